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
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal, cast, get_args, overload

import torch
from torch import Tensor

from diffgap.ops import _dispatch
from diffgap.ops._native import CPU_MISSING, CUDA_MISSING
from diffgap.ops._step_arguments import COLUMNS, MAX_HISTORY, Out, StepOutput, check_arguments, check_out
from diffgap.ops.random import STREAM_SOLVER, normal_reference

__all__ = ["COLUMNS", "MAX_HISTORY", "GuidanceForm", "Out", "StepOutput", "solver_step", "solver_step_reference"]

GuidanceForm = Literal["standard", "offset"]
_FORMS = get_args(GuidanceForm)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    check_arguments(*arguments)
    following, x0, corrected = solver_step_reference(*arguments)
    corrected = following.new_empty(0) if corrected is None else corrected.contiguous()
    return following.contiguous(), x0.contiguous(), corrected


def _solver_step_fake(sample: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _dispatch.check_devices("solver_step", sample, *arguments)
    last_sample = arguments[8]
    corrected = sample.new_empty(0 if last_sample is None else sample.shape)
    return sample.new_empty(sample.shape), sample.new_empty(sample.shape), corrected


def _solver_step_out_default(*arguments: Any) -> None:
    inputs, outs = arguments[:-3], arguments[-3:]
    check_arguments(*inputs)
    check_out(outs, *inputs)
    for out, result in zip(outs, solver_step_reference(*inputs), strict=True):
        if out is not None and result is not None:
            out.copy_(result)


def _solver_step_out_fake(*arguments: Any) -> None:
    _dispatch.check_devices("solver_step_out", *arguments)


_ARGUMENTS = (
    "Tensor sample, Tensor output, Tensor table, Tensor? steps, int step, Tensor? unconditional,"
    " float guidance_scale, bool offset_form, float guidance_rescale, Tensor? last_sample,"
    " Tensor? h1, Tensor? h2, Tensor? h3, Tensor? seed, float? x0_clamp, float? x0_norm"
)
_solver_step = _dispatch.define(
    f"solver_step({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _solver_step_default, _solver_step_fake
)
_solver_step_out = _dispatch.define(
    f"solver_step_out({_ARGUMENTS}, Tensor(a!) next, Tensor(b!)? x0, Tensor(c!)? corrected) -> ()",
    _solver_step_out_default,
    _solver_step_out_fake,
)
_dispatch.declare(
    "solver_step",
    cpu=_dispatch.Native("C++", _DTYPES, CPU_MISSING),
    cuda=_dispatch.Native("CUDA C++", _DTYPES, CUDA_MISSING),
)


@overload
def solver_step(
    sample: Tensor,
    output: Tensor,
    table: Tensor,
    step: int | Tensor,
    *,
    unconditional: Tensor | None = ...,
    guidance_scale: float = ...,
    guidance_form: GuidanceForm = ...,
    guidance_rescale: float = ...,
    last_sample: Tensor | None = ...,
    history: Sequence[Tensor] = ...,
    seed: Tensor | None = ...,
    x0_clamp: float | None = ...,
    x0_norm: float | None = ...,
    out: None = ...,
) -> StepOutput: ...
@overload
def solver_step(
    sample: Tensor,
    output: Tensor,
    table: Tensor,
    step: int | Tensor,
    *,
    unconditional: Tensor | None = ...,
    guidance_scale: float = ...,
    guidance_form: GuidanceForm = ...,
    guidance_rescale: float = ...,
    last_sample: Tensor | None = ...,
    history: Sequence[Tensor] = ...,
    seed: Tensor | None = ...,
    x0_clamp: float | None = ...,
    x0_norm: float | None = ...,
    out: Out,
) -> Out: ...
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
    out: Out | None = None,
) -> StepOutput | Out:
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
        out: Contiguous tensors of the sample's shape and dtype for ``(sample, x0, corrected)``, the latter two None
            where not wanted. They may be arguments: ``(sample, history[-1], last_sample)`` steps in place.

    Returns:
        :class:`StepOutput`, or ``out``.

    Raises:
        TypeError: An argument has the wrong dtype.
        ValueError: A wrong shape, device or option; or, checked on the CPU, a ``step`` outside the table (on a GPU it
            makes the sample NaN) or a row that needs ``last_sample``, ``history`` or ``seed`` where none was given.
        RuntimeError: Backend "native" was asked for and there is no kernel for these inputs. Kernels have no
            backward pass, so inputs that require gradients, the table among them, take the eager reference.
    """
    if len(history) > MAX_HISTORY:
        raise ValueError(f"history: at most {MAX_HISTORY} earlier predictions are used, got {len(history)}")
    if guidance_form not in _FORMS:
        raise ValueError(f"guidance_form: unknown {guidance_form!r}; use 'standard' or 'offset'")
    if not sample.is_floating_point():
        raise TypeError(f"sample: expected a floating-point tensor, got {sample.dtype}")
    h1, h2, h3 = (*history, None, None, None)[:MAX_HISTORY]
    steps, row = (step, 0) if isinstance(step, Tensor) else (None, step)
    offset_form = guidance_form == "offset"
    terms = (sample, output, unconditional, last_sample, h1, h2, h3)
    # Of results too: what autograd has recorded for them would no longer be true.
    learned = _differentiates((*terms, table, guidance_scale, *(() if out is None else out)))
    native = _dispatch.choose("solver_step", sample) == "native" and not learned
    arguments: Any = (sample, output, table, steps, row, unconditional, guidance_scale, offset_form, guidance_rescale)
    arguments += (last_sample, h1, h2, h3, seed, x0_clamp, x0_norm)
    if native and not torch.compiler.is_compiling():
        # Looking at every argument here would cost more than a small step. The kernels refuse what they cannot take
        # before they begin; only then is it worth finding out what is wrong, or what has to be converted.
        with suppress(RuntimeError, TypeError):
            return _run(arguments, out, native=True)
    check_arguments(*arguments)
    if out is not None:
        check_out(out, *arguments)
        if learned:
            raise ValueError("out: gradients are not recorded through it; use no_grad(), or leave it None")
    arguments = tuple(x.to(sample.dtype) if i in _TERMS and x is not None else x for i, x in enumerate(arguments))
    return _run(arguments, out, native=native)


#: Positions among the op's arguments of the tensors that must have the sample's dtype.
_TERMS = (1, 5, 9, 10, 11, 12)


def _run(arguments: tuple[Any, ...], out: Out | None, *, native: bool) -> StepOutput | Out:
    if out is not None:
        (_solver_step_out if native else _solver_step_out_default)(*arguments, *out)
        # Nothing else tells autograd, which may have saved what was overwritten.
        torch.autograd.graph.increment_version([x for x in out if x is not None])
        return out
    following, x0, corrected = (_solver_step if native else solver_step_reference)(*arguments)
    return StepOutput(following, x0, cast(Tensor, corrected) if arguments[9] is not None else arguments[0])


def _differentiates(arguments: Sequence[Any]) -> bool:
    """Whether gradients are wanted, which only the reference gives."""
    learned = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
    if learned and _dispatch.selected() == "native":
        raise RuntimeError("solver_step: no native kernel has a backward pass; use no_grad() or backend 'auto'")
    return learned
