"""How large the terms are that cancel in the gradients of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from diffgap.ops.attention import EPS


def attention_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    scale: float,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    hidden: Tensor | None = None,
) -> dict[str, float]:
    r"""Norms of the sums of absolute terms of the gradients of q, k and their weights, in float64.

    With p the attention weights, g the output's gradient and :math:`\hat q`, :math:`\hat k` the normed inputs,

    .. math::
        \frac{\partial}{\partial \hat q_i} = s \sum_j p_{ij} (g_i \cdot v_j - g_i \cdot o_i) \hat k_j,

    likewise for k. Where all values are alike, or there is one key, the difference is 0 and rounding remains, of
    terms of the size :math:`s\, p_{ij} |g_i \cdot v_j| |\hat k_j|`. The norm of x divides by its root mean square.

    Args:
        q: (B, N_q, H, d); k and v, (B, N_k, H, d), and grad, of q's shape, alike.
        grad: The gradient of the output. What is not finite in keys and values has to be hidden.
        scale: s.
        q_weight: (d,), if queries are normed; ``k_weight`` likewise.
        hidden: Pairs that do not attend, broadcast against (B, H, N_q, N_k).
    """
    normed, sizes = {}, {}
    for name, x, weight in (("q", q, q_weight), ("k", k, k_weight)):
        x = x.double().nan_to_num().transpose(1, 2)
        rms = torch.ones_like(x[..., :1]) if weight is None else (x.square().mean(-1, keepdim=True) + EPS).sqrt()
        normed[name] = x / rms if weight is None else x / rms * weight.double()
        sizes[name] = (x.abs() / rms, (1.0 if weight is None else weight.double().abs()) / rms)
    logits = scale * normed["q"] @ normed["k"].transpose(-1, -2)
    if hidden is not None:
        logits = logits.masked_fill(hidden, -torch.inf)
    share = logits.softmax(-1).nan_to_num()
    terms = abs(scale) * share * (grad.double().transpose(1, 2) @ v.double().nan_to_num().transpose(1, 2).mT).abs()
    found = {}
    for name, each in (("q", terms @ normed["k"].abs()), ("k", terms.mT @ normed["q"].abs())):
        by_weight, by_input = sizes[name]
        found[name] = (each * by_input).norm().item()
        found[f"{name}_weight"] = (each * by_weight).sum((0, 1, 2)).norm().item()
    return found
