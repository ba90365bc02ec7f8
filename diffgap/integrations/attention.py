"""Drop-in for :func:`torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffgap.ops import _dispatch, attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``softmax(scale * query @ key.T) @ value`` with torch's arguments and layout, by :func:`diffgap.attention`.

    Ours are calls without a mask, causal ones, and boolean masks that hide the same keys from every query
    and head; self or cross, any number of leading dimensions, grouped queries. All others, and inputs for whose
    device or dtype there is no kernel of ours, are torch's: float biases, masks of pairs, dropout, values of
    another width than the keys', leading dimensions that broadcast. Under ``diffgap.backend("native")`` those raise.

    Args:
        query: (..., H, L, E); L, E or H, L, E alone will do.
        key: (..., H, S, E); with ``enable_gqa`` of fewer heads, which divide ``query``'s.
        value: (..., H, S, E), the heads of ``key``.
        attn_mask: bool, True = attend, (..., 1, 1, S), what broadcasts to it, or what it was expanded to by
            :meth:`torch.Tensor.expand`. A query with no key to
            attend to gives zeros.
        dropout_p: 0; anything else is torch's.
        is_causal: query i attends to the keys j <= i.
        scale: factor of the logits; ``E ** -0.5`` by default.
        enable_gqa: heads of ``key`` and ``value`` serve groups of consecutive heads of ``query``.

    Returns:
        The shape and dtype of ``query``, differentiable once. ``output.transpose(-3, -2)``, (..., L, H, E), is
        contiguous, as torch's is if that of ``query`` is.

    Raises:
        RuntimeError: backend ``native`` was asked for and the call is not one of ours.
        ValueError, TypeError: as :func:`diffgap.attention`.
    """
    obstacle = _obstacle(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if left_to_torch("scaled_dot_product_attention", query, obstacle):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    shape = query.shape
    if query.ndim < 4:
        # (L, E), (N, L, E), or (H, L, E) where the heads are grouped.
        missing = (None, None) if query.ndim == 2 else (None,) if enable_gqa else (slice(None), None)
        query, key, value = query[missing], key[missing], value[missing]
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask[missing]
    if attn_mask is not None:
        attn_mask = attn_mask[..., :1, :].expand(*query.shape[:-3], 1, 1, key.shape[-2]).flatten(0, -2)
    query, key, value = (x.flatten(0, -4) for x in (query, key, value))
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (key, value))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    output = attention(query, key, value, key_mask=attn_mask, causal=is_causal, scale=scale)
    return output.transpose(1, 2).reshape(shape)


def left_to_torch(name: str, query: Tensor, obstacle: str | None) -> bool:
    """Whether a call of ``name`` is left to torch: for the ``obstacle``, or for want of a kernel.

    Our reference holds every logit, so without a kernel it is taken only where backend ``eager`` asks for it.

    Raises:
        RuntimeError: it is, but backend ``native`` was asked for.
    """
    if obstacle is None:
        return _dispatch.choose("attention", query) == "eager" and _dispatch.selected() != "eager"
    if _dispatch.selected() == "native":
        raise RuntimeError(f"{name}: backend 'native' was asked for, but {obstacle}; use diffgap.backend('auto')")
    return True


def _obstacle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> str | None:
    """Why :func:`diffgap.attention` cannot take these arguments; ``None`` if it can."""
    if dropout_p > 0.0:
        return "it has no dropout"
    if query.is_nested or key.is_nested or value.is_nested:
        return "it takes no nested tensors"
    if not 2 + enable_gqa <= query.ndim == key.ndim == value.ndim:
        return "the inputs differ in their number of dimensions"
    if not query.shape[-1] == key.shape[-1] == value.shape[-1] > 0:
        return "queries, keys and values differ in width"
    batch = slice(None, -3 if enable_gqa else -2)
    if query.shape[batch] != key.shape[batch] or key.shape[:-1] != value.shape[:-1]:
        return "the leading dimensions differ"
    if enable_gqa and (key.shape[-3] == 0 or query.shape[-3] % key.shape[-3] != 0):
        return "the heads of the keys do not divide those of the queries"
    if attn_mask is None:
        return None
    if attn_mask.dtype != torch.bool:
        return "it takes boolean masks only"
    if is_causal or not 2 <= attn_mask.ndim <= query.ndim or not _is_one_row(attn_mask, query):
        return "the mask is not one of keys alone"
    has_heads = query.ndim > 3 or enable_gqa
    if has_heads and attn_mask.ndim > 2 and attn_mask.shape[-3] != 1:
        return "the mask differs between heads"
    return None


def _is_one_row(mask: Tensor, query: Tensor) -> bool:
    """Whether all queries have the same row of ``mask``, by its strides if it has one for each."""
    return mask.shape[-2] == 1 or (0 < mask.shape[-2] == query.shape[-2] and mask.stride(-2) == 0)
