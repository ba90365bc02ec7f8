"""Evaluation of trained bridges: retrieval in every direction, beside every baseline, with intervals.

A direction "text -> audio" has the distinct text embeddings of the split as queries, its distinct audio embeddings as
gallery, and rows of equal group as positives. All choices (hyper-parameters of baselines, fusion weight) are made on the
validation split. Several runs, one per split seed, are pooled: an estimate is the mean over the queries of all runs, and
its interval resamples concepts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffgap.data.store import EmbeddingStore
from diffgap.models.bridge import DiffGAP
from diffgap.models.scoring import Encoded, Scoring, score_features
from diffgap.retrieval.baselines import Baseline, make_baselines, validation_mrr
from diffgap.retrieval.bootstrap import Interval, bootstrap, paired_bootstrap
from diffgap.retrieval.diagnostics import ModalityGap, modality_gap
from diffgap.retrieval.metrics import METRICS, per_query_metrics, positive_ranks
from diffgap.training.runs import load_data, load_run

#: Fusion weights tried on validation data; 0 is the plain cosine.
ALPHAS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)

#: Rows of the table that come from the bridge itself.
SCORINGS: dict[str, Scoring] = {"heads (cosine)": "cosine", "bridge": "bridge", "bridge + cosine": "fusion"}


class Items(NamedTuple):
    """Distinct embeddings of one modality and the group of each."""

    embeddings: Tensor
    groups: np.ndarray


class Scores(NamedTuple):
    """Per-query metrics (N,) by name, and each query's group."""

    values: dict[str, Tensor]
    groups: np.ndarray


@dataclass(frozen=True)
class Direction:
    """One retrieval task and, for each run, the sizes that its numbers depend on."""

    query: str
    gallery: str
    queries: list[int] = field(default_factory=list)
    gallery_sizes: list[int] = field(default_factory=list)


@dataclass
class Report:
    """What :func:`evaluate_runs` found.

    Attributes:
        runs: Names of the run folders.
        split: Split evaluated.
        settings: What the numbers depend on: samples, steps, solver.
        directions: By name, "query -> gallery".
        metrics: [method][direction][metric] -> interval; "MedR" is the median rank, without one.
        differences: [comparison][direction] -> interval of the difference in R@5.
        alphas: [direction] -> fusion weight chosen in each run.
        gaps: [direction] -> (before, after): the gap between gallery items and the queries, before and after bridging.
        embeddings: [direction] -> unit vectors of the first run for the plot: queries, bridged queries, gallery.
        trajectory: [direction] -> per step, mean cosine of the denoised estimate with its true pair.
    """

    runs: list[str]
    split: str
    settings: dict[str, object]
    directions: dict[str, Direction] = field(default_factory=dict)
    metrics: dict[str, dict[str, dict[str, Interval]]] = field(default_factory=dict)
    differences: dict[str, dict[str, Interval]] = field(default_factory=dict)
    alphas: dict[str, list[float]] = field(default_factory=dict)
    gaps: dict[str, tuple[ModalityGap, ModalityGap]] = field(default_factory=dict)
    embeddings: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    trajectory: dict[str, list[float]] = field(default_factory=dict)


def items(store: EmbeddingStore, modality: str) -> Items:
    """The distinct embeddings of a modality, with the group of the first row that holds each."""
    rows = store.unique_rows(modality)
    return Items(store.embeddings(modality, rows), store.column("group")[rows].astype(str))


def codes(*groups: np.ndarray) -> list[Tensor]:
    """Integer codes of group names, equal across the arguments where the names are."""
    flat = np.unique(np.concatenate(groups), return_inverse=True)[1]
    return [torch.from_numpy(part) for part in np.split(flat, np.cumsum([len(g) for g in groups])[:-1])]


def rank(queries: Tensor, gallery: Tensor, query_groups: np.ndarray, gallery_groups: np.ndarray) -> Scores:
    """Strict-rank metrics of every query that has a positive in the gallery, by inner product."""
    kept = np.isin(query_groups, gallery_groups)
    if not kept.any():
        raise ValueError("no query has a positive in the gallery; check the groups of the store")
    ids = codes(query_groups[kept], gallery_groups)
    ranks = positive_ranks(queries[torch.from_numpy(kept)], gallery, *ids, normalize=False)
    return Scores(per_query_metrics(ranks), query_groups[kept])


def validation_scores(model: DiffGAP, store: EmbeddingStore) -> dict[str, float]:
    """R@5 during training: "score", of the fused scoring with weight 1, and "cosine", each the mean over directions.

    Few samples and steps: a validation that costs little, for choosing the step, not for reporting.
    """
    found: dict[str, list[float]] = {"score": [], "cosine": []}
    for query, gallery in permutations(model.modalities, 2):
        sides = items(store, query), items(store, gallery)
        encoded = [
            model.encode(name, side.embeddings, other, num_samples=4, steps=4)
            for name, side, other in ((query, sides[0], gallery), (gallery, sides[1], query))
        ]
        for name, scoring in (("score", "fusion"), ("cosine", "cosine")):
            features = score_features(*encoded, scoring)  # type: ignore[arg-type]
            found[name].append(float(rank(*features, sides[0].groups, sides[1].groups).values["R@5"].mean()))
    return {name: sum(values) / len(values) for name, values in found.items()}


def evaluate_runs(
    runs: Sequence[Path],
    *,
    split: str = "test",
    with_baselines: bool = True,
    replicates: int = 1000,
    seed: int = 0,
) -> Report:
    """Evaluate run folders of ``diffgap train``; see the module's text.

    Raises:
        FileNotFoundError: A folder holds no trained run.
        ValueError: The runs bridge different modalities, or a split is empty.
    """
    loaded = [(path, *load_run(path)) for path in runs]
    modalities = loaded[0][1].modalities
    for path, model, _ in loaded:
        if model.modalities != modalities:
            raise ValueError(f"{path} bridges {', '.join(model.modalities)}, {runs[0]} {', '.join(modalities)}; evaluate them apart")
    settings = loaded[0][1].settings
    report = Report(
        [path.name for path in runs],
        split,
        {
            "scoring samples": settings.num_samples,
            "sampling steps": settings.sampling_steps,
            "solver": settings.solver,
            "guidance": settings.guidance_scale,
            "seed": seed,
        },
    )
    pooled: dict[str, dict[str, list[Scores]]] = {}
    for number, (_, model, config) in enumerate(loaded):
        store = load_data(config.data)
        parts = {name: store.split(name) for name in ("train", "val", split)}
        methods = _bridge_scores(model, parts["val"], parts[split], report, seed, first=number == 0)
        if with_baselines:
            methods |= _baseline_scores(modalities, parts, split, seed)
        for method, by_direction in methods.items():
            for direction, scores in by_direction.items():
                pooled.setdefault(method, {}).setdefault(direction, []).append(scores)
    _summarise(report, pooled, replicates, seed)
    return report


def _bridge_scores(
    model: DiffGAP, val: EmbeddingStore, test: EmbeddingStore, report: Report, seed: int, *, first: bool
) -> dict[str, dict[str, Scores]]:
    """Scores of the bridge's scorings; adds weights, gaps and (``first`` run) what the plots show to the report."""
    found: dict[str, dict[str, Scores]] = {name: {} for name in SCORINGS}
    for a, b in combinations(model.modalities, 2):
        val_sides, test_sides = ({name: items(part, name) for name in (a, b)} for part in (val, test))
        val_encoded, encoded = (_encode_pair(model, sides, seed) for sides in (val_sides, test_sides))
        for query, gallery in ((a, b), (b, a)):
            name = f"{query} -> {gallery}"
            alpha = _choose_alpha(val_encoded, val_sides, query, gallery)
            report.alphas.setdefault(name, []).append(alpha)
            groups = test_sides[query].groups, test_sides[gallery].groups
            for method, scoring in SCORINGS.items():
                features = score_features(encoded[query], encoded[gallery], scoring, alpha)
                found[method][name] = rank(*features, *groups)
            direction = report.directions.setdefault(name, Direction(query, gallery))
            direction.queries.append(len(groups[0]))
            direction.gallery_sizes.append(len(groups[1]))
            if first:
                _describe(report, model, name, encoded, test_sides, query, gallery, seed)
    return found


def _encode_pair(model: DiffGAP, sides: Mapping[str, Items], seed: int) -> dict[str, Encoded]:
    a, b = sides
    return {
        name: model.encode(name, sides[name].embeddings, other, seed=seed) for name, other in ((a, b), (b, a))
    }


def _choose_alpha(encoded: Mapping[str, Encoded], sides: Mapping[str, Items], query: str, gallery: str) -> float:
    """The fusion weight with the best validation MRR."""

    def mrr(alpha: float) -> float:
        features = score_features(encoded[query], encoded[gallery], "fusion", alpha)
        return float(rank(*features, sides[query].groups, sides[gallery].groups).values["MRR"].mean())

    return max(ALPHAS, key=mrr)


def _describe(
    report: Report,
    model: DiffGAP,
    name: str,
    encoded: Mapping[str, Encoded],
    sides: Mapping[str, Items],
    query: str,
    gallery: str,
    seed: int,
) -> None:
    """The gap before and after bridging the queries, and the trajectory of one sample each."""
    pairs = list(_pairs(sides[query].groups, sides[gallery].groups))
    q, g = (torch.tensor(side) for side in zip(*pairs, strict=True))
    own, bridged, target = encoded[query].own[q], encoded[query].bridged[q], encoded[gallery].own[g]
    groups = sides[query].groups[q]
    report.gaps[name] = (
        modality_gap(own, target, groups, seed=seed),
        modality_gap(bridged, target, groups, seed=seed),
    )
    report.embeddings[name] = (own, bridged, target)
    cosines: list[float] = []

    def follow(_: int, step: object) -> None:
        estimate = model.diffusion.scaler(gallery).unscale(step.x0)  # type: ignore[attr-defined]
        cosines.append(float(torch.cosine_similarity(estimate, target, dim=-1).mean()))

    model.sample(
        gallery, seed=seed, callback=follow, batch_size=len(q), **{query: sides[query].embeddings[q]}
    )
    report.trajectory[name] = cosines


def _pairs(query_groups: np.ndarray, gallery_groups: np.ndarray) -> Iterator[tuple[int, int]]:
    """One (query, gallery) pair per group: the first item of it on each side."""
    gallery_first = {group: row for row, group in reversed(list(enumerate(gallery_groups)))}
    seen: set[str] = set()
    for row, group in enumerate(query_groups):
        if group in gallery_first and group not in seen:
            seen.add(group)
            yield row, gallery_first[group]


def _baseline_scores(
    modalities: Sequence[str], parts: Mapping[str, EmbeddingStore], split: str, seed: int
) -> dict[str, dict[str, Scores]]:
    """Scores of every baseline in both directions of every pair of modalities.

    A regression may run either way; the way with the better validation MRR serves both directions.
    """
    found: dict[str, dict[str, Scores]] = {}
    for a, b in combinations(modalities, 2):
        sides = {name: items(parts[split], name) for name in (a, b)}
        for name, (x, y, baseline) in _fitted(a, b, parts, seed).items():
            space = {
                x: baseline.encode_x(sides[x].embeddings),
                y: baseline.encode_y(sides[y].embeddings),
            }
            for query, gallery in ((a, b), (b, a)):
                scores = rank(space[query], space[gallery], sides[query].groups, sides[gallery].groups)
                found.setdefault(name, {})[f"{query} -> {gallery}"] = scores
    return found


def _fitted(
    a: str, b: str, parts: Mapping[str, EmbeddingStore], seed: int
) -> dict[str, tuple[str, str, Baseline]]:
    """By name, the modality taken as x, that taken as y, and the fitted baseline."""
    best: dict[str, tuple[float, str, str, Baseline]] = {}
    train, val = (part.select(part.present(a, b)) for part in (parts["train"], parts["val"]))
    ids = val.group_ids()
    for x, y in ((a, b), (b, a)):
        for name, baseline in make_baselines(train.dim(x), train.dim(y), seed).items():
            pairs = (train.embeddings(x), train.embeddings(y), val.embeddings(x), val.embeddings(y))
            baseline.fit(*pairs, ids)
            score = validation_mrr(baseline.encode_x(pairs[2]), baseline.encode_y(pairs[3]), ids)
            if name not in best or score > best[name][0]:
                best[name] = (score, x, y, baseline)
    return {name: (x, y, baseline) for name, (_, x, y, baseline) in best.items()}


def _summarise(report: Report, pooled: Mapping[str, Mapping[str, list[Scores]]], replicates: int, seed: int) -> None:
    """Means and intervals over the queries of all runs; differences on the same queries."""

    def merged(method: str, direction: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
        runs = pooled[method][direction]
        values = np.concatenate([scores.values[metric].numpy() for scores in runs])
        return values, np.concatenate([scores.groups for scores in runs])

    for method, by_direction in pooled.items():
        for direction in by_direction:
            cell: dict[str, Interval] = {}
            for metric in METRICS:
                values, groups = merged(method, direction, metric)
                cell[metric] = bootstrap(values, groups, resamples=replicates, seed=seed)
            median = float(np.median(merged(method, direction, "rank")[0]))
            cell["MedR"] = Interval(median, median, median)
            report.metrics.setdefault(method, {})[direction] = cell
    for direction in report.directions:
        rivals = [method for method in pooled if method not in SCORINGS]
        best = max(rivals, key=lambda m: report.metrics[m][direction]["R@5"].estimate, default=None)
        pairs = [("bridge", "heads (cosine)"), ("bridge + cosine", "heads (cosine)")]
        if best is not None:
            pairs.append(("bridge + cosine", best))
        for one, other in pairs:
            label = "best baseline" if other == best else other
            (a, groups), (b, _) = merged(one, direction, "R@5"), merged(other, direction, "R@5")
            report.differences.setdefault(f"{one} - {label}", {})[direction] = paired_bootstrap(
                a, b, groups, resamples=replicates, seed=seed
            )
