"""What a solver step takes and gives, and the checks of it; :mod:`diffgap.ops.solver_step` explains them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffgap.ops._dispatch import is_finite, readable
from diffgap.ops.random import check_index, check_seed

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

Out = tuple[Tensor, "Tensor | None", "Tensor | None"]
"""Where to write the next sample, x0 and the corrected sample; None: nowhere."""


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


def _check_tensors(sample: Tensor, others: dict[str, Tensor | None]) -> None:
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
    elif not isinstance(step, int):
        raise TypeError(f"step: expected an int or an int64 tensor, got {type(step).__name__}")
    elif not 0 <= step < table.shape[0]:
        raise ValueError(f"step: must lie in [0, {table.shape[0]}), the rows of the table; got {step}")


def _check_terms(table: Tensor, step: int | Tensor, given: Sequence[bool]) -> None:
    """Refuse a row that needs a tensor that was not given, where the table may be read."""
    if all(given) or not readable(table):
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
    guidance_rescale: float,
    x0_clamp: float | None,
    x0_norm: float | None,
) -> None:
    if not is_finite(guidance_scale):
        raise ValueError(f"guidance_scale: must be finite, got {guidance_scale}")
    if not 0.0 <= guidance_rescale <= 1.0:
        raise ValueError(f"guidance_rescale: must lie in [0, 1], got {guidance_rescale}")
    if guidance_rescale > 0.0 and guided and math.prod(sample.shape[1:]) < 2:
        raise ValueError("guidance_rescale: a standard deviation needs more than one element per sample")
    if x0_clamp is not None and x0_norm is not None:
        raise ValueError("x0_norm: x0 can be clamped or put on a sphere, not both; drop x0_clamp or x0_norm")
    for name, value in (("x0_clamp", x0_clamp), ("x0_norm", x0_norm)):
        if value is not None and not (is_finite(value) and value > 0.0):
            raise ValueError(f"{name}: must be positive and finite, got {value}")
    if x0_norm is not None and sample.dim() < 2:
        raise ValueError(f"x0_norm: needs a sample of two dimensions or more, got {tuple(sample.shape)}")


def check_arguments(
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
) -> None:
    """Raise one error that names the first bad argument; the kernels refuse the same, without the explanation."""
    others = {"output": output, "unconditional": unconditional, "last_sample": last_sample}
    _check_tensors(sample, others | {f"history[{j}]": tensor for j, tensor in enumerate((h1, h2, h3))})
    row = step if steps is None else steps
    _check_table(sample, table, row)
    _check_options(sample, unconditional is not None, guidance_scale, guidance_rescale, x0_clamp, x0_norm)
    if seed is not None:
        check_seed(seed, sample.shape[0], sample.device)
    _check_terms(table, row, [tensor is not None for tensor in (last_sample, h1, h2, h3, seed)])


def _overlap(x: Tensor, y: Tensor) -> bool:
    begin, other = x.data_ptr(), y.data_ptr()
    return begin < other + y.numel() * y.element_size() and other < begin + x.numel() * x.element_size()


def check_out(out: Out, *arguments: Any) -> None:
    """Raise one error unless results can go to ``out``: to memory of their own, or to all that an argument has."""
    sample, output, _, _, _, unconditional, _, _, _, last_sample, *history = arguments[:13]
    if len(out) != 3 or out[0] is None:
        raise ValueError("out: expected (sample, x0, corrected), of which the latter two may be None")
    if out[2] is not None and last_sample is None:
        raise ValueError("out: a tensor for corrected is given, but no last_sample; pass None for it")
    results = [(name, x) for name, x in zip(StepOutput._fields, out, strict=True) if x is not None]
    for name, result in results:
        if result.shape != sample.shape or result.dtype != sample.dtype or result.device != sample.device:
            wanted = f"{sample.dtype} {tuple(sample.shape)} on {sample.device}"
            got = f"{result.dtype} {tuple(result.shape)} on {result.device}"
            raise ValueError(f"out: {name} must be as the sample, {wanted}; got {got}")
        if not result.is_contiguous():
            raise ValueError(f"out: {name} must be contiguous, got strides {result.stride()}")
        if torch.compiler.is_compiling() or sample.device.type == "meta":
            continue
        if any(_overlap(result, other) for other_name, other in results if other_name != name):
            raise ValueError(f"out: {name} shares memory with another result; give each its own")
        for term in (sample, output, unconditional, last_sample, *history):
            if (
                term is not None
                and term.is_contiguous()
                and result.data_ptr() != term.data_ptr()
                and _overlap(result, term)
            ):
                raise ValueError(f"out: {name} shares a part of its memory with an argument; give it all or none of it")
