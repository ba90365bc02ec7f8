"""Registered ops refuse what would send their C++ kernels past the end of a tensor, however they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffgap.ops._native import CPU_MISSING

pytestmark = pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))

OPS = torch.ops.diffgap
N, D = 6, 8
A, B = torch.randn(2, N, D, generator=torch.Generator().manual_seed(0))
NARROW, LOW, HEADS = A[:, :4], A.bfloat16(), A.view(1, N, 1, D)
IDS, ONE, ONES = torch.arange(N), torch.ones(()), torch.ones(N)
LSE, NOTHING = torch.ones(N, 2), torch.empty(0, 0)


def clip_backward(rows_lse: Tensor, columns_lse: Tensor, logits: Tensor) -> Any:
    factors = (ONES, ONES, ONES, ONES)
    return OPS.clip_loss_backward(A, B, ONE, None, None, rows_lse, columns_lse, *factors, logits, 0, None)


PAIRS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "clip_loss": lambda a, b: OPS.clip_loss(a, b, ONE, None, None, None, None, True, 0, None, False),
    "siglip_loss": lambda a, b: OPS.siglip_loss(a, b, ONE, ONE, None, None, 0, None),
    "siglip_loss_backward": lambda a, b: OPS.siglip_loss_backward(ONES, a, b, ONE, ONE, None, None, 0, None),
    "similarity_ranks": lambda a, b: OPS.similarity_ranks(a, b, IDS, IDS),
    "similarity_topk": lambda a, b: OPS.similarity_topk(a, b, 2),
}


@pytest.mark.parametrize("op", PAIRS)
@pytest.mark.parametrize("other", [NARROW, LOW, B[0], B[None]], ids=["narrow", "low", "vector", "batch"])
def test_two_matrices_must_fit(op: str, other: Tensor) -> None:
    PAIRS[op](A, B)
    with pytest.raises(RuntimeError):
        PAIRS[op](A, other)


CALLS: dict[str, Callable[[], Any]] = {
    "expected both ids_a and ids_b": lambda: OPS.siglip_loss(A, B, ONE, ONE, IDS, None, 0, None),
    "rows_lse: expected": lambda: clip_backward(LSE[:2], LSE, NOTHING),
    "columns_lse: expected": lambda: clip_backward(LSE, LSE.double(), NOTHING),
    "logits: expected": lambda: clip_backward(LSE, LSE, torch.ones(2, 2)),
    "grad_target: expected": lambda: OPS.q_sample_backward(A, NARROW, IDS, torch.rand(N, 2), 2),
    "grad: expected": lambda: OPS.attention_backward(
        HEADS[:, :1], None, None, HEADS, HEADS, HEADS, None, None, None, 1.0, False
    ),
}


@pytest.mark.parametrize("message", CALLS)
def test_arguments_must_fit(message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        CALLS[message]()
