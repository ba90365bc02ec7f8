"""Projections from each encoder's embedding into the contrastive space."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffgap.models.layers import Linear

_OVERSAMPLING = 32
_ITERATIONS = 8


class ProjectionHead(nn.Module):
    """``z = normalise(W (x - mean) / std + b)``; an embedding (..., D) becomes a unit vector (..., width).

    ``mean`` (D,) and ``std`` (a scalar, so that directions keep their proportions) are fitted on training data and
    saved with the weights.

    Args:
        dim: Width D of the embedding.
        width: Width of the contrastive space.
        hidden: Width of a hidden GELU layer; 0 for a linear head.
        dropout: Dropout on the standardised input.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, width: int, *, hidden: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(()))
        self.dropout = nn.Dropout(dropout)
        self.project: nn.Module = (
            nn.Sequential(Linear(dim, hidden), nn.GELU(), Linear(hidden, width)) if hidden else Linear(dim, width)
        )

    def fit(self, x: Tensor) -> None:
        """Take ``mean`` and ``std`` from training embeddings (N, D)."""
        self.mean.copy_(x.mean(0))
        self.std.copy_((x - self.mean).square().mean().sqrt().clamp_min(1e-12))

    @torch.no_grad()
    def start_from(self, weight: Tensor) -> None:
        """Begin training at the linear map ``weight`` (D, width)."""
        assert isinstance(self.project, nn.Linear)
        self.project.weight.copy_(weight.T)
        self.project.bias.zero_()

    def standardise(self, x: Tensor) -> Tensor:
        """``(x - mean) / std``."""
        return (x - self.mean) / self.std

    def forward(self, x: Tensor, *, corrupt: bool = True) -> Tensor:
        """Project; in training with dropout, unless ``corrupt`` is false."""
        x = self.standardise(x)
        return F.normalize(self.project(self.dropout(x) if corrupt else x), dim=-1)


class IdentityHead(nn.Module):
    """``z = normalise(x)``: the encoders already share a contrastive space of the bridge's width."""

    def fit(self, x: Tensor) -> None:
        """Nothing to fit."""

    def forward(self, x: Tensor, *, corrupt: bool = True) -> Tensor:
        """Normalise; ``corrupt`` has nothing to turn off."""
        return F.normalize(x, dim=-1)


@torch.no_grad()
def shared_space(views: list[Tensor], width: int, ridge: float = 0.1) -> list[Tensor]:
    """Linear maps of paired views into one space: generalised CCA (MAXVAR; Kettenring, 1971), regularised.

        B_m = X_m (X_m^T X_m + r_m I)^(-1/2)        G: leading left singular vectors of [B_1 | B_2 | ...]
        W_m = (X_m^T X_m + r_m I)^-1 X_m^T G a

    With two views and r = 0 it is CCA. ``a`` weights each direction by the agreement it stands for: with M views the
    squared singular value is 1 where only one view has it and M where all agree, and a = (s^2 - 1) / (M - 1).

    Args:
        views: One centred (N, D_m) float tensor per modality; row i of all views belongs together.
        width: Directions to return; if the data have fewer, the rest are zero.
        ridge: r_m in units of the mean eigenvalue of ``X_m^T X_m``.

    Returns:
        One (D_m, width) tensor per view.
    """
    columns = [view.double() for view in views]
    factors, bases = [], []
    for x in columns:
        gram = x.T @ x
        gram += (ridge * gram.diagonal().mean() + torch.finfo(x.dtype).tiny) * torch.eye(len(gram), dtype=x.dtype)
        factors.append(torch.linalg.cholesky(gram))
        # Any root of the inverse will do: they differ by a rotation, which the left singular vectors do not see.
        bases.append(torch.linalg.solve_triangular(factors[-1], x.T, upper=False).T)
    stacked = torch.cat(bases, 1)
    count = min(width, *stacked.shape)
    with torch.random.fork_rng(devices=[]):  # the start of a subspace iteration; its end is the same for any start
        torch.manual_seed(0)
        left, singular, _ = torch.svd_lowrank(stacked, q=min(count + _OVERSAMPLING, *stacked.shape), niter=_ITERATIONS)
    agreement = ((singular[:count].square() - 1) / max(len(views) - 1, 1)).clamp_min(1e-3)
    target = stacked.new_zeros(len(stacked), width)
    target[:, :count] = left[:, :count] * agreement * len(stacked) ** 0.5
    return [
        torch.cholesky_solve(x.T @ target, factor).to(views[0].dtype)
        for factor, x in zip(factors, columns, strict=True)
    ]
