"""What the metrics take: (N, D) rows of finite numbers, computed with in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

Floats = npt.NDArray[np.float64]
Values = Tensor | npt.NDArray[Any]


def as_rows(name: str, values: Values, *, least: int = 1) -> Floats:
    """``values`` as float64 (N, D). Raises ValueError unless finite, two-dimensional and of ``least`` rows or more."""
    array = np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values, dtype=np.float64)
    if array.ndim != 2 or not array.shape[1]:
        raise ValueError(f"{name} must be (N, D), a row a sample; got shape {array.shape}")
    if len(array) < least:
        raise ValueError(f"{name} has {len(array)} rows; this metric needs at least {least}")
    bad = int((~np.isfinite(array)).any(1).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {len(array)} rows hold NaN or infinite values; drop them")
    return array


def as_pairs(first: str, a: Values, second: str, b: Values) -> tuple[Floats, Floats]:
    """Two sets of one shape: row i of one belongs to row i of the other."""
    rows = as_rows(first, a), as_rows(second, b)
    if rows[0].shape != rows[1].shape:
        raise ValueError(f"{first} and {second} must be paired row by row; got {rows[0].shape} and {rows[1].shape}")
    return rows
