"""What a benchmark case is, and how it becomes functions to time.

A case names an operation and builds its inputs. The frame derives three implementations from the one call
(native, eager, compiled eager) and the float64 oracle; the case adds the peers, and says where an oracle or an
implementation cannot be had.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from diffgap.ops._dispatch import Backend, backend

Inputs = dict[str, Any]
Outputs = tuple[Tensor, ...]
Run = Callable[[], Outputs]
#: A forward pass alone, or with a backward pass.
Direction = Literal["fwd", "fwd+bwd"]
DIRECTIONS: tuple[Direction, ...] = ("fwd", "fwd+bwd")
#: Dtypes by their name in a case's.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Why outputs are wrong, or ``None`` if they are right.
Gate = Callable[[Outputs], str | None]


@dataclass(frozen=True)
class Peer:
    """Another package's way to do what a case does.

    Attributes:
        name: Its name in the tables: the package's, or one that begins with "torch" for what one would write
            without any.
        prepare: Given the case's inputs (keyword arguments), the function to time. It may return the first
            of the case's outputs only, unless the case has gradients or the peer a gate.
        install: What ``pip install`` takes.
        draws: The case's oracle for a peer with random numbers of its own, given the inputs in float64 (and
            ``draw_dtype``, the case's dtype), right after ``torch.manual_seed(0)``. ``None``: the case's own.
        module: What must be importable; ``None``: the name.
        devices: Where it runs; on others it is left out.
        gate: Given the inputs, judges a peer that answers the case's question in another form.
    """

    name: str
    prepare: Callable[..., Run]
    install: str
    draws: Callable[..., Outputs] | None = None
    module: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    gate: Callable[..., Gate] | None = None

    @property
    def missing(self) -> bool:
        return find_spec(self.module or self.name) is None


def everything_feasible(device: torch.device) -> Mapping[str, str]:
    """No implementation is out of reach."""
    return {}


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
        name: ``op/pass/shape/dtype``.
        dtype: Of the large inputs.
        inputs: Builds the keyword arguments of ``call`` on a device, always the same values. Tensors that
            require a gradient are differentiated: their gradients are further outputs of all implementations.
        call: The public operation.
        peers: Whom to compare with.
        flops: Operations of the matrix products the result needs at least, for the floor.
        expected: The outputs in float64, where the eager reference in float64 takes too long; ``None``: by that.
        gate: Given the inputs, judges the outputs where closeness to an oracle does not: indices, ranks.
        infeasible: On a device, the implementations that must not run, and why; the tables show it.
    """

    name: str
    dtype: torch.dtype
    inputs: Callable[[torch.device], Inputs]
    call: Callable[..., Outputs]
    peers: tuple[Peer, ...] = ()
    flops: float = 0.0
    expected: Callable[[torch.device], Outputs] | None = None
    gate: Callable[..., Gate] | None = None
    infeasible: Callable[[torch.device], Mapping[str, str]] = everything_feasible

    def on(self, device: torch.device) -> Case:
        """The case with the peers that run on ``device``."""
        return replace(self, peers=tuple(peer for peer in self.peers if device.type in peer.devices))


def implementations(case: Case, inputs: Inputs, without: Container[str] = ()) -> dict[str, Run]:
    """The functions to time by name: the public call, its eager form, that compiled, and the peers."""
    compiled = torch.compile(case.call, fullgraph=True, dynamic=False)
    forward: dict[str, Run] = {
        "diffgap": lambda: case.call(**inputs),
        "eager": under("eager", lambda: case.call(**inputs)),
        "compile": under("eager", lambda: compiled(**inputs)),
    }
    present = [peer for peer in case.peers if not peer.missing and peer.name not in without]
    forward |= {peer.name: _prepared(peer, inputs) for peer in present}
    return {name: differentiated(run, inputs) for name, run in forward.items() if name not in without}


def _prepared(peer: Peer, inputs: Inputs) -> Run:
    """The peer's function; what its preparation raises is raised by its calls, and so is a failure of it alone."""
    try:
        return peer.prepare(**inputs)
    except Exception as error:
        raised = error

    def fails() -> Outputs:
        raise raised

    return fails


def oracle(case: Case, inputs: Inputs) -> Outputs:
    """What the case returns for its inputs in float64, by the eager reference unless it has another source."""
    if case.expected is not None:
        return case.expected(next(tensors(inputs)).device)
    exact = in_float64(inputs)
    return differentiated(under("eager", lambda: case.call(**exact)), exact)()


def peer_oracle(case: Case, peer: Peer, inputs: Inputs) -> Outputs | None:
    """The oracle of a peer's next call, which must follow; ``None`` if it is the case's."""
    if peer.draws is None:
        return None
    torch.manual_seed(0)
    expected = peer.draws(**in_float64(inputs), draw_dtype=case.dtype)
    torch.manual_seed(0)
    return expected


def differentiated(run: Run, inputs: Inputs, first: int = 0) -> Run:
    """``run`` and the backward pass into the inputs that require a gradient; ``run`` itself if none does.

    Where ``run`` computes a slice of a case's output, ``first`` is the place of its first element in that.
    """
    leaves = [x for x in tensors(inputs) if x.requires_grad]
    if not leaves:
        return run
    cotangents: list[Tensor] = []

    def forward_and_backward() -> Outputs:
        outputs = tuple(x for x in run() if x.requires_grad)
        if not cotangents:
            cotangents.extend(_cotangent(x, first) for x in outputs)
        return (*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, cotangents))

    return forward_and_backward


def in_float64(inputs: Inputs) -> Inputs:
    """The inputs with every floating-point tensor in float64; leaves stay leaves."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return tuple(convert(item) for item in value) if isinstance(value, tuple) else value

    return {name: convert(value) for name, value in inputs.items()}


def tensors(inputs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Every tensor among the inputs, those in tuples included."""
    for value in inputs.values():
        items = value if isinstance(value, tuple) else (value,)
        yield from (item for item in items if isinstance(item, Tensor))


def under(name: Backend, run: Run) -> Run:
    """``run`` by a backend."""

    def selected() -> Outputs:
        with backend(name):
            return run()

    return selected


def _cotangent(output: Tensor, first: int) -> Tensor:
    """A gradient of ``output`` that varies, of eighths that every dtype holds exactly; 1/2 for a scalar."""
    eighths = torch.arange(first, first + output.numel(), device=output.device) % 7 + 4
    return (eighths / 8).to(output.dtype).reshape(output.shape)
