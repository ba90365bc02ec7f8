"""From what a backbone says of the clips to each metric, its interval and its settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np

from diffgap.generation.metrics._rows import Floats
from diffgap.generation.metrics.backbone import Output
from diffgap.generation.metrics.distances import (
    KERNEL_SCALE,
    KernelSums,
    frechet_of_rows,
    median_distance,
)
from diffgap.generation.metrics.resampling import Index, half_sampled
from diffgap.generation.metrics.scores import EPS, Form, clap_scores, generated_ranks, inception_score, kl_divergences
from diffgap.retrieval.bootstrap import Interval, bootstrap
from diffgap.retrieval.metrics import per_query_metrics

__all__ = ["MEASURES", "Evidence", "Measure", "Result"]

Settings: TypeAlias = dict[str, str | int | float]

_BOOTSTRAP = "bootstrap of the clips, each with what it is paired with"
_HALVES = (
    "random halves of the clips{sets}, without replacement; it covers the metric's expectation at this N, not its "
    "value for unlimited clips"
)
_LEAST = 4
_TOO_FEW = f"under {_LEAST} clips"


@dataclass(frozen=True)
class Evidence:
    """What one backbone says of the generated clips and, if there is one, the reference; and how it is weighed.

    ``features`` are (T, D) a clip, ``logits`` (N, C) a set, or empty. Where ``paired``, clip i of both sets
    belongs together. ``conditions`` (M, D) are all conditions and ``own`` (N,) the row of each clip's own.
    """

    features: Sequence[list[Floats]]
    logits: Sequence[Floats]
    paired: bool = False
    conditions: Floats | None = None
    own: Index | None = None
    splits: int = 10
    confidence: float = 0.95
    resamples: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """One figure; see :class:`diffgap.generation.metrics.report.Figure`."""

    metric: str
    estimate: float
    interval: Interval | None
    resampling: str
    against: int
    bias: float | None = None
    settings: Settings = field(default_factory=dict)
    details: Settings = field(default_factory=dict)
    values: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Measure:
    """A metric: what it is computed from, and which end is good."""

    output: Output
    against: Literal["nothing", "reference", "pairs", "conditions"]
    better: Literal["higher", "lower"]
    compute: Callable[[Evidence], Iterator[Result]]


def _inception_score(evidence: Evidence) -> Iterator[Result]:
    logits, splits = evidence.logits[0], evidence.splits

    def score(clips: Index) -> float:
        return inception_score(logits[clips], splits=splits).mean

    details: Settings = {"std over splits": inception_score(logits, splits=splits).std}
    least = max(_LEAST, 2 * splits)
    yield _halved("inception_score", score, (len(logits),), evidence, {"splits": splits}, details, least=least)


def _kl(form: Form) -> Callable[[Evidence], Iterator[Result]]:
    def compute(evidence: Evidence) -> Iterator[Result]:
        values = kl_divergences(evidence.logits[0], evidence.logits[1], form=form)
        yield _mean(f"kl_{form}", values, len(values), evidence, {"eps": EPS})

    return compute


def _frechet_distance(evidence: Evidence) -> Iterator[Result]:
    generated, reference = evidence.features
    details = _frames(evidence)
    smallest, width = min(sum(map(len, rows)) for rows in evidence.features), generated[0].shape[1]
    if smallest <= width:
        details["covariance"] = f"singular, {smallest} rows of width {width}: far too large, by more than the bias says"

    def distance(a: Index, b: Index) -> float:
        return frechet_of_rows(np.concatenate([generated[i] for i in a]), np.concatenate([reference[i] for i in b]))

    yield _halved("frechet_distance", distance, (len(generated), len(reference)), evidence, {}, details)


def _kernel_distance(evidence: Evidence) -> Iterator[Result]:
    generated, reference = evidence.features
    stacked = np.concatenate(generated), np.concatenate(reference)
    bandwidth = median_distance(stacked[1])
    sums = KernelSums(*stacked, bandwidth, ([len(x) for x in generated], [len(x) for x in reference]))

    def distance(a: Index, b: Index) -> float:
        return KERNEL_SCALE * sums.distance((a, b))

    settings: Settings = {"kernel": "gaussian", "bandwidth": bandwidth, "scale": KERNEL_SCALE}
    counts = len(generated), len(reference)
    result = _halved("kernel_distance", distance, counts, evidence, settings, _frames(evidence))
    yield replace(result, bias=None)  # there is none to estimate


def _clap_score(evidence: Evidence) -> Iterator[Result]:
    assert evidence.conditions is not None and evidence.own is not None
    values = clap_scores(_pooled(evidence), evidence.conditions[evidence.own])
    yield _mean("clap_score", values, len(evidence.conditions), evidence, {})


def _recall(evidence: Evidence) -> Iterator[Result]:
    assert evidence.conditions is not None and evidence.own is not None
    gallery, codes = np.unique(evidence.conditions, axis=0, return_inverse=True)
    ids = codes.reshape(-1)[evidence.own]
    ranks = generated_ranks(_pooled(evidence), gallery, ids, np.arange(len(gallery)))
    for name, values in per_query_metrics(ranks).items():
        if name in ("R@1", "R@5", "R@10", "MRR"):
            yield _mean(name, values.numpy(), len(gallery), evidence, {})


#: The metrics, by name.
MEASURES: dict[str, Measure] = {
    "inception_score": Measure("logits", "nothing", "higher", _inception_score),
    "kl_softmax": Measure("logits", "pairs", "lower", _kl("softmax")),
    "kl_sigmoid": Measure("logits", "pairs", "lower", _kl("sigmoid")),
    "frechet_distance": Measure("features", "reference", "lower", _frechet_distance),
    "kernel_distance": Measure("features", "reference", "lower", _kernel_distance),
    "clap_score": Measure("features", "conditions", "higher", _clap_score),
    "recall": Measure("features", "conditions", "higher", _recall),
}


def _mean(metric: str, values: Floats, against: int, evidence: Evidence, settings: Settings) -> Result:
    if len(values) < _LEAST:
        interval, resampling = None, _TOO_FEW
    else:
        options = {"confidence": evidence.confidence, "resamples": evidence.resamples, "seed": evidence.seed}
        interval, resampling = bootstrap(values, **options), _BOOTSTRAP  # type: ignore[arg-type]
    estimate = float(values.mean())
    return Result(metric, estimate, interval, resampling, against, None, settings, {}, tuple(map(float, values)))


def _halved(
    metric: str,
    statistic: Callable[..., float],
    counts: tuple[int, ...],
    evidence: Evidence,
    settings: Settings,
    details: Settings,
    *,
    least: int = _LEAST,
) -> Result:
    against = counts[1] if len(counts) > 1 else 0
    if min(counts) < least:
        estimate = statistic(*(np.arange(count) for count in counts))
        return Result(metric, estimate, None, f"under {least} clips", against, None, settings, details)
    interval, bias = half_sampled(
        statistic,
        *counts,
        paired=evidence.paired and len(counts) > 1,
        confidence=evidence.confidence,
        resamples=evidence.resamples,
        seed=evidence.seed,
    )
    sets = "" if len(counts) == 1 else " of both sets, pair by pair" if evidence.paired else " of both sets"
    return Result(metric, interval.estimate, interval, _HALVES.format(sets=sets), against, bias, settings, details)


def _frames(evidence: Evidence) -> Settings:
    """Nothing where a clip is a row; else how many rows (frames) the sets have."""
    counts = [sum(map(len, rows)) for rows in evidence.features]
    return {} if counts == list(map(len, evidence.features)) else {"frames": f"{counts[0]} and {counts[1]}"}


def _pooled(evidence: Evidence) -> Floats:
    generated = evidence.features[0]
    if any(len(rows) != 1 for rows in generated):
        raise ValueError("clap_score and recall need a backbone with one vector a clip; this one gives frames")
    return np.concatenate(generated)
