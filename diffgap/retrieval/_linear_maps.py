"""Linear maps of two modalities into one space, one candidate per choice of hyper-parameters.

Every function takes centred pairs x (n, Dx) and y (n, Dy), float64, and yields candidates lazily, so that the
caller keeps only the best of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy import linalg

Floats = np.ndarray[Any, np.dtype[np.float64]]

#: Ridge strengths in units of the mean eigenvalue of X'X, so that they mean the same at any width and count.
_STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_CCA_WIDTHS = (32, 64, 128, 256)
_CCA_POWERS = (0.0, 1.0)


class Candidate(NamedTuple):
    """Matrices (D, d) for x and y, None for the identity, and the hyper-parameters they stand for."""

    choice: dict[str, float]
    x: Floats | None
    y: Floats | None


def identity_candidates(x: Floats, y: Floats) -> Iterator[Candidate]:
    """Raw cosine and mean shift: nothing to fit, but the widths must agree."""
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"raw cosine and mean shift need equal widths; got {x.shape[1]} and {y.shape[1]}")
    yield Candidate({}, None, None)


def ridge_candidates(x: Floats, y: Floats) -> Iterator[Candidate]:
    """``W = (X'X + a I)^-1 X'Y`` for every strength, all from one SVD of X."""
    u, s, vt = linalg.svd(x, full_matrices=False)
    target, unit = u.T @ y, _mean_eigenvalue(x)
    for strength in _STRENGTHS:
        yield Candidate({"alpha": strength}, vt.T @ ((s / (s**2 + strength * unit))[:, None] * target), None)


def procrustes_candidates(x: Floats, y: Floats) -> Iterator[Candidate]:
    """The orthogonal R that minimises ``|X R - Y|`` after padding the narrower side with zero columns."""
    width = max(x.shape[1], y.shape[1])
    padded = [np.pad(z, ((0, 0), (0, width - z.shape[1]))) for z in (x, y)]
    rotation, _ = linalg.orthogonal_procrustes(*padded)
    yield Candidate({}, rotation[: x.shape[1]], np.eye(y.shape[1], width))


def cca_candidates(x: Floats, y: Floats) -> Iterator[Candidate]:
    """Regularised CCA, the SVD of ``(X'X + a I)^-1/2 X'Y (Y'Y + b I)^-1/2`` over a, widths, powers of s."""
    (ux, sx, vx), (uy, sy, vy) = (linalg.svd(z, full_matrices=False) for z in (x, y))
    cross = ux.T @ uy
    for strength in _STRENGTHS:
        rx, ry = (1 / np.sqrt(s**2 + strength * _mean_eigenvalue(z)) for s, z in ((sx, x), (sy, y)))
        p, correlations, qt = linalg.svd((sx * rx)[:, None] * cross * (sy * ry), full_matrices=False)
        a, b = vx.T @ (rx[:, None] * p), vy.T @ (ry[:, None] * qt.T)
        for width in sorted({min(w, len(correlations)) for w in _CCA_WIDTHS}):
            for power in _CCA_POWERS:
                weight = correlations[:width] ** power
                choice = {"alpha": strength, "width": width, "power": power}
                yield Candidate(choice, a[:, :width] * weight, b[:, :width] * weight)


def _mean_eigenvalue(x: Floats) -> float:
    return float(np.square(x).sum() / x.shape[1]) or 1.0
