"""The denoiser's shape, and embeddings to tokens and back.

A pooled vector is split into a few tokens; a sequence has one a frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from diffgap.models.layers import Linear

Kind = Literal["vector", "sequence"]


@dataclass(frozen=True)
class DenoiserConfig:
    """Shape of a :class:`~diffgap.models.denoiser.Denoiser`."""

    embedding_dim: int
    """Coordinates of the contrastive space; every embedding, pooled or a frame, has this many."""
    kinds: tuple[Kind, ...] = ("vector", "vector")
    """For each modality, whether its embeddings are pooled vectors (B, D) or sequences (B, T, D)."""
    tokens_per_vector: int = 8
    """Tokens a pooled vector is split into; divides ``embedding_dim``."""
    width: int = 128
    """Features of a token inside the network; an even multiple of ``heads``."""
    depth: int = 3
    """Blocks the target tokens go through."""
    condition_depth: int = 1
    """Blocks the condition tokens go through, once per condition."""
    heads: int = 4
    """Attention heads."""
    mlp_ratio: float = 2.0
    """Hidden width of the gated MLP in units of ``width``."""
    dropout: float = 0.0
    """On the output of every attention and MLP."""

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "tokens_per_vector", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more")
        if self.condition_depth < 0:
            raise ValueError(f"condition_depth is {self.condition_depth}; use 0 or more")
        if not self.kinds or not set(self.kinds) <= set(get_args(Kind)):
            raise ValueError(f"kinds is {self.kinds}; give 'vector' or 'sequence' for each modality")
        if "vector" in self.kinds and self.embedding_dim % self.tokens_per_vector:
            raise ValueError(
                f"embedding_dim {self.embedding_dim} is not a multiple of tokens_per_vector "
                f"{self.tokens_per_vector}; change one of them"
            )
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} is not an even multiple of heads {self.heads}; change one of them")
        if not self.mlp_ratio > 0:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}; use a positive number")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; use a value in [0, 1)")


def sinusoidal_embedding(positions: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Cosines, then sines, of ``positions`` at ``width / 2`` frequencies from 1 towards ``1 / max_period``.

    Args:
        positions: (...), frames or timesteps, any real dtype.
        width: even number of features.
        max_period: longest period, in units of ``positions`` and of 2 pi.

    Returns:
        (..., width) float32.
    """
    exponents = torch.arange(width // 2, device=positions.device, dtype=torch.float32) / (width // 2)
    angles = positions.to(torch.float32).unsqueeze(-1) * max_period**-exponents
    return torch.cat([angles.cos(), angles.sin()], -1)


def modality_index(index: int | Tensor, batch_size: int, device: torch.device) -> Tensor:
    """A modality index as int64 (B,); an int is written on the device, which a CUDA graph can capture."""
    if isinstance(index, int):
        return torch.full((batch_size,), index, dtype=torch.int64, device=device)
    return index.expand(batch_size)


class Tokenizer(nn.Module):
    """Embeddings (B, D) or (B, T, D) -> tokens (B, N, width), with their position and modality added.

    Pooled vectors have ``tokens_per_vector`` tokens of D / tokens_per_vector coordinates each and learned
    positions; sequences, of any length, have sinusoidal ones.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.split = (config.tokens_per_vector, config.embedding_dim // config.tokens_per_vector)
        self.modality = nn.Embedding(len(config.kinds), config.width)
        if "vector" in config.kinds:
            self.vector = Linear(self.split[1], config.width)
            self.positions = nn.Parameter(torch.randn(config.tokens_per_vector, config.width) * 0.02)
        if "sequence" in config.kinds:
            self.sequence = Linear(config.embedding_dim, config.width)

    def forward(self, embedding: Tensor, modality: int | Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokenise; zeros are read where ``mask``, (B,) or (B, T), is False."""
        if mask is not None:
            embedding = embedding.masked_fill(~mask.unsqueeze(-1), 0.0)
        if embedding.ndim == 2:
            tokens = self.vector(embedding.unflatten(1, self.split)) + self.positions
        else:
            frames = torch.arange(embedding.shape[1], device=embedding.device)
            tokens = self.sequence(embedding)
            tokens = tokens + sinusoidal_embedding(frames, tokens.shape[-1]).to(self.sequence.weight.dtype)
        index = modality_index(modality, len(embedding), embedding.device)
        output: Tensor = tokens + self.modality(index).unsqueeze(1)
        return output


class TokenHead(nn.Module):
    """Tokens (B, N, width) -> embeddings (B, D) or (B, T, D)."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        if "vector" in config.kinds:
            self.vector = Linear(config.width, config.embedding_dim // config.tokens_per_vector)
        if "sequence" in config.kinds:
            self.sequence = Linear(config.width, config.embedding_dim)

    def forward(self, tokens: Tensor, *, pooled: bool) -> Tensor:
        output: Tensor = self.vector(tokens).flatten(1) if pooled else self.sequence(tokens)
        return output
