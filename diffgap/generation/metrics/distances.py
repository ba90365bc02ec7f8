"""Distances between the features of generated clips and of real ones, as sets.

Frechet distance (FAD with VGGish's features, FD with others; arXiv 1812.08466), of Gaussians with the sets' means m and
covariances C (divided by N - 1):

    FD  = |m_g - m_r|^2 + tr C_g + tr C_r - 2 tr (C_g C_r)^(1/2)

With centred rows A = (X - m) / sqrt(N - 1), so that C = A^T A, the eigenvalues of C_g C_r are the squared singular
values of A_g A_r^T and the last trace is their sum. That needs no root of a matrix, loses no digits where a covariance
is singular and adds nothing to its diagonal, and for N < D it is the smaller problem too.

Kernel audio distance (KAD, arXiv 2502.15602), the unbiased estimate of the squared maximum mean discrepancy:

    KAD = 100 (mean_{i != j} k(g_i, g_j) + mean_{i != j} k(r_i, r_j) - 2 mean_{ij} k(g_i, r_j))
    k(x, y) = exp(-|x - y|^2 / (2 s^2)),  s the median distance between two reference rows

It may be negative: for equal distributions its mean is zero. (``kadtk`` documents this bandwidth; its code takes the
median of its second argument, which is the evaluated set. Swap the sets there to compare.)
"""

from __future__ import annotations

import warnings

import numpy as np
from scipy.linalg import svdvals

from diffgap.generation.metrics._rows import Floats, Values, as_rows

__all__ = ["KERNEL_SCALE", "KernelSums", "frechet_distance", "kernel_distance", "median_distance"]

#: Factor of the kernel distance, as in ``kadtk``.
KERNEL_SCALE = 100.0

_BLOCK = 1024
_MEDIAN_ROWS = 8192


def frechet_distance(generated: Values, reference: Values) -> float:
    """Frechet distance of ``generated`` (N, D) and ``reference`` (M, D); symmetric, >= 0.

    Biased upwards, the more so the fewer rows there are, so that only figures of equal N and M compare.

    Raises:
        ValueError: fewer than two rows, widths that differ, values that are not finite.

    Warns:
        UserWarning: N or M is at most D: that covariance is singular whatever the distribution.
    """
    rows = _two_sets(generated, reference)
    for name, x in zip(("generated", "reference"), rows, strict=True):
        if len(x) <= x.shape[1]:
            warnings.warn(
                f"{name} has {len(x)} rows of width {x.shape[1]}: their covariance is singular and the Frechet "
                "distance far too large; use more clips, or the kernel distance",
                stacklevel=2,
            )
    return frechet_of_rows(*rows)


def frechet_of_rows(generated: Floats, reference: Floats) -> float:
    """:func:`frechet_distance` of checked rows."""
    means, factors, traces = [], [], []
    for rows in (generated, reference):
        mean = rows.mean(0)
        centred = (rows - mean) / np.sqrt(len(rows) - 1)
        means.append(mean)
        traces.append(np.square(centred).sum())
        # R of A = QR has A's singular values with any other factor, and no more than D rows.
        factors.append(np.asarray(np.linalg.qr(centred, mode="r")) if len(centred) > centred.shape[1] else centred)
    cross = svdvals(factors[0] @ factors[1].T).sum()
    return max(0.0, float(np.square(means[0] - means[1]).sum() + traces[0] + traces[1] - 2.0 * cross))


def kernel_distance(
    generated: Values, reference: Values, *, bandwidth: float | None = None, scale: float = KERNEL_SCALE
) -> float:
    """Kernel distance of ``generated`` (N, D) and ``reference`` (M, D); unbiased, so it may be below zero.

    Args:
        bandwidth: s; :func:`median_distance` of the reference if not given, so that systems measured against one
            reference share their kernel.
        scale: Factor of the result; 1 for the plain squared discrepancy.

    Raises:
        ValueError: fewer than two rows, widths that differ, values that are not finite, a bandwidth that is not above
            zero (as for a reference of equal rows).
    """
    rows = _two_sets(generated, reference)
    s = median_distance(rows[1]) if bandwidth is None else bandwidth
    return KernelSums(*rows, s).distance() * scale


def median_distance(reference: Values) -> float:
    """Median Euclidean distance between two rows of ``reference`` (M, D), the lower one of an even number.

    Of more than 8192 rows, 8192 evenly spaced ones count. Raises ValueError if it is zero: give a bandwidth then.
    """
    rows = as_rows("reference", reference, least=2)
    if len(rows) > _MEDIAN_ROWS:
        rows = rows[np.linspace(0, len(rows) - 1, _MEDIAN_ROWS).astype(int)]
    rows = rows - rows.mean(0)
    pairs = np.concatenate(
        [
            _squared_distances(rows[at : at + _BLOCK], rows)[np.tri(min(_BLOCK, len(rows) - at), len(rows), at - 1) > 0]
            for at in range(0, len(rows), _BLOCK)
        ]
    )
    middle = (len(pairs) - 1) // 2
    median = float(np.sqrt(np.partition(pairs, middle)[middle]))
    if not median > 0:
        raise ValueError("the median distance between reference rows is 0: most are equal; give a bandwidth")
    return median


class KernelSums:
    """Sums of the kernel between the clips of two sets, from which the distance of any subsets follows at once.

    A clip is a run of rows (frames); one row each unless ``lengths`` say otherwise. Only pairs of one row with itself
    are left out, not those of one clip's frames, as in ``kadtk``.
    """

    def __init__(
        self,
        generated: Floats,
        reference: Floats,
        bandwidth: float,
        lengths: tuple[list[int], list[int]] | None = None,
    ) -> None:
        if not (np.isfinite(bandwidth) and bandwidth > 0):
            raise ValueError(f"bandwidth must be finite and above 0; got {bandwidth}")
        center = reference.mean(0)  # distances do not change, and their rounding shrinks
        sets = generated - center, reference - center
        self._lengths = [
            np.ones(len(rows), dtype=np.int64) if lengths is None else np.asarray(lengths[number])
            for number, rows in enumerate(sets)
        ]
        gamma = 0.5 / bandwidth**2
        own = [self._sums(number, number, sets, gamma) for number in (0, 1)]
        for sums, length in zip(own, self._lengths, strict=True):
            sums[np.diag_indices_from(sums)] -= length  # k(x, x) = 1
        self._within, self._between = own, self._sums(0, 1, sets, gamma)

    def distance(self, clips: tuple[np.ndarray, np.ndarray] | None = None) -> float:
        """Unscaled distance between the given clips (indices) of the sets, by default all."""
        chosen = clips or tuple(np.arange(len(length)) for length in self._lengths)
        counts = [int(length[index].sum()) for length, index in zip(self._lengths, chosen, strict=True)]
        within = sum(
            sums[np.ix_(index, index)].sum() / (count * (count - 1))
            for sums, index, count in zip(self._within, chosen, counts, strict=True)
        )
        between = self._between[np.ix_(chosen[0], chosen[1])].sum() / (counts[0] * counts[1])
        return float(within - 2.0 * between)

    def _sums(self, first: int, second: int, sets: tuple[Floats, Floats], gamma: float) -> Floats:
        rows = np.empty((len(sets[first]), len(self._lengths[second])))
        starts = [np.concatenate([[0], np.cumsum(length)[:-1]]) for length in self._lengths]
        for at in range(0, len(rows), _BLOCK):
            kernel = np.exp(-gamma * _squared_distances(sets[first][at : at + _BLOCK], sets[second]))
            rows[at : at + _BLOCK] = np.add.reduceat(kernel, starts[second], axis=1)
        return np.asarray(np.add.reduceat(rows, starts[first], axis=0))


def _squared_distances(a: Floats, b: Floats) -> Floats:
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2.0 * (a @ b.T)
    return np.maximum(squares, 0.0)


def _two_sets(generated: Values, reference: Values) -> tuple[Floats, Floats]:
    rows = as_rows("generated", generated, least=2), as_rows("reference", reference, least=2)
    if rows[0].shape[1] != rows[1].shape[1]:
        raise ValueError(f"generated and reference must be of one width; got {rows[0].shape[1]} and {rows[1].shape[1]}")
    return rows
