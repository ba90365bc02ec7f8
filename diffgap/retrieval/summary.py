"""What an evaluation found, and how per-query values become means, intervals and differences."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from diffgap.retrieval.bootstrap import Interval, bootstrap, bootstrap_strata
from diffgap.retrieval.diagnostics import ModalityGap
from diffgap.retrieval.metrics import METRICS
from diffgap.retrieval.tasks import Scores

#: The mean over directions, beside the directions themselves.
ALL_DIRECTIONS = "all directions"

#: Metrics of which differences are given: R@5 is the custom, MRR the less noisy.
COMPARED = ("R@5", "MRR")

#: Per direction and run.
Runs = Mapping[str, Sequence[Scores]]


@dataclass(frozen=True)
class Direction:
    """One retrieval task and, for each run, the sizes that its numbers depend on."""

    query: str
    gallery: str
    queries: list[int] = field(default_factory=list)
    gallery_sizes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class ScoringCost:
    """What a scoring costs: denoiser calls, counted, and time, measured.

    Attributes:
        query_calls: Embeddings through the network, for one query.
        item_calls: The same for one gallery item, beforehand.
        milliseconds: For one query, from its embedding to its best items: median over runs and directions.
    """

    query_calls: int
    item_calls: int
    milliseconds: float


@dataclass(frozen=True)
class Setting:
    """One number of steps and samples, as :func:`diffgap.retrieval.few_steps.compare_steps` tries it.

    Attributes:
        steps, num_samples, solver: How the embeddings were bridged.
        calls: Denoiser calls for each embedding.
        milliseconds: To bridge one embedding: median over runs and sides.
        metrics: [method][direction][metric] -> interval, as in :class:`Report`.
        gap: Mean over runs and directions between bridged queries and gallery, by the names of :class:`ModalityGap`.
    """

    steps: int
    num_samples: int
    solver: str
    calls: int
    milliseconds: float
    metrics: dict[str, dict[str, dict[str, Interval]]]
    gap: dict[str, float]


@dataclass
class Report:
    """What :func:`diffgap.retrieval.evaluate.evaluate_runs` found.

    Attributes:
        runs: Names of the run folders.
        split: Split evaluated.
        settings: What the numbers depend on: samples, steps, solver; threads and device.
        directions: By name, "query -> gallery".
        metrics: [method][direction][metric] -> interval; "MedR", of a direction, is a median and has none. The
            direction :data:`ALL_DIRECTIONS` is the mean over all.
        differences: [one][other][direction][metric] -> interval of one method's mean less the other's.
        costs: [method] of the bridge.
        alphas: Fusion weight of each run.
        betas: Weight of the likelihood ratio of each run, if that was asked for.
        gaps: [direction] -> (before, after): the gap between gallery items and the queries, before and after bridging.
        embeddings: [direction] -> unit vectors of the first run for the plot: queries, bridged queries, gallery.
        trajectory: [direction] -> per step, mean cosine of the denoised estimate with its true pair.
        few_steps: The table of few steps, if that was asked for.
    """

    runs: list[str]
    split: str
    settings: dict[str, object]
    directions: dict[str, Direction] = field(default_factory=dict)
    metrics: dict[str, dict[str, dict[str, Interval]]] = field(default_factory=dict)
    differences: dict[str, dict[str, dict[str, dict[str, Interval]]]] = field(default_factory=dict)
    costs: dict[str, ScoringCost] = field(default_factory=dict)
    alphas: list[float] = field(default_factory=list)
    betas: list[float] = field(default_factory=list)
    gaps: dict[str, tuple[ModalityGap, ModalityGap]] = field(default_factory=dict)
    embeddings: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    trajectory: dict[str, list[float]] = field(default_factory=dict)
    few_steps: list[Setting] = field(default_factory=list)


def means(runs: Runs, directions: Collection[str], *, replicates: int, seed: int) -> dict[str, dict[str, Interval]]:
    """[direction][metric] -> mean over the queries of all runs, with an interval that resamples concepts.

    :data:`ALL_DIRECTIONS` is the mean over ``directions``, each counting the same, with one draw of concepts for all.
    It is left out where a direction is missing, or there is only one.
    """
    found = {}
    for name, part in _rows(runs, directions).items():
        found[name] = {
            metric: _interval([(_values(runs[each], metric), _groups(runs[each])) for each in part], replicates, seed)
            for metric in METRICS
        }
        if name != ALL_DIRECTIONS:
            median = float(np.median(_values(runs[name], "rank")))
            found[name]["MedR"] = Interval(median, median, median)
    return found


def differences(
    one: Runs, other: Runs, directions: Collection[str], *, replicates: int, seed: int
) -> dict[str, dict[str, Interval]]:
    """[direction][metric] -> mean of ``one`` less ``other`` on the same queries, where both have them."""
    both = {name: runs for name, runs in one.items() if len(other.get(name, ())) == len(runs)}
    return {
        name: {
            metric: _interval(
                [(_values(one[each], metric) - _values(other[each], metric), _groups(one[each])) for each in part],
                replicates,
                seed,
            )
            for metric in COMPARED
        }
        for name, part in _rows(both, directions).items()
    }


def overall(by_direction: Mapping[str, dict[str, Interval]]) -> dict[str, Interval]:
    """The mean over directions, or the only direction."""
    return by_direction.get(ALL_DIRECTIONS) or next(iter(by_direction.values()))


def _rows(runs: Runs, directions: Collection[str]) -> dict[str, list[str]]:
    """The directions that each row is a mean over: one, or all of them."""
    each = {direction: [direction] for direction in runs}
    return {**each, ALL_DIRECTIONS: list(runs)} if len(runs) == len(directions) > 1 else each


def _interval(strata: Sequence[tuple[np.ndarray, np.ndarray]], replicates: int, seed: int) -> Interval:
    """Of the mean of (values, groups), over strata if there are several."""
    if len(strata) == 1:
        return bootstrap(*strata[0], resamples=replicates, seed=seed)
    return bootstrap_strata(strata, resamples=replicates, seed=seed)


def _values(runs: Sequence[Scores], metric: str) -> np.ndarray:
    return np.concatenate([scores.values[metric].numpy() for scores in runs])


def _groups(runs: Sequence[Scores]) -> np.ndarray:
    return np.concatenate([scores.groups for scores in runs])
