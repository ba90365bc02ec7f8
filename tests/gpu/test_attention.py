"""attention on a GPU through the public function, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import diffgap
from diffgap.ops import attention
from tests.attention_terms import attention_terms
from tests.helpers import assert_close_to_oracle
from tests.ops.test_attention import OPTIONS, doubled, inputs, is_float, oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton kernels need a CUDA device; none is visible"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# (B, N_q, N_k, H, d): every bucket of the short path, and the long one.
SHAPES = [
    (2, 1, 1, 3, 24),
    (33, 4, 4, 7, 64),
    (33, 3, 7, 7, 16),
    (9, 8, 8, 8, 128),
    (9, 16, 16, 8, 64),
    (5, 17, 33, 3, 40),
    (5, 4, 64, 3, 80),
    (5, 64, 64, 8, 128),
    (3, 65, 65, 2, 64),
    (3, 16, 77, 8, 64),
    (2, 257, 130, 3, 128),
    (1, 300, 1, 2, 40),
    (1, 2000, 4096, 2, 64),
]


@pytest.fixture(autouse=True)
def _native() -> Any:
    with diffgap.backend("native"):
        yield


def arguments_for(shape: tuple[int, ...], options: str, causal: bool, dtype: torch.dtype) -> dict[str, Any]:
    every = inputs(*shape, dtype=dtype)
    return {name: every[name].cuda() for name in ("q", "k", "v", *OPTIONS[options])} | {"causal": causal}


def results(function: Callable[..., Tensor], arguments: dict[str, Any]) -> list[Tensor]:
    """The output and the gradient of each floating-point argument, for a fixed incoming gradient."""
    leaves = {name: x.detach().requires_grad_() if is_float(x) else x for name, x in arguments.items()}
    output = function(**leaves)
    wanted = [x for x in leaves.values() if is_float(x)]
    return [output, *torch.autograd.grad(output, wanted, upstream(output))]


def assert_matches_the_oracle(arguments: dict[str, Any]) -> None:
    """Within the tolerance, or four roundings of its terms where a gradient is 0, as those of one key's logits are."""
    with torch.device("cuda"):
        exact, plain = results(oracle, doubled(arguments)), results(oracle, arguments)
    actual = results(attention, arguments)
    names = ["output", *(name for name, x in arguments.items() if is_float(x))]
    terms = terms_of(arguments)
    for name, ours, oracles, eager in zip(names, actual, exact, plain, strict=True):
        if oracles.norm() < 1e-12 and name in terms:
            error, bound = ours.double().norm().item(), 4 * torch.finfo(torch.float32).eps * terms[name]
            assert error <= bound, f"gradient of {name}: {error:.3g} in place of 0 exceeds {bound:.3g}"
        else:
            assert_close_to_oracle(ours, oracles, eager)


def terms_of(arguments: dict[str, Any]) -> dict[str, float]:
    """Norms of the terms of the gradients that :func:`results` asks for."""
    q, k, v = (arguments[name] for name in "qkv")
    hidden = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    if arguments["causal"]:
        hidden = hidden.logical_not().triu(1)
    if "key_mask" in arguments:
        hidden = hidden | ~arguments["key_mask"][:, None, None]
    weights = {name: arguments.get(name) for name in ("q_weight", "k_weight")}
    return attention_terms(q, k, v, upstream(q), q.shape[-1] ** -0.5, **weights, hidden=hidden)


def upstream(output: Tensor) -> Tensor:
    """The gradient of an output."""
    steps = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=torch.float64)
    return steps.sin().reshape(output.shape).to(output.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_matches_the_oracle(shape: tuple[int, ...], options: str, causal: bool, dtype: torch.dtype) -> None:
    assert_matches_the_oracle(arguments_for(shape, options, causal, dtype))


def test_attention_of_more_pairs_than_a_grid_has_rows() -> None:
    assert_matches_the_oracle(arguments_for((70_000, 3, 3, 2, 16), "all", False, torch.float32))
    assert_matches_the_oracle(arguments_for((70_000, 2, 65, 1, 16), "plain", False, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [4, 40, 100])
def test_attention_hides_masked_keys_and_rows_without_keys(n: int, dtype: torch.dtype) -> None:
    arguments = arguments_for((6, n, n, 2, 64), "all", False, dtype)
    arguments["key_mask"][1] = False
    clean = results(attention, arguments)
    assert all(x[1].eq(0).all() and x.isfinite().all() for x in clean[:4])
    hidden = ~arguments["key_mask"][..., None, None]
    arguments |= {"k": arguments["k"].masked_fill(hidden, math.nan), "v": arguments["v"].masked_fill(hidden, math.inf)}
    assert all(torch.equal(x, y) for x, y in zip(results(attention, arguments), clean, strict=True))


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("n", [4, 40, 100])
def test_attention_keeps_what_is_not_finite_in_its_own_batch_and_head(n: int, name: str) -> None:
    arguments = arguments_for((6, n, n, 3, 64), "plain", False, torch.bfloat16)
    clean = results(attention, arguments)
    arguments[name][2, 0, 1, 5] = math.nan
    affected = torch.zeros(6, 1, 3, 1, dtype=torch.bool, device="cuda")
    affected[2, :, 1] = True
    poisoned = results(attention, arguments)
    assert not poisoned[0][2, :, 1].isfinite().all()
    for actual, expected in zip(poisoned, clean, strict=True):
        assert torch.equal(actual.masked_fill(affected, 0), expected.masked_fill(affected, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [7, 33, 130])
def test_attention_of_extreme_logits(n: int, dtype: torch.dtype) -> None:
    arguments = arguments_for((2, n, n, 2, 16), "masked", False, dtype)
    arguments |= {name: arguments[name] * 100 for name in "qk"}
    actual = results(attention, arguments)
    assert all(x.isfinite().all() for x in actual)
    with torch.device("cuda"):
        exact = results(oracle, doubled(arguments))
    # float32 logits of 1e4 are known to 1e-3, so their exponentials are too.
    torch.testing.assert_close(actual[0].double(), exact[0], rtol=0, atol=2e-2)


@pytest.mark.parametrize("n", [4, 40, 100])
def test_attention_takes_any_strides(n: int) -> None:
    x = arguments_for((3, n, n, 2, 24), "plain", False, torch.float32)
    wide = torch.nn.functional.pad(x["q"], (0, 1))
    odd = wide[..., :-1]
    transposed = x["k"].transpose(1, 2).contiguous().transpose(1, 2)
    strided = x["v"].transpose(1, 3).contiguous().transpose(1, 3)
    assert odd.stride(2) == 25 and strided.stride(3) != 1
    other = {"q": odd, "k": transposed, "v": strided, "causal": False}
    for actual, expected in zip(results(attention, other), results(attention, x), strict=True):
        torch.testing.assert_close(actual, expected)
    output = attention(x["q"].requires_grad_(), x["k"], x["v"])
    row = torch.linspace(-1, 1, 24, device="cuda")
    expanded, dense = (torch.autograd.grad(output, x["q"], g, retain_graph=True)[0] for g in (
        row.expand_as(output), row.expand_as(output).contiguous(),
    ))  # fmt: skip
    torch.testing.assert_close(expanded, dense)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [4, 16, 64, 300])
def test_attention_is_deterministic(n: int, dtype: torch.dtype) -> None:
    arguments = arguments_for((64, n, n, 8, 64), "all", False, dtype)
    once = results(attention, arguments)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(once, results(attention, arguments), strict=True))


@pytest.mark.parametrize("n", [4, 300])
def test_attention_compiles_without_a_break(n: int) -> None:
    arguments = arguments_for((4, n, n, 2, 64), "all", False, torch.bfloat16)
    compiled = torch.compile(attention, fullgraph=True)
    for actual, expected in zip(results(compiled, arguments), results(attention, arguments), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("n", [4, 64, 300])
def test_attention_replays_in_a_cuda_graph(n: int) -> None:
    arguments = arguments_for((16, n, n, 4, 64), "all", False, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(attention, arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(attention, arguments)
    arguments["q"].copy_(arguments["q"].flip(0))
    graph.replay()
    for actual, expected in zip(captured, results(attention, arguments), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("n", "names"), [
    (16, ["short_forward_kernel", "short_backward_kernel"]),
    (100, ["long_forward_kernel", "long_backward_queries_kernel", "long_backward_keys_kernel"]),
])  # fmt: skip
def test_attention_launches_no_more_than_its_kernels(n: int, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # a launch for every output
    q, k, v = (arguments_for((8, n, n, 4, 64), "plain", False, torch.bfloat16)[x].requires_grad_() for x in "qkv")
    grad = torch.ones_like(q)

    def both_passes() -> None:
        torch.autograd.grad(attention(q, k, v), (q, k, v), grad)

    both_passes()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        both_passes()
    launched = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sorted(launched) == sorted(names)


@pytest.mark.parametrize("n", [4, 300])
def test_attention_never_waits_for_the_device(n: int) -> None:
    arguments = arguments_for((4, n, n, 2, 64), "all", True, torch.float16)
    results(attention, arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(attention, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_attention_takes_the_dtype_of_autocast() -> None:
    arguments = arguments_for((4, 16, 16, 2, 64), "all", False, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        actual = attention(**arguments)
    rounded = arguments | {name: arguments[name].bfloat16() for name in "qkv"}
    assert torch.equal(actual, attention(**rounded))


def test_float32_is_multiplied_as_torch_is_told() -> None:
    arguments = arguments_for((4, 64, 64, 2, 64), "plain", False, torch.float32)
    exact = attention(**arguments)
    torch.set_float32_matmul_precision("high")
    try:
        rounded = attention(**arguments)
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(rounded, exact, rtol=1e-2, atol=1e-2)
