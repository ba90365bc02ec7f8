"""The parts a denoiser is made of: timestep embedding, gated MLP, DiT block.

A block makes no norm, gate or attention of its own: it calls :func:`diffgap.ops.adaln.adaln` and
:func:`diffgap.ops.attention.attention`. Since ``adaln`` adds a gated branch and normalises the sum in one
pass, a block hands its last branch on un-added, as a :class:`Residual`, to whatever normalises the stream
next.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffgap.models.layers import Linear
from diffgap.models.randomness import STREAM_BRANCHES, Dropout
from diffgap.models.tokens import sinusoidal_embedding
from diffgap.ops.adaln import adaln
from diffgap.ops.attention import attention
from diffgap.ops.linear import swiglu

#: Rows of modulation a block reads, in DiT's order: shift, scale, gate of the attention, then of the MLP.
ROWS_PER_BLOCK = 6


class TimestepEmbedding(nn.Module):
    """Timesteps (B,), on the scale of 0 to 1000, -> (B, width): sinusoids through a two-layer MLP."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.inner = Linear(frequencies, width)
        self.outer = Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        waves = sinusoidal_embedding(t, self.inner.in_features).to(self.inner.weight.dtype)
        embedding: Tensor = self.outer(F.silu(self.inner(waves)))
        return embedding


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (SwiGLU; Shazeer 2020, arXiv 2002.05202).

    The hidden width, ``ratio`` times ``width``, is rounded up to a multiple of 8.
    """

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = math.ceil(width * ratio / 8) * 8
        self.gate_up = Linear(width, 2 * hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(swiglu(x, self.gate_up.weight, self.gate_up.bias))
        return output


class Residual(NamedTuple):
    """A residual stream (B, N, width) and the gated branch that the next norm adds to it."""

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None

    def normed(self, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The stream with its branch added, and its modulated layer norm.

        ``shift`` and ``scale`` are (G, width), for G groups of consecutive samples; so is the gate.
        """
        batch, tokens, width = self.x.shape
        groups = (len(shift), batch * tokens // max(len(shift), 1), width)  # those of a group in a row: a view
        branch = None if self.branch is None else self.branch.reshape(groups)
        y, h = adaln(self.x.reshape(groups), branch, self.gate, shift, scale)
        return y.view_as(self.x), h.view_as(self.x)


class Context(NamedTuple):
    """Keys and values that tokens attend to beside their own.

    Attributes:
        keys_values: (B, room + M, 2, heads, width / heads).
        room: Leading tokens whose memory is free for the attending tokens' own keys and values.
    """

    keys_values: Tensor
    room: int = 0

    def beside(self, own: Tensor) -> Tensor:
        """``own`` (B, N, 2, heads, width / heads), then these: (B, N + M, ...); in place where there is room for it."""
        if self.room and self.room == own.shape[1]:
            self.keys_values[:, : self.room].copy_(own)
            return self.keys_values
        return torch.cat([own, self.keys_values[:, self.room :].to(own.dtype)], 1)


class BlockShape(Protocol):
    """What a block needs to know of its network's configuration."""

    @property
    def width(self) -> int: ...

    @property
    def heads(self) -> int: ...

    @property
    def mlp_ratio(self) -> float: ...

    @property
    def dropout(self) -> float: ...


class DiTBlock(nn.Module):
    """Attention and gated MLP, each behind an adaptive norm and a gate.

    Queries and keys are RMS-normalised per head. The modulation comes from outside, so that one matrix
    product makes that of all blocks, and a sampler can make it for all steps beforehand.

    Source: Peebles & Xie 2023, arXiv 2212.09748.

    Args:
        config: Of the network.
        number: Of the block in its network: no two blocks drop out the same elements.
    """

    def __init__(self, config: BlockShape, number: int = 0) -> None:
        super().__init__()
        self.split = (config.heads, config.width // config.heads)
        self.qkv = Linear(config.width, 3 * config.width)
        self.q_weight = nn.Parameter(torch.ones(self.split[1]))
        self.k_weight = nn.Parameter(torch.ones(self.split[1]))
        self.out = Linear(config.width, config.width)
        self.mlp = GatedMLP(config.width, config.mlp_ratio)
        self.attention_dropout = Dropout(config.dropout, STREAM_BRANCHES, 2 * number)
        self.mlp_dropout = Dropout(config.dropout, STREAM_BRANCHES, 2 * number + 1)

    def forward(
        self,
        stream: Residual,
        rows: Tensor,
        *,
        context: Context | None = None,
        key_mask: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Residual:
        """Run the block.

        Args:
            stream: the residual stream, tokens (B, N, width).
            rows: (G, 6, width) modulation, see :data:`ROWS_PER_BLOCK`: of each sample, or of groups of B / G
                consecutive ones.
            context: what the tokens attend to beside themselves.
            key_mask: (B, N + M) bool, True = attend.
            seeds: (B,) int64, decide the dropout; drawn if not given.
        """
        attention_shift, attention_scale, attention_gate, mlp_shift, mlp_scale, mlp_gate = rows.unbind(1)
        x, h = stream.normed(attention_shift, attention_scale)
        qkv = self.qkv(h).unflatten(-1, (3, *self.split))
        q, own = qkv.split((1, 2), 2)  # whose gradients are joined by one copy, where slices would fill two with zeros
        k, v = (own if context is None else context.beside(own)).unbind(2)
        mixed = attention(q.squeeze(2), k, v, q_weight=self.q_weight, k_weight=self.k_weight, key_mask=key_mask)
        stream = Residual(x, self.attention_dropout(self.out(mixed.flatten(2)), seeds), attention_gate)
        x, h = stream.normed(mlp_shift, mlp_scale)
        return Residual(x, self.mlp_dropout(self.mlp(h), seeds), mlp_gate)
