"""Drop-in for ``xformers.ops.memory_efficient_attention``; xformers itself is not needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffgap.integrations.attention import scaled_dot_product_attention
from diffgap.ops import attention


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """``softmax(scale * query @ key.T + attn_bias) @ value`` with xformers' arguments and layout.

    By :func:`diffgap.attention` without a bias and with ``LowerTriangularMask``, ``BlockDiagonalMask`` or
    ``BlockDiagonalCausalMask``. Tensors as biases, ``p`` above 0, values of another width than the keys' and inputs for
    which there is no kernel are torch's ``scaled_dot_product_attention``; under ``diffgap.backend("native")`` they
    raise.

    Args:
        query: (B, M, H, K); (B, M, K), a single head; or (B, M, G, H, K), G groups of H heads.
        key: (B, N, H, K), or with the other dimensions of ``query``; expand what several heads share.
        value: (B, N, H, K_v), likewise.
        attn_bias: ``None``, one of xformers' masks above, or a tensor: (B, H, M, N), (B, M, N) for a single head,
            (B, G, H, M, N) for groups.
        p: dropout of the weights; 0 with a block-diagonal mask.
        scale: factor of the logits; ``K ** -0.5`` by default.
        op: ``None``; xformers' kernels are not here to choose from.
        output_dtype: of the result, the inputs' by default. The inputs are widened to it, not narrowed.

    Returns:
        (B, M, H, K_v), or with the other dimensions of ``query``; contiguous.

    Raises:
        ValueError: shapes do not fit together, ``p`` is out of range or cannot be had, ``op`` is given.
        TypeError: ``attn_bias`` is another of xformers' masks, or ``output_dtype`` is not floating point.
        RuntimeError: backend ``native`` was asked for and the call is not one of ours.
    """
    _check(query, key, value, p, op, output_dtype)
    shape = (*query.shape[:-1], value.shape[-1])
    if output_dtype is not None:
        query, key, value = (x.to(torch.promote_types(x.dtype, output_dtype)) for x in (query, key, value))
    q, k, v = (x.unsqueeze(2) if x.ndim == 3 else x.flatten(2, -2) for x in (query, key, value))
    name = type(attn_bias).__name__  # as in diffgap.ops; xformers' masks may be tensors by their type
    causal = name == "LowerTriangularMask"
    if attn_bias is None or causal or type(attn_bias) in (Tensor, torch.nn.Parameter):
        mask = None if attn_bias is None or causal else _heads_first(attn_bias, query)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        output = scaled_dot_product_attention(q, k, v, mask, p, causal, scale).transpose(1, 2)
    elif p > 0.0:
        raise ValueError(f"memory_efficient_attention: p is {p}, and there is no dropout with a {name}; use p=0.0")
    else:
        output = attention(q, k, v, attn_bias, scale=scale)
    return output.to(output_dtype or output.dtype).reshape(shape).contiguous()


def _heads_first(bias: Tensor, query: Tensor) -> Tensor:
    """(B, M, N) or (B, G, H, M, N) biases as (B, H, M, N)."""
    if bias.ndim != query.ndim:
        raise ValueError(
            f"memory_efficient_attention: attn_bias has shape {tuple(bias.shape)}, query {tuple(query.shape)}; "
            "pass (B, H, M, N), with (B, M, K) inputs (B, M, N), with (B, M, G, H, K) inputs (B, G, H, M, N)"
        )
    return bias.unsqueeze(1) if bias.ndim == 3 else bias.flatten(1, -3)


def _check(query: Tensor, key: Tensor, value: Tensor, p: float, op: Any, output_dtype: torch.dtype | None) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.ndim not in (3, 4, 5) or not query.ndim == key.ndim == value.ndim:
        raise ValueError(
            f"memory_efficient_attention: got {shapes}; pass all three as (B, M, H, K), (B, M, K) or (B, M, G, H, K)"
        )
    if key.shape != (len(query), key.shape[1], *query.shape[2:]) or value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"memory_efficient_attention: got {shapes}; expand() key and value to the batch and heads of query"
        )
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"memory_efficient_attention: p is {p}; use a probability")
    if op is not None:
        raise ValueError(
            f"memory_efficient_attention: op is {op}, but xformers' kernels are not used here; leave it None"
        )
    if output_dtype is not None and not output_dtype.is_floating_point:
        raise TypeError(f"memory_efficient_attention: output_dtype is {output_dtype}; use a floating-point dtype")
