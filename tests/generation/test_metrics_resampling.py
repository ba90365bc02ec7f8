"""Intervals: what they cover on data whose truth is known, and that halves are halves."""

from __future__ import annotations

import numpy as np
import pytest

from diffgap.generation.metrics import half_sampled, inception_score
from diffgap.generation.metrics.distances import KernelSums, frechet_of_rows
from diffgap.retrieval.bootstrap import bootstrap


def coverage(intervals: list, truth: float) -> float:
    return float(np.mean([interval.low <= truth <= interval.high for interval in intervals]))


def test_draws_halves_without_repeats_and_pairs_together() -> None:
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def statistic(a: np.ndarray, b: np.ndarray) -> float:
        seen.append((a, b))
        return 0.0

    half_sampled(statistic, 9, 12, resamples=20)
    assert all(len(set(a)) == len(a) == 4 and len(set(b)) == len(b) == 6 for a, b in seen[:-1])
    assert all((np.diff(a) > 0).all() for a, _ in seen)
    assert len({tuple(a) for a, _ in seen}) > 10
    assert [len(x) for x in seen[-1]] == [9, 12]  # the estimate itself
    seen.clear()
    half_sampled(statistic, 9, 9, resamples=20, paired=True)
    assert all((a == b).all() for a, b in seen)


def test_the_bias_is_no_part_of_the_interval() -> None:
    interval, bias = half_sampled(lambda clips: float(len(clips)), 10, resamples=5)
    assert interval == (10.0, 10.0, 10.0)
    assert bias == -5.0


def test_the_interval_leans_the_way_the_halves_do() -> None:
    values = np.random.default_rng(0).lognormal(sigma=2.0, size=30)
    halves: list[float] = []

    def statistic(clips: np.ndarray) -> float:
        halves.append(float(values[clips].max()))
        return halves[-1]

    interval, _ = half_sampled(statistic, 30, resamples=400, confidence=0.9)
    low, high = np.quantile(halves[:-1], [0.05, 0.95]) - np.mean(halves[:-1])
    assert interval == pytest.approx((values.max(), values.max() + low, values.max() + high))
    assert -low > 2 * high


def test_a_mean_has_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=200) * 3
    interval, bias = half_sampled(lambda i: float(values[i].mean()), 200, resamples=2000)
    by_bootstrap = bootstrap(values, resamples=2000)
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(by_bootstrap.high - by_bootstrap.low, rel=0.08)
    assert abs(bias) < 0.05


def test_bias_of_a_biased_variance() -> None:
    values = np.random.default_rng(0).normal(size=50)
    _, bias = half_sampled(lambda i: float(values[i].var()), 50, resamples=4000)
    assert bias == pytest.approx(-values.var(ddof=1) / 50, rel=0.2)  # exactly -1/N of the variance


def test_covers_the_frechet_distance_at_this_count() -> None:
    rng = np.random.default_rng(0)
    results = []
    for trial in range(120):
        a, b = rng.normal(size=(40, 3)) * 1.3 + 0.5, rng.normal(size=(60, 3))
        results.append(
            half_sampled(lambda i, j, a=a, b=b: frechet_of_rows(a[i], b[j]), 40, 60, resamples=100, seed=trial)
        )
    estimates = [result.interval.estimate for result in results]
    assert 0.88 <= coverage([result.interval for result in results], float(np.mean(estimates))) <= 0.99
    # The distance of the distributions: what is left after the bias is taken off.
    truth = 3 * (0.3**2 + 0.5**2)
    assert np.mean(estimates) > truth + 0.1
    assert np.mean([result.interval.estimate - result.bias for result in results]) == pytest.approx(truth, abs=0.08)


def test_covers_the_kernel_distance() -> None:
    rng = np.random.default_rng(0)
    results = []
    for trial in range(120):
        a, b = rng.normal(size=(40, 3)) * 1.3 + 0.5, rng.normal(size=(60, 3))
        sums = KernelSums(a, b, 2.4)
        results.append(half_sampled(lambda i, j, s=sums: s.distance((i, j)), 40, 60, resamples=100, seed=trial))
    # E k of two Gaussians in closed form: difference N(shift, v) per coordinate, width s.
    s2 = 2.4**2

    def expected(shift: float, variance: float) -> float:
        return float((np.sqrt(s2 / (s2 + variance)) * np.exp(-(shift**2) / (2 * (s2 + variance)))) ** 3)

    truth = expected(0, 2 * 1.69) + expected(0, 2.0) - 2 * expected(0.5, 2.69)
    estimates = [result.interval.estimate for result in results]
    assert abs(np.mean(estimates) - truth) < 4 * np.std(estimates) / np.sqrt(len(estimates))
    assert 0.88 <= coverage([result.interval for result in results], truth) <= 0.99


def test_covers_the_inception_score_at_this_count() -> None:
    rng = np.random.default_rng(0)
    intervals = []
    for trial in range(80):
        logits = rng.normal(size=(60, 6)) * 2
        score = half_sampled(lambda i, x=logits: inception_score(x[i], splits=1).mean, 60, resamples=60, seed=trial)
        intervals.append(score.interval)
    assert 0.88 <= coverage(intervals, float(np.mean([i.estimate for i in intervals]))) <= 0.99


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ((3,), {}, "at least 4 clips"),
        ((8, 9), {"paired": True}, "paired sets must be of one size"),
        ((8,), {"confidence": 1.0}, "confidence must lie between 0 and 1"),
        ((8,), {"resamples": 1}, "resamples must be at least 2"),
    ],
)
def test_bad_input(counts: tuple[int, ...], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        half_sampled(lambda *_: 0.0, *counts, **options)
