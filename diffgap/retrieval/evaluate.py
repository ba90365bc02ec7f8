"""Evaluation of trained bridges: retrieval in every direction, beside every baseline, with intervals.

A direction "text -> audio" has the distinct text embeddings of the split as queries, its distinct audio embeddings as
gallery, and rows of equal group as positives. All choices (hyper-parameters of baselines, fusion weight) are made on
the validation split. Several runs, one per split seed, are pooled: an estimate is the mean over the queries of all
runs, and its interval resamples concepts. Sequences are pooled over their frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffgap.data.store import EmbeddingStore
from diffgap.models.bridge import DiffGAP
from diffgap.models.inputs import frame_mask, hidden
from diffgap.models.scoring import Encoded, Scoring, score_features
from diffgap.ops.solver_step import StepOutput
from diffgap.retrieval.baselines import Baseline, make_baselines, validation_mrr
from diffgap.retrieval.bootstrap import Interval, bootstrap, bootstrap_strata, paired_bootstrap
from diffgap.retrieval.diagnostics import ModalityGap, modality_gap
from diffgap.retrieval.metrics import METRICS, per_query_metrics, positive_ranks
from diffgap.training.config import DataConfig
from diffgap.training.runs import load_data, load_run

#: Fusion weights tried on validation data; 0 is the plain cosine.
ALPHAS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)

#: Rows of the table that come from the bridge itself.
SCORINGS: dict[str, Scoring] = {"heads (cosine)": "cosine", "bridge": "bridge", "bridge + cosine": "fusion"}

ALL_DIRECTIONS = "all directions"

#: Metrics whose differences are reported: the usual one, and the one that varies least.
COMPARED = ("R@5", "MRR")


class Items(NamedTuple):
    """Distinct embeddings of one modality, the group of each, and the frames of each where it is a sequence."""

    embeddings: Tensor
    groups: np.ndarray
    lengths: Tensor | None = None

    def pooled(self) -> Tensor:
        """(N, D): the mean over the frames of each sequence, a vector as it is."""
        if self.lengths is None:
            return self.embeddings
        here = frame_mask(self.lengths, self.embeddings.shape[1])
        return hidden(self.embeddings, here).sum(1) / self.lengths[:, None]


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
        metrics: [method][direction][metric] -> interval; "MedR" is the median rank, without one. The direction
            :data:`ALL_DIRECTIONS` is the mean over all.
        differences: [metric][comparison][direction] -> interval of the difference, for :data:`COMPARED`.
        alphas: Fusion weight chosen in each run.
        gaps: [direction] -> (before, after): the gap between gallery items and the queries, before and after bridging.
        embeddings: [direction] -> unit vectors of the first run for the plot: queries, bridged queries, gallery.
        trajectory: [direction] -> per step, mean cosine of the denoised estimate with its true pair.
    """

    runs: list[str]
    split: str
    settings: dict[str, object]
    directions: dict[str, Direction] = field(default_factory=dict)
    metrics: dict[str, dict[str, dict[str, Interval]]] = field(default_factory=dict)
    differences: dict[str, dict[str, dict[str, Interval]]] = field(default_factory=dict)
    alphas: list[float] = field(default_factory=list)
    gaps: dict[str, tuple[ModalityGap, ModalityGap]] = field(default_factory=dict)
    embeddings: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    trajectory: dict[str, list[float]] = field(default_factory=dict)


def items(store: EmbeddingStore, modality: str, rows: np.ndarray | None = None) -> Items:
    """Embeddings of index rows; by default the distinct ones, each with the group of the first row that holds it."""
    rows = store.unique_rows(modality) if rows is None else rows
    groups = store.column("group")[rows].astype(str)
    return Items(store.embeddings(modality, rows), groups, store.lengths(modality, rows))


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

    For choosing the step, not for reporting.
    """
    found: dict[str, list[float]] = {"score": [], "cosine": []}
    scorings: dict[str, Scoring] = {"score": "fusion", "cosine": "cosine"}
    for pair in combinations(model.modalities, 2):
        sides = {name: items(store, name) for name in pair}
        encoded = encode_pair(model, sides)
        for query, gallery in permutations(pair):
            for name, scoring in scorings.items():
                features = score_features(encoded[query], encoded[gallery], scoring)
                scores = rank(*features, sides[query].groups, sides[gallery].groups)
                found[name].append(float(scores.values["R@5"].mean()))
    return {name: sum(values) / len(values) for name, values in found.items()}


def encode_pair(model: DiffGAP, sides: Mapping[str, Items], **options: Any) -> dict[str, Encoded]:
    """Both sides of a pair of modalities, each bridged to the other; options as in :meth:`DiffGAP.translate`.

    A direction that was not trained (``BridgeSettings.directions``) gives zeros, so that scores use its reverse alone;
    where neither was, nothing is bridged: the embeddings stay as they are.
    """
    a, b = sides
    encoded = {
        name: model.encode(name, sides[name].embeddings, other, **_sequence_options(sides, name, other), **options)
        for name, other in ((a, b), (b, a))
    }
    trained = {a: model.settings.trains(a, b), b: model.settings.trains(b, a)}
    for name, side in encoded.items():
        if not trained[name]:
            encoded[name] = side._replace(bridged=torch.zeros_like(side.own) if any(trained.values()) else side.own)
    return encoded


def _sequence_options(sides: Mapping[str, Items], source: str, target: str) -> dict[str, Any]:
    """What sampling needs to know of sequences: how many frames the sources have and the samples are to have.

    A sample has the gallery's typical number: that of its true pair would give the answer away.
    """
    lengths = sides[target].lengths
    return {"frames": None if lengths is None else int(lengths.median()), "lengths": sides[source].lengths}


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
        ValueError: The runs differ in their model or data, or a split is empty.
    """
    loaded = [(path, *load_run(path)) for path in runs]
    modalities, first_config = loaded[0][1].modalities, loaded[0][2]
    for path, _, config in loaded[1:]:
        own = [
            name
            for name in config.differences(first_config)
            if not name.startswith("train.") and name != "data.split_seed"
        ]
        if own:
            raise ValueError(f"{path} and {runs[0]} differ in {', '.join(own[:3])}; evaluate them apart")
    settings = loaded[0][1].settings
    report = Report(
        [path.name for path in runs],
        split,
        {
            "scoring samples": settings.num_samples,
            "scoring steps": settings.translate_steps,
            "solver": settings.solver,
            "guidance": settings.guidance_scale,
            "seed": seed,
        },
    )
    pooled: dict[str, dict[str, list[Scores]]] = {}
    baselines: dict[DataConfig, dict[str, dict[str, Scores]]] = {}
    for number, (_, model, config) in enumerate(loaded):
        store = load_data(config.data)
        parts = {name: store.split(name) for name in ("train", "val", split)}
        methods = _bridge_scores(model, parts["val"], parts[split], report, seed, first=number == 0)
        if with_baselines:
            if config.data not in baselines:
                baselines[config.data] = _baseline_scores(modalities, parts, split, seed)
            methods |= baselines[config.data]
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
    alpha = choose_alpha(encode_pairs(model, val, seed=seed))
    report.alphas.append(alpha)
    for encoded, test_sides in encode_pairs(model, test, seed=seed):
        for query, gallery in permutations(test_sides):
            name = f"{query} -> {gallery}"
            groups = test_sides[query].groups, test_sides[gallery].groups
            for method, scoring in SCORINGS.items():
                features = score_features(encoded[query], encoded[gallery], scoring, alpha)
                found[method][name] = rank(*features, *groups)
            direction = report.directions.setdefault(name, Direction(query, gallery))
            direction.queries.append(len(found["bridge"][name].groups))
            direction.gallery_sizes.append(len(groups[1]))
            if first:
                _describe(report, model, name, encoded, test_sides, query, gallery, seed)
    return found


EncodedPair = tuple[dict[str, Encoded], dict[str, Items]]


def encode_pairs(model: DiffGAP, store: EmbeddingStore, **options: Any) -> list[EncodedPair]:
    """Every pair of modalities of a store, each side bridged to the other; options as in :meth:`DiffGAP.translate`."""
    pairs = [{name: items(store, name) for name in pair} for pair in combinations(model.modalities, 2)]
    return [(encode_pair(model, sides, **options), sides) for sides in pairs]


def choose_alpha(pairs: Sequence[EncodedPair]) -> float:
    """The fusion weight with the best validation MRR, mean over all directions.

    One for all: on 60 validation concepts the best weight of a single direction was anything from 0 to 4, and what the
    bridge gains was lost in that choice.
    """

    def mrr(alpha: float) -> float:
        found = []
        for encoded, sides in pairs:
            for query, gallery in permutations(sides):
                features = score_features(encoded[query], encoded[gallery], "fusion", alpha)
                scores = rank(*features, sides[query].groups, sides[gallery].groups)
                found.append(float(scores.values["MRR"].mean()))
        return sum(found) / len(found)

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
    if len(pairs) < 2:
        raise ValueError(f"{name}: the split has {len(pairs)} group with both; retrieval needs two or more")
    q, g = (torch.tensor(side) for side in zip(*pairs, strict=True))
    own, bridged, target = encoded[query].own[q], encoded[query].bridged[q], encoded[gallery].own[g]
    groups, folds = sides[query].groups[q], min(5, len(pairs))
    before, after = (modality_gap(x, target, groups, folds=folds, seed=seed) for x in (own, bridged))
    report.gaps[name] = (before, after)
    report.embeddings[name] = (own, bridged, target)
    cosines: list[float] = []

    def follow(_: int, step: StepOutput) -> None:
        estimate = model.diffusion.scaler(gallery).unscale(step.x0)
        estimate = estimate.mean(1) if estimate.dim() == 3 else estimate
        cosines.append(float(torch.cosine_similarity(estimate, target, dim=-1).mean()))

    chosen = {
        name: Items(side.embeddings[rows], side.groups[rows], None if side.lengths is None else side.lengths[rows])
        for (name, side), rows in zip(((query, sides[query]), (gallery, sides[gallery])), (q, g), strict=True)
    }
    options = _sequence_options(chosen, query, gallery)
    options[query] = chosen[query].embeddings
    model.sample(gallery, seed=seed, callback=follow, batch_size=len(q), **options)
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
    """Scores of every baseline in both directions of every pair of modalities."""
    found: dict[str, dict[str, Scores]] = {}
    for a, b in combinations(modalities, 2):
        sides = {name: items(parts[split], name) for name in (a, b)}
        for name, (x, y, baseline) in _fitted(a, b, parts, seed).items():
            space = {
                x: baseline.encode_x(sides[x].pooled()),
                y: baseline.encode_y(sides[y].pooled()),
            }
            for query, gallery in ((a, b), (b, a)):
                scores = rank(space[query], space[gallery], sides[query].groups, sides[gallery].groups)
                found.setdefault(name, {})[f"{query} -> {gallery}"] = scores
    return found


def _fitted(a: str, b: str, parts: Mapping[str, EmbeddingStore], seed: int) -> dict[str, tuple[str, str, Baseline]]:
    """By name, the modality taken as x, that taken as y, and the fitted baseline.

    A regression may run either way. The way in which ridge has the better validation MRR serves every baseline and both
    directions: the MLP agrees with it, and the others are the same either way.
    """
    pairs = {name: _distinct_pairs(parts[name], a, b) for name in ("train", "val")}
    rows = {
        (name, side): items(pairs[name], side, np.arange(len(pairs[name]))).pooled()
        for name in pairs
        for side in (a, b)
    }
    ids = pairs["val"].group_ids()

    def fit(name: str, x: str, y: str) -> tuple[float, str, str, Baseline]:
        baseline = make_baselines(rows["train", x].shape[1], rows["train", y].shape[1], seed)[name]
        baseline.fit(rows["train", x], rows["train", y], rows["val", x], rows["val", y], ids)
        encoded = baseline.encode_x(rows["val", x]), baseline.encode_y(rows["val", y])
        return validation_mrr(*encoded, ids), x, y, baseline

    ridge = max((fit("ridge", *way) for way in ((a, b), (b, a))), key=lambda found: found[0])
    names = make_baselines(rows["train", a].shape[1], rows["train", b].shape[1], seed)
    fitted = {name: ridge if name == "ridge" else fit(name, *ridge[1:3]) for name in names}
    return {name: (x, y, baseline) for name, (_, x, y, baseline) in fitted.items()}


def _distinct_pairs(part: EmbeddingStore, a: str, b: str) -> EmbeddingStore:
    """The rows that have both modalities, one for each pair of embeddings."""
    present = part.present(a, b)
    pairs = np.stack((part.rows(a)[present], part.rows(b)[present]), axis=1)
    return part.select(present[np.sort(np.unique(pairs, axis=0, return_index=True)[1])])


def _summarise(report: Report, pooled: Mapping[str, Mapping[str, list[Scores]]], replicates: int, seed: int) -> None:
    """Means and intervals over the queries of all runs; differences on the same queries."""

    def merged(method: str, direction: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
        runs = pooled[method][direction]
        values = np.concatenate([scores.values[metric].numpy() for scores in runs])
        return values, np.concatenate([scores.groups for scores in runs])

    def strata(method: str, metric: str) -> list[tuple[np.ndarray, np.ndarray]]:
        return [merged(method, direction, metric) for direction in report.directions]

    options: dict[str, Any] = {"resamples": replicates, "seed": seed}
    for method, by_direction in pooled.items():
        cells = report.metrics.setdefault(method, {})
        for direction in by_direction:
            cells[direction] = {metric: bootstrap(*merged(method, direction, metric), **options) for metric in METRICS}
            median = float(np.median(merged(method, direction, "rank")[0]))
            cells[direction]["MedR"] = Interval(median, median, median)
        if by_direction.keys() == report.directions.keys():
            cells[ALL_DIRECTIONS] = {metric: bootstrap_strata(strata(method, metric), **options) for metric in METRICS}
    heads, fused = "heads (cosine)", "bridge + cosine"
    rivals = [method for method in pooled if method not in SCORINGS]
    pairs = [("bridge", heads), (fused, heads), *((fused, rival) for rival in rivals), *((heads, r) for r in rivals)]
    for metric in COMPARED:
        for one, other in pairs:
            found = report.differences.setdefault(metric, {}).setdefault(f"{one} - {other}", {})
            both = [direction for direction in report.directions if direction in pooled[other]]
            differences = []
            for direction in both:
                (x, groups), (y, _) = merged(one, direction, metric), merged(other, direction, metric)
                differences.append((x - y, groups))
                found[direction] = paired_bootstrap(x, y, groups, **options)
            if both == list(report.directions):
                found[ALL_DIRECTIONS] = bootstrap_strata(differences, **options)
