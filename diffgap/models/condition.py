"""What a denoiser is conditioned on, and the encoder that turns it into keys and values.

Condition tokens see only one another, and neither the time nor the target: what the denoiser's blocks need of
them, a key and a value per token and block, is made once and serves every sampling step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffgap.models.blocks import ROWS_PER_BLOCK, Context, DiTBlock, Residual
from diffgap.models.layers import Linear
from diffgap.models.linear_gaussian import LinearGaussian
from diffgap.models.tokens import DenoiserConfig, Tokenizer, modality_index


class Condition(NamedTuple):
    """One embedding per sample to condition on.

    Attributes:
        embedding: (B, D), or (B, T, D) for a sequence modality.
        source: index of its modality, an int or int64 (B,).
        mask: bool, (B,) or (B, T): True where the vector or frame is present. Absent ones may hold anything.
    """

    embedding: Tensor
    source: int | Tensor
    mask: Tensor | None = None

    def rows(self, index: Tensor) -> Condition:
        """Those of some samples."""
        source = self.source if isinstance(self.source, int) else self.source[index]
        return Condition(self.embedding[index], source, None if self.mask is None else self.mask[index])


class EncodedCondition(NamedTuple):
    """What the denoiser needs of its conditions, the same at every timestep.

    Attributes:
        contexts: for each block, the keys and values of N tokens.
        mask: (B, N) bool, True = attend, or ``None``: all.
        sources: (B, modalities), 1 where the sample is conditioned on the modality; a row of zeros is
            unconditional.
        means: (B, modalities, D) float32, what :class:`~diffgap.models.linear_gaussian.LinearGaussian` expects of
            each modality, or ``None`` where the network predicts alone.
    """

    contexts: tuple[Context, ...]
    mask: Tensor | None
    sources: Tensor
    means: Tensor | None

    def repeat(self, times: int) -> EncodedCondition:
        """Each sample ``times`` times in a row: several draws for one condition."""
        return EncodedCondition(
            tuple(Context(kv.repeat_interleave(times, 0), room) for kv, room in self.contexts),
            None if self.mask is None else self.mask.repeat_interleave(times, 0),
            self.sources.repeat_interleave(times, 0),
            None if self.means is None else self.means.repeat_interleave(times, 0),
        )

    def rows(self, index: Tensor) -> EncodedCondition:
        """Those of some samples."""
        return EncodedCondition(
            tuple(Context(kv[index], room) for kv, room in self.contexts),
            None if self.mask is None else self.mask[index],
            self.sources[index],
            None if self.means is None else self.means[index],
        )

    @staticmethod
    def cat(parts: Sequence[EncodedCondition]) -> EncodedCondition:
        """All of several, encoded apart, with masks and means all or none."""
        masks = [part.mask for part in parts if part.mask is not None]
        means = [part.means for part in parts if part.means is not None]
        return EncodedCondition(
            tuple(
                Context(torch.cat([kv for kv, _ in block]), block[0].room)
                for block in zip(*(part.contexts for part in parts), strict=True)
            ),
            torch.cat(masks) if masks else None,
            torch.cat([part.sources for part in parts]),
            torch.cat(means) if means else None,
        )

    def with_room(self, tokens: int) -> EncodedCondition:
        """A copy in which ``tokens`` target tokens can put their own keys and values; for calls without gradients."""

        def grown(context: Context) -> Context:
            batch, length, *rest = context.keys_values.shape
            memory = context.keys_values.new_empty(batch, tokens + length, *rest)
            memory[:, tokens:] = context.keys_values
            return Context(memory, tokens)

        return self._replace(contexts=tuple(grown(context) for context in self.contexts))


class ConditionEncoder(nn.Module):
    """All condition tokens through a few pre-norm blocks, then keys and values for every denoiser block.

    Args:
        config: Shape.
        linear: Whether the network corrects the best linear denoiser, which then reads the conditions too.
    """

    def __init__(self, config: DenoiserConfig, *, linear: bool = False) -> None:
        super().__init__()
        self.config = config
        self.tokens = Tokenizer(config)
        self.null_token = nn.Parameter(torch.randn(config.width) * 0.02)
        self.blocks = nn.ModuleList(DiTBlock(config, number) for number in range(config.condition_depth))
        # The modulation of these blocks and of the final norm is learned outright; their gates start open.
        rows = torch.zeros(ROWS_PER_BLOCK * config.condition_depth + 2, config.width)
        rows[2:-2:3] = 1.0
        self.rows = nn.Parameter(rows)
        self.keys_values = Linear(config.width, 2 * config.depth * config.width)
        self.linear_gaussian = LinearGaussian(len(config.kinds), config.embedding_dim) if linear else None

    def forward(
        self,
        conditions: Sequence[Condition],
        batch_size: int,
        drop: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> EncodedCondition:
        """Encode ``conditions``; a sample with nothing present, or dropped, has one null token instead."""
        tokens, mask, sources = self._gather(conditions, batch_size, drop)
        stream = Residual(tokens)
        *rows, final = self.rows.to(tokens.dtype).unsqueeze(0).split(ROWS_PER_BLOCK, 1)
        for block, own_rows in zip(self.blocks, rows, strict=True):
            stream = block(stream, own_rows, key_mask=mask, seeds=seeds)
        _, h = stream.normed(*final.unbind(1))
        depth, heads, width = self.config.depth, self.config.heads, self.config.width
        per_block = self.keys_values(h).unflatten(-1, (depth, 2, heads, width // heads)).unbind(2)
        means = None if self.linear_gaussian is None else self.linear_gaussian.means(conditions, sources)
        return EncodedCondition(tuple(Context(kv) for kv in per_block), mask, sources, means)

    def _gather(
        self, conditions: Sequence[Condition], batch_size: int, drop: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """All tokens (B, N, width), their mask, and the modalities that each sample is conditioned on."""
        null, modalities = self.null_token, len(self.config.kinds)
        sources = null.new_zeros(batch_size, modalities)
        if not conditions:
            return null.expand(batch_size, 1, -1), None, sources
        parts, masks = [], []
        for embedding, source, present in conditions:
            parts.append(self.tokens(embedding, source, present))
            if present is None:
                present = torch.ones(batch_size, 1, dtype=torch.bool, device=null.device)
            present = present if present.ndim == 2 else present.unsqueeze(1)
            masks.append(present.expand(-1, parts[-1].shape[1]))
            index = modality_index(source, batch_size, null.device)
            one_hot = F.one_hot(index, modalities).to(sources.dtype)
            sources = torch.maximum(sources, one_hot * present.any(1, keepdim=True))
        tokens = torch.cat(parts, 1)
        if drop is None and all(present is None for _, _, present in conditions):
            return tokens, None, sources
        mask = torch.cat(masks, 1)
        absent = ~mask.any(1, keepdim=True)
        if drop is not None:
            absent = absent | drop.unsqueeze(1)
        first = torch.arange(tokens.shape[1], device=null.device) == 0
        tokens = torch.where((absent & first).unsqueeze(-1), null.to(tokens.dtype), tokens)
        return tokens, torch.where(absent, first, mask), sources.masked_fill(absent, 0.0)
