"""The gate every implementation passes before it is timed: its outputs equal the float64 oracle's."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import Outputs

#: Relative L2 error allowed for float32 and float64: the project's accuracy contract.
_BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}
#: A peer, or the low-precision eager reference, only has to show that it computes the same thing.
_SLACK = 10.0


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / |expected|`` in float64; infinite for a wrong shape or non-finite value."""
    if actual.shape != expected.shape or not torch.isfinite(actual).all():
        return float("inf")
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float64).tiny)).item()


def mismatch(outputs: Outputs, expected: Outputs, eager: Outputs | None) -> str | None:
    """Why ``outputs`` are wrong, or ``None`` if they are right.

    Args:
        outputs: What the implementation returned: the first outputs of the case, or all.
        expected: The oracle's, float64.
        eager: What the eager reference made of the same inputs, for an implementation under the project's
            accuracy contract; ``None`` for a peer and the reference itself, which have ten times the room.
    """
    if not 0 < len(outputs) <= len(expected):
        return f"returned {len(outputs)} outputs, the oracle has {len(expected)}"
    for index, (actual, exact) in enumerate(zip(outputs, expected, strict=False)):
        error = relative_l2(actual, exact)
        bound = _BOUNDS.get(actual.dtype)
        if bound is None:
            rounding = relative_l2(exact.to(actual.dtype), exact)
            bound = 2 * max(rounding, 0.0 if eager is None else relative_l2(eager[index], exact))
        bound *= 1.0 if eager is not None else _SLACK
        if not error <= bound:
            return f"output {index}: relative L2 error {error:.2e} to the float64 oracle exceeds {bound:.2e}"
    return None
