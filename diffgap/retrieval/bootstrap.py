"""Bootstrap confidence intervals for means over queries.

Queries of one group (a concept with several recordings or captions) are not independent, so whole groups are
drawn with replacement: the cluster bootstrap, with percentile intervals (Efron and Tibshirani, 1993, ch. 13).
Pool several split seeds with the concept as group: a concept tested under two seeds then counts once, not
twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from diffgap.retrieval.metrics import METRICS, per_query_metrics

__all__ = ["Interval", "bootstrap", "bootstrap_metrics", "bootstrap_strata", "paired_bootstrap", "unpaired_bootstrap"]

Values = Tensor | np.ndarray[Any, Any]
Floats = np.ndarray[Any, np.dtype[np.float64]]
_CHUNK_ELEMENTS = 1 << 21


class Interval(NamedTuple):
    """An estimate and its confidence interval."""

    estimate: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference lies outside the noise."""
        return self.low > 0 or self.high < 0


def bootstrap(
    values: Values,
    groups: Values | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of the mean of ``values`` (N,), resampling ``groups`` (N,) (default: a group a value)."""
    _check_options(confidence, resamples)
    sums, counts = _by_group("values", values, groups)
    return _interval(sums.sum() / counts.sum(), _resampled_means(sums, counts, resamples, seed), confidence)


def bootstrap_metrics(
    ranks: Tensor,
    groups: Values | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """``bootstrap`` of each of ``METRICS``, from ``positive_ranks`` and the queries' groups."""
    values = per_query_metrics(ranks)
    options: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
    return {name: bootstrap(values[name], groups, **options) for name in METRICS}


def bootstrap_strata(
    strata: Sequence[tuple[Values, Values]],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of the mean over strata (retrieval directions) of each stratum's mean over its queries.

    One draw of groups serves all strata: a concept that is hard in one direction is hard in the others too. A resample
    without any query of a stratum is a mean over the others.

    Args:
        strata: (values (N,), groups (N,)) of each; N may differ.
    """
    _check_options(confidence, resamples)
    if not strata:
        raise ValueError("strata is empty; give (values, groups) of at least one")
    arrays = [_vector(f"strata[{number}]", values) for number, (values, _) in enumerate(strata)]
    labels = [np.asarray(groups).astype(str) for _, groups in strata]
    for number, (array, label) in enumerate(zip(arrays, labels, strict=True)):
        if label.shape != array.shape:
            raise ValueError(f"groups of strata[{number}] have shape {label.shape}; expected {array.shape}")
    names, codes = np.unique(np.concatenate(labels), return_inverse=True)
    parts = np.split(codes, np.cumsum([len(array) for array in arrays])[:-1])
    counts = np.stack([np.bincount(part, minlength=len(names)) for part in parts], 1).astype(np.float64)
    sums = np.stack(
        [np.bincount(part, array, minlength=len(names)) for part, array in zip(parts, arrays, strict=True)], 1
    )
    generator = np.random.default_rng(seed)
    # How often each group is drawn says all about a resample: two products replace a gather for every stratum.
    drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples).astype(np.float64)
    with np.errstate(invalid="ignore"):
        means = np.nanmean((drawn @ sums) / (drawn @ counts), axis=1)
    return _interval(float((sums.sum(0) / counts.sum(0)).mean()), means, confidence)


def paired_bootstrap(
    a: Values,
    b: Values,
    groups: Values | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of ``mean(a) - mean(b)``, two systems on the same queries in the same order."""
    first, second = _vector("a", a), _vector("b", b)
    if first.shape != second.shape:
        raise ValueError(
            f"a and b must score the same queries; got {len(first)} and {len(second)}: use unpaired_bootstrap"
        )
    return bootstrap(first - second, groups, confidence=confidence, resamples=resamples, seed=seed)


def unpaired_bootstrap(
    a: Values,
    b: Values,
    groups_a: Values | None = None,
    groups_b: Values | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of ``mean(a) - mean(b)`` for different query sets, resampled independently."""
    _check_options(confidence, resamples)
    clusters = _by_group("a", a, groups_a), _by_group("b", b, groups_b)
    estimate = [sums.sum() / counts.sum() for sums, counts in clusters]
    means = [
        _resampled_means(sums, counts, resamples, [seed, number]) for number, (sums, counts) in enumerate(clusters)
    ]
    return _interval(estimate[0] - estimate[1], means[0] - means[1], confidence)


def _check_options(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1; got {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1; got {resamples}")


def _vector(name: str, values: Values) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"{name} must be a non-empty vector of finite numbers; got shape {array.shape}")
    return array


def _by_group(name: str, values: Values, groups: Values | None) -> tuple[Floats, Floats]:
    """Sum and number of the values of each group."""
    array = _vector(name, values)
    if groups is None:
        return array, np.ones_like(array)
    labels = np.asarray(groups)
    if labels.shape != array.shape:
        raise ValueError(f"groups of {name} have shape {labels.shape}; expected {array.shape}, one a query")
    codes = np.unique(labels, return_inverse=True)[1]
    return np.bincount(codes, array).astype(np.float64), np.bincount(codes).astype(np.float64)


def _resampled_means(sums: Floats, counts: Floats, resamples: int, seed: int | list[int]) -> Floats:
    """(resamples,) means of as many groups as there are, drawn with replacement."""
    generator, groups = np.random.default_rng(seed), len(sums)
    step, means = max(1, _CHUNK_ELEMENTS // groups), []
    for start in range(0, resamples, step):
        drawn = generator.integers(groups, size=(min(step, resamples - start), groups))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(means)


def _interval(estimate: float, means: Floats, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(estimate), float(low), float(high))
