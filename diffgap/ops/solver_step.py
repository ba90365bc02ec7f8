"""One step of any diffusion solver, as one row of a coefficient table.

DDPM, DDIM, DPM-Solver++ and its SDE form, UniPC and Euler flow all advance by a linear combination of the
same few tensors; :data:`COLUMNS` names the coefficients. With ``c = table[step]`` and ``h1`` the newest of the
earlier ``x0``:

    output    = unconditional + g * (conditional - unconditional)      guidance_form "standard"
                conditional + g * (conditional - unconditional)        guidance_form "offset"
    output    = phi * output * std(conditional) / std(output) + (1 - phi) * output
    x0        = c.x0_sample * sample + c.x0_output * output            then clamped, or put on a sphere
    corrected = c.corr_sample * sample + c.corr_last * last_sample + c.corr_x0 * x0 + sum_j c.corr_hj * hj
    next      = c.pred_corrected * corrected + c.pred_sample * sample + c.pred_output * output
                + c.pred_x0 * x0 + sum_j c.pred_hj * hj + c.pred_noise * noise

``g`` is the guidance scale (arXiv 2207.12598), ``phi`` the guidance rescale (arXiv 2305.08891, section 3.4).
``corrected`` differs from ``sample`` for predictor-corrector solvers (UniPC) alone and is skipped without
``last_sample``. ``noise = normal(seed, ..., step)`` on the solver's own stream (:mod:`diffgap.ops.random`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from diffgap.ops import _dispatch
from diffgap.ops._native import CPU_MISSING
from diffgap.ops.random import STREAM_SOLVER, check_index, check_seed, normal_reference

#: Columns of a solver table, in order.
COLUMNS = (
    "x0_sample",
    "x0_output",
    "corr_sample",
    "corr_last",
    "corr_x0",
    "corr_h1",
    "corr_h2",
    "corr_h3",
    "pred_corrected",
    "pred_sample",
    "pred_output",
    "pred_x0",
    "pred_h1",
    "pred_h2",
    "pred_h3",
    "pred_noise",
)

#: Earlier ``x0`` predictions a table can use.
MAX_HISTORY = 3

GuidanceForm = Literal["standard", "offset"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class StepOutput(NamedTuple):
    """What one solver step gives; every tensor has the sample's shape and dtype.

    Attributes:
        sample: The sample at the next timestep.
        x0: The prediction of the clean sample, clamped or renormalised: the next step's ``history[0]``.
        corrected: The corrected sample: the next step's ``last_sample``. Without corrector ``sample`` itself.
    """

    sample: Tensor
    x0: Tensor
    corrected: Tensor


def _guide(conditional: Tensor, unconditional: Tensor, scale: float, offset_form: bool, rescale: float) -> Tensor:
    base = conditional if offset_form else unconditional
    output = base + scale * (conditional - unconditional)
    if rescale == 0.0 or output.numel() == 0:
        return output
    dims = tuple(range(1, output.dim()))
    wanted, got = conditional.std(dims, keepdim=True), output.std(dims, keepdim=True)
    ratio = torch.where(got > 0, wanted / torch.where(got > 0, got, 1.0), 1.0)
    return output * (rescale * ratio + (1.0 - rescale))


def _constrain(x0: Tensor, clamp: float | None, norm: float | None) -> Tensor:
    if clamp is not None:
        return x0.clamp(-clamp, clamp)
    if norm is not None:
        length = torch.linalg.vector_norm(x0, dim=-1, keepdim=True)
        return x0 * torch.where(length > 0, norm / torch.where(length > 0, length, 1.0), 1.0)
    return x0


def solver_step_reference(
    sample: Tensor,
    output: Tensor,
    table: Tensor,
    steps: Tensor | None,
    step: int,
    unconditional: Tensor | None,
    guidance_scale: float,
    offset_form: bool,
    guidance_rescale: float,
    last_sample: Tensor | None,
    h1: Tensor | None,
    h2: Tensor | None,
    h3: Tensor | None,
    seed: Tensor | None,
    x0_clamp: float | None,
    x0_norm: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Eager definition of :func:`solver_step`: ``(next, x0, corrected)``; float32 inside for lower dtypes.

    ``steps`` (B,) takes precedence over ``step``. A term whose tensor is None is left out; ``corrected`` is
    None without ``last_sample``.
    """
    dtype = torch.promote_types(sample.dtype, torch.float32)
    rows = table[step][None] if steps is None else table[steps]
    columns = rows.to(dtype).reshape(-1, len(COLUMNS), *(1,) * (sample.dim() - 1)).unbind(1)
    c = dict(zip(COLUMNS, columns, strict=True))

    current, conditional = sample.to(dtype), output.to(dtype)
    history = [(j, tensor.to(dtype)) for j, tensor in enumerate((h1, h2, h3), 1) if tensor is not None]
    guided = conditional
    if unconditional is not None:
        free = unconditional.to(dtype)
        guided = _guide(conditional, free, guidance_scale, offset_form, guidance_rescale)
    x0 = _constrain(c["x0_sample"] * current + c["x0_output"] * guided, x0_clamp, x0_norm)
    corrected = current
    if last_sample is not None:
        corrected = c["corr_sample"] * current + c["corr_last"] * last_sample.to(dtype) + c["corr_x0"] * x0
        for j, earlier in history:
            corrected = corrected + c[f"corr_h{j}"] * earlier
    following = c["pred_corrected"] * corrected + c["pred_sample"] * current
    following = following + c["pred_output"] * guided + c["pred_x0"] * x0
    for j, earlier in history:
        following = following + c[f"pred_h{j}"] * earlier
    if seed is not None:
        noise = normal_reference(seed, math.prod(sample.shape[1:]), steps, step, STREAM_SOLVER)
        following = following + c["pred_noise"] * noise.reshape(sample.shape).to(dtype)
    kept = None if last_sample is None else corrected.to(sample.dtype)
    return following.to(sample.dtype), x0.to(sample.dtype), kept


def _solver_step_default(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    following, x0, corrected = solver_step_reference(*arguments)
    corrected = following.new_empty(0) if corrected is None else corrected.contiguous()
    return following.contiguous(), x0.contiguous(), corrected


def _solver_step_fake(
    sample: Tensor,
    output: Tensor,
    table: Tensor,
    steps: Tensor | None,
    step: int,
    unconditional: Tensor | None,
    guidance_scale: float,
    offset_form: bool,
    guidance_rescale: float,
    last_sample: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    corrected = sample.new_empty(0 if last_sample is None else sample.shape)
    return sample.new_empty(sample.shape), sample.new_empty(sample.shape), corrected


_solver_step = _dispatch.define(
    "solver_step(Tensor sample, Tensor output, Tensor table, Tensor? steps, int step, Tensor? unconditional,"
    " float guidance_scale, bool offset_form, float guidance_rescale, Tensor? last_sample,"
    " Tensor? h1, Tensor? h2, Tensor? h3, Tensor? seed, float? x0_clamp, float? x0_norm)"
    " -> (Tensor, Tensor, Tensor)",
    _solver_step_default,
    _solver_step_fake,
)
_dispatch.declare("solver_step", cpu=_dispatch.Native("C++", _DTYPES, CPU_MISSING))


def _check_tensors(sample: Tensor, others: dict[str, Tensor | None]) -> None:
    if not sample.is_floating_point():
        raise TypeError(f"sample: expected a floating-point tensor, got {sample.dtype}")
    if sample.dim() < 1:
        raise ValueError("sample: expected shape (B, ...), got a scalar")
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.shape != sample.shape:
            shapes = f"{tuple(sample.shape)}, got {tuple(tensor.shape)}"
            raise ValueError(f"{name}: expected the sample's shape {shapes}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.device != sample.device:
            raise ValueError(f"{name}: is on {tensor.device}, sample on {sample.device}; move it with .to()")


def _check_table(sample: Tensor, table: Tensor, step: int | Tensor) -> None:
    if not isinstance(table, Tensor) or not table.is_floating_point() or table.shape[1:] != (len(COLUMNS),):
        got = f"{table.dtype} {tuple(table.shape)}" if isinstance(table, Tensor) else type(table).__name__
        raise ValueError(f"table: expected floating-point (S, {len(COLUMNS)}), columns COLUMNS, got {got}")
    if table.device != sample.device:
        raise ValueError(f"table: is on {table.device}, sample on {sample.device}; move it with .to()")
    if isinstance(step, Tensor):
        check_index("step", step, sample.shape[0], sample.device, table.shape[0])
    elif not 0 <= step < table.shape[0]:
        raise ValueError(f"step: must lie in [0, {table.shape[0]}), the rows of the table; got {step}")


def _check_terms(table: Tensor, step: int | Tensor, given: Sequence[bool]) -> None:
    """Refuse a row that needs a tensor that was not given; on the CPU only, where looking costs no stall."""
    if table.device.type != "cpu" or torch.compiler.is_compiling() or all(given):
        return
    rows = table[step]
    used = dict(zip(COLUMNS, (rows if rows.dim() == 1 else rows.abs().sum(0)).tolist(), strict=True))
    last, h1, h2, h3, seed = given
    for name, present, columns in (
        ("last_sample", last, ("corr_last",)),
        ("history", h1, ("corr_h1", "pred_h1")),
        ("history", h2, ("corr_h2", "pred_h2")),
        ("history", h3, ("corr_h3", "pred_h3")),
        ("seed", seed, ("pred_noise",)),
    ):
        if not present and any(used[column] != 0.0 for column in columns):
            needed = " or ".join(columns)
            raise ValueError(f"{name}: not given, but the table's row has a non-zero {needed}; pass it")


def _check_options(
    sample: Tensor,
    guided: bool,
    guidance_scale: float,
    guidance_form: str,
    guidance_rescale: float,
    x0_clamp: float | None,
    x0_norm: float | None,
) -> None:
    if guidance_form not in get_args(GuidanceForm):
        raise ValueError(f"guidance_form: unknown {guidance_form!r}; use 'standard' or 'offset'")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale: must be finite, got {guidance_scale}")
    if not 0.0 <= guidance_rescale <= 1.0:
        raise ValueError(f"guidance_rescale: must lie in [0, 1], got {guidance_rescale}")
    if guidance_rescale > 0.0 and guided and math.prod(sample.shape[1:]) < 2:
        raise ValueError("guidance_rescale: a standard deviation needs more than one element per sample")
    if x0_clamp is not None and x0_norm is not None:
        raise ValueError("x0_norm: x0 can be clamped or put on a sphere, not both; drop x0_clamp or x0_norm")
    for name, value in (("x0_clamp", x0_clamp), ("x0_norm", x0_norm)):
        if value is not None and not (math.isfinite(value) and value > 0.0):
            raise ValueError(f"{name}: must be positive and finite, got {value}")
    if x0_norm is not None and sample.dim() < 2:
        raise ValueError(f"x0_norm: needs a sample of two dimensions or more, got {tuple(sample.shape)}")


def solver_step(
    sample: Tensor,
    output: Tensor,
    table: Tensor,
    step: int | Tensor,
    *,
    unconditional: Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance_form: GuidanceForm = "standard",
    guidance_rescale: float = 0.0,
    last_sample: Tensor | None = None,
    history: Sequence[Tensor] = (),
    seed: Tensor | None = None,
    x0_clamp: float | None = None,
    x0_norm: float | None = None,
) -> StepOutput:
    """Advance ``sample`` by row ``step`` of a solver's coefficient table; the formula heads this module.

    Args:
        sample: (B, ...) at the current timestep; float64, float32, float16 or bfloat16, any strides. Lower
            dtypes are combined in float32.
        output: The denoiser's conditional output, of the sample's shape. This and all tensors below may be of
            another floating-point dtype; they are converted to the sample's.
        table: (S, 16) floating point (float64 as solvers build it), columns :data:`COLUMNS`.
        step: The row, an int, or int64 (B,) for a row of each sample's own. It is the noise counter as well.
        unconditional: The denoiser's unconditional output; turns classifier-free guidance on.
        guidance_scale: ``g`` of the formula; like the next two, without effect unless guidance is on.
        guidance_form: Which of the two formulations.
        guidance_rescale: ``phi`` in [0, 1].
        last_sample: The previous step's ``corrected``; turns the corrector on.
        history: Up to three earlier ``x0`` predictions, newest first.
        seed: (B,) int64, each sample's own seed; needed where the table draws noise.
        x0_clamp: Clamp ``x0`` to [-x0_clamp, x0_clamp].
        x0_norm: Scale each row (last dimension) of ``x0`` to this Euclidean norm; zero rows stay zero.

    Returns:
        :class:`StepOutput`.

    Raises:
        TypeError: An argument has the wrong dtype.
        ValueError: A wrong shape, device or option; a ``step`` outside the table; or (checked on the CPU) a row
            that needs ``last_sample``, ``history`` or ``seed`` where none was given.
        RuntimeError: Backend "native" was asked for and there is no kernel for these inputs. Kernels have no
            backward pass, so inputs that require gradients take the eager reference.
    """
    if len(history) > MAX_HISTORY:
        raise ValueError(f"history: at most {MAX_HISTORY} earlier predictions are used, got {len(history)}")
    h1, h2, h3 = (*history, None, None, None)[:MAX_HISTORY]
    tensors = {
        "output": output,
        "unconditional": unconditional,
        "last_sample": last_sample,
        "history[0]": h1,
        "history[1]": h2,
        "history[2]": h3,
    }
    _check_tensors(sample, tensors)
    _check_table(sample, table, step)
    _check_options(
        sample, unconditional is not None, guidance_scale, guidance_form, guidance_rescale, x0_clamp, x0_norm
    )
    if seed is not None:
        check_seed(seed, sample.shape[0], sample.device)
    _check_terms(table, step, [tensor is not None for tensor in (last_sample, h1, h2, h3, seed)])
    unconditional, last_sample, h1, h2, h3 = (
        None if tensor is None else tensor.to(sample.dtype) for tensor in (unconditional, last_sample, h1, h2, h3)
    )
    following, x0, corrected = _route(sample, tensors)(
        sample,
        output.to(sample.dtype),
        table,
        step if isinstance(step, Tensor) else None,
        0 if isinstance(step, Tensor) else step,
        unconditional,
        guidance_scale,
        guidance_form == "offset",
        guidance_rescale,
        last_sample,
        h1,
        h2,
        h3,
        seed,
        x0_clamp,
        x0_norm,
    )
    return StepOutput(following, x0, sample if last_sample is None else corrected)


def _route(sample: Tensor, tensors: dict[str, Tensor | None]) -> Callable[..., Any]:
    """The registered op or the reference; the latter also where gradients are wanted, which only it gives."""
    native = _dispatch.choose("solver_step", sample) == "native"
    learned = [x for x in (sample, *tensors.values()) if x is not None and x.requires_grad]
    if not (native and learned and torch.is_grad_enabled()):
        return _solver_step if native else solver_step_reference
    if _dispatch._mode == "native":
        raise RuntimeError("solver_step: no native kernel has a backward pass; use no_grad() or backend 'auto'")
    return solver_step_reference
