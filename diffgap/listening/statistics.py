"""Intervals and tests for answers of several listeners to several items."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, norm

from diffgap.retrieval.bootstrap import Interval

__all__ = ["SignTest", "crossed_bootstrap", "preference_interval", "sign_test", "wilson"]

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95


class SignTest(NamedTuple):
    """How many values are above, below and at zero, and how likely a split as uneven is if both sides are."""

    above: int
    below: int
    ties: int
    p: float


def sign_test(values: Floats) -> SignTest:
    """Exact two-sided binomial test of as many values above as below zero.

    Ties say nothing about the direction and are left out (Dixon and Mood, JASA 41, 1946); p is 1 if all are ties.
    """
    above, below = int((values > 0).sum()), int((values < 0).sum())
    p = float(binomtest(above, above + below).pvalue) if above + below else 1.0
    return SignTest(above, below, values.size - above - below, p)


def wilson(share: float, count: int) -> Interval:
    """Wilson's 95 % interval of a share of ``count`` independent answers (JASA 22, 1927).

    ``(p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)``
    """
    z = float(norm.ppf(0.5 + CONFIDENCE / 2))
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = ((centre + side) / (1 + z * z / count) for side in (-half, half))
    return Interval(share, min(max(low, 0.0), share), max(min(high, 1.0), share))


def crossed_bootstrap(values: Floats, resamples: int = 10_000, seed: int = 0) -> Interval:
    """95 % percentile interval of the mean of (participants, items) values, both drawn with replacement.

    Owen's pigeonhole bootstrap (Annals of Applied Statistics 1, 2007): answers of one listener are alike, and so are
    answers to one item. It errs towards wide intervals. A single value has no interval: NaN.
    """
    estimate = float(values.mean())
    if values.size == 1:
        return Interval(estimate, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    rows, columns = (
        generator.multinomial(size, np.full(size, 1 / size), size=resamples) / size for size in values.shape
    )
    means = np.einsum("ri,ri->r", rows @ values, columns)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(estimate, float(low), float(high))


def preference_interval(values: Floats) -> Interval:
    """Interval of a share: the wider ends of Wilson's and the crossed bootstrap's.

    Wilson's takes answers as independent, which several of one listener are not; the bootstrap sees that, but has no
    width where all answers are alike.

    Args:
        values: (participants, items) 1 for the one answer, 0 for the other, 0.5 for a tie.
    """
    independent, crossed = wilson(float(values.mean()), values.size), crossed_bootstrap(values)
    return Interval(independent.estimate, *_hull(independent, crossed))


def _hull(one: Interval, two: Interval) -> tuple[float, float]:
    return float(np.fmin(one.low, two.low)), float(np.fmax(one.high, two.high))
