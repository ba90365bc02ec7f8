from __future__ import annotations

import numpy as np
import pytest
import torch

from diffgap.retrieval.bootstrap import (
    bootstrap,
    bootstrap_metrics,
    bootstrap_strata,
    paired_bootstrap,
    unpaired_bootstrap,
)


def test_bootstrap_matches_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=2000)
    interval = bootstrap(values, resamples=4000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_equals_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    groups = rng.integers(0, 9, size=40)
    values = rng.normal(size=40)
    generator, names = np.random.default_rng(5), np.unique(groups)
    drawn = generator.integers(len(names), size=(300, len(names)))
    means = [np.mean(np.concatenate([values[groups == names[g]] for g in row])) for row in drawn]
    expected = np.quantile(means, [0.05, 0.95])
    interval = bootstrap(values, groups, confidence=0.9, resamples=300, seed=5)
    np.testing.assert_allclose([interval.low, interval.high], expected)


@pytest.mark.parametrize("by_group", [True, False])
def test_bootstrap_coverage(by_group: bool) -> None:
    """Concepts of ten correlated queries: intervals by concept hold 95%, intervals by query far less."""
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(40), 10)
    hits = 0
    for trial in range(200):
        values = np.repeat(rng.normal(size=40), 10) + 0.3 * rng.normal(size=400)
        interval = bootstrap(values, groups if by_group else None, resamples=400, seed=trial)
        hits += interval.low <= 0 <= interval.high
    assert (0.89 <= hits / 200 <= 0.99) if by_group else hits / 200 < 0.7


def test_paired_bootstrap_sees_what_unpaired_cannot() -> None:
    rng = np.random.default_rng(3)
    difficulty = rng.normal(size=300)
    a, b = difficulty + 0.05, difficulty + 0.1 * rng.normal(size=300)
    paired, unpaired = paired_bootstrap(a, b), unpaired_bootstrap(a, b)
    assert paired.estimate == pytest.approx(unpaired.estimate) == pytest.approx((a - b).mean())
    assert paired.excludes_zero and not unpaired.excludes_zero
    assert paired_bootstrap(a, a) == (0, 0, 0)


def test_unpaired_bootstrap_width() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=900), rng.normal(1, 2, size=400)
    interval = unpaired_bootstrap(a, b, np.arange(900) // 2, resamples=4000)
    half = 1.96 * np.sqrt(a.var() / 900 + b.var() / 400)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.1)
    assert (interval.low + interval.high) / 2 == pytest.approx(a.mean() - b.mean(), abs=0.1 * half)


def test_bootstrap_is_seeded() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1) != bootstrap(values, seed=2)


def test_bootstrap_metrics() -> None:
    ranks = torch.tensor([[1.0], [2.0], [20.0], [1.0]], dtype=torch.float64)
    intervals = bootstrap_metrics(ranks, ["a", "a", "b", "c"])
    assert list(intervals) == ["R@1", "R@5", "R@10", "mAP@10", "MRR"]
    assert intervals["R@1"].estimate == 0.5 and intervals["R@1"].low == 0 and intervals["R@1"].high == 1
    assert intervals["R@5"] == intervals["R@10"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap([]), "values must be a non-empty vector of finite numbers"),
        (lambda: bootstrap([1.0, np.nan]), "values must be a non-empty vector"),
        (lambda: bootstrap([1.0, 2.0], [1]), r"groups of values have shape \(1,\); expected \(2,\)"),
        (lambda: bootstrap([1.0], confidence=95), "confidence must lie between 0 and 1; got 95"),
        (lambda: bootstrap([1.0], resamples=0), "resamples must be at least 1"),
        (lambda: paired_bootstrap([1.0], [1.0, 2.0]), "got 1 and 2: use unpaired_bootstrap"),
    ],
)
def test_bootstrap_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_bootstrap_strata_equals_a_plain_loop() -> None:
    """Groups drawn once for both strata, of which one lacks some of them."""
    rng = np.random.default_rng(6)
    groups = [rng.integers(0, 8, size=50), rng.integers(4, 12, size=30)]
    values = [rng.normal(size=50), rng.normal(2, 1, size=30)]
    names = np.unique(np.concatenate(groups).astype(str))
    drawn = np.random.default_rng(7).multinomial(len(names), np.full(len(names), 1 / len(names)), size=400)
    means = []
    for row in drawn:
        rows = [
            np.concatenate([np.repeat(v[g.astype(str) == name], times) for name, times in zip(names, row, strict=True)])
            for v, g in zip(values, groups, strict=True)
        ]
        means.append(np.mean([part.mean() for part in rows if len(part)]))
    interval = bootstrap_strata(list(zip(values, groups, strict=True)), confidence=0.8, resamples=400, seed=7)
    expected = [np.mean([v.mean() for v in values]), *np.quantile(means, [0.1, 0.9])]
    np.testing.assert_allclose(interval, expected)


def test_bootstrap_strata_knows_that_directions_share_their_concepts() -> None:
    """Two directions that rise and fall with the same concepts are no more evidence than one."""
    rng = np.random.default_rng(8)
    values, groups = rng.normal(size=400), np.arange(400)
    one = bootstrap_strata([(values, groups)], resamples=4000)
    two = bootstrap_strata([(values, groups), (values, groups)], resamples=4000)
    apart = bootstrap_strata([(values, groups), (rng.permutation(values), groups + 400)], resamples=4000)
    assert two == pytest.approx(one)
    assert (apart.high - apart.low) / (one.high - one.low) == pytest.approx(0.5**0.5, rel=0.1)
    half = 1.96 * values.std() / 20
    assert one.high - one.low == pytest.approx(2 * half, rel=0.1)


@pytest.mark.parametrize(
    ("strata", "message"),
    [
        ([], "strata is empty"),
        ([([1.0], ["a", "b"])], r"groups of strata\[0\] have shape \(2,\); expected \(1,\)"),
        ([([1.0], ["a"]), ([float("nan")], ["a"])], r"strata\[1\] must be a non-empty vector of finite numbers"),
    ],
)
def test_bootstrap_strata_refuses(strata: list[tuple[list[float], list[str]]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_strata([(np.array(values), np.array(groups)) for values, groups in strata])
