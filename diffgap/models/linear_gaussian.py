"""The best linear denoiser, which the network only has to correct.

With scaled embeddings x of the target and c_s of the sources, and all moments taken from training rows, let

    x | c ~ N(m(c), v I)        m(c) = mu + mean over the sources s that are there of W_s (c_s - mu_s)
    W_s = argmin |W (c_s - mu_s) - (x - mu)|^2 + r |W|^2        v: what m leaves of a coordinate's variance
    x_t = alpha x + sigma eps

where a sequence counts by its mean frame in m, and v is that of its frames. Then the posterior of x given x_t and c is
Gaussian too, and with ``d = alpha^2 v + sigma^2``

    E[x | x_t, c]   = (alpha v x_t + sigma^2 m) / d             std(x | x_t, c)   = sigma sqrt(v / d)
    E[eps | x_t, c] = sigma (x_t - alpha m) / d                 std(eps | x_t, c) = alpha sqrt(v / d)

The denoiser's prediction is that mean plus that standard deviation times what the network gives, which at
initialisation is zero: sampling then draws from N(m(c), v I), and from pure noise one step gives the ridge
regression m(c). This is EDM's preconditioning (Karras et al. 2022, arXiv 2206.00364, section 5) of a network whose
condition tells something beforehand; EDM's own is the case m = 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from diffgap.diffusion.prediction import Prediction
from diffgap.models.tokens import modality_index

#: Ridge r in units of the mean eigenvalue of the sources' second moments, so that it means the same for any data. Of
#: 0.1, 1 and 10, 1 served retrieval best on validation concepts of the stamps.
_RIDGE = 1.0

_LEAST_VARIANCE = 1e-4


class LinearGaussian(nn.Module):
    """Moments of every direction, as buffers; before :meth:`fit`, ``x | c ~ N(0, I)``.

    Args:
        modalities: Their number M.
        width: Coordinates D of the contrastive space.
    """

    centres: Tensor
    maps: Tensor
    variance: Tensor

    def __init__(self, modalities: int, width: int) -> None:
        super().__init__()
        self.register_buffer("centres", torch.zeros(modalities, width))
        self.register_buffer("maps", torch.zeros(modalities, width, modalities, width))  # [source, :, target, :]
        self.register_buffer("variance", torch.ones(modalities, 2))  # of a target: without a condition, with one

    @torch.no_grad()
    def fit(self, embeddings: Mapping[int, Tensor], masks: Mapping[int, Tensor]) -> None:
        """Take the moments, in float64.

        Args:
            embeddings: By modality index, scaled, (N, D) or (N, T, D); rows belong together.
            masks: By modality index, (N,) or (N, T) bool: what is there.
        """
        rows = {index: _pooled(x.double(), masks[index]) for index, x in embeddings.items()}
        present = {index: mask if mask.dim() == 1 else mask.any(1) for index, mask in masks.items()}
        centres = {index: x[present[index]].mean(0) for index, x in rows.items()}
        for target, x in rows.items():
            self.centres[target] = centres[target]
            within = _within(embeddings[target].double(), x, masks[target])
            own = (x[present[target]] - centres[target]).square().mean() + within[present[target]].mean()
            left = []
            for source, c in rows.items():
                both = present[target] & present[source]
                if source == target or not both.any():
                    continue
                centred, wanted = c[both] - centres[source], x[both] - centres[target]
                gram = centred.T @ centred
                ridge = _RIDGE * gram.diagonal().mean() + torch.finfo(x.dtype).tiny
                weight = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), centred.T @ wanted)
                self.maps[source, :, target] = weight.to(self.maps)
                left.append((wanted - centred @ weight).square().mean() + within[both].mean())
            self.variance[target, 0] = own
            self.variance[target, 1] = torch.stack(left).mean() if left else own
        self.variance.clamp_(min=_LEAST_VARIANCE)

    def means(self, conditions: Sequence[tuple[Tensor, int | Tensor, Tensor | None]], sources: Tensor) -> Tensor:
        """``m`` of every modality, (B, M, D).

        Args:
            conditions: Embedding (B, D) or (B, T, D), modality and mask of each; a sequence counts by its mean frame.
            sources: (B, M), 1 where the sample is conditioned on the modality.
        """
        given = self.centres.new_zeros(len(sources), *self.centres.shape)
        for embedding, source, mask in conditions:
            index = modality_index(source, len(sources), sources.device)[:, None, None]
            pooled = _pooled(embedding.to(self.centres), mask).unsqueeze(1)
            given = given.scatter_add(1, index.expand_as(pooled), pooled)
        given = torch.where(sources.bool().unsqueeze(-1), given - self.centres, 0.0)
        with torch.autocast(given.device.type, enabled=False):
            shifts = (given.flatten(1) @ self.maps.flatten(2).flatten(0, 1)).unflatten(1, self.centres.shape)
        return self.centres + shifts / sources.to(self.centres).sum(1).clamp_min(1)[:, None, None]


def _pooled(embedding: Tensor, mask: Tensor | None) -> Tensor:
    """(B, D): the mean over the frames that are there, zero if none is."""
    if mask is not None:
        embedding = embedding.masked_fill(~mask.unsqueeze(-1), 0.0)
    if embedding.dim() == 2:
        return embedding
    return embedding.mean(1) if mask is None else embedding.sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


def _within(embedding: Tensor, mean: Tensor, mask: Tensor) -> Tensor:
    """(B,): the mean square of a coordinate of the frames about their ``mean`` (B, D); zeros for vectors."""
    if embedding.dim() == 2:
        return embedding.new_zeros(len(embedding))
    return _pooled((embedding - mean[:, None]).square(), mask).mean(1)


def posterior_coefficients(
    alpha: Tensor, sigma: Tensor, variance: Tensor, prediction: Prediction
) -> tuple[Tensor, Tensor, Tensor]:
    """``(a, b, g)`` such that the prediction is ``a x_t + b m + g network``; shapes broadcast."""
    d = alpha**2 * variance + sigma**2
    deviation = (variance / d).sqrt()
    x0 = alpha * variance / d, sigma**2 / d
    if prediction == "sample":
        return *x0, sigma * deviation
    epsilon = sigma / d, -alpha * sigma / d
    if prediction == "epsilon":
        return *epsilon, alpha * deviation
    scale = (alpha, sigma) if prediction == "v_prediction" else (1.0, 1.0)  # v = alpha eps - sigma x0, flow = eps - x0
    a, b = (scale[0] * e - scale[1] * x for e, x in zip(epsilon, x0, strict=True))
    return a, b, (scale[0] * alpha + scale[1] * sigma) * deviation
