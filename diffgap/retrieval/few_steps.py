"""How few steps and samples will do: recall, gap and cost of the bridged embedding at each.

A denoiser that predicts x0 gives, in one step from pure noise, its estimate of the conditional mean: ideally the same
whatever the seed where the schedule leaves no signal at its end (alpha_T = 0), so that one sample does for many. More
steps draw a sample, whose expected cosine with the truth is lower, and K samples average back to the mean.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from diffgap.models.bridge import DiffGAP
from diffgap.models.scoring import Scoring
from diffgap.retrieval.diagnostics import modality_gap
from diffgap.retrieval.evaluate import load_comparable
from diffgap.retrieval.options import METHODS, ScoringOptions
from diffgap.retrieval.summary import Setting, means
from diffgap.retrieval.tasks import EncodedPair, Scores, directions, encode_pairs, example_pairs, rank_direction
from diffgap.retrieval.weights import choose_weights
from diffgap.training.runs import load_data

#: One step to far more than the solvers need.
STEPS = (1, 2, 4, 8, 50)

#: One sample, and as many as make a steady mean.
SAMPLES = (1, 16)

_SCORINGS: tuple[Scoring, ...] = ("bridge", "fusion")
_GAP = ("paired_cosine", "centroid_distance", "linear_separability")


def compare_steps(
    runs: Sequence[Path],
    *,
    split: str = "test",
    options: ScoringOptions | None = None,
    replicates: int = 1000,
    seed: int = 0,
) -> list[Setting]:
    """Every number of steps with every number of samples, by "bridge" and "fusion"; weights chosen on validation data.

    Args:
        runs: Run folders of ``diffgap train``, as for :func:`diffgap.retrieval.evaluate.evaluate_runs`.
        split: Split evaluated.
        options: Solver, guidance and alpha; its own steps and samples do not count.
        replicates: Of the bootstrap.
        seed: Of samples and bootstrap.
    """
    loaded = load_comparable(runs)
    stores = [load_data(config.data) for _, config in loaded]
    parts = [(store.split("val"), store.split(split)) for store in stores]
    found = []
    for samples in SAMPLES:
        for steps in STEPS:
            chosen = replace(
                options or ScoringOptions(), scorings=_SCORINGS, steps=steps, num_samples=samples, beta=None
            )
            pooled: dict[str, dict[str, list[Scores]]] = {METHODS[scoring]: {} for scoring in _SCORINGS}
            seconds: list[float] = []
            gaps: list[dict[str, float]] = []
            for (model, _), (val, test) in zip(loaded, parts, strict=True):
                bridging = {"seed": seed, **chosen.resolved(model)}
                alpha = choose_weights(model, val, chosen, bridging).alpha
                for pair, query, gallery in directions(encode_pairs(model, test, **bridging)):
                    for scoring in _SCORINGS:
                        scores = rank_direction(pair, query, gallery, scoring, alpha)
                        pooled[METHODS[scoring]].setdefault(f"{query} -> {gallery}", []).append(scores)
                    seconds.append(pair.seconds[query] / len(pair.sides[query].groups))
                    gaps.append(_gap(pair, query, gallery, seed))
            found.append(_setting(loaded[0][0], chosen, pooled, seconds, gaps, replicates, seed))
    return found


def _gap(pair: EncodedPair, query: str, gallery: str, seed: int) -> dict[str, float]:
    """Between bridged queries and gallery."""
    groups = pair.sides[query].groups
    q, g = example_pairs(groups, pair.sides[gallery].groups)
    bridged, target = pair.encoded[query].bridged[q], pair.encoded[gallery].own[g]
    gap = asdict(modality_gap(bridged, target, groups[q], folds=min(5, len(q)), seed=seed))
    return {name: gap[name] for name in _GAP}


def _setting(
    model: DiffGAP,
    options: ScoringOptions,
    pooled: dict[str, dict[str, list[Scores]]],
    seconds: list[float],
    gaps: list[dict[str, float]],
    replicates: int,
    seed: int,
) -> Setting:
    chosen = options.resolved(model)
    return Setting(
        steps=chosen["steps"],
        num_samples=chosen["num_samples"],
        solver=chosen["solver"],
        calls=options.cost(model, "bridge", 1).query,
        milliseconds=1000 * statistics.median(seconds),
        metrics={name: means(runs, list(runs), replicates=replicates, seed=seed) for name, runs in pooled.items()},
        gap={name: float(np.mean([gap[name] for gap in gaps])) for name in _GAP},
    )
