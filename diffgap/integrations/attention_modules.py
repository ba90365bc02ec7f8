"""Forward passes of other libraries' attention modules by :func:`diffgap.attention`.

Each class here goes in front of the module's own among its bases (see :mod:`diffgap.integrations.attention_swap`), so
that ``super()`` is the original, which takes the calls that are not ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from diffgap.integrations.attention import left_to_torch, scaled_dot_product_attention
from diffgap.ops import _dispatch, attention
from diffgap.ops.attention import EPS


class Adapted:
    """What all modules in a swapped tree have."""

    #: Longest square float mask that is the causal one; 0 if none is.
    causal_length: int = 0

    def __prepare_scriptable__(self) -> Any:
        """What ``torch.jit.script`` asks every module for; its compiler cannot read ours, and says so in riddles."""
        raise TypeError(
            f"torch.jit.script cannot compile the swapped {type(self).__name__}; call "
            "diffgap.restore_attention(model) first, or use torch.compile"
        )


class MultiheadAttention(Adapted, nn.MultiheadAttention):
    """torch's module: calls without weights, dropout, added keys and masks other than causal and padding."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        padding = _as_bool(key_padding_mask)
        causal = attn_mask is not None and (is_causal or is_causal_mask(attn_mask, self.causal_length))
        obstacle = self._obstacle(query, padding, need_weights)
        if causal != (attn_mask is not None or is_causal):
            obstacle = "attn_mask is not known to be the causal mask"
        if left_to_torch("MultiheadAttention", query, obstacle):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        q, k, v = self._projected(query, key, value)
        if not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        key_mask = None if padding is None else ~padding
        output = attention(q, k, v, key_mask=key_mask, causal=causal).flatten(2)
        output = F.linear(output, self.out_proj.weight, self.out_proj.bias)
        return (output if self.batch_first else output.transpose(0, 1)), None

    def _obstacle(self, query: Tensor, key_padding_mask: Tensor | None, need_weights: bool) -> str | None:
        if need_weights:
            return "attention weights cannot be had (need_weights=False)"
        if self.training and self.dropout > 0.0:
            return "it has no dropout"
        if self.bias_k is not None or self.add_zero_attn:
            return "keys cannot be added"
        if query.is_nested or query.ndim != 3:
            return "it takes batched, dense tensors only"
        if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
            return "key_padding_mask is neither bool nor, on the CPU, of 0 and -inf alone"
        return None

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values as views of (..., heads, head_dim), by as few products as the inputs allow."""
        if self._qkv_same_embed_dim:
            inputs, counts = _packed(query, key, value)
            weights = self.in_proj_weight.split([n * self.embed_dim for n in counts])
        else:
            inputs, counts = (query, key, value), (1, 1, 1)
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases: Any = [None] * len(counts)
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.split([n * self.embed_dim for n in counts])
        projected: list[Tensor] = []
        for x, weight, bias, n in zip(inputs, weights, biases, counts, strict=True):
            projected += F.linear(x, weight, bias).unflatten(-1, (n, self.num_heads, self.head_dim)).unbind(-3)
        return projected


def _as_bool(mask: Tensor | None) -> Tensor | None:
    """A float padding mask of 0 and -inf alone as bool, True = hidden; any other, and where looking stalls, as it is.

    :class:`torch.nn.TransformerEncoder` makes such a mask of its caller's bool one.
    """
    if mask is None or not mask.is_floating_point() or mask.requires_grad or not _dispatch.readable(mask):
        return mask
    hidden = mask == -torch.inf
    return hidden if (hidden | (mask == 0)).all() else mask


def _packed(query: Tensor, key: Tensor, value: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The distinct ones of the three, and how many of queries, keys and values each is projected to."""
    if key is not value:
        return (query, key, value), (1, 1, 1)
    return ((query,), (3,)) if query is key else ((query, key), (1, 2))


class TimmAttention(Adapted, nn.Module):
    """timm's ``Attention``, which DiT uses: calls with the tokens alone, without dropout of weights."""

    num_heads: int
    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout
    proj: nn.Linear
    proj_drop: nn.Dropout

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = all(option is None or option is False for option in (*args, *kwargs.values()))
        dropout = self.training and self.attn_drop.p > 0.0
        if not plain or dropout or left_to_torch("Attention", x, None):
            with Redirect(self.causal_length):
                return super().forward(x, *args, **kwargs)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        output = normed_attention(q, k, v, self.q_norm, self.k_norm)
        return self.proj_drop(self.proj(output.flatten(2)))


class DiffusersProcessor(Adapted):
    """diffusers' ``AttnProcessor2_0``: calls without a mask or with a boolean one of keys."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        key_mask = attention_mask
        if attention_mask is not None and attention_mask.dtype == torch.bool and attention_mask.ndim == 3:
            key_mask = attention_mask.squeeze(1)
        is_key_mask = key_mask is None or (
            key_mask.dtype == torch.bool and context.ndim == 3 and key_mask.shape == context.shape[:2]
        )
        if not is_key_mask or args or kwargs or left_to_torch("AttnProcessor2_0", hidden_states, None):
            with Redirect():
                return super().__call__(  # type: ignore[misc]
                    attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
                )
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            context = x
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(encoder_hidden_states)
        q, k, v = (
            project(tokens).unflatten(-1, (attn.heads, -1))
            for project, tokens in ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context))
        )
        output = normed_attention(q, k, v, attn.norm_q, attn.norm_k, key_mask).flatten(2)
        for layer in attn.to_out:
            output = layer(output)
        if hidden_states.ndim == 4:
            output = output.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            output = output + hidden_states
        return output / attn.rescale_output_factor


class Redirect(TorchFunctionMode):
    """Inside, calls of torch's ``scaled_dot_product_attention`` are calls of ours."""

    def __init__(self, causal_length: int = 0) -> None:
        super().__init__()
        self.causal_length = causal_length

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            func = self.attention
        return func(*args, **(kwargs or {}))

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        if attn_mask is not None and is_causal_mask(attn_mask, self.causal_length):
            attn_mask, is_causal = None, True
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)


def redirected(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` with its calls of torch's attention redirected to ours, and its signature."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with Redirect(self.causal_length):
            return method(self, *args, **kwargs)

    return call


def is_causal_mask(mask: Tensor, causal_length: int) -> bool:
    """Whether ``mask`` is a causal mask by its type and size alone, as known since the modules were swapped."""
    return mask.is_floating_point() and mask.ndim == 2 and mask.shape[0] == mask.shape[1] <= causal_length


def normed_attention(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Any, k_norm: Any, key_mask: Tensor | None = None
) -> Tensor:
    """Attention behind two normalisation modules (or ``None``), which are part of the operation if they are its own."""
    q_weight, k_weight = rms_weight(q_norm, q.shape[-1]), rms_weight(k_norm, k.shape[-1])
    if q_norm is not None and q_weight is None:
        q = q_norm(q)
    if k_norm is not None and k_weight is None:
        k = k_norm(k)
    return attention(q, k, v, q_weight=q_weight, k_weight=k_weight, key_mask=key_mask)


def rms_weight(norm: Any, head_dim: int) -> Tensor | None:
    """The weight of an RMS norm over the head dimension as :func:`diffgap.attention` has it; ``None`` for any other."""
    is_rms = isinstance(norm, nn.RMSNorm) or (
        type(norm).__name__ in ("RMSNorm", "RmsNorm") and type(norm).__module__.startswith(("diffusers.", "timm."))
    )
    if not is_rms or norm.eps != EPS or getattr(norm, "bias", None) is not None:
        return None
    weight: Tensor | None = norm.weight
    return weight if weight is not None and weight.shape == (head_dim,) else None
