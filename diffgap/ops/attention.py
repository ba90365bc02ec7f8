r"""Attention for short sequences, with optional normalisation of queries and keys.

.. math::

    \hat q_i = w_q \odot \frac{q_i}{\sqrt{\tfrac1d \lVert q_i \rVert^2 + 10^{-6}}}, \qquad
    p_{ij} = m_j \exp(s\, \hat q_i \cdot \hat k_j), \qquad o_i = \frac{\sum_j p_{ij} v_j}{\sum_j p_{ij}}

per head, with the mask m in {0, 1}; without a weight :math:`\hat q = q`, and :math:`\hat k` likewise.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffgap.ops import _dispatch
from diffgap.ops._dispatch import choose

_EPS = 1e-6
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention ``softmax(scale * norm(q) @ norm(k).T) @ v``, self or cross, in the layout (B, N, H, d).

    Sums, norms and the softmax are computed in float32 for inputs of lower precision. Under autocast q, k
    and v are cast to autocast's dtype, as in :func:`torch.nn.functional.scaled_dot_product_attention`.

    Args:
        q: (B, N_q, H, d), float16, bfloat16, float32 or float64; any strides.
        k: (B, N_k, H, d), dtype and device of ``q``.
        v: (B, N_k, H, d), dtype and device of ``q``.
        q_weight: (d,), any floating-point dtype: divide each query by its root mean square (eps 1e-6) and
            multiply it by this.
        k_weight: (d,), the same for the keys.
        key_mask: (B, N_k) bool, True = attend. What masked keys and values hold, NaN included, has no
            influence; a query with no key to attend to gives zeros, and zero gradients.
        scale: factor of the logits; ``d ** -0.5`` by default.

    Returns:
        (B, N_q, H, d) in the dtype of ``q``. Gradients for q, k, v and both weights.

    Raises:
        ValueError: shapes or devices do not fit together, or ``scale`` is not finite.
        TypeError: a dtype is not one of the above.

    Source: Vaswani et al. 2017, arXiv 1706.03762; query-key normalisation: Henry et al. 2020, arXiv
    2010.04245, with the root mean square in place of the L2 norm as in Esser et al. 2024, arXiv 2403.03206.
    """
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
    if choose("attention", q) == "eager":
        return attention_reference(q, k, v, q_weight, k_weight, key_mask, scale)
    output: Tensor = _Attention.apply(*_dispatch.distinct(q, k, v, q_weight, k_weight), key_mask, scale)
    return output


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """The definition of :func:`attention` in plain torch; the weights are in the accumulation dtype."""
    dtype, accumulate = q.dtype, _accumulation_dtype(q)
    # Autocast would round the operands of the two products below to its dtype.
    autocast_off = torch.autocast(q.device.type, enabled=False) if _dispatch.autocast_dtype(q) else nullcontext()
    with autocast_off:
        q, k, v = (x.to(accumulate).transpose(1, 2) for x in (q, k, v))  # (B, H, N, d)
        if key_mask is not None:
            hidden = ~key_mask[:, None, :, None]
            k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        if q_weight is not None:
            q = _rms_norm(q, q_weight)
        if k_weight is not None:
            k = _rms_norm(k, k_weight)
        logits = (q * scale) @ k.transpose(-1, -2)  # (B, H, N_q, N_k)
        if key_mask is not None:
            # A finite fill keeps a fully masked row free of NaN: it averages values that are all zero.
            logits = logits.masked_fill(~key_mask[:, None, None, :], torch.finfo(accumulate).min)
        return (logits.softmax(-1) @ v).transpose(1, 2).to(dtype)


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS) * weight


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    key_mask: Tensor | None,
    scale: float | None,
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
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"attention: scale is {scale}; use a finite number")


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
) -> Tensor:
    return attention_reference(q, k, v, q_weight, k_weight, key_mask, scale).contiguous()


def _forward_fake(q: Tensor, *others: Any) -> Tensor:
    return q.new_empty(q.shape)


def _backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(_dispatch.vjp(attention_reference, inputs, [grad])[:5])


def _backward_fake(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) if x is not None else grad.new_empty(0) for x in inputs[:5])


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor? key_mask, float scale"
_attention = _dispatch.define(f"attention({_INPUTS}) -> Tensor", _forward, _forward_fake)
# The gradient of a weight that is absent is an empty tensor.
_attention_backward = _dispatch.define(
    f"attention_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_dispatch.declare("attention")


class _Attention(torch.autograd.Function):
    """The registered forward and backward ops as one differentiable function; saves only its inputs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        ctx.save_for_backward(*inputs[:6])
        ctx.scale = inputs[6]
        return _attention(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        grads = _attention_backward(grad, *ctx.saved_tensors, ctx.scale)
        absent = (weight is None for weight in ctx.saved_tensors[3:5])
        weights = (None if missing else g for missing, g in zip(absent, grads[3:], strict=True))
        return (*grads[:3], *weights, None, None)
