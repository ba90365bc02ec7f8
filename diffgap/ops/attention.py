r"""Attention for short sequences, with optional normalisation of queries and keys.

.. math::

    \hat q_i = w_q \odot \frac{q_i}{\sqrt{\tfrac1d \lVert q_i \rVert^2 + 10^{-6}}}, \qquad
    p_{ij} = m_{ij} \exp(s\, \hat q_i \cdot \hat k_j), \qquad o_i = \frac{\sum_j p_{ij} v_j}{\sum_j p_{ij}}

per head, with m in {0, 1}: zero where key j is masked or, if causal, j > i. Without a weight :math:`\hat q = q`, and
:math:`\hat k` likewise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from diffgap.ops import _dispatch
from diffgap.ops._attention_bias import plain_form
from diffgap.ops._dispatch import Native
from diffgap.ops._native import CPU_MISSING, TRITON_MISSING

#: The most queries and keys that the GPU's kernels hold at once; the backward pass then needs nothing but the inputs.
SHORT = 64

#: Of the norm of queries and keys.
EPS = 1e-6
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Any = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention ``softmax(scale * norm(q) @ norm(k).T) @ v``, self or cross, in the layout (B, N, H, d).

    Sums, norms and the softmax are computed in float32 for inputs of lower precision. Under autocast q, k
    and v are cast to autocast's dtype, as in :func:`torch.nn.functional.scaled_dot_product_attention`.

    Args:
        q: (B, N_q, H, d), float16, bfloat16, float32 or float64; any strides.
        k: (B, N_k, H, d), dtype and device of ``q``.
        v: (B, N_k, H, d), dtype and device of ``q``. All three may be (B, N, d), a single head.
        attn_bias: as in ``xformers.ops.memory_efficient_attention``: ``LowerTriangularMask``, or ``BlockDiagonalMask``
            or ``BlockDiagonalCausalMask`` over sequences laid end to end in one row, (1, total, H, d), which are padded
            to the longest.
        q_weight: (d,), any floating-point dtype: divide each query by its root mean square (eps 1e-6) and
            multiply it by this.
        k_weight: (d,), the same for the keys.
        key_mask: (B, N_k) bool, True = attend. What masked keys and values hold, NaN included, has no
            influence; a query with no key to attend to gives zeros, and zero gradients.
        causal: query i attends to the keys j <= i, of its own block if the bias is block-diagonal.
        scale: factor of the logits; ``d ** -0.5`` by default.

    Returns:
        The shape of ``q``, in its dtype, contiguous. Gradients for q, k, v and both weights.

    Raises:
        ValueError: shapes or devices do not fit together, or ``scale`` is not finite.
        TypeError: a dtype is not one of the above, or ``attn_bias`` is of another kind.

    Source: Vaswani et al. 2017, arXiv 1706.03762; query-key normalisation: Henry et al. 2020, arXiv
    2010.04245, with the root mean square in place of the L2 norm as in Esser et al. 2024, arXiv 2403.03206.
    """
    if attn_bias is not None or q.ndim == k.ndim == v.ndim == 3:
        plain = plain_form(q, k, v, attn_bias, key_mask, causal)
        weights = {"q_weight": q_weight, "k_weight": k_weight}
        return plain.restore(
            attention(plain.q, plain.k, plain.v, key_mask=plain.key_mask, causal=plain.causal, scale=scale, **weights)
        )
    dtype = _dispatch.autocast_dtype(q)
    if dtype is not None:
        q, k, v = (x.to(dtype) if x.dtype in _AUTOCAST_DTYPES else x for x in (q, k, v))
    _check(q, k, v, q_weight, k_weight, key_mask, scale)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    accumulate = _accumulation_dtype(q)
    if q_weight is not None:
        q_weight = q_weight.to(accumulate)
    if k_weight is not None:
        k_weight = k_weight.to(accumulate)
    if _dispatch.choose("attention", q) == "eager":
        return attention_reference(q, k, v, q_weight, k_weight, key_mask, scale, causal)
    output: Tensor = _Attention.apply(*_dispatch.distinct(q, k, v, q_weight, k_weight), key_mask, scale, causal)
    return output


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    """The definition of :func:`attention` in plain torch; the weights are in the accumulation dtype."""
    dtype, accumulate = q.dtype, _accumulation_dtype(q)
    # Autocast would round the operands of the two products below to its dtype.
    with _dispatch.autocast_off(q):
        q, k, v = (x.to(accumulate).transpose(1, 2) for x in (q, k, v))  # (B, H, N, d)
        if key_mask is not None:
            hidden_keys = ~key_mask[:, None, :, None]
            k, v = k.masked_fill(hidden_keys, 0.0), v.masked_fill(hidden_keys, 0.0)
        if q_weight is not None:
            q = _rms_norm(q, q_weight)
        if k_weight is not None:
            k = _rms_norm(k, k_weight)
        logits = (q * scale) @ k.transpose(-1, -2)  # (B, H, N_q, N_k)
        hidden = _hidden_pairs(q, k, key_mask, causal)
        if hidden is not None:
            logits = logits.masked_fill(hidden, -math.inf)
            # A row without a key to attend to would be NaN.
            empty = hidden.all(-1, keepdim=True)
            weights = logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
        else:
            weights = logits.softmax(-1)
        return (weights @ v).transpose(1, 2).to(dtype).contiguous()  # as the kernels: users take views of it


def _hidden_pairs(q: Tensor, k: Tensor, key_mask: Tensor | None, causal: bool) -> Tensor | None:
    """Which pairs do not attend, broadcast against (B, H, N_q, N_k); ``None`` if all do. q and k are (B, H, N, d)."""
    hidden = None if key_mask is None else ~key_mask[:, None, None, :]
    if causal:
        future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        hidden = future if hidden is None else hidden | future
    return hidden


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    key_mask: Tensor | None,
    scale: Any,
) -> None:
    """Raise one clear error for inputs :func:`attention` cannot take."""
    if q.dtype not in _DTYPES:
        raise TypeError(f"attention: q has dtype {q.dtype}; use float16, bfloat16, float32 or float64")
    if q.ndim != 4 or q.shape[-1] == 0:
        raise ValueError(f"attention: q has shape {tuple(q.shape)}; pass (batch, tokens, heads, head_dim)")
    expected = (q.shape[0], k.shape[1] if k.ndim > 1 else 1, q.shape[2], q.shape[3])
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != expected:
            raise ValueError(
                f"attention: {name} has shape {tuple(tensor.shape)}, expected {expected} "
                f"(batch, keys, heads, head_dim) from q {tuple(q.shape)} and k {tuple(k.shape)}"
            )
        if tensor.dtype != q.dtype:
            raise TypeError(f"attention: {name} has dtype {tensor.dtype} but q {q.dtype}; convert one of them")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and weight.shape != q.shape[3:]:
            raise ValueError(
                f"attention: {name} has shape {tuple(weight.shape)}; pass ({q.shape[3]},), one per head_dim"
            )
        if weight is not None and not weight.is_floating_point():
            raise TypeError(f"attention: {name} has dtype {weight.dtype}; use a floating-point dtype")
    if key_mask is not None and key_mask.shape != k.shape[:2]:
        raise ValueError(
            f"attention: key_mask has shape {tuple(key_mask.shape)}; pass {tuple(k.shape[:2])} (batch, keys)"
        )
    if key_mask is not None and key_mask.dtype != torch.bool:
        raise TypeError(f"attention: key_mask has dtype {key_mask.dtype}; use bool, True = attend")
    others = (("k", k), ("v", v), ("q_weight", q_weight), ("k_weight", k_weight), ("key_mask", key_mask))
    for name, other in others:
        if other is not None and other.device != q.device:
            raise ValueError(f"attention: {name} is on {other.device} but q on {q.device}; move one of them")
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise TypeError("attention: scale is a number and gets no gradient; multiply q by a tensor that learns")
    if scale is not None and not _dispatch.is_finite(scale):
        raise ValueError(f"attention: scale is {scale}; use a finite number")


def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    output = attention_reference(*inputs)
    return output, output.new_empty(0, dtype=torch.float32)


def _forward_fake(q: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    lse_shape = (q.shape[0], q.shape[2], q.shape[1]) if _saves_lse(q, k) else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


def _saves_lse(q: Tensor, k: Tensor) -> bool:
    """Whether the forward pass hands the log-sum-exps of its logits, and its output, to the backward pass."""
    return q.device.type == "cuda" and TRITON_MISSING is None and max(q.shape[1], k.shape[1]) > SHORT


def _backward(grad: Tensor, output: Tensor | None, lse: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(_dispatch.vjp(attention_reference, inputs, [grad])[:5])


def _backward_fake(grad: Tensor, output: Tensor | None, lse: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) if x is not None else grad.new_empty(0) for x in inputs[:5])


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor? key_mask, float scale, bool causal"
# The second output is (B, H, N_q) float32, the log-sum-exp of every row of logits, or empty where the backward pass
# computes it again from the inputs.
_attention = _dispatch.define(f"attention({_INPUTS}) -> (Tensor, Tensor)", _forward, _forward_fake)
# The gradient of a weight that is absent is an empty tensor.
_attention_backward = _dispatch.define(
    f"attention_backward(Tensor grad, Tensor? output, Tensor? lse, {_INPUTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_CPU = Native("C++", _NATIVE_DTYPES, CPU_MISSING)
_CUDA = Native("Triton", _NATIVE_DTYPES, TRITON_MISSING)
_dispatch.declare("attention", cpu=_CPU, cuda=_CUDA)
_dispatch.implement(_CUDA, "diffgap.kernels.attention", attention="forward", attention_backward="backward")


class _Attention(torch.autograd.Function):
    """The registered forward and backward ops as one differentiable function."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output, lse = _attention(*inputs)
        saved = (output, lse) if lse.ndim > 1 else (None, None)
        ctx.save_for_backward(*inputs[:6], *saved)
        ctx.options = inputs[6:]
        return output

    @staticmethod
    @_dispatch.first_order
    def backward(ctx: Any, grad: Tensor) -> Any:
        *inputs, output, lse = ctx.saved_tensors
        grads = _attention_backward(grad, output, lse, *inputs, *ctx.options)
        weights = (None if x is None else g for x, g in zip(inputs[3:5], grads[3:], strict=True))
        return (*grads[:3], *weights, None, None, None)
