"""How much a condition tells about an embedding: a likelihood ratio from denoising errors, to re-rank candidates.

With x a clean embedding in the schedule's scale, c a condition or none, and x^ the denoiser's estimate of x from
``x_t = alpha_t x + sigma_t eps``, a diffusion model bounds the likelihood by its denoising error (Kingma et al. 2021,
arXiv 2107.00630, section 5; lambda = ln SNR = 2 ln(alpha / sigma)):

    ln p(x | c)  >=  - int w(lambda) E_eps || x - x^(x_t, t, c) ||^2 dlambda + const(x),      w = SNR / 2

The constant does not depend on c. So the difference of two bounds, with the condition and without, estimates the
pointwise mutual information of x and c up to scale:

    ln p(x | c) - ln p(x)   ~   E_{t, eps} w_t ( || x - x^(x_t, t, null) ||^2 - || x - x^(x_t, t, c) ||^2 )

Denoising errors as a likelihood are the Diffusion Classifier's (Li et al. 2023, arXiv 2303.16203). All candidates, and
both terms, share the same few t and one eps for each, so that most of the noise of the estimate cancels.

In place of w = SNR / 2 every level weighs the same, as in the training loss, and the levels are noisy ones. On
validation data of the stamps (seed 0, 32 candidates, MRR over all directions, an earlier state of the recipe) the ratio
alone ranked at 30 with w = SNR / 2 over ln SNR of -4 to 4, where errors at little noise drown the rest, and at 37 with
equal weights from -6 to -2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffgap.diffusion.prediction import x0_coefficients
from diffgap.diffusion.schedule import NoiseSchedule
from diffgap.models.contrastive_diffusion import ContrastiveDiffusion
from diffgap.models.denoiser import Condition, EncodedCondition
from diffgap.ops.random import normal, sample_seeds

#: ln SNR of the noise levels: from where nothing of x is seen any more to where a seventh of its variance is.
LOG_SNR_RANGE = (-6.0, -2.0)

#: Noise levels: two ranked as well as four on the stamps; four leave a margin where conditions tell less.
LEVELS = 4


class Side(NamedTuple):
    """Unit embeddings of one modality: (N, width), or (N, T, width) with a mask (N, T), True where a frame is."""

    modality: str
    z: Tensor
    mask: Tensor | None = None

    def rows(self, index: Tensor) -> Side:
        """Some of them."""
        return Side(self.modality, self.z[index], None if self.mask is None else self.mask[index])


def noise_levels(schedule: NoiseSchedule, count: int = LEVELS) -> Tensor:
    """Rows of the schedule's table nearest to the midpoints of ``count`` equal parts of the range, int64 (count,)."""
    if count < 1:
        raise ValueError(f"levels is {count}; use 1 or more")
    low, high = LOG_SNR_RANGE
    wanted = low + (high - low) * (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (schedule.snr.log() - wanted[:, None]).abs().argmin(1)


def denoising_errors(
    diffusion: ContrastiveDiffusion, target: Side, encoded: EncodedCondition, levels: Tensor, *, seed: int = 0
) -> Tensor:
    """Mean over ``levels`` of ``|| x - x^ ||^2`` over an embedding's squared norm: (N,), row i given condition i.

    1 is what an estimate of zero would give. A sequence counts as its mean frame: its frames are far from independent,
    and a sum would favour long ones. The noise of a level is the same for every row, a function of ``seed`` alone.

    Args:
        target: The clean embeddings.
        encoded: Their conditions, of N samples.
        levels: (S,) int64 rows of the schedule's table, with some signal each.
    """
    index, scaler = diffusion.modalities.index(target.modality), diffusion.scaler(target.modality)
    clean, mask = scaler.scale(target.z), target.mask
    # Of a whitened embedding only the mean squared norm is known, the width.
    squared_norm = float(clean.shape[-1]) if scaler.radius is None else scaler.radius**2
    seeds = sample_seeds(len(levels), torch.Generator().manual_seed(seed)).to(clean.device)
    noise = normal(seeds, clean.shape[1:], dtype=clean.dtype)
    rows = diffusion.denoiser.precompute(
        diffusion.times[levels.to(clean.device)].to(clean.dtype), index, encoded.sources
    )
    total = clean.new_zeros(len(clean))
    for step, (alpha, sigma) in enumerate(diffusion.schedule.table[levels.cpu()].tolist()):
        noisy = alpha * clean + sigma * noise[step]
        output = diffusion.denoiser.denoise(noisy, index, rows.at(step), encoded, mask=mask)
        of_sample, of_output = x0_coefficients(alpha, sigma, diffusion.settings.prediction)
        error = (clean - of_sample * noisy - of_output * output).square().sum(-1)
        if mask is not None:
            error = (error * mask).sum(-1) / mask.sum(-1).clamp(min=1)
        total += error
    return total / (len(levels) * squared_norm)


@torch.no_grad()
def information(
    diffusion: ContrastiveDiffusion,
    query: Side,
    gallery: Side,
    candidates: Tensor,
    *,
    levels: int = LEVELS,
    seed: int = 0,
    batch_size: int = 4096,
) -> Tensor:
    """What each query and each of its candidates tell about one another: float32 (N, R), comparable to a cosine.

    The ratio of the module's formula, in units of an embedding's squared norm: the share of the embedding that the
    condition explains. As ``p(k | q) / p(k) = p(q | k) / p(q)``, the candidate given the query and the query given the
    candidate estimate the same; the result is their mean.

    Every condition is encoded once, and the unconditional error of every item computed once. The denoiser takes
    ``2 N R S`` rows with a condition and S for each query and each distinct candidate without, S being ``levels``.

    Args:
        diffusion: Of a bridge in evaluation mode.
        query: N queries.
        gallery: M items.
        candidates: (N, R) int64 rows of the gallery.
        seed: Of the noise.
        batch_size: Pairs taken at a time.
    """
    chosen = noise_levels(diffusion.schedule, levels)
    if not candidates.numel():
        return query.z.new_zeros(candidates.shape, dtype=torch.float32)
    queries = torch.arange(len(candidates), device=candidates.device).repeat_interleave(candidates.shape[1])
    items = candidates.flatten()
    found = query.z.new_zeros(len(items), dtype=torch.float32)
    for target, target_rows, source, source_rows in (
        (gallery, items, query, queries),
        (query, queries, gallery, items),
    ):
        used, of_pair = target_rows.unique(return_inverse=True)
        alone = []
        for part in used.split(batch_size):
            nothing = diffusion.denoiser.encode_condition((), len(part))
            alone.append(denoising_errors(diffusion, target.rows(part), nothing, chosen, seed=seed))
        found += torch.cat(alone)[of_pair]
        used, of_pair = source_rows.unique(return_inverse=True)
        encoded = _encode(diffusion, source, used, batch_size)
        for part in torch.arange(len(items), device=items.device).split(batch_size):
            given = encoded.rows(of_pair[part])
            found[part] -= denoising_errors(diffusion, target.rows(target_rows[part]), given, chosen, seed=seed)
    return (found / 2).view(candidates.shape)


def _encode(diffusion: ContrastiveDiffusion, source: Side, rows: Tensor, batch_size: int) -> EncodedCondition:
    """The conditions ``rows`` of ``source``, encoded in batches."""
    index, scaler = diffusion.modalities.index(source.modality), diffusion.scaler(source.modality)
    parts = []
    for part in rows.split(batch_size):
        side = source.rows(part)
        condition = Condition(scaler.scale(side.z), index, side.mask)
        parts.append(diffusion.denoiser.encode_condition([condition], len(part)))
    return EncodedCondition.cat(parts)
