"""Triton kernels of ``diffgap::clip_loss`` and ``diffgap::clip_loss_backward``; the op module has the formulas.

Forward, one product: every program walks over its rectangle of tiles and keeps the maximum and the sum of
exponentials of each row and of each column; a second kernel merges the programs' parts in a fixed order.
Backward, three products: one kernel recomputes a macro tile of S and writes its gradient G, of bounded size, and the
BLAS multiplies it by both sides. Nothing is atomic, so the same inputs give the same bits.
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
    program_slots,
    store_gradient,
    tile_product,
)
from diffgap.kernels.configs import Tile, tile_for
from torch import Tensor

_MERGE_BLOCK = 128


@triton.jit
def _add_logits(p_state, pitch, o, seen, b_s, axis: tl.constexpr):
    """Add a tile of S, over an axis, to the state in memory: the maximum m and the sum of exp(S - m).

    In memory and not in registers, because each thread holds a quarter of a tile's columns: six vectors of them would
    leave room for one program on a multiprocessor where two fit. For the same reason the tile is summed up before its
    state is read.
    """
    b_tile = tl.max(b_s, axis)
    b_shift = tl.where(b_tile == float("-inf"), 0.0, b_tile)  # -inf - -inf would be NaN
    b_tile_sum = tl.sum(tl.exp2((b_s - tl.expand_dims(b_shift, axis)) * LOG2E), axis)
    b_max = tl.load(p_state + o, mask=seen, other=float("-inf"))
    b_sum = tl.load(p_state + pitch + o, mask=seen, other=0.0)
    b_new = tl.maximum(b_max, b_tile)
    # What the sum with the lower maximum is multiplied by.
    b_decay = tl.exp2(tl.where(b_new == float("-inf"), 0.0, tl.minimum(b_max, b_tile) - b_new) * LOG2E)
    b_sum = tl.where(b_tile > b_max, b_sum * b_decay + b_tile_sum, b_sum + b_tile_sum * b_decay)
    tl.store(p_state + o, b_new)
    tl.store(p_state + pitch + o, b_sum)


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    p_a, p_b, p_scale, p_ids_a, p_ids_b, p_rows, p_columns, p_logits, N, M, D, offset,
    rows_pitch, columns_pitch, logits_pitch,
    HAS_POSITIVES: tl.constexpr, HAS_IDS: tl.constexpr, TWO_SIDED: tl.constexpr, KEEP_LOGITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Parts of (max, sum, sum of the positive logits): ``rows`` (C, 3, N), ``columns`` (R, 3, M), grid (R, C).

    The parts have room for whole blocks, their pitch, so that they need no mask; what is beyond N or M is not read.
    """
    i_r, i_c = tl.program_id(0), tl.program_id(1)
    row_blocks, column_blocks = tl.cdiv(N, BLOCK_M), tl.cdiv(M, BLOCK_N)
    first_row, last_row = i_r * row_blocks // tl.num_programs(0), (i_r + 1) * row_blocks // tl.num_programs(0)
    first_column = i_c * column_blocks // tl.num_programs(1)
    last_column = (i_c + 1) * column_blocks // tl.num_programs(1)
    p_rows += i_c.to(tl.int64) * 3 * rows_pitch
    p_columns += i_r.to(tl.int64) * 3 * columns_pitch
    scale = tl.load(p_scale)
    for i_n in range(first_column, last_column):
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < M
        for i_m in range(first_row, last_row):
            o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
            m_m = o_m < N
            o_x, o_y = tl.minimum(o_m, N - 1), tl.minimum(o_n, M - 1)
            b_s = scale * tile_product(p_a, p_b, o_x, o_y, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, WIDEN)
            if KEEP_LOGITS:
                p_s = p_logits + o_m.to(tl.int64)[:, None] * logits_pitch + o_n[None, :]
                tl.store(p_s, b_s, mask=m_m[:, None] & (o_n < logits_pitch)[None, :])
            if may_hold_positives(i_m * BLOCK_M, i_n * BLOCK_N, offset, BLOCK_M, BLOCK_N, HAS_POSITIVES, HAS_IDS):
                m_positive = positives(p_ids_a, p_ids_b, o_m, o_n, N, M, offset, HAS_IDS)
                b_positive = tl.where(m_positive, b_s, 0.0)
                add_to(p_rows + 2 * rows_pitch + o_m, tl.sum(b_positive, 1))
                if TWO_SIDED:
                    add_to(p_columns + 2 * columns_pitch + o_n, tl.sum(b_positive, 0))
            if ((i_m + 1) * BLOCK_M > N) | ((i_n + 1) * BLOCK_N > M):
                b_s = tl.where(m_m[:, None] & m_n[None, :], b_s, float("-inf"))
            _add_logits(p_rows, rows_pitch, o_m, i_n > first_column, b_s, 1)
            if TWO_SIDED:
                _add_logits(p_columns, columns_pitch, o_n, i_m > first_row, b_s, 0)
            # Another thread of this program may load what this one has stored.
            tl.debug_barrier()


@triton.jit(do_not_specialize=SIZES)
def _merge_kernel(
    p_parts, p_weights, p_losses, p_lse, N, pitch, parts, HAS_POSITIVES: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses (N,) and log-sum-exp (N, 2) from (parts, 3, pitch)."""
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    b_max = tl.full((BLOCK,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    b_positive = tl.zeros((BLOCK,), tl.float32)
    p_part = p_parts + o_n
    for _ in range(parts):
        b_part_max = tl.load(p_part, mask=m_n, other=0.0)  # [BLOCK]
        b_new = tl.maximum(b_max, b_part_max)
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_part_sum = tl.load(p_part + pitch, mask=m_n, other=1.0) * tl.exp2((b_part_max - b_shift) * LOG2E)  # [BLOCK]
        b_sum = b_sum * tl.exp2((b_max - b_shift) * LOG2E) + b_part_sum
        b_max = b_new
        b_positive += tl.load(p_part + 2 * pitch, mask=m_n, other=0.0)  # [BLOCK]
        p_part += 3 * pitch
    b_log = tl.log(b_sum)
    tl.store(p_lse + 2 * o_n.to(tl.int64), b_max, mask=m_n)
    tl.store(p_lse + 2 * o_n.to(tl.int64) + 1, b_log, mask=m_n)
    b_loss = tl.zeros((BLOCK,), tl.float32)
    if HAS_POSITIVES:
        if HAS_WEIGHTS:
            b_weight = tl.load(p_weights + o_n, mask=m_n, other=0.0)  # [BLOCK]
            b_loss = tl.where(b_weight > 0, (b_max - b_weight * b_positive) + b_log, 0.0)
        else:
            b_loss = (b_max - b_positive) + b_log
    tl.store(p_losses + o_n, b_loss, mask=m_n)


def forward(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    ids_a: Tensor | None,
    ids_b: Tensor | None,
    weights_a: Tensor | None,
    weights_b: Tensor | None,
    one_sided: bool,
    label_offset: int | None,
    memory_budget: int | None,
    keep_logits: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``diffgap::clip_loss``; ``tile`` for tests and compilation without a GPU."""
    tile = tile or tile_for(a)
    if keep_logits:
        tile = tile.for_gradient()  # addresses of the logits take registers too
    rows, columns = a.shape[0], b.shape[0]
    logits = torch.empty((rows, columns) if keep_logits else (0, 0), dtype=torch.float32, device=a.device)
    # One rectangle of tiles per program, as square as it can be: each side has a part for every group of the other.
    slots = program_slots(a, tile)
    row_blocks, column_blocks = max(1, blocks(rows, tile.block_m)), max(1, blocks(columns, tile.block_n))
    row_groups = min(row_blocks, max(int(slots**0.5), slots // column_blocks))
    column_groups = min(column_blocks, slots // row_groups)
    rows_pitch, columns_pitch = row_blocks * tile.block_m, column_blocks * tile.block_n
    row_parts = a.new_zeros((column_groups, 3, rows_pitch), dtype=torch.float32)
    column_parts = a.new_zeros((row_groups, 3, 0 if one_sided else columns_pitch), dtype=torch.float32)
    ids_a, ids_b = narrow_ids(ids_a, ids_b)
    has_ids = ids_a is not None
    has_positives = has_ids or label_offset is not None
    if rows == 0 or columns == 0:
        for parts in (row_parts, column_parts):
            parts[:, 0] = -torch.inf
    with torch.cuda.device_of(a):
        if rows > 0 and columns > 0:
            wide_a, wide_b = padded(a, tile), padded(b, tile)
            _forward_kernel[row_groups, column_groups](
                wide_a, wide_b, logit_scale, ids_a, ids_b, row_parts, column_parts, logits,
                rows, columns, wide_a.shape[1], label_offset or 0, rows_pitch, columns_pitch, columns,
                HAS_POSITIVES=has_positives, HAS_IDS=has_ids, TWO_SIDED=not one_sided, KEEP_LOGITS=keep_logits,
                **tile.options(a, persistent=True),
            )  # fmt: skip
        row_losses, row_lse = _merged(row_parts, rows, weights_a, has_positives)
        column_losses, column_lse = _merged(column_parts, 0 if one_sided else columns, weights_b, has_positives)
    return row_losses, column_losses, row_lse, column_lse, logits


def _merged(parts: Tensor, size: int, weights: Tensor | None, has_positives: bool) -> tuple[Tensor, Tensor]:
    groups, _, pitch = parts.shape
    losses, lse = parts.new_empty(size), parts.new_empty((size, 2))
    if size > 0:
        _merge_kernel[(blocks(size, _MERGE_BLOCK),)](
            parts, weights, losses, lse, size, pitch, groups,
            HAS_POSITIVES=has_positives, HAS_WEIGHTS=weights is not None, BLOCK=_MERGE_BLOCK,
        )  # fmt: skip
    return losses, lse


@triton.jit
def _weighted_softmax(b_s, p_lse, p_factor, o, mask, axis: tl.constexpr):
    """``factor * exp(S - lse)`` with a factor and a log-sum-exp for each row (axis 1) or column (axis 0)."""
    b_max = tl.load(p_lse + 2 * o.to(tl.int64), mask=mask, other=0.0)
    b_log = tl.load(p_lse + 2 * o.to(tl.int64) + 1, mask=mask, other=0.0)
    b_factor = tl.load(p_factor + o, mask=mask, other=0.0)
    # Never above 1, though with infinite logits S may differ from the forward pass's.
    b_exponent = (b_s - tl.expand_dims(b_max, axis)) - tl.expand_dims(b_log, axis)
    b_exponent = tl.minimum(b_exponent, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.expand_dims(b_factor, axis) * tl.exp2(b_exponent * LOG2E)


@triton.jit(do_not_specialize=SIZES)
def _gradient_kernel(
    p_a, p_b, p_scale, p_ids_a, p_ids_b, p_rows_lse, p_columns_lse, p_softmax_rows, p_softmax_columns,
    p_target_rows, p_target_columns, p_logits, p_g, p_scale_sums, N, M, D, offset, first_row, first_column, width,
    logits_pitch,
    HAS_POSITIVES: tl.constexpr, HAS_IDS: tl.constexpr, TWO_SIDED: tl.constexpr, HAS_LOGITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One tile of G into the macro tile ``g`` (height, width) at (first_row, first_column), and of
    ``sum_ij G_ij <a_i, b_j>`` into the program's own sum."""
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    i_row, i_column = first_row + i_m * BLOCK_M, first_column + i_n * BLOCK_N
    o_m, o_n = i_row + tl.arange(0, BLOCK_M), i_column + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < N, o_n < M
    m_pairs = m_m[:, None] & m_n[None, :]
    scale = tl.load(p_scale)
    if HAS_LOGITS:
        p_s = p_logits + o_m.to(tl.int64)[:, None] * logits_pitch + o_n[None, :]
        b_s = tl.load(p_s, mask=m_m[:, None] & (o_n < logits_pitch)[None, :], other=0.0)
        b_similarity = b_s / scale
    else:
        o_x, o_y = tl.minimum(o_m, N - 1), tl.minimum(o_n, M - 1)
        b_similarity = tile_product(p_a, p_b, o_x, o_y, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, WIDEN)
        b_s = scale * b_similarity
        if p_a.dtype.element_ty == tl.float32 and PRECISION == "ieee":
            # Chosen, so that it is rounded: the compiler would subtract from the exact product, in one fused operation,
            # where the forward pass sums the exponentials of rounded logits. It costs registers, and of other products
            # the rounding does not matter.
            b_s = tl.where(m_pairs, b_s, 0.0)
    b_g = _weighted_softmax(b_s, p_rows_lse, p_softmax_rows, o_m, m_m, 1)
    if TWO_SIDED:
        b_g += _weighted_softmax(b_s, p_columns_lse, p_softmax_columns, o_n, m_n, 0)
    if may_hold_positives(i_row, i_column, offset, BLOCK_M, BLOCK_N, HAS_POSITIVES, HAS_IDS):
        m_positive = positives(p_ids_a, p_ids_b, o_m, o_n, N, M, offset, HAS_IDS)
        b_target_rows = tl.load(p_target_rows + o_m, mask=m_m, other=0.0)  # [BLOCK_M]
        b_g -= tl.where(m_positive, b_target_rows[:, None], 0.0)
        if TWO_SIDED:
            b_target_columns = tl.load(p_target_columns + o_n, mask=m_n, other=0.0)  # [BLOCK_N]
            b_g -= tl.where(m_positive, b_target_columns[None, :], 0.0)
    o_g = (o_m - first_row).to(tl.int64)[:, None] * width + (o_n - first_column)[None, :]
    store_gradient(p_g + o_g, b_g, None, WIDEN)  # whole tiles: what is beyond N or M is not read
    b_products = tl.where(m_pairs, b_g * b_similarity, 0.0)
    add_to(p_scale_sums + i_m * tl.num_programs(1) + i_n, tl.sum(tl.sum(b_products, 1), 0))


def backward(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    ids_a: Tensor | None,
    ids_b: Tensor | None,
    rows_lse: Tensor,
    columns_lse: Tensor,
    softmax_rows: Tensor,
    softmax_columns: Tensor,
    target_rows: Tensor,
    target_columns: Tensor,
    logits: Tensor,
    label_offset: int | None,
    memory_budget: int | None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``diffgap::clip_loss_backward``; ``tile`` for tests and compilation without a GPU."""
    tile = (tile or tile_for(a)).for_gradient()
    a, b = a.contiguous(), b.contiguous()
    grad_a, grad_b = (torch.zeros_like(x, dtype=torch.float32) for x in (a, b))
    rows, columns = a.shape[0], b.shape[0]
    if rows == 0 or columns == 0:
        return grad_a, grad_b, torch.zeros_like(logit_scale)
    factors = [softmax_rows, softmax_columns, target_rows, target_columns]
    unit = float16_unit(factors, 2.0) if a.dtype == torch.float16 else None
    factors = [x.contiguous() if unit is None else x * unit for x in factors]
    vectors = (rows_lse.contiguous(), columns_lse.contiguous(), *factors)
    height, width, all_macros = macros(rows, columns, tile, a.element_size(), memory_budget)
    g = a.new_empty((height, width))
    scale_sums = grad_a.new_zeros(height // tile.block_m * (width // tile.block_n))
    ids_a, ids_b = narrow_ids(ids_a, ids_b)
    has_ids = ids_a is not None
    wide_a, wide_b = padded(a, tile), padded(b, tile)
    options = tile.options(a)
    with torch.cuda.device_of(a), torch.autocast(a.device.type, enabled=False):
        for macro in all_macros:
            _gradient_kernel[macro.grid(tile)](
                wide_a, wide_b, logit_scale, ids_a, ids_b, *vectors, logits, g, scale_sums,
                rows, columns, wide_a.shape[1], label_offset or 0, macro.rows.start, macro.columns.start, width,
                columns,
                HAS_POSITIVES=has_ids or label_offset is not None, HAS_IDS=has_ids,
                TWO_SIDED=columns_lse.shape[0] == columns, HAS_LOGITS=logits.shape == (rows, columns),
                **options,
            )  # fmt: skip
            part = g[: macro.rows.stop - macro.rows.start, : macro.columns.stop - macro.columns.start]
            accumulate(grad_a[macro.rows], part, b[macro.columns])
            accumulate(grad_b[macro.columns], part.T, a[macro.rows])
    grad_scale = scale_sums.sum()
    if logits.shape == (rows, columns):
        # S / scale is lost at scale 0, but <a, G b> is the same sum.
        grad_scale = torch.where(logit_scale == 0, (a * grad_a).sum(), grad_scale)
    factor = logit_scale if unit is None else logit_scale / unit
    return grad_a.mul_(factor), grad_b.mul_(factor), grad_scale if unit is None else grad_scale / unit
