"""Which implementation an op takes, and how ops are registered with ``torch.library``.

Every op has one eager reference and at most one native kernel per device. :func:`choose` decides between them for
the inputs of one call; :func:`define` gives the op its ``torch.library`` schema, fake and default implementation, so
that a native kernel only has to register itself for its device.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

Backend = Literal["auto", "eager", "native"]
Route = Literal["eager", "native"]

_LIBRARY = torch.library.Library("diffgap", "FRAGMENT")


def _checked(name: str, source: str) -> str:
    if name not in get_args(Backend):
        raise ValueError(f"{source}: unknown backend {name!r}; use one of {', '.join(get_args(Backend))}")
    return name


# A plain global, because torch.compile guards on it and retraces when it changes; it holds for the whole process.
_mode: str = _checked(os.environ.get("DIFFGAP_BACKEND", "auto"), "DIFFGAP_BACKEND")


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Select the implementation of every op inside the ``with`` block, process-wide.

    ``auto`` takes the native kernel where the inputs qualify and the eager reference elsewhere, ``eager`` always the
    reference, ``native`` always the kernel, raising :class:`RuntimeError` where there is none. The environment
    variable ``DIFFGAP_BACKEND`` sets the default.

    Raises:
        ValueError: ``name`` is none of the three.
    """
    global _mode
    previous, _mode = _mode, _checked(name, "backend")
    try:
        yield
    finally:
        _mode = previous


def selected() -> str:
    """The backend in force, one of :data:`Backend`."""
    return _mode


@dataclass(frozen=True)
class Native:
    """A native kernel of one op on one device.

    Attributes:
        provider: What it is written in, e.g. ``"C++"``.
        dtypes: Dtypes it takes.
        missing: Why it cannot run on this machine, with the fix, or ``None`` if it can.
    """

    provider: str
    dtypes: tuple[torch.dtype, ...]
    missing: str | None = None


@dataclass(frozen=True)
class Choice:
    """One row of :func:`explain`: the backend an op takes for float32 inputs on a device, and why."""

    op: str
    device: str
    backend: Route
    reason: str


_ops: dict[str, dict[str, Native]] = {}


def transformed() -> bool:
    """Whether this runs inside ``torch.func.grad``, ``vmap`` or another of their kind."""
    return torch._C._are_functorch_transforms_active()


def readable(x: Tensor) -> bool:
    """Whether a check may look at the values of ``x``: on a GPU that would stall the host, and a trace has none."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()


def _obstacle(op: str, device: str, dtype: torch.dtype) -> str | None:
    """Why the native kernel of ``op`` cannot take inputs of this device and dtype; ``None`` if it can."""
    native = _ops[op].get(device)
    if native is None:
        return f"no native {device} kernel exists for it"
    if native.missing is not None:
        return native.missing
    if dtype not in native.dtypes:
        return f"its {native.provider} kernel does not take {dtype}"
    if forward_ad._current_level >= 0:
        return "kernels carry no tangents of forward-mode differentiation"
    if transformed():
        return "kernels have no rule for the transforms of torch.func, such as grad and vmap"
    return None


def choose(op: str, tensor: Tensor) -> Route:
    """The route one call of ``op`` takes, from the device and dtype of its leading tensor.

    Raises:
        RuntimeError: backend ``native`` was asked for and no kernel takes these inputs.
    """
    if _mode == "eager":
        return "eager"
    obstacle = _obstacle(op, tensor.device.type, tensor.dtype)
    if obstacle is None:
        return "native"
    if _mode == "native":
        raise RuntimeError(f"{op}: backend 'native' was asked for, but {obstacle}; use diffgap.backend('auto')")
    return "eager"


def prefers(op: str, tensor: Tensor) -> bool:
    """Whether to take a kernel of another library, for what has none here; never raises, as :func:`choose` may."""
    return _mode != "eager" and _obstacle(op, tensor.device.type, tensor.dtype) is None


def explain() -> list[Choice]:
    """The backend each op takes on this machine for float32 inputs, per device present, and the reason."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = []
    for op in sorted(_ops):
        for device in devices:
            obstacle = _obstacle(op, device, torch.float32)
            if _mode == "eager":
                rows.append(Choice(op, device, "eager", "backend 'eager' is set"))
            elif obstacle is None:
                rows.append(Choice(op, device, "native", f"{_ops[op][device].provider} kernel"))
            else:
                rows.append(Choice(op, device, "eager", obstacle))
    return rows


def declare(op: str, **natives: Native) -> None:
    """Make ``op`` known to :func:`choose` and :func:`explain`; ``natives`` maps a device type to its kernel."""
    _ops[op] = dict(natives)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast computes in on the device of ``x``, or ``None`` where it is off."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def autocast_off(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, autocast rounds nothing on the device of ``x``, of whichever kind that is."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, with a view in place of each that occurs earlier in the list.

    ``torch.compile`` refuses an ``autograd.Function`` that is given one tensor twice, as self-attention's ``q is k``.
    """
    result: list[Tensor | None] = []
    for tensor in tensors:
        repeated = tensor is not None and any(tensor is other for other in result)
        result.append(tensor.view_as(tensor) if tensor is not None and repeated else tensor)
    return result


class _Refuse(torch.autograd.Function):
    """The first ``count`` of the tensors, of which a derivative by any of the tensors is an error."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "diffgap: kernels, and losses across ranks, have no second derivative; under diffgap.backend('eager') "
            "the ops have one"
        )


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the ``backward`` of an ``autograd.Function`` that gives no second derivatives, so that they raise.

    torch's ``once_differentiable`` lets a gradient pass for a constant where the one that comes in needs no gradient
    itself, as a loss's own, or where ``torch.autograd.grad`` is told by what to differentiate: a penalty on the
    gradient would silently do nothing.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.compiler.is_compiling():  # which has an error of its own
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        results = results if isinstance(results, tuple) else (results,)
        found = [x for x in results if x is not None]
        causes = [x for x in (*grads, *ctx.saved_tensors) if x is not None]
        refusing = iter(_Refuse.apply(len(found), *found, *causes))
        return tuple(None if x is None else next(refusing) for x in results)

    return wrapper


def is_finite(value: float) -> bool:
    """As ``math.isfinite``, which ``torch.compile`` cannot trace once a number has changed between two calls."""
    return -math.inf < value < math.inf


def check_devices(op: str, *arguments: Any) -> None:
    """Raise RuntimeError unless all tensors among the arguments are on one device; for fakes, which look no further."""
    devices = {str(x.device) for x in arguments if isinstance(x, Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"{op}: tensors are on {' and '.join(sorted(devices))}; move them to one device")


def define(schema: str, default: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register ``diffgap::<schema>`` with a default implementation for every device, and return its overload.

    ``default`` runs wherever no kernel is registered for the device. ``fake`` computes shapes and dtypes for
    ``torch.compile`` and meta tensors.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, default, "CompositeExplicitAutograd")
    torch.library.register_fake(f"diffgap::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.diffgap, name).default


def implement(native: Native, module: str, **functions: str) -> None:
    """Run functions of ``module`` as the CUDA implementations of registered ops, ``op="function"``, if ``native`` can.

    The module is imported at the first call, because importing triton takes long.
    """

    def bind(function: str) -> Callable[..., Any]:
        return lambda *args: getattr(import_module(module), function)(*args)

    if native.missing is None:
        for op, function in functions.items():
            _LIBRARY.impl(op, bind(function), "CUDA")


def vjp(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Any],
    grad_outputs: Sequence[Tensor],
) -> list[Tensor]:
    """Vector-Jacobian product of ``function`` at ``inputs``, recomputing the forward pass.

    The default implementation of every backward op. Returns one tensor per input: its gradient, contiguous and sharing
    memory with nothing, or an empty tensor of shape (0,) for an input that is not a floating-point tensor.
    """
    # A kernel called from a TorchDispatchMode (opcheck, profilers, FakeTensorMode) runs with autograd excluded.
    autograd_recorded = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with autograd_recorded, torch.enable_grad():
        leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        grads = torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True, materialize_grads=True)
    remaining = iter(grads)
    return [
        next(remaining).clone(memory_format=torch.contiguous_format)
        if isinstance(x, Tensor) and x.requires_grad
        else grad_outputs[0].new_empty(0)
        for x in leaves
    ]
