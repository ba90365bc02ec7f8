"""The tile of similarities that every contrastive kernel computes, and the products of gradients.

Names inside kernels: ``b_`` values of a block, ``p_`` pointers, ``o_`` offsets, ``m_`` masks, ``i_`` indices of
programs and blocks.
"""

# The arguments of kernels are Triton's to type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from diffgap.kernels.configs import Tile
from torch import Tensor
from torch.nn import functional as F

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

#: Arguments of the contrastive kernels by which Triton shall not specialize: 16 may divide them or not, and all batches
#: run the same code. No wide access depends on them, by its address or its mask.
SIZES = ("N", "M", "offset", "row_blocks", "groups", "slots")

#: Bytes of scratch a launch function takes at most when the caller sets no limit.
WORKSPACE_BYTES = 64 << 20


def program_slots(x: Tensor, tile: Tile) -> int:
    """How many programs the device of ``x`` runs at a time."""
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count) * tile.programs if x.is_cuda else 4


def padded(x: Tensor, tile: Tile) -> Tensor:
    """``x`` contiguous from a multiple of 16 bytes on, its width filled up with zeros to whole blocks.

    So that every load is of 16 aligned bytes and the product needs no mask; zeros add nothing to it. The usual
    widths are multiples already, and copied is N D out of N M D.
    """
    missing = -x.shape[1] % tile.block_d
    x = F.pad(x, (0, missing)) if missing else x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


@triton.jit
def tile_product(
    p_x, p_y, o_m, o_n, D, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """``x[o_m] @ y[o_n].T`` in float32. Every element sums the same products in the same order wherever it stands
    in a tile, so equal rows have equal scores to the last bit. D is a multiple of BLOCK_D."""
    o_d = tl.arange(0, BLOCK_D)
    p_x_tile = p_x + o_m.to(tl.int64)[:, None] * D + o_d[None, :]
    p_y_tile = p_y + o_n.to(tl.int64)[None, :] * D + o_d[:, None]
    b_product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, D, BLOCK_D):
        b_x = tl.load(p_x_tile)  # [BLOCK_M, BLOCK_D]
        b_y = tl.load(p_y_tile)  # [BLOCK_D, BLOCK_N]
        if WIDEN:
            b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
        b_product = tl.dot(b_x, b_y, b_product, input_precision=PRECISION)
        p_x_tile += BLOCK_D
        p_y_tile += BLOCK_D
    return b_product


@triton.jit
def may_hold_positives(
    i_row, i_column, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_POSITIVES: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    """Whether the tile at this row and column can hold a positive; without ids only the diagonal's tiles do."""
    crosses = (i_row + offset < i_column + BLOCK_N) & (i_column < i_row + offset + BLOCK_M)
    return (crosses | HAS_IDS) & HAS_POSITIVES


@triton.jit
def positives(p_ids_a, p_ids_b, o_m, o_n, N, M, offset, HAS_IDS: tl.constexpr):
    """Which pairs of a tile are positive, [BLOCK_M, BLOCK_N]."""
    m_pairs = (o_m < N)[:, None] & (o_n < M)[None, :]
    if HAS_IDS:
        b_ids_a = tl.load(p_ids_a + o_m, mask=o_m < N, other=0)  # [BLOCK_M]
        b_ids_b = tl.load(p_ids_b + o_n, mask=o_n < M, other=0)  # [BLOCK_N]
        m_positive = b_ids_a[:, None] == b_ids_b[None, :]
    else:
        m_positive = (o_m + offset)[:, None] == o_n[None, :]
    return m_positive & m_pairs


@triton.jit
def add_to(p_sum, b_value):
    """Add to a sum in memory that only this program touches; no atomics, so the order is always the same."""
    tl.store(p_sum, tl.load(p_sum) + b_value)


@triton.jit
def narrow(b_x, dtype: tl.constexpr, WIDEN: tl.constexpr):
    """float32 rounded to ``dtype``; where WIDEN, to bfloat16's numbers, but still float32."""
    if WIDEN:
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_bits += 0x7FFF + ((b_bits >> 16) & 1)  # so that truncating rounds
        b_x = (b_bits & -0x10000).to(tl.float32, bitcast=True)
    else:
        b_x = b_x.to(dtype)
    return b_x


@triton.jit
def store_gradient(p_g, b_g, mask, WIDEN: tl.constexpr):
    """Store in the dtype of the embeddings."""
    tl.store(p_g, narrow(b_g, p_g.dtype.element_ty, WIDEN).to(p_g.dtype.element_ty), mask=mask)


def blocks(rows: int, size: int) -> int:
    return -(-rows // size)


def narrow_ids(ids_a: Tensor | None, ids_b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """int32 ids that are equal where these are: half the registers and instructions of every comparison."""
    if ids_a is None or ids_b is None:
        return None, None
    ordered = torch.cat([ids_a, ids_b]).sort().values
    first, second = (torch.searchsorted(ordered, ids.contiguous(), out_int32=True) for ids in (ids_a, ids_b))
    return first, second


@dataclass(frozen=True)
class Macro:
    """A rectangle of the N x M similarities, of bounded size."""

    rows: slice
    columns: slice

    def grid(self, tile: Tile) -> tuple[int, int]:
        """Programs of one tile each."""
        return (
            blocks(self.rows.stop - self.rows.start, tile.block_m),
            blocks(self.columns.stop - self.columns.start, tile.block_n),
        )


def macros(rows: int, columns: int, tile: Tile, itemsize: int, budget: int | None) -> tuple[int, int, Iterator[Macro]]:
    """Height and width of the largest macro tile, and all of them, row by row.

    A macro tile of the gradient takes ``itemsize`` bytes a pair, at most ``budget`` in all but at least one tile.
    """
    pairs = min(budget or WORKSPACE_BYTES, WORKSPACE_BYTES) // itemsize
    # As wide as high, so that both products have a long inner dimension.
    width = min(blocks(columns, tile.block_n), max(1, int(pairs**0.5) // tile.block_n)) * tile.block_n
    height = min(blocks(rows, tile.block_m), max(1, pairs // (width * tile.block_m))) * tile.block_m
    found = (
        Macro(slice(row, min(row + height, rows)), slice(column, min(column + width, columns)))
        for row in range(0, rows, height)
        for column in range(0, columns, width)
    )
    return height, width, found


def accumulate(total: Tensor, x: Tensor, y: Tensor) -> None:
    """``total += x @ y`` in float32, by the BLAS: plain products, at which no kernel of ours would beat it."""
    if x.dtype == total.dtype:
        total.addmm_(x, y)
    elif x.is_cuda:
        torch.addmm(total, x, y, out_dtype=total.dtype, out=total)
    else:  # in the interpreter; only CUDA has the product above
        total.addmm_(x.float(), y.float())


def float16_unit(factors: Sequence[Tensor], bound: float) -> Tensor:
    """What to multiply gradients of the pairs by so that float16 holds them.

    They are probabilities times a factor of a row or column, at most ``bound`` times the largest factor. Of a mean
    over 32,768 rows the products are near 1e-9, below float16's smallest number; with the largest possible one at
    2^15 they are not, and none overflows.
    """
    largest = torch.stack([x.abs().amax() for x in factors if x.numel() > 0]).amax()
    return torch.where(largest > 0, 2.0**15 / (bound * largest), 1.0)
