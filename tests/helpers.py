"""Tolerances and comparisons shared by all tests (see CONTRIBUTING, "Tolerances"), and the command line."""

from __future__ import annotations

import torch
from torch import Tensor

from diffgap import cli

#: Relative L2 error against the float64 oracle allowed for float32.
FLOAT32_RTOL = 1e-5


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / |expected|`` in float64; infinite if ``actual`` holds a non-finite value."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return 0.0
    if not torch.isfinite(actual).all():
        return float("inf")
    scale = expected.norm().item()
    return (actual - expected).norm().item() / (scale if scale > 0 else 1.0)


def assert_close_to_oracle(actual: Tensor, oracle: Tensor, eager: Tensor | None = None) -> None:
    """Assert the project's accuracy contract against a float64 oracle.

    float64 and float32 within fixed relative L2 errors; a lower dtype within twice the error that ``eager``, a plain
    computation in the same dtype, makes, or one rounding of the result, whichever is larger.
    """
    error = relative_l2(actual, oracle)
    if actual.dtype == torch.float64:
        bound = 1e-12
    elif actual.dtype == torch.float32:
        bound = FLOAT32_RTOL
    else:
        rounding = relative_l2(oracle.to(actual.dtype), oracle)
        bound = 2 * max(rounding, 0.0 if eager is None else relative_l2(eager, oracle))
    assert error <= bound, f"relative L2 error {error:.3g} exceeds {bound:.3g} ({actual.dtype})"


def run(*arguments: object) -> int:
    """Exit status of ``diffgap`` with these arguments."""
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
