"""The parts a denoiser is made of: timestep embedding, gated MLP, DiT block.

A block makes no norm, gate or attention of its own: it calls :func:`diffgap.ops.adaln.adaln` and
:func:`diffgap.ops.attention.attention`. Since ``adaln`` adds a gated branch and normalises the sum in one
pass, a block hands its last branch on un-added, as a :class:`Residual`, to whatever normalises the stream
next.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffgap.models.tokens import DenoiserConfig, sinusoidal_embedding
from diffgap.ops.adaln import adaln
from diffgap.ops.attention import attention

#: Rows of modulation a block reads, in DiT's order: shift, scale, gate of the attention, then of the MLP.
ROWS_PER_BLOCK = 6


class TimestepEmbedding(nn.Module):
    """Timesteps (B,), on the scale of 0 to 1000, -> (B, width): sinusoids through a two-layer MLP."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.inner = nn.Linear(frequencies, width)
        self.outer = nn.Linear(width, width)

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
        self.gate_up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        output: Tensor = self.down(F.silu(gate) * up)
        return output


class Residual(NamedTuple):
    """A residual stream (B, N, width) and the gated branch that the next norm adds to it."""

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None

    def normed(self, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The stream with its branch added, and its modulated layer norm."""
        return adaln(self.x, self.branch, self.gate, shift, scale)


class DiTBlock(nn.Module):
    """Attention and gated MLP, each behind an adaptive norm and a gate.

    Queries and keys are RMS-normalised per head. The modulation comes from outside, so that one matrix
    product makes that of all blocks, and a sampler can make it for all steps beforehand.

    Source: Peebles & Xie 2023, arXiv 2212.09748.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.split = (config.heads, config.width // config.heads)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.q_weight = nn.Parameter(torch.ones(self.split[1]))
        self.k_weight = nn.Parameter(torch.ones(self.split[1]))
        self.out = nn.Linear(config.width, config.width)
        self.mlp = GatedMLP(config.width, config.mlp_ratio)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        stream: Residual,
        rows: Tensor,
        *,
        context: tuple[Tensor, Tensor] | None = None,
        key_mask: Tensor | None = None,
    ) -> Residual:
        """Run the block.

        Args:
            stream: the residual stream, tokens (B, N, width).
            rows: (B, 6, width) modulation, see :data:`ROWS_PER_BLOCK`.
            context: keys and values (B, M, heads, width / heads) that the tokens attend to beside themselves.
            key_mask: (B, N + M) bool, True = attend.
        """
        attention_shift, attention_scale, attention_gate, mlp_shift, mlp_scale, mlp_gate = rows.unbind(1)
        x, h = stream.normed(attention_shift, attention_scale)
        q, k, v = self.qkv(h).unflatten(-1, (3, *self.split)).unbind(2)
        if context is not None:
            k, v = (torch.cat([own, other.to(own.dtype)], 1) for own, other in zip((k, v), context, strict=True))
        mixed = attention(q, k, v, q_weight=self.q_weight, k_weight=self.k_weight, key_mask=key_mask)
        stream = Residual(x, self.dropout(self.out(mixed.flatten(2))), attention_gate)
        x, h = stream.normed(mlp_shift, mlp_scale)
        return Residual(x, self.dropout(self.mlp(h)), mlp_gate)
