"""A block of the denoiser makes no unfused call where there is an op for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.denoiser import count_calls
from diffgap.models.blocks import ROWS_PER_BLOCK, Context, DiTBlock, Residual
from diffgap.models.tokens import DenoiserConfig
from diffgap.ops._dispatch import backend
from diffgap.ops._native import CPU_MISSING

CONFIG = DenoiserConfig(embedding_dim=64, width=32, heads=2, tokens_per_vector=4)

#: What there is no op for: the four products, and keys and values next to the condition's.
PLAIN = Counter({"aten::addmm": 4, "aten::cat": 1})
FUSED = Counter({"diffgap::adaln": 2, "diffgap::attention": 1, "diffgap::silu_mul": 1})
#: What the fused ops are made of without a kernel.
UNFUSED = {
    "aten::native_layer_norm", "aten::_softmax", "aten::bmm", "aten::rsqrt", "aten::mean", "aten::add", "aten::silu",
}  # fmt: skip


@pytest.fixture
def block() -> Callable[[], object]:
    torch.manual_seed(0)
    module = DiTBlock(CONFIG).eval().requires_grad_(False)
    x, branch = torch.randn(2, 3, 4, 32)
    rows = torch.randn(3, ROWS_PER_BLOCK, 32)
    context = Context(torch.randn(3, 4, 2, 2, 16))
    return lambda: module(Residual(x, branch, rows[:, 2]), rows, context=context)


@pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))
def test_a_native_block_calls_nothing_unfused(block: Callable[[], object]) -> None:
    with backend("native"):
        assert count_calls(block) == PLAIN + FUSED
        # The profiler also sees what an op calls inside.
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
            block()
    seen = Counter(event.name for event in profiler.events())
    assert not UNFUSED & seen.keys()
    assert seen >= FUSED


def test_an_eager_block_calls_the_references(block: Callable[[], object]) -> None:
    with backend("eager"):
        calls = count_calls(block)
    assert calls >= PLAIN and not FUSED & calls
    assert calls.keys() >= UNFUSED
    assert calls.total() == 39
