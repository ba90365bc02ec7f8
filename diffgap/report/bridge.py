"""The gap before and after bridging, and samples on their way, from the run's model on rows of its data."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffgap.data.store import EmbeddingStore
from diffgap.diagnose.observe import Samples, draw, pairs
from diffgap.models.bridge import DiffGAP
from diffgap.report.charts import INK, SERIES, chart
from diffgap.report.html import Html, Section, element, figure, grid, joined, paragraph, table
from diffgap.retrieval.diagnostics import ModalityGap
from diffgap.retrieval.report import gap_table

__all__ = ["gap", "observe", "trajectories"]

#: More lines than these cannot be told apart.
_JOINED = 60
_SAMPLES = 4
_MIN_PAIRS = 2


def observe(bridge: DiffGAP, store: EmbeddingStore, *, count: int, seed: int) -> dict[str, Samples]:
    """By direction that was trained, "text -> audio", at most ``count`` pairs with their samples.

    Directions of which the store has fewer than two pairs are left out.

    Raises:
        ValueError: What the bridge gives is not finite.
    """
    found = {}
    for source, target in permutations(bridge.modalities, 2):
        if not bridge.settings.trains(source, target):
            continue
        sides = pairs(bridge, store, source, target, count)
        if len(sides[0].x) < _MIN_PAIRS:
            continue
        samples = draw(bridge, *sides, num_samples=_SAMPLES, seed=seed)
        if not all(x.isfinite().all() for x in (samples.cosines, samples.translated, samples.source, samples.target)):
            raise ValueError(f"the bridge gives values that are not finite, {source} -> {target}; train it again")
        found[f"{source} -> {target}"] = samples
    return found


def gap(observed: dict[str, Samples], split: str, *, seed: int) -> Section:
    """Figures of the gap, and the pairs on principal axes."""
    if not observed:
        return Section("gap", "The gap", _nothing(split))
    gaps = {name: samples.gaps(seed) for name, samples in observed.items()}
    counts = "; ".join(f"{name} {before.pairs}" for name, (before, _) in gaps.items())
    parts = [
        paragraph(
            f"Pairs of the {split} split, one a group, in the contrastive space, before and after the queries are "
            f"translated: {counts}."
        ),
        table("The gap between queries and their partners", *gap_table(gaps)),
        paragraph(
            "Below, each direction on the two principal axes of its queries, its bridged queries and its gallery "
            f"together. A line joins a query to its partner; at most {_JOINED} pairs are drawn."
        ),
    ]
    for name, samples in observed.items():
        parts += [element("h3", name), element("div", *_scatter(name, samples, gaps[name]), class_="grid two")]
    return Section("gap", "The gap", joined(parts))


def trajectories(observed: dict[str, Samples], split: str, solver: str) -> Section:
    """How near the estimate of a sample is to its true partner after each step."""
    if not observed:
        return Section("trajectories", "Sampling trajectories", _nothing(split))
    figures = [figure(_trajectory(name, samples), _told(name, samples)) for name, samples in observed.items()]
    parts = [
        paragraph(
            f"Cosine with the true partner after each step of {solver}: of the sample with what noise is left in it, "
            f"and of the estimate of where it will end. Mean over the pairs of the {split} split, {_SAMPLES} samples "
            "each; the band holds eight pairs of ten. A sample is one plausible partner; the bridged embedding is the "
            "mean that retrieval uses, so a perfect sample ends below it."
        ),
        grid(*figures),
    ]
    return Section("trajectories", "Sampling trajectories", joined(parts))


def _nothing(split: str) -> Html:
    return paragraph(f"The {split} split has no two pairs of any direction that the bridge was trained in.")


def _scatter(name: str, samples: Samples, gaps: tuple[ModalityGap, ModalityGap]) -> Iterator[Html]:
    """The pairs before and after, on the same axes."""
    sets = samples.source, samples.translated, samples.target
    centre, basis = _principal_axes(torch.cat(sets))
    rows = np.unique(np.linspace(0, len(samples.target) - 1, _JOINED).round().astype(int))
    source, translated, target = (((x - centre) @ basis)[rows].numpy() for x in sets)
    every = np.concatenate([source, translated, target])
    low, high = every.min(0), every.max(0)
    margin = 0.05 * (high - low).max()
    query, _, gallery = name.partition(" -> ")
    for points, what, found in ((source, query, gaps[0]), (translated, f"{query}, bridged", gaps[1])):

        def draw_pairs(axis: Any, points: Any = points, what: str = what) -> None:
            lines = np.stack([points, target], 1)
            axis.plot(lines[..., 0].T, lines[..., 1].T, color=SERIES[3], lw=0.6, alpha=0.5, zorder=1)
            axis.scatter(*points.T, s=16, color=SERIES[0], marker="o", label=what)
            axis.scatter(*target.T, s=16, color=SERIES[1], marker="s", label=gallery)
            axis.set_xlim(low[0] - margin, high[0] + margin)
            axis.set_ylim(low[1] - margin, high[1] + margin)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

        drawn = chart(draw_pairs, f"{what} and {gallery} on two principal axes, {name}", height=3.2)
        when = "Before" if found is gaps[0] else "After"
        yield figure(drawn, f"{when}: mean cosine of {what} with its partner {found.paired_cosine:.3f}.")


def _principal_axes(points: Tensor) -> tuple[Tensor, Tensor]:
    """Centre (D,) and the two leading directions (D, 2), each with its largest entry positive."""
    centre = points.mean(0)
    leading = torch.linalg.svd(points - centre, full_matrices=False).Vh[:2]
    largest = leading.gather(1, leading.abs().argmax(1, keepdim=True))
    return centre, (leading * largest.sign()).T


def _paired(samples: Samples) -> tuple[float, float]:
    """Mean cosine with the partner of the queries as they are, and bridged."""
    before, after = (float((x * samples.target).sum(1).mean()) for x in (samples.source, samples.translated))
    return before, after


def _trajectory(name: str, samples: Samples) -> Html:
    low, high = np.quantile(samples.cosines.numpy(), (0.1, 0.9), axis=1)
    means = samples.cosines.mean(1).numpy()
    before, after = _paired(samples)

    def draw_steps(axis: Any) -> None:
        steps = range(1, len(means) + 1)
        axis.fill_between(steps, low, high, color=SERIES[0], alpha=0.25, lw=0)
        axis.plot(steps, means, color=SERIES[0], marker="o", ms=3, label="estimate")
        axis.plot(steps, samples.noisy_cosines.mean(1), color=SERIES[1], marker="s", ms=3, label="sample")
        axis.axhline(after, color=SERIES[2], lw=1.2, ls="--", label="bridged")
        axis.axhline(before, color=INK, lw=1.2, ls=":", label="as they are")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("sampling step")
        axis.set_ylabel("cosine with the true partner")
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, columnspacing=1.2, handlelength=1.6)

    return chart(draw_steps, f"Cosine of samples with their true partner by step, {name}", height=3.0)


def _told(name: str, samples: Samples) -> str:
    first, last = (float(samples.noisy_cosines[step].mean()) for step in (0, -1))
    before, after = _paired(samples)
    return (
        f"{name}, {len(samples.target)} pairs: the sample {first:.3f} after the first of {len(samples.cosines)} steps, "
        f"{last:.3f} after the last; bridged {after:.3f}, as they are {before:.3f}."
    )
