"""The contrastive ops on a GPU through their public functions, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import diffgap
from diffgap.ops import clip_loss, siglip_loss, similarity_ranks, similarity_topk
from diffgap.ops.similarity import similarity_ranks_reference, similarity_topk_reference
from tests.helpers import assert_close_to_oracle
from tests.ops.contrastive_cases import ids_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton kernels need a CUDA device; none is visible"),
]

Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {
    "clip": lambda a, b, s, **options: clip_loss(a, b, s, **options),
    "siglip": lambda a, b, s, **options: siglip_loss(a, b, s, -10.0, **options),
}


@pytest.fixture(autouse=True)
def _native() -> Any:
    with diffgap.backend("native"):
        yield


def inputs(rows: int, columns: int, width: int, dtype: torch.dtype, scale: float = 20.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (rows, columns))
    b[: min(rows, columns)] += a[: min(rows, columns)] / 8
    values = [*(F.normalize(x, dim=1).to(dtype) for x in (a, b)), torch.tensor(scale)]
    return [x.cuda().requires_grad_() for x in values]


def results(loss: Loss, values: list[Tensor], **options: Any) -> list[Tensor]:
    value = loss(*values, **options)
    weights = torch.linspace(0.5, 1.5, value.numel(), device="cuda", dtype=value.dtype).reshape(value.shape)
    return [value, *torch.autograd.grad((weights * value).sum(), values)]


def assert_matches_eager(name: str, values: list[Tensor], **options: Any) -> None:
    """Loss and gradients as the eager reference has them in float64."""
    exact = [x.detach().double().requires_grad_() for x in values]
    with diffgap.backend("eager"):
        expected = results(LOSSES[name], exact, **(options | {"memory_budget": None}))
    for actual, wanted in zip(results(LOSSES[name], values, **options), expected, strict=True):
        assert_close_to_oracle(actual, wanted)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (7, 100), (63, 33), (300, 512), (1000, 768), (5000, 2048)])
def test_losses_match_eager(name: str, dtype: torch.dtype, rows: int, width: int) -> None:
    assert_matches_eager(name, inputs(rows, rows, width, dtype))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("budget", [None, 1, 1 << 30])
def test_losses_with_ids_within_a_memory_budget(name: str, reduction: str, budget: int | None) -> None:
    ids_a, ids_b = ids_for(700, 90).cuda(), ids_for(700, 140, seed=1).cuda()
    values = inputs(700, 700, 200, torch.bfloat16)
    assert_matches_eager(name, values, ids_a=ids_a, ids_b=ids_b, reduction=reduction, memory_budget=budget)


@pytest.mark.parametrize("offset", [0, 129, 700])
def test_losses_with_an_offset(offset: int) -> None:
    values = inputs(300, 1000, 64, torch.float32)
    assert_matches_eager("clip", values, one_sided=True, label_offset=offset)
    assert_matches_eager("siglip", values, label_offset=offset)


@pytest.mark.parametrize("scale", [-20.0, 0.0, 100.0])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_at_any_scale(name: str, scale: float) -> None:
    for budget in (None, 1 << 30):
        assert_matches_eager(name, inputs(500, 500, 512, torch.float32, scale), memory_budget=budget)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_deterministic_and_take_any_strides(name: str) -> None:
    a, b, scale = inputs(3000, 3000, 512, torch.bfloat16)
    transposed = a.detach().T.contiguous().T.requires_grad_()
    once, again = (results(LOSSES[name], values) for values in ([a, b, scale], [transposed, b, scale]))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_compile_without_a_break(name: str) -> None:
    values = inputs(300, 300, 100, torch.bfloat16)
    compiled = torch.compile(LOSSES[name], fullgraph=True)
    for actual, wanted in zip(results(compiled, values), results(LOSSES[name], values), strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_replay_in_a_cuda_graph(name: str) -> None:
    values = inputs(1000, 1000, 256, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(LOSSES[name], values)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(LOSSES[name], values)
    with torch.no_grad():
        values[0].copy_(values[0].flip(0))
    graph.replay()
    for actual, wanted in zip(captured, results(LOSSES[name], values), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_never_wait_for_the_device(name: str, dtype: torch.dtype) -> None:
    values = inputs(700, 700, 100, dtype)
    ids = ids_for(700, 90).cuda()
    results(LOSSES[name], values, ids_a=ids, ids_b=ids)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(LOSSES[name], values)
        results(LOSSES[name], values, ids_a=ids, ids_b=ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", LOSSES)
def test_losses_keep_autocast_out(name: str) -> None:
    values = inputs(300, 300, 64, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        assert_matches_eager(name, values)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_a_large_batch_need_no_matrix(name: str) -> None:
    values = inputs(8192, 8192, 512, torch.bfloat16)
    results(LOSSES[name], values)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results(LOSSES[name], values)
    # Gradients, once in float32 and once in bfloat16, and 64 MiB for a macro tile; all similarities take 256 MiB.
    gradients = 2 * 8192 * 512 * (4 + 2)
    assert torch.cuda.max_memory_allocated() - before < gradients + (64 << 20) + (24 << 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "gallery", "width"), [(1, 1, 8), (300, 1000, 100), (129, 5000, 512)])
def test_similarity_matches_the_definition_with_ties(
    queries: int, gallery: int, width: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, g = (torch.randint(-1, 2, (n, width), generator=generator).to("cuda", dtype) for n in (queries, gallery))
    ids_q, ids_g = (torch.arange(n, device="cuda") % 50 for n in (queries, gallery))
    ranks = torch.ops.diffgap.similarity_ranks(q, g, ids_q, ids_g)
    for actual, wanted in zip(ranks, similarity_ranks_reference(q, g, ids_q, ids_g), strict=True):
        assert torch.equal(actual, wanted)
    for k in {1, min(10, gallery), min(1024, gallery)}:
        for actual, wanted in zip(similarity_topk(q, g, k), similarity_topk_reference(q, g, k), strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_rows_tie_wherever_they_stand(dtype: torch.dtype) -> None:
    distinct, q, _ = inputs(100, 400, 100, dtype)
    positives = torch.arange(400, device="cuda") % 100
    once = similarity_ranks(q, distinct, positives)
    assert torch.equal(similarity_ranks(q, distinct.repeat(7, 1), positives), 7 * once)
    row = q[:1].expand(400, -1)
    assert similarity_ranks(row, row, torch.arange(400, device="cuda"), ties="average").eq(200.5).all()
    assert torch.equal(similarity_topk(row, row, 40)[1], torch.arange(40, device="cuda").expand(400, -1))
