"""Scaling of embeddings to the unit variance that the noise has.

An L2-normalised embedding of width D has coordinates of about ``1 / sqrt(D)``, 0.044 at D = 512: beside unit
noise it is invisible at almost every noise level. So it is brought to unit variance a coordinate before it is
noised, and brought back after sampling.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor, nn

from diffgap.diffusion.schedule import EmbeddingScaling


class EmbeddingScaler(nn.Module):
    """Scales embeddings for diffusion (:meth:`scale`) and back (:meth:`unscale`), along the last dimension.

        sqrt_dim   z = sqrt(D) * x            (unit vectors; lucidrains/DALLE2-pytorch, `image_embed_scale`)
        whiten     z = (x - mean) @ C^(-1/2)  C the covariance of the training embeddings, shrunk
        none       z = x

    The statistics are buffers: they are saved with the model that owns the scaler, and move with it.

    Args:
        dim: Width D of the embeddings.
        scaling: One of the three.

    Raises:
        ValueError: ``dim`` below 1 or an unknown ``scaling``.
    """

    mean: Tensor
    whitening: Tensor
    colouring: Tensor

    def __init__(self, dim: int, scaling: EmbeddingScaling = "sqrt_dim") -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim is {dim}; use 1 or more")
        if scaling not in get_args(EmbeddingScaling):
            raise ValueError(f"scaling is {scaling!r}; use one of {', '.join(get_args(EmbeddingScaling))}")
        self.dim = dim
        self.scaling = scaling
        if scaling == "whiten":  # NaN until fitted: using it unfitted cannot go unnoticed
            self.register_buffer("mean", torch.full((dim,), math.nan))
            self.register_buffer("whitening", torch.full((dim, dim), math.nan))
            self.register_buffer("colouring", torch.full((dim, dim), math.nan))

    @property
    def radius(self) -> float | None:
        """Norm of a scaled unit vector, for ``x0_norm`` of the sampler; None where norms differ."""
        return {"sqrt_dim": math.sqrt(self.dim), "none": 1.0, "whiten": None}[self.scaling]

    @torch.no_grad()
    def fit(self, embeddings: Tensor, shrinkage: float | None = None) -> EmbeddingScaler:
        """Take the statistics of training embeddings; only "whiten" has any.

        The covariance is ``C = (1 - r) S + r * trace(S) / D * I``. Without shrinkage the directions that the
        training embeddings do not span would be divided by zero.

        Args:
            embeddings: (N, D) or (B, T, D), N >= 2, any float dtype; computed in float64.
            shrinkage: r in (0, 1]; None takes Ledoit and Wolf's optimum (2004, J. Multivariate Analysis 88).

        Returns:
            Itself.

        Raises:
            ValueError: Another width, fewer than 2 embeddings, non-finite or constant ones, r out of range.
        """
        self._check(embeddings)
        if self.scaling != "whiten":
            return self
        if shrinkage is not None and not 0 < shrinkage <= 1:
            raise ValueError(f"shrinkage is {shrinkage}; use a number in (0, 1], or None for Ledoit-Wolf")
        rows = embeddings.detach().reshape(-1, self.dim).double()
        if len(rows) < 2 or not torch.isfinite(rows).all():
            raise ValueError(f"embeddings has {len(rows)} rows and must have 2 or more, all finite")
        mean = rows.mean(dim=0)
        rows = rows - mean
        covariance = rows.T @ rows / len(rows)
        variance = covariance.trace() / self.dim
        if not variance > 0:
            raise ValueError("embeddings are all equal, so they cannot be whitened; check how they were made")
        r = _ledoit_wolf(rows, covariance) if shrinkage is None else shrinkage
        shrunk = (1 - r) * covariance + r * variance * torch.eye(self.dim, dtype=rows.dtype, device=rows.device)
        eigenvalues, eigenvectors = torch.linalg.eigh(shrunk)
        # Exact duplicates can make Ledoit-Wolf's r vanish; keep the inverse root finite in float32.
        roots = eigenvalues.clamp(min=1e-10 * float(variance)).sqrt()
        self.mean.copy_(mean)
        self.whitening.copy_((eigenvectors / roots) @ eigenvectors.T)
        self.colouring.copy_((eigenvectors * roots) @ eigenvectors.T)
        return self

    def scale(self, x: Tensor) -> Tensor:
        """Embeddings (..., D) to diffusion's scale, same shape and dtype."""
        self._check(x)
        if self.scaling == "sqrt_dim":
            return x * math.sqrt(self.dim)
        if self.scaling == "whiten":
            return ((x.to(self.mean.dtype) - self.mean) @ self.whitening).to(x.dtype)
        return x

    def unscale(self, z: Tensor) -> Tensor:
        """The inverse of :meth:`scale`, same shape and dtype."""
        self._check(z)
        if self.scaling == "sqrt_dim":
            return z / math.sqrt(self.dim)
        if self.scaling == "whiten":
            return (z.to(self.mean.dtype) @ self.colouring + self.mean).to(z.dtype)
        return z

    def extra_repr(self) -> str:
        return f"{self.dim}, scaling={self.scaling!r}"

    def _check(self, x: Tensor) -> None:
        if x.ndim < 1 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise ValueError(f"embeddings are {x.dtype} {tuple(x.shape)}; give floats with last dimension {self.dim}")


def _ledoit_wolf(rows: Tensor, covariance: Tensor) -> float:
    """Ledoit and Wolf's shrinkage of the ``covariance`` of centred ``rows`` (N, D) towards a multiple of I.

    ``r = min(b2, d2) / d2`` with ``d2 = |S - mu I|^2``, ``b2 = sum_i |x_i x_i^T - S|^2 / N^2``.
    """
    n, dim = rows.shape
    identity = torch.eye(dim, dtype=rows.dtype, device=rows.device)
    d2 = (covariance - covariance.trace() / dim * identity).square().sum()
    b2 = (rows.square().sum(dim=1).square().sum() - n * covariance.square().sum()) / n**2
    return float(torch.minimum(b2.clamp(min=0), d2) / d2) if d2 > 0 else 1.0
