"""Kernels of attention of any length: a block of rows of one side, a batch and head, against all blocks of the other.

The softmax is computed online; its logarithmic sums are saved, and the output. Backward, one kernel sums over the keys
and one over the queries, so that nothing is atomic.
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
def _block(N, BLOCK: tl.constexpr):
    """This program's pair, the first row of its block, all its rows, and which of them there are."""
    count = tl.cdiv(N, BLOCK)
    first = tl.program_id(0) % count * BLOCK
    o_row = first + tl.arange(0, BLOCK)
    return tl.program_id(0) // count, first, o_row, o_row < N


@triton.jit(do_not_specialize=SIZES)
def long_forward_kernel(
    p_q, p_k, p_v, p_q_weight, p_k_weight, p_mask, p_output, p_lse, scale, H, NQ, NK, width,
    q_strides, k_strides, v_strides, output_strides,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A block of rows of ``output`` and of ``lse`` (B, H, NQ)."""
    i_pair, first_m, o_m, m_m = _block(NQ, BLOCK_M)
    o_q = offsets(i_pair, o_m, H, q_strides)
    b_rms_q = inverse_rms(p_q, o_q, m_m, Q_NORM, D, FEATURES, BLOCK_D)
    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_o = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    last = tl.minimum(NK, first_m + BLOCK_M) if CAUSAL else NK
    for first in range(0, last, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = attending_keys(p_mask, i_pair, o_n, o_n < NK, H, NK, HAS_MASK)
        o_k, o_v = offsets(i_pair, o_n, H, k_strides), offsets(i_pair, o_n, H, v_strides)
        b_rms_k = inverse_rms(p_k, o_k, m_n, K_NORM, D, FEATURES, BLOCK_D)
        b_s = product(
            p_q, o_q, m_m, b_rms_q, p_q_weight, Q_NORM, p_k, o_k, m_n, b_rms_k, p_k_weight, K_NORM,
            width, D, CHUNK, PRECISION, WIDEN,
        ) * (scale * LOG2E)  # fmt: skip
        if MASKED:
            m_pairs = m_n[None, :]
            if CAUSAL:
                m_pairs &= o_n[None, :] <= o_m[:, None]
            b_s = tl.where(m_pairs, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # nothing but -inf so far: -inf - -inf would be NaN
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_max, b_sum = b_new, b_sum * b_decay + tl.sum(b_p, 1)
        b_v = load_rows(p_v, o_v, m_n, 0, D, BLOCK_D, WIDEN)  # [BLOCK_N, BLOCK_D]
        b_o = tl.dot(narrow(b_p, b_v.dtype, WIDEN), b_v, b_o * b_decay[:, None], input_precision=PRECISION)
    b_positive = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_o /= b_positive[:, None]
    store_rows(p_output, offsets(i_pair, o_m, H, output_strides), m_m, b_o, 0, D, BLOCK_D, WIDEN)
    b_lse = tl.where(b_sum == 0.0, float("-inf"), (b_max + tl.log2(b_positive)) / LOG2E)
    tl.store(p_lse + i_pair.to(tl.int64) * NQ + o_m, b_lse, mask=m_m)


@triton.jit
def _logits_backward(b_s, b_dp, b_lse, b_delta, m_pairs, MASKED: tl.constexpr):
    """P and ``dS = P * (dP - delta)`` of a tile."""
    b_p = tl.exp2((b_s - b_lse) * LOG2E)
    b_ds = b_p * (b_dp - b_delta)
    if MASKED:
        b_p, b_ds = tl.where(m_pairs, b_p, 0.0), tl.where(m_pairs, b_ds, 0.0)
    return b_p, b_ds


@triton.jit(do_not_specialize=SIZES)
def long_backward_queries_kernel(
    p_grad, p_output, p_lse, p_q, p_k, p_v, p_q_weight, p_k_weight, p_mask, p_dq, p_delta, p_parts,
    scale, H, NQ, NK, width,
    grad_strides, output_strides, q_strides, k_strides, v_strides, dq_strides,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A block of rows of ``dq``, of ``delta = rowsum(G * output)`` (B, H, NQ), which is the row sum of ``P * dP``, and
    one row of ``parts`` (programs, d). The formulas are those of the short kernel."""
    i_pair, first_m, o_m, m_m = _block(NQ, BLOCK_M)
    o_q, o_g = offsets(i_pair, o_m, H, q_strides), offsets(i_pair, o_m, H, grad_strides)
    b_rms_q = inverse_rms(p_q, o_q, m_m, Q_NORM, D, FEATURES, BLOCK_D)
    o_output = offsets(i_pair, o_m, H, output_strides)
    b_o = load_rows(p_output, o_output, m_m, 0, D, BLOCK_D, True)
    b_delta = tl.sum(b_o * load_rows(p_grad, o_g, m_m, 0, D, BLOCK_D, True), 1)
    o_row = i_pair.to(tl.int64) * NQ + o_m
    tl.store(p_delta + o_row, b_delta, mask=m_m)
    b_lse = tl.load(p_lse + o_row, mask=m_m, other=0.0)
    b_dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    b_mean = tl.zeros((BLOCK_M,), tl.float32)
    last = tl.minimum(NK, first_m + BLOCK_M) if CAUSAL else NK
    for first in range(0, last, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = attending_keys(p_mask, i_pair, o_n, o_n < NK, H, NK, HAS_MASK)
        o_k, o_v = offsets(i_pair, o_n, H, k_strides), offsets(i_pair, o_n, H, v_strides)
        b_rms_k = inverse_rms(p_k, o_k, m_n, K_NORM, D, FEATURES, BLOCK_D)
        b_s = product(
            p_q, o_q, m_m, b_rms_q, p_q_weight, Q_NORM, p_k, o_k, m_n, b_rms_k, p_k_weight, K_NORM,
            width, D, CHUNK, PRECISION, WIDEN,
        ) * scale  # fmt: skip
        b_dp = product(
            p_grad, o_g, m_m, None, None, False, p_v, o_v, m_n, None, None, False, width, D, CHUNK, PRECISION, WIDEN
        )  # fmt: skip
        m_pairs = m_n[None, :]
        if CAUSAL:
            m_pairs &= o_n[None, :] <= o_m[:, None]
        _, b_ds = _logits_backward(b_s, b_dp, b_lse[:, None], b_delta[:, None], m_pairs, MASKED)
        b_mean += tl.sum(b_ds * b_s, 1)
        b_k = load_rows(p_k, o_k, m_n, 0, D, BLOCK_D, WIDEN)  # [BLOCK_N, BLOCK_D]
        b_k = normed(b_k, b_rms_k, p_k_weight, 0, K_NORM, D, BLOCK_D, WIDEN)
        b_dq = tl.dot(narrow(b_ds, b_k.dtype, WIDEN), b_k, b_dq, input_precision=PRECISION)
    p_part = p_parts + tl.program_id(0).to(tl.int64) * D
    b_x = load_rows(p_q, o_q, m_m, 0, D, BLOCK_D, WIDEN)
    b_dq = norm_backward(
        b_dq * scale, b_x, b_rms_q, b_mean[:, None] / FEATURES, p_q_weight, p_part, 0, Q_NORM, D, BLOCK_D
    )  # fmt: skip
    store_rows(p_dq, offsets(i_pair, o_m, H, dq_strides), m_m, b_dq, 0, D, BLOCK_D, WIDEN)


@triton.jit(do_not_specialize=SIZES)
def long_backward_keys_kernel(
    p_grad, p_delta, p_lse, p_q, p_k, p_v, p_q_weight, p_k_weight, p_mask, p_dk, p_dv, p_parts, scale, H, NQ, NK, width,
    grad_strides, q_strides, k_strides, v_strides, dk_strides,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A block of BLOCK_M rows of ``dk`` and ``dv``, and one row of ``parts`` (programs, d)."""
    i_pair, first_n, o_n, m_n = _block(NK, BLOCK_M)
    m_key = attending_keys(p_mask, i_pair, o_n, m_n, H, NK, HAS_MASK)
    o_k, o_v = offsets(i_pair, o_n, H, k_strides), offsets(i_pair, o_n, H, v_strides)
    b_rms_k = inverse_rms(p_k, o_k, m_key, K_NORM, D, FEATURES, BLOCK_D)
    b_dk, b_dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    b_mean = tl.zeros((BLOCK_M,), tl.float32)
    # Queries before the block's first key do not see it.
    start = first_n // BLOCK_N * BLOCK_N if CAUSAL else 0
    for first in range(start, NQ, BLOCK_N):
        o_m = first + tl.arange(0, BLOCK_N)
        m_m = o_m < NQ
        o_q, o_g = offsets(i_pair, o_m, H, q_strides), offsets(i_pair, o_m, H, grad_strides)
        b_rms_q = inverse_rms(p_q, o_q, m_m, Q_NORM, D, FEATURES, BLOCK_D)
        o_row = i_pair.to(tl.int64) * NQ + o_m
        b_lse = tl.load(p_lse + o_row, mask=m_m, other=0.0)
        b_delta = tl.load(p_delta + o_row, mask=m_m, other=0.0)
        # Transposed, [BLOCK_M, BLOCK_N] of keys and queries: P and dS are then the left operands of their products.
        b_s = product(
            p_k, o_k, m_key, b_rms_k, p_k_weight, K_NORM, p_q, o_q, m_m, b_rms_q, p_q_weight, Q_NORM,
            width, D, CHUNK, PRECISION, WIDEN,
        ) * scale  # fmt: skip
        b_dp = product(
            p_v, o_v, m_key, None, None, False, p_grad, o_g, m_m, None, None, False, width, D, CHUNK, PRECISION, WIDEN
        )  # fmt: skip
        m_pairs = m_key[:, None]
        if CAUSAL:
            m_pairs &= o_n[:, None] <= o_m[None, :]
        b_p, b_ds = _logits_backward(b_s, b_dp, b_lse[None, :], b_delta[None, :], m_pairs, MASKED)
        b_mean += tl.sum(b_ds * b_s, 1)
        b_g = load_rows(p_grad, o_g, m_m, 0, D, BLOCK_D, WIDEN)  # [BLOCK_N, BLOCK_D]
        b_dv = tl.dot(narrow(b_p, b_g.dtype, WIDEN), b_g, b_dv, input_precision=PRECISION)
        b_q = load_rows(p_q, o_q, m_m, 0, D, BLOCK_D, WIDEN)  # [BLOCK_N, BLOCK_D]
        b_q = normed(b_q, b_rms_q, p_q_weight, 0, Q_NORM, D, BLOCK_D, WIDEN)
        b_dk = tl.dot(narrow(b_ds, b_q.dtype, WIDEN), b_q, b_dk, input_precision=PRECISION)
    o_dk = offsets(i_pair, o_n, H, dk_strides)
    store_rows(p_dv, o_dk, m_n, b_dv, 0, D, BLOCK_D, WIDEN)
    p_part = p_parts + tl.program_id(0).to(tl.int64) * D
    b_x = load_rows(p_k, o_k, m_key, 0, D, BLOCK_D, WIDEN)
    b_dk = norm_backward(
        b_dk * scale, b_x, b_rms_k, b_mean[:, None] / FEATURES, p_k_weight, p_part, 0, K_NORM, D, BLOCK_D
    )  # fmt: skip
    store_rows(p_dk, o_dk, m_n, b_dk, 0, D, BLOCK_D, WIDEN)
