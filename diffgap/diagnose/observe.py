"""What the checks of a bridge look at: samples on their way from noise, and denoising errors, of one direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffgap.data.store import EmbeddingStore
from diffgap.diagnose.data import evenly
from diffgap.diffusion.solvers import build_solver
from diffgap.models.bridge import DiffGAP, evaluating
from diffgap.models.denoiser import Condition
from diffgap.models.inputs import frame_mask, hidden
from diffgap.ops import q_sample, sample_seeds
from diffgap.ops.solver_step import StepOutput
from diffgap.retrieval.diagnostics import ModalityGap, modality_gap

#: Noise levels of the denoising errors, the midpoints of equal parts of the schedule.
LEVELS = 8


class Side(NamedTuple):
    """One modality of some pairs, on the bridge's device.

    Attributes:
        modality: Its name.
        x: Embeddings as the encoder gives them, (N, D) or (N, T, D).
        z: Unit vectors of the contrastive space, (N, width) or (N, T, width).
        mask: (N, T) bool, the frames that are there; None for vectors.
        groups: (N,) names of the rows' groups, all different.
    """

    modality: str
    x: Tensor
    z: Tensor
    mask: Tensor | None
    groups: np.ndarray

    def pooled(self) -> Tensor:
        """(N, width) float64 on the CPU: the unit mean over the frames of a sequence, a vector as it is."""
        return _pooled(self.z, self.mask)


@dataclass(frozen=True)
class Samples:
    """N conditions, K samples each, over S steps; everything float64 on the CPU.

    Attributes:
        source, target: (N, width) unit vectors of the pairs in the contrastive space, row i of group i.
        drawn: (N, K, width) unit vectors of ``target``'s modality.
        translated: (N, width), what :meth:`DiffGAP.translate` gives: the bridged embedding of retrieval.
        cosines: (S, N) cosine of the estimate of x0 with the target, mean over the samples.
        noisy_cosines: (S, N) the same of the samples themselves, with the noise that is left in them.
        norms: (S,) root mean square norm of the samples after each step, over what it should be.
        estimate_norms: (S,) that of the estimates of x0, over that of real embeddings.
        norm_spread: Relative standard deviation of the norm of one noisy real embedding, the largest over the steps.
        groups: (N,) names of the pairs' groups, all different.
    """

    source: Tensor
    target: Tensor
    drawn: Tensor
    translated: Tensor
    cosines: Tensor
    noisy_cosines: Tensor
    norms: Tensor
    estimate_norms: Tensor
    norm_spread: float
    groups: np.ndarray

    def gaps(self, seed: int) -> tuple[ModalityGap, ModalityGap]:
        """The modality gap before and after bridging, as :func:`diffgap.retrieval.evaluate.evaluate_runs` has it.

        The names of the groups decide the folds of the classifier, so they are the same there.
        """
        folds = min(5, len(self.target))
        before, after = (
            modality_gap(x, self.target, self.groups, folds=folds, seed=seed) for x in (self.source, self.translated)
        )
        return before, after


class Errors(NamedTuple):
    """Mean squared denoising error (N, levels), float64, under the true, another group's, and no condition."""

    true: Tensor
    shuffled: Tensor
    null: Tensor


def pairs(bridge: DiffGAP, store: EmbeddingStore, a: str, b: str, count: int) -> tuple[Side, Side]:
    """At most ``count`` pairs of two modalities, the first of each group, evenly spaced over the groups."""
    present = store.present(a, b)
    codes = store.group_ids().numpy()[present]
    rows = evenly(present[np.sort(np.unique(codes, return_index=True)[1])], count)
    one, other = (_side(bridge, store, name, rows) for name in (a, b))
    return one, other


def _side(bridge: DiffGAP, store: EmbeddingStore, modality: str, rows: np.ndarray) -> Side:
    device = bridge.logit_scale.device
    x, lengths, mask = store.embeddings(modality, rows).to(device), store.lengths(modality, rows), None
    if lengths is not None:
        frames = int(lengths.max()) if len(lengths) else 1
        mask = frame_mask(lengths.to(device), frames)
        x = hidden(x[:, :frames], mask)
    with torch.no_grad(), evaluating(bridge):
        return Side(modality, x, bridge.project(modality, x), mask, store.column("group")[rows].astype(str))


def _pooled(z: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        z = hidden(z, mask).sum(-2)
    return normalize(z.double().cpu(), dim=-1)


def _norms(x: Tensor, mask: Tensor | None) -> Tensor:
    """Norms of all vectors, or frames that are there, in one row; float64 on the CPU."""
    norms = x.double().norm(dim=-1)
    return (norms if mask is None else norms[mask]).flatten().cpu()


def draw(bridge: DiffGAP, source: Side, target: Side, *, num_samples: int, seed: int) -> Samples:
    """Sample ``target``'s modality given ``source`` as :meth:`DiffGAP.sample` does by default, and follow it."""
    diffusion, settings, rows = bridge.diffusion, bridge.settings, len(source.x)
    scaler = diffusion.scaler(target.modality)
    real = _norms(scaler.scale(target.z), target.mask)
    square, width = float(real.square().mean()), settings.width
    levels = build_solver(settings.solver, diffusion.schedule, settings.sampling_steps).levels[1:].tolist()
    # Of every sample of a pair: the frames that are there, and the true target.
    mask = None if target.mask is None else target.mask[:, None].expand(-1, num_samples, -1)
    truth = target.pooled()[:, None]
    cosines: list[Tensor] = []
    noisy_cosines: list[Tensor] = []
    norms, estimate_norms = [], []

    def follow(step: int, state: StepOutput) -> None:
        alpha, sigma = levels[step]
        x, x0 = (values.unflatten(0, (rows, num_samples)) for values in (state.sample, state.x0))
        expected = alpha**2 * square + sigma**2 * width
        norms.append(float(_norms(x, mask).square().mean() / expected) ** 0.5)
        estimate_norms.append(float(_norms(x0, mask).square().mean() / square) ** 0.5)
        for found, values in ((cosines, x0), (noisy_cosines, x)):
            found.append((_pooled(scaler.unscale(values), mask) * truth).sum(-1).mean(1))

    options: dict[str, Any] = {
        source.modality: source.x,
        "lengths": None if source.mask is None else source.mask.sum(1),
        "frames": None if target.mask is None else target.mask.sum(1),
        "seed": seed,
    }
    drawn = bridge.sample(
        target.modality, num_samples=num_samples, callback=follow, batch_size=rows * num_samples, **options
    )
    translated = bridge.translate(target.modality, **options)
    # The norm of x spreads as the real norms do and as the noise's, whose square is chi-squared with `width` degrees.
    spread = float(real.var()) / square + 1 / (2 * width)
    return Samples(
        source.pooled(),
        target.pooled(),
        _pooled(drawn, mask),
        _pooled(translated, target.mask),
        torch.stack(cosines),
        torch.stack(noisy_cosines),
        torch.tensor(norms, dtype=torch.float64),
        torch.tensor(estimate_norms, dtype=torch.float64),
        spread**0.5,
        source.groups,
    )


@torch.no_grad()
def denoising_errors(bridge: DiffGAP, source: Side, target: Side, *, seed: int) -> Errors:
    """Errors at :data:`LEVELS` noise levels; one noise for each (pair, level), the same under all conditions."""
    rows, device = len(target.z), target.z.device
    generator = torch.Generator().manual_seed(seed)
    seeds = sample_seeds(LEVELS * rows, generator).view(LEVELS, rows).to(device)
    # Every pair is of a group of its own, so any derangement gives a condition of another group.
    order = torch.randperm(rows, generator=generator)
    stranger = torch.empty_like(order).index_copy_(0, order, order.roll(1)).to(device)
    diffusion = bridge.diffusion
    scaler, index = diffusion.scaler(source.modality), diffusion.modalities.index(source.modality)
    z, mask = scaler.scale(source.z), source.mask
    conditions: tuple[list[Condition], ...] = (
        [Condition(z, index, mask)],
        [Condition(z[stranger], index, None if mask is None else mask[stranger])],
        [],
    )
    total = diffusion.schedule.num_train_timesteps
    with evaluating(bridge):
        errors = [
            torch.stack(
                [
                    _error(bridge, target, condition, int(total * (level + 0.5) / LEVELS), seeds[level])
                    for level in range(LEVELS)
                ],
                dim=1,
            )
            for condition in conditions
        ]
    return Errors(*errors)


def _error(bridge: DiffGAP, target: Side, conditions: list[Condition], t: int, seeds: Tensor) -> Tensor:
    """Mean squared error (N,) of the denoiser at row ``t`` of the noise table, float64 on the CPU."""
    diffusion = bridge.diffusion
    clean = diffusion.scaler(target.modality).scale(target.z)
    rows = torch.full((len(clean),), t, device=clean.device)
    noisy, wanted = q_sample(clean, rows, diffusion.noise_table, seeds, bridge.settings.prediction)
    index = diffusion.modalities.index(target.modality)
    predicted = diffusion.denoiser(noisy, diffusion.times[rows], index, conditions, mask=target.mask)
    error = (predicted.double() - wanted.double()).square().mean(-1)
    if target.mask is not None:
        error = (error * target.mask).sum(-1) / target.mask.sum(-1)
    return error.cpu()
