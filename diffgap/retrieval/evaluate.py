"""Evaluation of trained bridges: retrieval in every direction, beside every baseline, with intervals and costs.

All choices (hyper-parameters of baselines, weights of scores) are made on the validation split. Several runs, one per
split seed, are pooled: an estimate is the mean over the queries of all runs, and its interval resamples concepts.
Sequences are pooled over their frames.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from diffgap.data.store import EmbeddingStore
from diffgap.models.bridge import DiffGAP
from diffgap.models.scoring import Scoring, find_candidates, score_features
from diffgap.ops.solver_step import StepOutput
from diffgap.retrieval.baseline_scores import baseline_scores
from diffgap.retrieval.diagnostics import modality_gap
from diffgap.retrieval.options import METHODS, ScoringOptions
from diffgap.retrieval.summary import Direction, Report, ScoringCost, differences, means
from diffgap.retrieval.tasks import (
    EncodedPair,
    Items,
    Scores,
    directions,
    encode_pairs,
    example_pairs,
    rank_direction,
    rank_shortlist,
    sequence_options,
    shortlist,
)
from diffgap.retrieval.weights import Weights, choose_weights
from diffgap.training.config import DataConfig, RunConfig
from diffgap.training.runs import load_data, load_run

P = ParamSpec("P")
Result = TypeVar("Result")


def validation_scores(model: DiffGAP, store: EmbeddingStore) -> dict[str, float]:
    """R@5 during training: "score", of the fused scoring with weight 1, and "cosine", each the mean over directions.

    For choosing the step, not for reporting.

    Raises:
        ValueError: No group of the store has two modalities.
    """
    pairs = encode_pairs(model, store)
    scorings: dict[str, Scoring] = {"score": "fusion", "cosine": "cosine"}
    return {
        name: statistics.fmean(float(rank_direction(*one, scoring).values["R@5"].mean()) for one in directions(pairs))
        for name, scoring in scorings.items()
    }


def evaluate_runs(
    runs: Sequence[Path],
    *,
    split: str = "test",
    options: ScoringOptions | None = None,
    with_baselines: bool = True,
    replicates: int = 1000,
    seed: int = 0,
) -> Report:
    """Evaluate run folders of ``diffgap train``; see the module's text.

    Args:
        runs: The folders, one per split seed.
        split: Split evaluated.
        options: What to score by, and how embeddings are bridged.
        with_baselines: Fit and score the baselines too.
        replicates: Of the bootstrap.
        seed: Of samples, baselines and bootstrap.

    Raises:
        FileNotFoundError: A folder holds no trained run.
        ValueError: The runs differ in their model or data, or no group of a split has two modalities.
    """
    options = options or ScoringOptions()
    loaded = load_comparable(runs)
    first = loaded[0][0]
    bridging = {"seed": seed, **options.resolved(first)}
    report = Report([path.name for path in runs], split, scoring_settings(first, bridging))
    pooled: dict[str, dict[str, list[Scores]]] = {}
    seconds: dict[Scoring, list[float]] = {scoring: [] for scoring in options.scorings}
    baselines: dict[DataConfig, dict[str, dict[str, Scores]]] = {}
    for model, config in loaded:
        store = load_data(config.data)
        parts = {name: store.split(name) for name in ("train", "val", split)}
        pairs = encode_pairs(model, parts[split], **bridging)
        weights = choose_weights(model, parts["val"], options, bridging)
        methods = _bridge_scores(model, pairs, options, weights, report, seconds, seed)
        if model is first:
            for one in directions(pairs):
                _describe(report, model, *one, options, seed)
        if with_baselines:
            if config.data not in baselines:
                baselines[config.data] = baseline_scores(model.modalities, parts, split, seed)
            methods |= baselines[config.data]
        for method, by_direction in methods.items():
            for direction, scores in by_direction.items():
                pooled.setdefault(method, {}).setdefault(direction, []).append(scores)
    _summarise(report, pooled, replicates, seed)
    largest = max(max(direction.gallery_sizes) for direction in report.directions.values())
    for scoring, taken in seconds.items():
        calls = options.cost(first, scoring, largest)
        report.costs[METHODS[scoring]] = ScoringCost(*calls, 1000 * statistics.median(taken))
    return report


def load_comparable(runs: Sequence[Path]) -> list[tuple[DiffGAP, RunConfig]]:
    """Models and configurations of runs that may differ in their split and their training alone.

    Raises:
        FileNotFoundError: A folder holds no trained run.
        ValueError: They differ in something else.
    """
    loaded = [load_run(path) for path in runs]
    for path, (_, config) in zip(runs[1:], loaded[1:], strict=True):
        own = [
            name
            for name in config.differences(loaded[0][1])
            if not name.startswith("train.") and name != "data.split_seed"
        ]
        if own:
            raise ValueError(f"{path} and {runs[0]} differ in {', '.join(own[:3])}; evaluate them apart")
    return loaded


def scoring_settings(model: DiffGAP, bridging: Mapping[str, Any]) -> dict[str, object]:
    """What the numbers depend on, as the report names it; "scoring" steps, as sampling for generation has its own."""
    return {
        "scoring samples": bridging["num_samples"],
        "scoring steps": bridging["steps"],
        "solver": bridging["solver"],
        "guidance": bridging["guidance_scale"],
        "seed": bridging["seed"],
        "device": str(model.logit_scale.device),
        "threads": torch.get_num_threads(),
    }


def _bridge_scores(
    model: DiffGAP,
    pairs: Sequence[EncodedPair],
    options: ScoringOptions,
    weights: Weights,
    report: Report,
    seconds: dict[Scoring, list[float]],
    seed: int,
) -> dict[str, dict[str, Scores]]:
    """Scores by method and direction; adds weights and sizes to the report, and to ``seconds`` what a query took."""
    report.alphas.append(weights.alpha)
    if weights.beta is not None:
        report.betas.append(weights.beta)
    found: dict[str, dict[str, Scores]] = {METHODS[scoring]: {} for scoring in options.scorings}
    for pair, query, gallery in directions(pairs):
        name = f"{query} -> {gallery}"
        for scoring in options.scorings:
            scores, taken = score_direction(model, pair, query, gallery, scoring, options.candidates, weights, seed)
            found[METHODS[scoring]][name] = scores
            seconds[scoring].append(taken / len(pair.sides[query].groups))
        direction = report.directions.setdefault(name, Direction(query, gallery))
        direction.queries.append(len(scores.groups))
        direction.gallery_sizes.append(len(pair.sides[gallery].groups))
    return found


def score_direction(
    model: DiffGAP,
    pair: EncodedPair,
    query: str,
    gallery: str,
    scoring: Scoring,
    count: int,
    weights: Weights,
    seed: int,
) -> tuple[Scores, float]:
    """Scores of all queries, and the seconds from their embeddings to their ``count`` best items."""
    if scoring == "rerank" and weights.beta is not None:
        listed, search = _timed(shortlist, model, pair, query, gallery, count=count, alpha=weights.alpha, seed=seed)
        return rank_shortlist(pair, query, gallery, listed, weights.beta), pair.seconds[query] + search
    if scoring == "cosine":
        _, encoding = _timed(model.project, query, pair.sides[query].embeddings)
    else:
        encoding = pair.seconds[query]
    features = score_features(pair.encoded[query], pair.encoded[gallery], scoring, weights.alpha)
    _, search = _timed(find_candidates, *features, count)
    return rank_direction(pair, query, gallery, scoring, weights.alpha), encoding + search


def _timed(call: Callable[P, Result], *arguments: P.args, **options: P.kwargs) -> tuple[Result, float]:
    """What a call gives, and the seconds it took."""
    start = time.perf_counter()
    with torch.no_grad():
        result = call(*arguments, **options)
    return result, time.perf_counter() - start


def _describe(
    report: Report, model: DiffGAP, pair: EncodedPair, query: str, gallery: str, options: ScoringOptions, seed: int
) -> None:
    """The gap before and after bridging the queries, and the trajectory of one sample each."""
    name = f"{query} -> {gallery}"
    sides, encoded = pair.sides, pair.encoded
    q, g = example_pairs(sides[query].groups, sides[gallery].groups)
    own, bridged, target = encoded[query].own[q], encoded[query].bridged[q], encoded[gallery].own[g]
    groups, folds = sides[query].groups[q], min(5, len(q))
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
    sampling = sequence_options(chosen, query, gallery)
    sampling |= {"steps": options.steps, "solver": options.solver, "guidance_scale": options.guidance_scale}
    sampling[query] = chosen[query].embeddings
    model.sample(gallery, seed=seed, callback=follow, batch_size=len(q), **sampling)
    report.trajectory[name] = cosines


def _summarise(report: Report, pooled: Mapping[str, Mapping[str, list[Scores]]], replicates: int, seed: int) -> None:
    """Means and intervals over the queries of all runs; each scoring less the heads alone and less each baseline."""
    chosen: dict[str, Any] = {"directions": list(report.directions), "replicates": replicates, "seed": seed}
    report.metrics = {method: means(by_direction, **chosen) for method, by_direction in pooled.items()}
    ours = [method for method in METHODS.values() if method in pooled]
    rivals = [method for method in pooled if method == METHODS["cosine"] or method not in ours]
    for one in ours:
        report.differences[one] = {
            other: differences(pooled[one], pooled[other], **chosen) for other in rivals if other != one
        }
