"""Triton kernels of ``diffgap::similarity_ranks`` and ``diffgap::similarity_topk``; the op module defines both.

No N x M matrix: tiles of scores are compared, counted or reduced where they are computed. A score has the same bits
whichever kernel computes it and wherever it stands in a tile, so equal scores tie exactly.
"""

# The arguments of kernels are Triton's to type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from diffgap.kernels._tiles import SIZES, WORKSPACE_BYTES, blocks, padded, program_slots, tile_product
from diffgap.kernels.configs import Tile, tile_for
from torch import Tensor

# Programs per place on the device: the last, partly filled round is then one of four or more.
_ROUNDS = 4


@triton.jit
def _scores(
    p_q, p_g, o_m, o_n, N, M, D, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile of scores, NaN as -inf."""
    o_x, o_y = tl.minimum(o_m, N - 1), tl.minimum(o_n, M - 1)
    b_s = tile_product(p_q, p_g, o_x, o_y, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, WIDEN)
    return tl.where(b_s == b_s, b_s, float("-inf"))


@triton.jit(do_not_specialize=SIZES)
def _best_positive_kernel(
    p_q, p_g, p_order_q, p_order_g, p_ids_q, p_ids_g, p_first, p_last, p_best, p_shared, N, M, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Best score among each query's positives and how many share it, in parts (groups, N); grid (blocks, groups).

    Queries and gallery are in the order of their ids, so a block's positives lie between its first query's first and
    its last query's last, and only that range is multiplied.
    """
    i_m, i_c = tl.program_id(0), tl.program_id(1)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < N
    b_row = tl.load(p_order_q + o_m, mask=m_m, other=0)  # [BLOCK_M]
    b_id = tl.load(p_ids_q + o_m, mask=m_m, other=0)  # [BLOCK_M]
    first = tl.load(p_first + i_m * BLOCK_M)
    last = tl.load(p_last + tl.minimum((i_m + 1) * BLOCK_M, N) - 1)
    column_blocks = tl.cdiv(last - first, BLOCK_N)
    b_best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_shared = tl.zeros((BLOCK_M,), tl.int32)
    for i_n in range(i_c, column_blocks, tl.num_programs(1)):
        o_n = first + i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < last
        b_column = tl.load(p_order_g + o_n, mask=m_n, other=0)  # [BLOCK_N]
        b_s = _scores(p_q, p_g, b_row, b_column, N, M, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, WIDEN)
        b_id_g = tl.load(p_ids_g + o_n, mask=m_n, other=0)  # [BLOCK_N]
        m_positive = (b_id[:, None] == b_id_g[None, :]) & m_n[None, :]
        b_new = tl.maximum(b_best, tl.max(tl.where(m_positive, b_s, float("-inf")), 1))
        b_here = tl.sum((m_positive & (b_s == b_new[:, None])).to(tl.int32), 1)
        b_shared = tl.where(b_new > b_best, 0, b_shared) + b_here
        b_best = b_new
    tl.store(p_best + i_c.to(tl.int64) * N + b_row, b_best, mask=m_m)
    tl.store(p_shared + i_c.to(tl.int64) * N + b_row, b_shared, mask=m_m)


@triton.jit(do_not_specialize=SIZES)
def _compare_kernel(
    p_q, p_g, p_target, p_above, p_equal, N, M, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """How many scores are above and equal to each query's target, in parts (groups, N); grid (blocks, groups)."""
    i_m, i_c = tl.program_id(0), tl.program_id(1)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < N
    b_target = tl.load(p_target + o_m, mask=m_m, other=0.0)[:, None]  # [BLOCK_M, 1]
    b_above = tl.zeros((BLOCK_M,), tl.int32)
    b_equal = tl.zeros((BLOCK_M,), tl.int32)
    for i_n in range(i_c, tl.cdiv(M, BLOCK_N), tl.num_programs(1)):
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        b_s = _scores(p_q, p_g, o_m, o_n, N, M, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, WIDEN)
        m_n = (o_n < M)[None, :]
        b_above += tl.sum(((b_s > b_target) & m_n).to(tl.int32), 1)
        b_equal += tl.sum(((b_s == b_target) & m_n).to(tl.int32), 1)
    tl.store(p_above + i_c.to(tl.int64) * N + o_m, b_above, mask=m_m)
    tl.store(p_equal + i_c.to(tl.int64) * N + o_m, b_equal, mask=m_m)


def ranks(q: Tensor, g: Tensor, ids_q: Tensor, ids_g: Tensor, tile: Tile | None = None) -> tuple[Tensor, ...]:
    """``diffgap::similarity_ranks``; ``tile`` for tests and compilation without a GPU."""
    tile = tile or tile_for(q)
    rows, columns = q.shape[0], g.shape[0]
    if rows == 0 or columns == 0:
        return tuple(torch.zeros_like(ids_q) for _ in range(3))
    row_blocks = blocks(rows, tile.block_m)
    groups = min(blocks(columns, tile.block_n), blocks(_ROUNDS * program_slots(q, tile), row_blocks))
    sorted_q, order_q = ids_q.sort()
    sorted_g, order_g = ids_g.sort()
    first, last = (torch.searchsorted(sorted_g, sorted_q, right=right, out_int32=True) for right in (False, True))
    best = torch.empty((groups, rows), dtype=torch.float32, device=q.device)
    shared, above, equal = (torch.empty_like(best, dtype=torch.int32) for _ in range(3))
    wide_q, wide_g = padded(q, tile), padded(g, tile)
    sizes = (rows, columns, wide_q.shape[1])
    with torch.cuda.device_of(q):
        _best_positive_kernel[row_blocks, groups](
            wide_q, wide_g, order_q, order_g, sorted_q, sorted_g, first, last, best, shared, *sizes, **tile.options(q)
        )
        target = best.amax(dim=0)
        _compare_kernel[row_blocks, groups](wide_q, wide_g, target, above, equal, *sizes, **tile.options(q))
    share_best = torch.where(best == target, shared, 0).sum(dim=0)
    return above.sum(dim=0), equal.sum(dim=0) - share_best, share_best


@triton.jit
def _keys(b_s, o_n):
    """Scores and columns as int64 keys whose order is: higher score first, then lower column. All are distinct."""
    b_bits = tl.where(b_s == 0.0, 0.0, b_s).to(tl.int32, bitcast=True)  # -0 ties with 0
    b_ordered = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    return (b_ordered.to(tl.int64) << 32) | (0xFFFFFFFF - o_n.to(tl.int64))[None, :]


def _decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and columns of the keys."""
    bits = (keys >> 32).to(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


@triton.jit(do_not_specialize=SIZES)
def _best_of_group_kernel(
    p_q, p_g, p_best, N, M, D, row_blocks, groups,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The best key of each row in each group of BLOCK_N columns, (N, groups); one program a tile."""
    i_m, i_n = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    o_m, o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_s = _scores(p_q, p_g, o_m, o_n, N, M, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, WIDEN)
    # Beyond M the last column is repeated under higher numbers, so its keys are no best ones.
    b_best = tl.max(_keys(b_s, o_n), 1)
    tl.store(p_best + o_m.to(tl.int64) * groups + i_n, b_best, mask=o_m < N)


@triton.jit(do_not_specialize=SIZES)
def _keys_of_groups_kernel(
    p_q, p_g, p_slots, p_keys, N, M, D, row_blocks, groups, slots,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """All keys of the groups that a row selected, (N, slots, BLOCK_N); ``slots`` (N, groups) says where, -1 nowhere."""
    i_m, i_n = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    o_m, o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_slot = tl.load(p_slots + o_m.to(tl.int64) * groups + i_n, mask=o_m < N, other=-1)  # [BLOCK_M]
    if tl.max(b_slot, 0) >= 0:
        b_s = _scores(p_q, p_g, o_m, o_n, N, M, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, WIDEN)
        b_keys = tl.where((o_n < M)[None, :], _keys(b_s, o_n), -0x8000000000000000)
        o_keys = (o_m.to(tl.int64) * slots + b_slot) * BLOCK_N
        p_tile = p_keys + o_keys[:, None] + tl.arange(0, BLOCK_N)[None, :]
        tl.store(p_tile, b_keys, mask=(b_slot >= 0)[:, None] & (o_n >= 0)[None, :])


def topk(q: Tensor, g: Tensor, k: int, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """``diffgap::similarity_topk``; ``tile`` for tests and compilation without a GPU.

    Whatever is among a row's k best lies in one of the k groups of columns with the best best key: any other group
    has k keys above its own. So one pass finds each group's best and a second, of the same tiles, writes out the k
    groups, from which ``torch.topk`` picks; tiles that no row selected are skipped. Exact whatever the ties, for no
    two keys are equal.
    """
    tile = tile or tile_for(q)
    values = torch.empty((q.shape[0], k), dtype=torch.float32, device=q.device)
    indices = torch.empty_like(values, dtype=torch.int64)
    wide_q, wide_g = padded(q, tile), padded(g, tile)
    groups = blocks(g.shape[0], tile.block_n)
    slots = min(k, groups)
    row_bytes = 8 * slots * tile.block_n + 12 * groups
    size = max(1, WORKSPACE_BYTES // (row_bytes * tile.block_m)) * tile.block_m
    for start in range(0, q.shape[0], size):
        block = slice(start, min(start + size, q.shape[0]))
        keys = _keys_of_groups(wide_q[block], wide_g, groups, slots, tile)
        values[block], indices[block] = _decode(keys.topk(k, dim=1).values)
    return values, indices


def _keys_of_groups(q: Tensor, g: Tensor, groups: int, slots: int, tile: Tile) -> Tensor:
    """Keys (N, slots * block_n) of each row's best groups."""
    rows = q.shape[0]
    row_blocks = blocks(rows, tile.block_m)
    sizes = (rows, g.shape[0], q.shape[1], row_blocks, groups)
    best = torch.empty((rows, groups), dtype=torch.int64, device=q.device)
    keys = torch.empty((rows, slots * tile.block_n), dtype=torch.int64, device=q.device)
    with torch.cuda.device_of(q):
        _best_of_group_kernel[(row_blocks * groups,)](q, g, best, *sizes, **tile.options(q))
        selected = best.topk(slots, dim=1, sorted=False).indices
        slot_of = torch.full((rows, groups), -1, dtype=torch.int32, device=q.device)
        places = torch.arange(slots, dtype=torch.int32, device=q.device).expand(rows, slots)
        slot_of.scatter_(1, selected, places)
        _keys_of_groups_kernel[(row_blocks * groups,)](q, g, slot_of, keys, *sizes, slots, **tile.options(q))
    return keys
