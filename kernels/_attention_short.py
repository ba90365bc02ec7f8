"""Kernels of attention where all keys of a pair, a batch and head, stand in one tile.

A program holds PAIRS pairs, each in an equal share of the tile's rows and columns, so that 4 pairs of 4 tokens fill the
16 rows which a product takes at least; logits between pairs are masked. The softmax needs one pass, and the backward
pass computes it again: nothing is kept but the inputs.
"""

# The arguments of kernels are Triton's to type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from diffgap.kernels._attention_rows import (
    SIZES,
    attending_keys,
    inverse_rms,
    load_rows,
    norm_backward,
    normed,
    offsets,
    product,
    store_rows,
)
from diffgap.kernels._tiles import LOG2E, narrow


@triton.jit
def _tile_rows(ALL_PAIRS, N, BLOCK: tl.constexpr, PAIRS: tl.constexpr):
    """Pair and token of each row of this program's tile, and which rows there are."""
    o_row = tl.arange(0, BLOCK)
    o_pair = tl.program_id(0) * PAIRS + o_row // (BLOCK // PAIRS)
    o_token = o_row % (BLOCK // PAIRS)
    return o_pair, o_token, (o_pair < ALL_PAIRS) & (o_token < N)


@triton.jit
def _poison(p_x, o_rows, m_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr):
    """NaN for each row with an element that is not finite, else 0.

    The zeros between the pairs of a tile would spread such an element to the other pairs: its row is left out of all
    products, and its own pair's logits get the NaN.
    """
    b_poison = tl.zeros(m_rows.shape, tl.float32)
    if PAIRS > 1:
        b_poison = tl.sum(load_rows(p_x, o_rows, m_rows, 0, D, BLOCK_D, True) * 0.0, 1)
    return b_poison


@triton.jit
def _softmax(b_s, m_pairs):
    """exp(logits - max) with the logits in units of log(2), and one over its sums; all zero in rows without keys."""
    b_s = tl.where(m_pairs, b_s, float("-inf"))
    b_max = tl.max(b_s, 1)
    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)  # -inf - -inf would be NaN
    b_p = tl.where(m_pairs, tl.exp2(b_s - b_shift[:, None]), 0.0)
    b_sum = tl.sum(b_p, 1)
    return b_p, (1.0 / tl.where(b_sum == 0.0, 1.0, b_sum))[:, None]


@triton.jit
def _attending(o_pair_m, o_m, o_pair_n, o_n, m_n, CAUSAL: tl.constexpr, PAIRS: tl.constexpr):
    """Which query attends to which key, [BLOCK_M, BLOCK_N] or [1, BLOCK_N]."""
    m_pairs = m_n[None, :]
    if PAIRS > 1:
        m_pairs &= o_pair_m[:, None] == o_pair_n[None, :]
    if CAUSAL:
        m_pairs &= o_n[None, :] <= o_m[:, None]
    return m_pairs


@triton.jit(do_not_specialize=SIZES)
def short_forward_kernel(
    p_q, p_k, p_v, p_q_weight, p_k_weight, p_mask, p_output, scale, ALL_PAIRS, H, NQ, NK, width,
    q_strides, k_strides, v_strides, output_strides,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, FEATURES: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """``output`` of PAIRS pairs."""
    o_pair_m, o_m, m_m = _tile_rows(ALL_PAIRS, NQ, BLOCK_M, PAIRS)
    o_pair_n, o_n, m_n = _tile_rows(ALL_PAIRS, NK, BLOCK_N, PAIRS)
    m_n = attending_keys(p_mask, o_pair_n, o_n, m_n, H, NK, HAS_MASK)
    o_q = offsets(o_pair_m, o_m, H, q_strides)
    o_k, o_v = offsets(o_pair_n, o_n, H, k_strides), offsets(o_pair_n, o_n, H, v_strides)
    m_pairs = _attending(o_pair_m, o_m, o_pair_n, o_n, m_n, CAUSAL, PAIRS)
    b_poison_m = _poison(p_q, o_q, m_m, D, BLOCK_D, PAIRS)
    b_poison_n = _poison(p_k, o_k, m_n, D, BLOCK_D, PAIRS) + _poison(p_v, o_v, m_n, D, BLOCK_D, PAIRS)
    m_q, m_k = m_m & (b_poison_m == 0.0), m_n & (b_poison_n == 0.0)
    b_rms_q = inverse_rms(p_q, o_q, m_q, Q_NORM, D, FEATURES, BLOCK_D)
    b_rms_k = inverse_rms(p_k, o_k, m_k, K_NORM, D, FEATURES, BLOCK_D)
    b_s = product(
        p_q, o_q, m_q, b_rms_q, p_q_weight, Q_NORM, p_k, o_k, m_k, b_rms_k, p_k_weight, K_NORM,
        width, D, CHUNK, PRECISION, WIDEN,
    ) * (scale * LOG2E)  # fmt: skip
    if PAIRS > 1:
        b_s += b_poison_m[:, None] + b_poison_n[None, :]
    b_p, b_inverse = _softmax(b_s, m_pairs)
    o_output = offsets(o_pair_m, o_m, H, output_strides)
    for first in range(0, width if CHUNK < D else D, CHUNK):
        b_v = load_rows(p_v, o_v, m_k, first, D, CHUNK, WIDEN)  # [BLOCK_N, CHUNK]
        b_o = tl.dot(narrow(b_p, b_v.dtype, WIDEN), b_v, input_precision=PRECISION) * b_inverse
        store_rows(p_output, o_output, m_m, b_o, first, D, CHUNK, WIDEN)


@triton.jit(do_not_specialize=SIZES)
def short_backward_kernel(
    p_grad, p_q, p_k, p_v, p_q_weight, p_k_weight, p_mask, p_dq, p_dk, p_dv, p_parts_q, p_parts_k,
    scale, ALL_PAIRS, H, NQ, NK, width,
    grad_strides, q_strides, k_strides, v_strides, dq_strides, dk_strides,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, FEATURES: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """``dq``, ``dk`` and ``dv`` of PAIRS pairs, and one row each of ``parts`` (programs, d), of the weights' gradients.

    With G the gradient of the output: dV = P^T G, dP = G V^T, dS = P * (dP - rowsum(P * dP)), dQ = scale dS K,
    dK = scale dS^T Q.
    """
    o_pair_m, o_m, m_m = _tile_rows(ALL_PAIRS, NQ, BLOCK_M, PAIRS)
    o_pair_n, o_n, m_n = _tile_rows(ALL_PAIRS, NK, BLOCK_N, PAIRS)
    m_key = attending_keys(p_mask, o_pair_n, o_n, m_n, H, NK, HAS_MASK)
    o_q, o_g = offsets(o_pair_m, o_m, H, q_strides), offsets(o_pair_m, o_m, H, grad_strides)
    o_k, o_v = offsets(o_pair_n, o_n, H, k_strides), offsets(o_pair_n, o_n, H, v_strides)
    m_pairs = _attending(o_pair_m, o_m, o_pair_n, o_n, m_key, CAUSAL, PAIRS)
    b_poison_m = _poison(p_q, o_q, m_m, D, BLOCK_D, PAIRS) + _poison(p_grad, o_g, m_m, D, BLOCK_D, PAIRS)
    b_poison_n = _poison(p_k, o_k, m_key, D, BLOCK_D, PAIRS) + _poison(p_v, o_v, m_key, D, BLOCK_D, PAIRS)
    m_q, m_k = m_m & (b_poison_m == 0.0), m_key & (b_poison_n == 0.0)
    b_rms_q = inverse_rms(p_q, o_q, m_q, Q_NORM, D, FEATURES, BLOCK_D)
    b_rms_k = inverse_rms(p_k, o_k, m_k, K_NORM, D, FEATURES, BLOCK_D)
    b_s = product(
        p_q, o_q, m_q, b_rms_q, p_q_weight, Q_NORM, p_k, o_k, m_k, b_rms_k, p_k_weight, K_NORM,
        width, D, CHUNK, PRECISION, WIDEN,
    ) * scale  # fmt: skip
    b_dp = product(
        p_grad, o_g, m_q, None, None, False, p_v, o_v, m_k, None, None, False, width, D, CHUNK, PRECISION, WIDEN
    )  # fmt: skip
    if PAIRS > 1:
        b_s += b_poison_m[:, None] + b_poison_n[None, :]
    b_p, b_inverse = _softmax(b_s * LOG2E, m_pairs)
    # Zero where nothing attends even if the sum is NaN.
    b_p = tl.where(m_pairs, b_p * b_inverse, 0.0)
    b_ds = tl.where(m_pairs, b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None]), 0.0)
    b_means = tl.where(m_pairs, b_ds * b_s, 0.0) / FEATURES
    b_mean_q, b_mean_k = tl.sum(b_means, 1)[:, None], tl.sum(b_means, 0)[:, None]
    o_part = tl.program_id(0).to(tl.int64) * D
    o_dq = offsets(o_pair_m, o_m, H, dq_strides)
    o_dk = offsets(o_pair_n, o_n, H, dk_strides)
    for first in range(0, width if CHUNK < D else D, CHUNK):
        b_g = load_rows(p_grad, o_g, m_q, first, D, CHUNK, WIDEN)  # [BLOCK_M, CHUNK]
        b_dv = tl.dot(tl.trans(narrow(b_p, b_g.dtype, WIDEN)), b_g, input_precision=PRECISION)
        store_rows(p_dv, o_dk, m_n, b_dv, first, D, CHUNK, WIDEN)
        b_x = load_rows(p_q, o_q, m_q, first, D, CHUNK, WIDEN)  # [BLOCK_M, CHUNK]
        b_y = load_rows(p_k, o_k, m_k, first, D, CHUNK, WIDEN)  # [BLOCK_N, CHUNK]
        b_k = normed(b_y, b_rms_k, p_k_weight, first, K_NORM, D, CHUNK, WIDEN)
        b_dq = tl.dot(narrow(b_ds, b_k.dtype, WIDEN), b_k, input_precision=PRECISION) * scale
        b_dq = norm_backward(b_dq, b_x, b_rms_q, b_mean_q, p_q_weight, p_parts_q + o_part, first, Q_NORM, D, CHUNK)
        store_rows(p_dq, o_dq, m_m, b_dq, first, D, CHUNK, WIDEN)
        b_q = normed(b_x, b_rms_q, p_q_weight, first, Q_NORM, D, CHUNK, WIDEN)
        b_dk = tl.dot(tl.trans(narrow(b_ds, b_q.dtype, WIDEN)), b_q, input_precision=PRECISION) * scale
        b_dk = norm_backward(b_dk, b_y, b_rms_k, b_mean_k, p_k_weight, p_parts_k + o_part, first, K_NORM, D, CHUNK)
        store_rows(p_dk, o_dk, m_n, b_dk, first, D, CHUNK, WIDEN)
