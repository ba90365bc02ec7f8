"""Triton kernels of ``diffgap::siglip_loss`` and ``diffgap::siglip_loss_backward``; the op module has the formulas.

A pair's gradient needs no more than its own logit, so one walk over the macro tiles gives the losses and, by two
products of the BLAS each, the gradients: three products in all. Nothing is atomic.
"""

# The arguments of kernels are Triton's to type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from diffgap.kernels._tiles import (
    LOG2E,
    SIZES,
    accumulate,
    add_to,
    blocks,
    float16_unit,
    macros,
    may_hold_positives,
    narrow_ids,
    padded,
    positives,
    store_gradient,
    tile_product,
)
from diffgap.kernels.configs import Tile, tile_for
from torch import Tensor


@triton.jit
def _log1p(x):
    """``log(1 + x)`` for x in [0, 1] to float32's precision, small x included, as ``2 artanh(x / (2 + x))``."""
    b_z = x / (2.0 + x)
    b_z2 = b_z * b_z  # at most 1/9: the series' next term is below 1e-8
    b_series = 1.0 / 15 * b_z2 + 1.0 / 13
    b_series = b_series * b_z2 + 1.0 / 11
    b_series = b_series * b_z2 + 1.0 / 9
    b_series = b_series * b_z2 + 1.0 / 7
    b_series = b_series * b_z2 + 1.0 / 5
    b_series = b_series * b_z2 + 1.0 / 3
    return 2.0 * b_z * (b_series * b_z2 + 1.0)


@triton.jit(do_not_specialize=SIZES)
def _pairs_kernel(
    p_a, p_b, p_scale, p_bias, p_ids_a, p_ids_b, p_grad_rows, p_rows, p_g, p_sums,
    N, M, D, offset, first_row, first_column, width, rows_pitch,
    HAS_POSITIVES: tl.constexpr, HAS_IDS: tl.constexpr, HAS_GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Losses of one tile's rows into ``rows`` (blocks of columns in a macro tile, N up to whole blocks); its G into the
    macro tile ``g`` (height, width) at (first_row, first_column), and the sums of ``G <a, b>`` and G into ``sums``
    (tiles, 2)."""
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    i_row, i_column = first_row + i_m * BLOCK_M, first_column + i_n * BLOCK_N
    o_m, o_n = i_row + tl.arange(0, BLOCK_M), i_column + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < N, o_n < M
    m_pairs = m_m[:, None] & m_n[None, :]
    o_x, o_y = tl.minimum(o_m, N - 1), tl.minimum(o_n, M - 1)
    b_similarity = tile_product(p_a, p_b, o_x, o_y, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, WIDEN)
    # y = -z S: the loss is log(1 + exp(y)), its derivative by y sigmoid(y).
    b_s = tl.load(p_scale) * b_similarity + tl.load(p_bias)
    b_y = b_s
    holds = may_hold_positives(i_row, i_column, offset, BLOCK_M, BLOCK_N, HAS_POSITIVES, HAS_IDS)
    if holds:
        b_y = tl.where(positives(p_ids_a, p_ids_b, o_m, o_n, N, M, offset, HAS_IDS), -b_y, b_y)
    b_exp = tl.exp2(-tl.abs(b_y) * LOG2E)  # at most 1, whatever the scale
    b_loss = tl.where(m_pairs, tl.maximum(b_y, 0.0, propagate_nan=tl.PropagateNan.ALL) + _log1p(b_exp), 0.0)
    add_to(p_rows + i_n.to(tl.int64) * rows_pitch + o_m, tl.sum(b_loss, 1))
    if HAS_GRADIENT:
        b_sigmoid = tl.where(b_y >= 0.0, 1.0, b_exp) / (1.0 + b_exp)
        b_grad = tl.load(p_grad_rows + o_m, mask=m_m, other=0.0)[:, None]  # [BLOCK_M, 1]
        b_g = b_grad * b_sigmoid
        # The sign of dy/dS, as a bit.
        b_sign = (b_y.to(tl.int32, bitcast=True) ^ b_s.to(tl.int32, bitcast=True)) & -0x80000000
        b_g = (b_g.to(tl.int32, bitcast=True) ^ b_sign).to(tl.float32, bitcast=True)
        b_g = tl.where(m_n[None, :], b_g, 0.0)  # beyond N the factor is 0
        o_g = (o_m - first_row).to(tl.int64)[:, None] * width + (o_n - first_column)[None, :]
        store_gradient(p_g + o_g, b_g, None, WIDEN)  # whole tiles: what is beyond N or M is not read
        p_sum = p_sums + 2 * (i_m * tl.num_programs(1) + i_n)
        add_to(p_sum, tl.sum(tl.sum(b_g * b_similarity, 1), 0))
        add_to(p_sum + 1, tl.sum(tl.sum(b_g, 1), 0))


def forward(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    ids_a: Tensor | None,
    ids_b: Tensor | None,
    label_offset: int | None,
    memory_budget: int | None,
    tile: Tile | None = None,
) -> Tensor:
    """``diffgap::siglip_loss``; ``tile`` for tests and compilation without a GPU."""
    tile = tile or tile_for(a)
    return _walk(tile, a, b, logit_scale, logit_bias, ids_a, ids_b, label_offset, memory_budget, None)[0]


def backward(
    grad_rows: Tensor,
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    ids_a: Tensor | None,
    ids_b: Tensor | None,
    label_offset: int | None,
    memory_budget: int | None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``diffgap::siglip_loss_backward``; ``tile`` for tests and compilation without a GPU."""
    tile = (tile or tile_for(a)).for_gradient()
    unit = float16_unit([grad_rows], 1.0) if a.dtype == torch.float16 and a.shape[0] > 0 else None
    grad_rows = grad_rows.contiguous() if unit is None else grad_rows * unit
    arguments = (a, b, logit_scale, logit_bias, ids_a, ids_b, label_offset, memory_budget)
    rows, grad_a, grad_b, sums = _walk(tile, *arguments, grad_rows)
    sums = sums if unit is None else sums / unit
    factor = logit_scale if unit is None else logit_scale / unit
    return rows, grad_a.mul_(factor), grad_b.mul_(factor), sums[0].clone(), sums[1].clone()


def _walk(
    tile: Tile,
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    ids_a: Tensor | None,
    ids_b: Tensor | None,
    label_offset: int | None,
    memory_budget: int | None,
    grad_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of the rows; with ``grad_rows`` also ``G b``, ``G^T a`` and the two sums of G, else empty."""
    a, b = a.contiguous(), b.contiguous()
    rows, columns = a.shape[0], b.shape[0]
    ids_a, ids_b = narrow_ids(ids_a, ids_b)
    with_gradient = grad_rows is not None
    grad_a, grad_b = (a.new_zeros(x.shape if with_gradient else (0,), dtype=torch.float32) for x in (a, b))
    if rows == 0 or columns == 0:
        return grad_a.new_zeros(rows), grad_a, grad_b, grad_a.new_zeros(2)
    height, width, all_macros = macros(rows, columns, tile, a.element_size(), memory_budget)
    g = a.new_empty((height, width) if with_gradient else (0, 0))
    losses = grad_a.new_zeros((width // tile.block_n, blocks(rows, tile.block_m) * tile.block_m))
    sums = grad_a.new_zeros((height // tile.block_m * (width // tile.block_n) if with_gradient else 0, 2))
    wide_a, wide_b = padded(a, tile), padded(b, tile)
    options = tile.options(a)
    with torch.cuda.device_of(a), torch.autocast(a.device.type, enabled=False):
        for macro in all_macros:
            _pairs_kernel[macro.grid(tile)](
                wide_a, wide_b, logit_scale, logit_bias, ids_a, ids_b, grad_rows, losses, g, sums,
                rows, columns, wide_a.shape[1], label_offset or 0, macro.rows.start, macro.columns.start, width,
                losses.shape[1],
                HAS_POSITIVES=ids_a is not None or label_offset is not None, HAS_IDS=ids_a is not None,
                HAS_GRADIENT=with_gradient, **options,
            )  # fmt: skip
            if with_gradient:
                part = g[: macro.rows.stop - macro.rows.start, : macro.columns.stop - macro.columns.start]
                accumulate(grad_a[macro.rows], part, b[macro.columns])
                accumulate(grad_b[macro.columns], part.T, a[macro.rows])
    return losses[:, :rows].sum(dim=0), grad_a, grad_b, sums.sum(dim=0)
