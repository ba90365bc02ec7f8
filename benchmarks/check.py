"""The gate every implementation passes before it is timed: its outputs equal the float64 oracle's.

Indices and ranks are not near one another because the scores behind them are: two scores that float32 cannot tell
apart may stand in either order. So what is judged is the exact score of the row an index names, and whether a rank is
one that scores within rounding can give.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.cases import Gate, Outputs
from diffgap.ops.similarity import similarity_topk

#: Relative L2 error allowed for float32 and float64: the project's accuracy contract.
_BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}
#: A peer, or the eager reference, only has to show that it computes the same thing.
_SLACK = 10.0


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / |expected|`` in float64; infinite for a wrong shape or non-finite value."""
    if actual.shape != expected.shape or not torch.isfinite(actual).all():
        return float("inf")
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float64).tiny)).item()


def mismatch(
    outputs: Outputs, expected: Outputs, eager: Outputs | None, dtype: torch.dtype = torch.float32
) -> str | None:
    """Why ``outputs`` are wrong, or ``None`` if they are right.

    Args:
        outputs: What the implementation returned: the first outputs of the case, or all.
        expected: The oracle's, float64.
        eager: What the eager reference made of the same inputs, for an implementation under the project's
            accuracy contract; ``None`` for a peer and the reference itself, which have ten times the room.
        dtype: The case's: a peer may compute in it what it returns in a finer one.
    """
    if not 0 < len(outputs) <= len(expected):
        return f"returned {len(outputs)} outputs, the oracle has {len(expected)}"
    for index, (actual, exact) in enumerate(zip(outputs, expected, strict=False)):
        error = relative_l2(actual, exact)
        if eager is None:
            bound = _SLACK * max(_room(actual.dtype), _room(dtype))
        elif actual.dtype in _BOUNDS:
            bound = _BOUNDS[actual.dtype]
        else:
            bound = 2 * max(relative_l2(exact.to(actual.dtype), exact), relative_l2(eager[index], exact))
        if not error <= bound:
            return f"output {index}: relative L2 error {error:.2e} to the float64 oracle exceeds {bound:.2e}"
    return None


def _room(dtype: torch.dtype) -> float:
    """The project's bound, or the unit roundoff of a dtype whose bound depends on the values."""
    return _BOUNDS.get(dtype, torch.finfo(dtype).eps / 2)


def ranks_gate(q: Tensor, g: Tensor, positives: Tensor) -> Gate:
    """Judges ``(ranks,)``, strict ranks of the gallery rows ``positives``; see :func:`_score_error`.

    A rank is right if it lies between the number of rows that score above the positive by more than two scores can
    be wrong, and the number that do not score below it by more than that.
    """
    low, high = torch.empty_like(positives), torch.empty_like(positives)
    for rows, scores in _exact_scores(q, g):
        target = scores.gather(1, positives[rows, None])
        margin = 2 * _score_error(q[rows], g)[:, None]
        low[rows] = (scores > target + margin).sum(dim=1) + 1
        high[rows] = (scores >= target - margin).sum(dim=1)  # the positive itself is among these

    def gate(outputs: Outputs) -> str | None:
        (ranks,) = outputs
        if ranks.shape != positives.shape:
            return f"ranks have shape {tuple(ranks.shape)}, not {tuple(positives.shape)}"
        return _first_wrong("rank", (ranks < low) | (ranks > high))

    return gate


def topk_gate(q: Tensor, g: Tensor, k: int) -> Gate:
    """Judges ``(values, indices)`` of the best ``k`` rows, in order of score; see :func:`_score_error`.

    Each value must be the exact score of the row that its index names, that score the exact j-th best, and the
    indices distinct.
    """
    best = similarity_topk(q.double(), g.double(), k)[0]
    error = _score_error(q, g)[:, None]

    def gate(outputs: Outputs) -> str | None:
        values, indices = outputs
        if values.shape != best.shape or indices.shape != best.shape:
            shapes = f"{tuple(values.shape)} and {tuple(indices.shape)}"
            return f"values and indices have shapes {shapes}, not {tuple(best.shape)}"
        if not ((indices >= 0) & (indices < g.shape[0])).all():
            return f"an index lies outside the gallery's {g.shape[0]} rows"
        named = (q.double()[:, None] * g.double()[indices]).sum(dim=2)
        ordered = indices.sort(dim=1).values
        return (
            _first_wrong("value", ((values - named).abs() <= error).logical_not().any(dim=1))
            or _first_wrong("index", ((named - best).abs() > 2 * error).any(dim=1))
            or _first_wrong("repeated index", (ordered[:, 1:] == ordered[:, :-1]).any(dim=1))
        )

    return gate


def _score_error(q: Tensor, g: Tensor) -> Tensor:
    """(N,) how wrong a float32 score may be: the project's relative bound of the largest ``|q_i| |g_j|``."""
    return _BOUNDS[torch.float32] * q.double().norm(dim=1) * g.double().norm(dim=1).max()


def _exact_scores(q: Tensor, g: Tensor, block: int = 256) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of query rows with their scores in float64."""
    exact = g.double()
    for start in range(0, q.shape[0], block):
        rows = slice(start, start + block)
        yield rows, q[rows].double() @ exact.T


def _first_wrong(what: str, wrong: Tensor) -> str | None:
    if not wrong.any():
        return None
    return f"{what} of query {int(wrong.nonzero()[0])} is wrong, as of {int(wrong.sum())} in {wrong.shape[0]} queries"
