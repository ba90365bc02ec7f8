"""What :func:`diffgap.attention` takes besides its plain form: inputs without heads, and xformers' biases.

A block-diagonal bias lays sequences of many lengths end to end in one row. Here they are padded to the longest and the
padding hidden by a key mask, so that one launch serves them all: ``sum(n_i)`` tokens become ``len(n) * max(n)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# xformers is recognised by name, because importing it takes seconds; subclasses of these mean something else.
_CAUSAL = ("LowerTriangularMask", "BlockDiagonalCausalMask")
_BLOCK_DIAGONAL = ("BlockDiagonalMask", "BlockDiagonalCausalMask")


@dataclass(frozen=True)
class PlainForm:
    """Arguments of attention without a bias, (B, N, H, d), and what brings its output to the caller's form."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    causal: bool
    restore: Callable[[Tensor], Tensor]


def plain_form(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, key_mask: Tensor | None, causal: bool) -> PlainForm:
    """Bring (B, N, d) or (B, N, H, d) inputs with one of xformers' biases to :class:`PlainForm`.

    Raises:
        TypeError: ``attn_bias`` is none of ``None``, ``LowerTriangularMask``, ``BlockDiagonalMask`` and
            ``BlockDiagonalCausalMask``.
        ValueError: a block-diagonal bias does not fit the inputs.
    """
    if q.ndim == k.ndim == v.ndim == 3:
        form = plain_form(q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), attn_bias, key_mask, causal)
        return PlainForm(form.q, form.k, form.v, form.key_mask, form.causal, lambda x: form.restore(x).squeeze(2))
    name = type(attn_bias).__name__
    if attn_bias is not None and name not in _CAUSAL + _BLOCK_DIAGONAL:
        raise TypeError(
            f"attention: attn_bias is a {name}; pass None, xformers' LowerTriangularMask, BlockDiagonalMask or "
            "BlockDiagonalCausalMask, hide keys with key_mask, or use torch's scaled_dot_product_attention, "
            "which takes any bias"
        )
    causal = causal or name in _CAUSAL
    if name not in _BLOCK_DIAGONAL:
        return PlainForm(q, k, v, key_mask, causal, lambda x: x)
    queries = _Blocks(attn_bias.q_seqinfo, q, "q")
    keys = queries if attn_bias.k_seqinfo is attn_bias.q_seqinfo else _Blocks(attn_bias.k_seqinfo, k, "k")
    for label, tensor in (("k", k), ("v", v), ("key_mask", key_mask)):
        if tensor is not None:
            keys.check(tensor, label)
    if len(queries.lengths) != len(keys.lengths):
        raise ValueError(
            f"attention: attn_bias has {len(queries.lengths)} blocks of queries but {len(keys.lengths)} of keys; "
            "make them equal"
        )
    return PlainForm(queries.pad(q), keys.pad(k), keys.pad(v), keys.mask(key_mask), causal, queries.unpad)


class _Blocks:
    """Sequences laid end to end in one row, and their way to and from a padded batch."""

    def __init__(self, seqinfo: Any, tensor: Tensor, name: str) -> None:
        starts = seqinfo.seqstart_py
        self.total: int = starts[-1]
        self.lengths = [end - start for start, end in pairwise(starts)]
        self.longest = max(self.lengths, default=0)
        self.ragged = min(self.lengths, default=0) != self.longest
        self.check(tensor, name)
        if self.ragged:
            # On the device already in xformers' masks: a copy from the host could not be captured in a CUDA graph.
            self.starts = seqinfo.seqstart.to(tensor.device, torch.int64)
            self.position = torch.arange(self.longest, device=tensor.device)

    def check(self, tensor: Tensor, name: str) -> None:
        if tensor.shape[:2] != (1, self.total):
            raise ValueError(
                f"attention: {name} has shape {tuple(tensor.shape)} but attn_bias's blocks hold {self.total} tokens; "
                f"lay them end to end in one row, (1, {self.total}, ...)"
            )

    def pad(self, x: Tensor) -> Tensor:
        """(1, total, ...) to (blocks, longest, ...); the padding repeats the block's last token.

        Gradients of padding are exactly zero, so the sums over repeated tokens are the same bits in any order.
        """
        if not self.ragged:
            return x.squeeze(0).unflatten(0, (len(self.lengths), self.longest))
        first, last = self.starts[:-1, None], self.starts[1:, None] - 1
        index = (first + self.position).minimum(last).clamp(min=0)
        return x.squeeze(0).index_select(0, index.flatten()).unflatten(0, index.shape)

    def mask(self, key_mask: Tensor | None) -> Tensor | None:
        """Which keys of the padded batch there are to attend to, (blocks, longest); ``None`` if all."""
        allowed = None if key_mask is None else self.pad(key_mask)
        if not self.ragged:
            return allowed
        present = self.position < (self.starts[1:] - self.starts[:-1])[:, None]
        return present if allowed is None else present & allowed

    def unpad(self, x: Tensor) -> Tensor:
        """(blocks, longest, ...) to (1, total, ...)."""
        x = x.flatten(0, 1)
        if self.ragged:
            token = torch.arange(self.total, device=x.device)
            block = torch.bucketize(token, self.starts[1:], right=True)
            x = x.index_select(0, block * self.longest + token - self.starts[block])
        return x.unsqueeze(0)
