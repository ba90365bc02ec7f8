"""Intervals for metrics that are no means over clips.

Drawing clips with replacement puts duplicates into the sets: a Frechet distance grows, an Inception score shrinks and
the kernel distance gains pairs of equal rows. So halves are drawn, without replacement: the spread of a statistic
over halves of N clips is its standard error at N (the delete-d jackknife with d = N / 2; Shao and Wu, Annals of
Statistics 17, 1989; Politis, Romano and Wolf, Subsampling, 1999),

    Var(T_{N/2} | data) ~ (2/N - 1/N) sigma^2 = Var(T_N),

and the interval is ``T + q``, q the quantiles of ``T_{N/2} - mean T_{N/2}``. (Not reflected to ``T - q``: these
statistics spread wider where they are larger, and reflected intervals miss on one side, 0.89 instead of 0.955 for a
kernel distance of 40 and 60 clips.) It covers the metric's expected value *at this N*, which for a biased metric is
not its value for unlimited clips. How far off that is, the halves say too: where the bias falls as 1/N, that of T_N
is about ``mean T_{N/2} - T_N``, reported as ``bias``.

Where the distance of the two sets vanishes (a kernel distance of equal distributions) the interval is too wide, not
too narrow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from diffgap.retrieval.bootstrap import Interval

__all__ = ["HalfSampled", "Index", "check_options", "half_sampled"]

Index = np.ndarray[tuple[int], np.dtype[np.int64]]


class HalfSampled(NamedTuple):
    """An estimate with its interval at this N, and its estimated bias at this N."""

    interval: Interval
    bias: float


def half_sampled(
    statistic: Callable[..., float],
    *counts: int,
    paired: bool = False,
    confidence: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> HalfSampled:
    """``statistic(indices, ...)`` of sets of ``counts`` clips, and its spread over random halves of each.

    Args:
        statistic: Called with an ascending array of clip numbers for each set.
        counts: Clips in each set; half of them, rounded down, are drawn.
        paired: Whether clip i of every set belongs together, so that one half is drawn for all.

    Raises:
        ValueError: a set of fewer than 4 clips, paired sets of different sizes, options out of range.
    """
    check_options(confidence, resamples)
    if min(counts) < 4:
        raise ValueError(f"an interval needs at least 4 clips in each set; got {min(counts)}")
    if paired and len(set(counts)) > 1:
        raise ValueError(f"paired sets must be of one size; got {counts}")
    generator = np.random.default_rng(seed)

    def half(count: int) -> Index:
        return np.sort(generator.permutation(count)[: count // 2])

    halves = np.empty(resamples)
    for number in range(resamples):
        drawn = [half(counts[0])] * len(counts) if paired else [half(count) for count in counts]
        halves[number] = statistic(*drawn)
    estimate = statistic(*(np.arange(count) for count in counts))
    tail = (1 - confidence) / 2
    low, high = np.quantile(halves - halves.mean(), [tail, 1 - tail])
    return HalfSampled(
        Interval(estimate, float(estimate + low), float(estimate + high)), float(halves.mean() - estimate)
    )


def check_options(confidence: float, resamples: int) -> None:
    """Raises ValueError for what no interval can be made with."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1; got {confidence}")
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2; got {resamples}")
