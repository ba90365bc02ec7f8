"""Distances against matrix roots of 50 digits, plain loops, torchmetrics, and Gaussians whose distance is known."""

from __future__ import annotations

import warnings

import mpmath
import numpy as np
import pytest
import torch

from diffgap.generation.metrics import frechet_distance, kernel_distance, median_distance
from diffgap.generation.metrics.distances import KERNEL_SCALE, KernelSums


def rows(count: int, width: int, *, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) * scale + shift


def frechet_of_50_digits(a: np.ndarray, b: np.ndarray) -> float:
    with mpmath.workdps(50):
        means, covariances = [], []
        for x in (a, b):
            matrix = mpmath.matrix(x.tolist())
            mean = [mpmath.fsum(matrix[:, j]) / matrix.rows for j in range(matrix.cols)]
            centred = mpmath.matrix(matrix.rows, matrix.cols)
            for i in range(matrix.rows):
                for j in range(matrix.cols):
                    centred[i, j] = matrix[i, j] - mean[j]
            means.append(mean)
            covariances.append(centred.T * centred / (matrix.rows - 1))
        values = mpmath.eig(covariances[0] * covariances[1], left=False, right=False)
        root = mpmath.fsum(mpmath.sqrt(abs(mpmath.re(value))) for value in values)
        square = mpmath.fsum((p - q) ** 2 for p, q in zip(*means, strict=True))
        traces = sum(c[i, i] for c in covariances for i in range(c.rows))
        return float(square + traces - 2 * root)


def whitened(count: int, width: int, seed: int) -> np.ndarray:
    """Rows whose mean is zero and whose covariance is the identity, exactly."""
    centred = np.random.default_rng(seed).normal(size=(count, width))
    centred -= centred.mean(0)
    return np.linalg.qr(centred)[0] * np.sqrt(count - 1)


@pytest.fixture
def singular_is_fine():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*covariance is singular")
        yield


class TestFrechet:
    @pytest.mark.parametrize(("n", "m", "d"), [(30, 20, 3), (9, 40, 5), (12, 12, 2)])
    def test_is_that_of_50_digits(self, n: int, m: int, d: int) -> None:
        a, b = rows(n, d, scale=2.0, shift=1.0), rows(m, d, seed=1)
        assert frechet_distance(a, b) == pytest.approx(frechet_of_50_digits(a, b), rel=1e-12)

    @pytest.mark.parametrize(("n", "m", "d"), [(3, 4, 5), (2, 2, 3), (2, 30, 4)])
    def test_singular_covariances_keep_their_digits(self, n: int, m: int, d: int, singular_is_fine: None) -> None:
        a, b = rows(n, d, scale=2.0), rows(m, d, seed=1)
        assert frechet_distance(a, b) == pytest.approx(frechet_of_50_digits(a, b), rel=1e-10)

    def test_is_that_of_the_matrix_root(self) -> None:
        from scipy.linalg import sqrtm

        a, b = rows(200, 24, scale=1.3, shift=0.2), rows(150, 24, seed=1)
        c_a, c_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        root = np.trace(sqrtm(c_a @ c_b)).real
        expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(c_a) + np.trace(c_b) - 2 * root
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)

    def test_is_that_of_torchmetrics(self) -> None:
        torchmetrics = pytest.importorskip("torchmetrics.image.fid")

        class Same(torch.nn.Identity):
            num_features = 6

        a, b = rows(200, 6, scale=1.3, shift=0.2), rows(150, 6, seed=1)
        metric = torchmetrics.FrechetInceptionDistance(feature=Same()).set_dtype(torch.float64)
        metric.update(torch.from_numpy(a), real=False)
        metric.update(torch.from_numpy(b), real=True)
        assert frechet_distance(a, b) == pytest.approx(float(metric.compute()), rel=1e-9)

    def test_known_gaussians(self) -> None:
        a, b = whitened(50, 4, 0), whitened(70, 4, 1)
        scales, shift = np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 1.0, -2.0, 0.5])
        # Commuting covariances: |shift|^2 + sum (s - 1)^2.
        expected = np.square(shift).sum() + np.square(scales - 1).sum()
        assert frechet_distance(a * scales + shift, b) == pytest.approx(expected, rel=1e-12)

    def test_equal_sets_are_at_zero_and_order_does_not_count(self) -> None:
        a, b = rows(40, 6), rows(30, 6, seed=1)
        assert frechet_distance(a, a[::-1]) == pytest.approx(0.0, abs=1e-10)
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a[::-1]), rel=1e-12)

    def test_rounding_never_makes_it_negative(self) -> None:
        assert min(frechet_distance(a, a[::-1]) for a in (rows(20, 5, seed=seed) for seed in range(40))) == 0.0

    def test_rotation_and_translation_change_nothing_and_scale_squares(self) -> None:
        a, b = rows(40, 6, shift=1.0), rows(30, 6, seed=1)
        turn = np.linalg.qr(rows(6, 6, seed=2))[0]
        expected = frechet_distance(a, b)
        assert frechet_distance(a @ turn + 1e3, b @ turn + 1e3) == pytest.approx(expected, rel=1e-9)
        assert frechet_distance(a * 7, b * 7) == pytest.approx(49 * expected, rel=1e-12)

    def test_constant_features(self) -> None:
        a, b = np.full((9, 3), 2.0), np.full((8, 3), -1.0)
        assert frechet_distance(a, b) == pytest.approx(27.0, rel=1e-12)
        assert frechet_distance(a, a) == 0.0
        c = rows(9, 3)
        assert frechet_distance(c, np.tile(c.mean(0), (5, 1))) == pytest.approx(np.trace(np.cov(c.T)), rel=1e-12)

    def test_more_columns_than_rows_warns(self) -> None:
        with pytest.warns(UserWarning, match="generated has 3 rows of width 5.*singular"):
            frechet_distance(rows(3, 5), rows(30, 5))
        with pytest.warns(UserWarning, match="reference has 5 rows of width 5"):
            frechet_distance(rows(30, 5), rows(5, 5))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            frechet_distance(rows(6, 5), rows(6, 5, seed=1))

    def test_is_biased_upwards_by_few_rows(self) -> None:
        def mean(count: int) -> float:
            draws = np.random.default_rng(0).normal(size=(30, 2, count, 4))
            return float(np.mean([frechet_distance(a, b) for a, b in draws]))

        assert mean(20) > 2 * mean(80) > 0

    @pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
    def test_bad_input(self, distance) -> None:
        with pytest.raises(ValueError, match="generated has 1 rows; this metric needs at least 2"):
            distance(rows(1, 3), rows(9, 3))
        with pytest.raises(ValueError, match="reference has 1 rows"):
            distance(rows(9, 3), rows(1, 3))
        with pytest.raises(ValueError, match="of one width; got 3 and 4"):
            distance(rows(9, 3), rows(9, 4))
        with pytest.raises(ValueError, match="generated: 9 of 9 rows hold NaN"):
            distance(rows(9, 3) * np.nan, rows(9, 3))
        with pytest.raises(ValueError, match="must be"):
            distance(rows(9, 3)[None], rows(9, 3))


def kernel_distance_by_loops(a: np.ndarray, b: np.ndarray, bandwidth: float) -> float:
    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.exp(-np.square(x - y).sum() / (2 * bandwidth**2)))

    within = [np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]) for x in (a, b)]
    return 100 * float(sum(within) - 2 * np.mean([k(p, q) for p in a for q in b]))


class TestKernel:
    @pytest.mark.parametrize(("n", "m", "d"), [(2, 2, 3), (7, 12, 4), (12, 7, 20), (13, 9, 1)])
    def test_is_that_of_plain_loops(self, n: int, m: int, d: int) -> None:
        a, b = rows(n, d, scale=1.5, shift=0.5), rows(m, d, seed=1)
        between = sorted(np.linalg.norm(b[i] - b[j]) for i in range(m) for j in range(i))
        bandwidth = between[(len(between) - 1) // 2]
        assert median_distance(b) == pytest.approx(bandwidth, rel=1e-12)
        assert kernel_distance(a, b) == pytest.approx(kernel_distance_by_loops(a, b, bandwidth), rel=1e-9)
        assert kernel_distance(a, b, bandwidth=2.0) == pytest.approx(kernel_distance_by_loops(a, b, 2.0), rel=1e-9)

    def test_blocks_do_not_show(self, monkeypatch: pytest.MonkeyPatch) -> None:
        a, b = rows(23, 4, shift=0.5), rows(31, 4, seed=1)
        expected = kernel_distance(a, b), median_distance(b)
        monkeypatch.setattr("diffgap.generation.metrics.distances._BLOCK", 5)
        assert (kernel_distance(a, b), median_distance(b)) == pytest.approx(expected, rel=1e-12)

    def test_has_mean_zero_for_equal_distributions(self) -> None:
        rng = np.random.default_rng(0)
        values = [kernel_distance(rng.normal(size=(12, 3)), rng.normal(size=(9, 3)), bandwidth=2.0) for _ in range(400)]
        error = np.std(values) / np.sqrt(len(values))
        assert abs(np.mean(values)) < 4 * error
        assert min(values) < -3 * error  # the biased estimate never falls below zero

    def test_bandwidth_is_the_references(self) -> None:
        a, b = rows(20, 3, scale=5.0), rows(20, 3, seed=1)
        assert kernel_distance(a, b) == kernel_distance(a, b, bandwidth=median_distance(b))
        assert kernel_distance(a, b) != pytest.approx(kernel_distance(b, a), rel=1e-3)

    def test_translation_rotation_and_scale_change_nothing(self) -> None:
        a, b = rows(20, 3, shift=0.5), rows(15, 3, seed=1)
        turn = np.linalg.qr(rows(3, 3, seed=2))[0]
        assert kernel_distance(9 * a @ turn + 1e4, 9 * b @ turn + 1e4) == pytest.approx(kernel_distance(a, b), rel=1e-6)

    def test_scale_factor(self) -> None:
        a, b = rows(20, 3, shift=0.5), rows(15, 3, seed=1)
        assert KERNEL_SCALE == 100
        assert kernel_distance(a, b, scale=1) == pytest.approx(kernel_distance(a, b) / 100, rel=1e-12)

    def test_far_apart_sets(self) -> None:
        a, b = np.repeat(np.eye(2), 5, axis=0) * 1e-3, rows(10, 2) + 1e9
        # Nothing in common: what is left is the kernel within each set.
        pairs = np.square(b[:, None] - b).sum(-1) / (2 * median_distance(b) ** 2)
        within = (np.exp(-pairs).sum() - 10) / 90
        assert kernel_distance(a, b) == pytest.approx(100 * (1 + within), rel=1e-6)

    def test_equal_reference_rows_need_a_bandwidth(self) -> None:
        a, b = rows(5, 2), np.ones((6, 2))
        with pytest.raises(ValueError, match="median distance between reference rows is 0"):
            kernel_distance(a, b)
        assert np.isfinite(kernel_distance(a, b, bandwidth=1.0))
        for bandwidth in (0.0, -1.0, np.nan, np.inf):
            with pytest.raises(ValueError, match="bandwidth must be finite and above 0"):
                kernel_distance(a, b, bandwidth=bandwidth)

    def test_median_of_many_rows_uses_some(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("diffgap.generation.metrics.distances._MEDIAN_ROWS", 40)
        values = rows(400, 3)
        assert median_distance(values) == pytest.approx(median_distance(values[np.linspace(0, 399, 40).astype(int)]))

    def test_sums_give_subsets_and_clips_of_many_frames(self) -> None:
        a, b = rows(12, 3, shift=0.5), rows(10, 3, seed=1)
        lengths = ([3, 1, 4, 4], [2, 5, 3])
        sums = KernelSums(a, b, 1.5, lengths)
        assert sums.distance() * 100 == pytest.approx(kernel_distance_by_loops(a, b, 1.5), rel=1e-9)
        parts = sums.distance((np.array([0, 3]), np.array([1, 2]))) * 100
        assert parts == pytest.approx(kernel_distance_by_loops(a[[0, 1, 2, 8, 9, 10, 11]], b[2:], 1.5), rel=1e-9)
