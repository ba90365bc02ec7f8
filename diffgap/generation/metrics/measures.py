"""From what a backbone says of the clips to each metric, its interval and its settings.

``recording_cosine`` and ``recording_recall`` hold a generated clip against its own recording, and that among all
recordings, by the cosine of the backbone's features (their mean over frames): what it was generated from, where the
backbone is the generator's own audio encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np
from torch import Tensor

from diffgap.generation.metrics._rows import Floats
from diffgap.generation.metrics.backbone import Output
from diffgap.generation.metrics.distances import (
    KERNEL_SCALE,
    KernelSums,
    frechet_of_rows,
    median_distance,
)
from diffgap.generation.metrics.mel import mel_distances
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

    ``features`` are (T, D) a clip, ``logits`` (N, C) and ``mel`` (N, 2 M) a set, or empty. Where ``paired``, clip i of
    both sets belongs together. ``conditions`` (M, D) are all conditions and ``own`` (N,) the row of each clip's own.
    ``classes`` (C,) name the logits, ``labels`` (N,) are the classes that the clips should be of.
    """

    features: Sequence[list[Floats]]
    logits: Sequence[Floats]
    mel: Sequence[Floats] = ()
    paired: bool = False
    conditions: Floats | None = None
    own: Index | None = None
    classes: Sequence[str] = ()
    labels: Sequence[str] = ()
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
    against: Literal["nothing", "reference", "pairs", "conditions", "labels"]
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
    yield from _recalls(
        "", generated_ranks(_pooled(evidence), gallery, ids, np.arange(len(gallery))), evidence, gallery
    )


def _recalls(prefix: str, ranks: Tensor, evidence: Evidence, gallery: Floats) -> Iterator[Result]:
    for name, values in per_query_metrics(ranks).items():
        if name in ("R@1", "R@5", "R@10", "MRR"):
            yield _mean(prefix + name, values.numpy(), len(gallery), evidence, {})


def _mel_distance(evidence: Evidence) -> Iterator[Result]:
    values = mel_distances(*evidence.mel)
    yield _mean("mel_distance", values, len(values), evidence, {"unit": "dB"})


def _label_agreement(evidence: Evidence) -> Iterator[Result]:
    """Share of clips that the classifier finds to be of their label, the first class in a tie."""
    wanted = np.asarray(evidence.labels)
    values = (np.asarray(evidence.classes)[evidence.logits[0].argmax(1)] == wanted).astype(np.float64)
    names, counts = np.unique(wanted, return_counts=True)
    details: Settings = {
        "chance": f"{counts.max() / len(wanted):.3g}, by always saying {str(names[counts.argmax()])!r}"
    }
    if unknown := sorted(set(wanted) - set(evidence.classes)):
        missed = int(np.isin(wanted, unknown).sum())
        details["unknown"] = f"{missed} clips are of labels that the classifier lacks, and count as wrong"
    yield replace(_mean("label_agreement", values, len(names), evidence, {}), details=details)


def _recording_cosine(evidence: Evidence) -> Iterator[Result]:
    values = clap_scores(*map(_averaged, evidence.features))
    yield _mean("recording_cosine", values, len(values), evidence, {})


def _recording_recall(evidence: Evidence) -> Iterator[Result]:
    recordings = _averaged(evidence.features[1])
    yield from _recalls(
        "recording_", generated_ranks(_averaged(evidence.features[0]), recordings), evidence, recordings
    )


#: The metrics, by name.
MEASURES: dict[str, Measure] = {
    "inception_score": Measure("logits", "nothing", "higher", _inception_score),
    "kl_softmax": Measure("logits", "pairs", "lower", _kl("softmax")),
    "kl_sigmoid": Measure("logits", "pairs", "lower", _kl("sigmoid")),
    "frechet_distance": Measure("features", "reference", "lower", _frechet_distance),
    "kernel_distance": Measure("features", "reference", "lower", _kernel_distance),
    "clap_score": Measure("features", "conditions", "higher", _clap_score),
    "recall": Measure("features", "conditions", "higher", _recall),
    "recording_cosine": Measure("features", "pairs", "higher", _recording_cosine),
    "recording_recall": Measure("features", "pairs", "higher", _recording_recall),
    "label_agreement": Measure("logits", "labels", "higher", _label_agreement),
    "mel_distance": Measure("mel", "pairs", "lower", _mel_distance),
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


def _averaged(clips: Sequence[Floats]) -> Floats:
    """(N, D), the mean over each clip's frames."""
    return np.stack([rows.mean(0) for rows in clips])
