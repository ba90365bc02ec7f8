"""Projections from each encoder's embedding into the contrastive space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffgap.models.layers import Linear
from diffgap.models.randomness import STREAM_HEADS, Dropout

_MOST_DROPOUT = 0.95
_LEAST_RIDGE = 0.1
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
        dropout: Least dropout on the standardised input.
        embeddings_per_input: See :meth:`fit`; 0 for ``dropout`` whatever the data.
        number: Of the head in its bridge: no two heads drop out the same elements.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        hidden: int = 0,
        dropout: float = 0.0,
        embeddings_per_input: float = 0.0,
        number: int = 0,
    ) -> None:
        super().__init__()
        self.least_dropout, self.embeddings_per_input = dropout, embeddings_per_input
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(()))
        self.dropout = Dropout(dropout, STREAM_HEADS, number)
        self.project: nn.Module = (
            nn.Sequential(Linear(dim, hidden), nn.GELU(), Linear(hidden, width)) if hidden else Linear(dim, width)
        )

    def fit(self, x: Tensor) -> None:
        """Take ``mean``, ``std`` and the rate of dropout from training embeddings (N, D).

        With U distinct embeddings, dropout leaves at most ``U / embeddings_per_input`` of the D inputs on average.
        """
        self.mean.copy_(x.mean(0))
        self.std.copy_((x - self.mean).square().mean().sqrt().clamp_min(1e-12))
        if self.embeddings_per_input:
            kept = _distinct(x) / (self.embeddings_per_input * x.shape[1])
            self.dropout.p = min(max(self.least_dropout, 1 - kept), _MOST_DROPOUT)

    @property
    def ridge(self) -> float:
        """The ridge that dropout amounts to in least squares, in units of the mean variance of an input, halved.

        Dropout of rate p penalises as a ridge of ``p / (1 - p)`` does (Wager et al. 2013, arXiv 1307.1493, for inputs
        of equal variance); half of it did better as a start on validation concepts of the stamps.
        """
        return max(_LEAST_RIDGE, 0.5 * self.dropout.p / (1 - self.dropout.p))

    @torch.no_grad()
    def start_from(self, weight: Tensor) -> None:
        """Begin training at the linear map ``weight`` (D, width)."""
        assert isinstance(self.project, nn.Linear)
        self.project.weight.copy_(weight.T)
        self.project.bias.zero_()

    def standardise(self, x: Tensor) -> Tensor:
        """``(x - mean) / std``."""
        return (x - self.mean) / self.std

    def forward(self, x: Tensor, *, corrupt: bool = True, seeds: Tensor | None = None) -> Tensor:
        """Project; in training with dropout by ``seeds`` (B,) int64, unless ``corrupt`` is false."""
        x = self.standardise(x)
        return F.normalize(self.project(self.dropout(x, seeds) if corrupt else x), dim=-1)


class IdentityHead(nn.Module):
    """``z = normalise(x)``: the encoders already share a contrastive space of the bridge's width."""

    def fit(self, x: Tensor) -> None:
        """Nothing to fit."""

    def forward(self, x: Tensor, *, corrupt: bool = True, seeds: Tensor | None = None) -> Tensor:
        """Normalise; ``corrupt`` has nothing to turn off, and ``seeds`` nothing to decide."""
        return F.normalize(x, dim=-1)


def _distinct(x: Tensor) -> int:
    """Distinct rows of x (N, D), told apart by a random projection."""
    direction = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return len((x.double() @ direction.to(x.device)).unique())


@torch.no_grad()
def shared_space(views: list[Tensor], width: int, ridges: Sequence[float]) -> list[Tensor]:
    """Linear maps of paired views into one space: generalised CCA (MAXVAR; Kettenring, 1971), regularised.

        B_m = X_m (X_m^T X_m + r_m I)^(-1/2)        G: leading left singular vectors of [B_1 | B_2 | ...]
        W_m = (X_m^T X_m + r_m I)^-1 X_m^T G a

    With two views and r = 0 it is CCA. ``a`` weights each direction by what its views share: with ``e_m`` the part of
    its squared singular value that view m has, ``a^2 = (sum e - max e) / ((M - 1) max e)`` is 0 where one view has all
    of it and 1 where all M have equally much.

    A view that a row lacks is a row of zeros, the mean: it says nothing about that row. Views that share no row are
    tied by those that each shares with a third.

    Args:
        views: One centred (N, D_m) float tensor per modality; row i of all views belongs together, zeros where absent.
        width: Directions to return; if the data have fewer, the rest are zero.
        ridges: r_m of each view, in units of the mean eigenvalue of ``X_m^T X_m``.

    Returns:
        One (D_m, width) tensor per view.
    """
    columns = [view.double() for view in views]
    factors, bases = [], []
    for x, ridge in zip(columns, ridges, strict=True):
        gram = x.T @ x
        gram += (ridge * gram.diagonal().mean() + torch.finfo(x.dtype).tiny) * torch.eye(len(gram), dtype=x.dtype)
        factors.append(torch.linalg.cholesky(gram))
        # Any root of the inverse will do: they differ by a rotation, which the left singular vectors do not see.
        bases.append(torch.linalg.solve_triangular(factors[-1], x.T, upper=False).T)
    stacked = torch.cat(bases, 1)
    count = min(width, *stacked.shape)
    with torch.random.fork_rng(devices=[]):  # the start of a subspace iteration; its end is the same for any start
        torch.manual_seed(0)
        left, _, _ = torch.svd_lowrank(stacked, q=min(count + _OVERSAMPLING, *stacked.shape), niter=_ITERATIONS)
    target = stacked.new_zeros(len(stacked), width)
    energy = torch.stack([(base.T @ left[:, :count]).square().sum(0) for base in bases])
    largest = energy.amax(0)
    shared = ((energy.sum(0) - largest) / (largest * max(len(views) - 1, 1)).clamp_min(1e-12)).clamp_min(0).sqrt()
    target[:, :count] = left[:, :count] * shared * len(stacked) ** 0.5
    return [
        torch.cholesky_solve(x.T @ target, factor).to(views[0].dtype)
        for factor, x in zip(factors, columns, strict=True)
    ]
