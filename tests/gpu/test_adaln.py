"""adaln on a GPU through the public function, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import diffgap
from tests.helpers import assert_close_to_oracle
from tests.ops.test_adaln import adaln, explicit, outputs_and_gradients, with_layer_norm
from tests.ops.test_adaln import inputs as cpu_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton kernels need a CUDA device; none is visible"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    with diffgap.backend("native"):
        yield


def inputs(*shape: int, dtype: torch.dtype = torch.float32, **options: bool) -> list[Tensor | None]:
    return [None if x is None else x.cuda() for x in cpu_inputs(*shape, dtype, **options)]


def results(arguments: list[Tensor | None]) -> list[Tensor]:
    """Outputs and gradients, for incoming gradients that are the same on every device."""
    return outputs_and_gradients(lambda *x: tuple(t.cpu() for t in adaln(*x)), arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 1), (3, 17, 7), (4096, 1, 100), (64, 16, 512), (64, 77, 512), (16, 256, 1024), (3, 50, 4096), (2, 9, 8192)],
)
def test_adaln_matches_the_oracle(shape: tuple[int, ...], per_token: bool, first: bool, dtype: torch.dtype) -> None:
    arguments = inputs(*shape, dtype=dtype, per_token=per_token, first=first)
    on_cpu = [None if x is None else x.cpu() for x in arguments]
    exact = outputs_and_gradients(explicit, [None if x is None else x.double() for x in on_cpu])
    eager = outputs_and_gradients(with_layer_norm, on_cpu)
    for actual, expected, torchs in zip(results(arguments), exact, eager, strict=True):
        assert_close_to_oracle(actual.cpu(), expected, torchs)


def test_adaln_of_a_long_sample_and_of_wide_rows() -> None:
    for shape in ((1, 100_000, 64), (1, 3, 20_000)):
        arguments = inputs(*shape)
        exact = outputs_and_gradients(explicit, [None if x is None else x.cpu().double() for x in arguments])
        for actual, expected in zip(results(arguments), exact, strict=True):
            assert_close_to_oracle(actual.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adaln_is_deterministic_and_takes_strided_rows(dtype: torch.dtype) -> None:
    x, branch, *_ = inputs(16, 256, 512, dtype=dtype)
    rows = torch.randn(16, 6, 512, device="cuda").to(dtype).unbind(1)[:3]
    copies = [t.contiguous() for t in rows]
    runs = [results([x, branch, *modulation]) for modulation in (rows, rows, copies)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_adaln_compiles_without_a_break() -> None:
    arguments = inputs(16, 77, 512, dtype=torch.bfloat16)
    compiled = torch.compile(adaln, fullgraph=True)
    for actual, expected in zip(compiled(*arguments), adaln(*arguments), strict=True):
        torch.testing.assert_close(actual, expected)


def test_adaln_replays_in_a_cuda_graph_and_never_waits() -> None:
    arguments = inputs(64, 77, 512)
    leaves = [x.requires_grad_() for x in arguments]
    grads = [torch.ones_like(leaves[0]), torch.ones_like(leaves[0])]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(adaln(*leaves), leaves, grads)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[0].copy_(leaves[0].flip(0))
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        assert torch.equal(actual, expected)
