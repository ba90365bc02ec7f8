"""Loads, norms and masks that the kernels of attention share.

Names inside kernels: those of ``_tiles``. Rows of q are indexed by ``m``, rows of k and v by ``n``; a pair is one batch
and head. CHUNK columns of BLOCK_D, d rounded up to a power of two, are multiplied at a time. Where these are several,
the loop ends at ``width``, d as an argument: up to a constant it would be unrolled, and spill.
"""

# The arguments of kernels are Triton's to type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from diffgap.kernels._tiles import narrow

_EPS: tl.constexpr = tl.constexpr(1e-6)

#: Elements that strides are multiples of, and d is: the kernels then know rows to begin at multiples of 16 bytes.
UNIT: tl.constexpr = tl.constexpr(8)

#: Arguments of the kernels by which Triton shall not specialize: calls of any length and batch run the same code. No
#: wide access depends on them.
SIZES = ("ALL_PAIRS", "H", "NQ", "NK")


@triton.jit
def offsets(o_pair, o_row, H, strides):
    """Where rows start in a tensor (B, N, H, d), in elements; ``strides`` are those of B, N and H in units of UNIT."""
    o_b, o_h = (o_pair // H).to(tl.int64), (o_pair % H).to(tl.int64)
    return (o_b * strides[0] + o_row.to(tl.int64) * strides[1] + o_h * strides[2]) * UNIT


@triton.jit
def in_rows(m_rows, first, D: tl.constexpr, BLOCK: tl.constexpr):
    """Mask of BLOCK columns, from ``first`` on, of the rows of ``m_rows``."""
    m_x = m_rows[:, None]
    if D % BLOCK != 0:
        m_x &= (first + tl.arange(0, BLOCK) < D)[None, :]
    return m_x


@triton.jit
def load_rows(p_x, o_rows, m_rows, first, D: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr):
    """BLOCK columns of rows, zero where masked, [rows, BLOCK]."""
    p_rows = p_x + o_rows[:, None] + (first + tl.arange(0, BLOCK))[None, :]
    b_x = tl.load(p_rows, mask=in_rows(m_rows, first, D, BLOCK), other=0.0)
    return b_x.to(tl.float32) if WIDEN else b_x


@triton.jit
def store_rows(p_x, o_rows, m_rows, b_x, first, D: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr):
    """Store float32 rows in the dtype of the tensor."""
    p_rows = p_x + o_rows[:, None] + (first + tl.arange(0, BLOCK))[None, :]
    b_x = narrow(b_x, p_x.dtype.element_ty, WIDEN).to(p_x.dtype.element_ty)
    tl.store(p_rows, b_x, mask=in_rows(m_rows, first, D, BLOCK))


@triton.jit
def inverse_rms(
    p_x, o_rows, m_rows, NORM: tl.constexpr, D: tl.constexpr, FEATURES: tl.constexpr, BLOCK_D: tl.constexpr
):
    """``1 / sqrt(mean(x^2) + 1e-6)`` of rows, 1 where they are not to be normed, [rows, 1].

    The mean is over FEATURES: the others of the D are zeros.
    """
    if NORM:
        b_x = load_rows(p_x, o_rows, m_rows, 0, D, BLOCK_D, True)
        b_factor = tl.rsqrt(tl.sum(b_x * b_x, 1) / FEATURES + _EPS)
    else:
        b_factor = tl.full(m_rows.shape, 1.0, tl.float32)
    return b_factor[:, None]


@triton.jit
def load_weight(p_weight, first, D: tl.constexpr, BLOCK: tl.constexpr):
    """[1, BLOCK]"""
    o_d = first + tl.arange(0, BLOCK)
    return tl.load(p_weight + o_d, mask=o_d < D, other=0.0)[None, :]


@triton.jit
def normed(
    b_x, b_factor, p_weight, first, NORM: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr
):
    """``w * x / rms(x)`` in the dtype of ``x``."""
    if NORM:
        b_weight = load_weight(p_weight, first, D, BLOCK)
        b_x = narrow(b_x.to(tl.float32) * b_factor * b_weight, b_x.dtype, WIDEN)
    return b_x


@triton.jit
def product(
    p_x, o_x, m_x, b_rms_x, p_x_weight, X_NORM: tl.constexpr, p_y, o_y, m_y, b_rms_y, p_y_weight, Y_NORM: tl.constexpr,
    width, D: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """``normed(x) @ normed(y).T`` of rows, float32."""
    b_product = tl.zeros((o_x.shape[0], o_y.shape[0]), tl.float32)
    for first in range(0, width if CHUNK < D else D, CHUNK):
        b_x = load_rows(p_x, o_x, m_x, first, D, CHUNK, WIDEN)
        b_x = normed(b_x, b_rms_x, p_x_weight, first, X_NORM, D, CHUNK, WIDEN)
        b_y = load_rows(p_y, o_y, m_y, first, D, CHUNK, WIDEN)
        b_y = normed(b_y, b_rms_y, p_y_weight, first, Y_NORM, D, CHUNK, WIDEN)
        b_product = tl.dot(b_x, tl.trans(b_y), b_product, input_precision=PRECISION)
    return b_product


@triton.jit
def norm_backward(
    b_grad, b_x, b_factor, b_mean, p_weight, p_part, first, NORM: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradient of x from that of ``x^ = normed(x)``: with u = x / rms(x) it is ``(w * grad - u * mean) / rms(x)``.

    ``mean`` is that of ``w * grad * u``, [rows, 1], or ``<grad, x^> / d``; with grad = dS K it is the mean of
    ``dS * logits``, which needs no more than the tile of pairs. The gradient of the weight, the sum over the rows of
    ``grad * u``, goes to ``part``.
    """
    if NORM:
        o_d = first + tl.arange(0, BLOCK)
        b_unit = b_x.to(tl.float32) * b_factor
        tl.store(p_part + o_d, tl.sum(b_grad * b_unit, 0), mask=o_d < D)
        b_grad = (b_grad * load_weight(p_weight, first, D, BLOCK) - b_unit * b_mean) * b_factor
    return b_grad


@triton.jit
def attending_keys(p_mask, o_pair, o_n, m_n, H, NK, HAS_MASK: tl.constexpr):
    """``m_n`` without the masked keys; ``mask`` is (B, NK)."""
    if HAS_MASK:
        o_mask = (o_pair // H).to(tl.int64) * NK + o_n
        m_n &= tl.load(p_mask + o_mask, mask=m_n, other=0) != 0
    return m_n
