"""q_sample: every route against the formula in float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffgap.ops import _dispatch
from diffgap.ops._native import CPU_MISSING
from diffgap.ops.random import STREAM_DRAW, normal, normal_reference, sample_seeds
from tests.helpers import assert_close_to_oracle

module = importlib.import_module("diffgap.ops.q_sample")
q_sample: Callable[..., tuple[Tensor, ...]] = module.q_sample
TARGETS: tuple[str, ...] = module.TARGETS

needs_native = pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))
ROUTES = ["reference", "registered", pytest.param("native", marks=needs_native)]
LOW = [torch.float32, torch.float16, torch.bfloat16]


def take(route: str, patch: pytest.MonkeyPatch) -> None:
    """Send q_sample down a route: the reference, the ops' default implementations, or the C++ kernel."""
    patch.setattr(_dispatch, "choose", lambda *_: "eager" if route == "reference" else "native")
    if route == "registered":
        patch.setattr(module, "_forward", module._q_sample_default)
        patch.setattr(module, "_backward", module._backward_default)


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take(request.param, monkeypatch)
    return request.param


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, rows: int = 6, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0, t, table and seeds."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    t = torch.randint(0, rows, shape[:1], generator=generator)
    angle = torch.rand(rows, generator=generator, dtype=torch.float64) * 1.5
    return x0, t, torch.stack([angle.cos(), angle.sin()], 1), sample_seeds(shape[0], generator)


def formula(x0: Tensor, t: Tensor, table: Tensor, seed: Tensor, target: str) -> tuple[Tensor, Tensor, Tensor]:
    """Sample by sample, in the dtype of x0."""
    with _dispatch.backend("eager"):
        noise = normal(seed, x0.shape[1:], dtype=x0.dtype)
    x_t, wanted = torch.empty_like(x0), torch.empty_like(x0)
    for i in range(len(x0)):
        alpha, sigma = table[t[i]].tolist()
        x_t[i] = alpha * x0[i] + sigma * noise[i]
        wanted[i] = {
            "epsilon": noise[i],
            "sample": x0[i],
            "v_prediction": alpha * noise[i] - sigma * x0[i],
            "flow_prediction": noise[i] - x0[i],
        }[target]
    return x_t, wanted, noise


def check(x0: Tensor, t: Tensor, table: Tensor, seed: Tensor, target: str) -> None:
    actual = q_sample(x0, t, table, seed, target, return_noise=True)
    oracle = formula(x0.double(), t, table, seed, target)
    eager = formula(x0, t, table, seed, target)
    assert len(actual) == 3
    for ours, exact, plain in zip(actual, oracle, eager, strict=True):
        assert ours.dtype == x0.dtype
        assert_close_to_oracle(ours, exact, plain)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("size", [1, 7, 63, 100, 1000])
def test_q_sample_matches_its_formula(route: str, target: str, dtype: torch.dtype, size: int) -> None:
    check(*inputs((3, size), dtype), target)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (2, 3, 4, 5), (1, 300, 7), (40, 33)])
def test_q_sample_takes_any_rank(route: str, shape: tuple[int, ...]) -> None:
    check(*inputs(shape), "v_prediction")


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,), (2, 0, 3)])
def test_q_sample_takes_empty_shapes(route: str, shape: tuple[int, ...]) -> None:
    for result in q_sample(*inputs(shape), return_noise=True):
        assert result.shape == shape


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ROUTES)
def test_q_sample_any_combination(name: str, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 17), min_size=1, max_size=4), label="shape"))
    dtype = data.draw(st.sampled_from(LOW), label="dtype")
    x0, t, table, seed = inputs(shape, dtype, seed=data.draw(st.integers(0, 99)))
    if data.draw(st.booleans(), label="strided"):
        x0 = x0.transpose(0, -1).contiguous().transpose(0, -1)
    if data.draw(st.booleans(), label="float32 table"):
        table = table.float().double()
    with pytest.MonkeyPatch.context() as patch:
        take(name, patch)
        check(x0, t, table, seed, data.draw(st.sampled_from(TARGETS), label="target"))


def test_q_sample_takes_strided_inputs(route: str) -> None:
    x0, t, table, seed = inputs((6, 40))
    spread = torch.stack([t, t], 1)[:, 1], torch.stack([table, table], 1)[:, 1], torch.stack([seed, seed], 1)[:, 1]
    strided = q_sample(x0.t().contiguous().t(), *spread, "v_prediction")
    for ours, expected in zip(strided, q_sample(x0, t, table, seed, "v_prediction"), strict=True):
        assert torch.equal(ours, expected)


def test_q_sample_takes_expanded_x0(route: str) -> None:
    """Several noised copies of each sample, without copying it."""
    x0, *_ = inputs((1, 3, 40))
    _, t, table, seed = inputs((5, 3, 40))
    check(x0.expand(5, 3, 40), t, table, seed, "v_prediction")


def test_q_sample_noise_is_that_of_normal(route: str) -> None:
    x0, t, table, seed = inputs((5, 37))
    noise = q_sample(x0, t, table, seed, return_noise=True)[2]
    with _dispatch.backend("eager"):
        torch.testing.assert_close(noise, normal(seed, (37,)), rtol=3e-7, atol=0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", LOW)
def test_q_sample_noise_is_recomputed_from_the_seed(route: str, dtype: torch.dtype, target: str) -> None:
    """Returned or not, the noise is normal's to the bit, so that nobody has to keep it."""
    x0, t, table, seed = inputs((6, 3, 101), dtype)
    seed[4], t[4], t[0] = seed[0], 1, 0  # the timestep has no say
    x_t, wanted, noise = q_sample(x0, t, table, seed, target, return_noise=True)
    for kept, again in zip((x_t, wanted), q_sample(x0, t, table, seed, target), strict=True):
        assert torch.equal(kept, again)
    draw = torch.ops.diffgap.normal if route == "native" else normal_reference
    assert torch.equal(noise, draw(seed, 303, None, 0, STREAM_DRAW).reshape(6, 3, 101).to(dtype))
    assert torch.equal(noise[4], noise[0])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", LOW)
def test_q_sample_bits_of_a_sample_depend_on_nothing_else(route: str, dtype: torch.dtype, target: str) -> None:
    """Any order of the batch, and any part of it."""
    x0, t, table, seed = inputs((7, 301), dtype)
    whole = q_sample(x0, t, table, seed, target, return_noise=True)
    parts = [torch.randperm(7, generator=torch.Generator().manual_seed(1)), *torch.arange(7).split(1)]
    for part in parts:
        some = q_sample(x0[part], t[part], table, seed[part], target, return_noise=True)
        assert all(torch.equal(ours, all_of_them[part]) for ours, all_of_them in zip(some, whole, strict=True))


def test_q_sample_results_share_no_memory_with_x0(route: str) -> None:
    x0, t, table, seed = inputs((3, 8))
    before = x0.clone()
    for result in q_sample(x0, t, table, seed, "sample"):
        result.zero_()
    assert torch.equal(x0, before)


@pytest.mark.parametrize("target", TARGETS)
def test_q_sample_gradient(name_of_python_route: str, target: str) -> None:
    x0, t, table, seed = inputs((3, 4), torch.float64)
    x0.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: q_sample(x, t, table, seed, target)[: 1 + (target != "epsilon")], x0)


@pytest.fixture(params=["reference", "registered"])
def name_of_python_route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take(request.param, monkeypatch)
    return request.param


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", LOW)
def test_q_sample_gradient_against_float64(route: str, target: str, dtype: torch.dtype) -> None:
    x0, t, table, seed = inputs((7, 301), dtype)
    weights = [torch.randn(7, 301, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (1, 2)]

    def gradient(function: Callable[..., Any], x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        outputs = function(x, t, table, seed, target)
        loss = sum((w.to(x.dtype) * y).sum() for w, y in zip(weights, outputs, strict=False))
        return torch.autograd.grad(loss, x)[0]

    def plain(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        alpha, sigma = table[t].to(x.dtype)[:, :, None].unbind(1)
        wanted = {"epsilon": 0 * x, "sample": x, "v_prediction": -sigma * x, "flow_prediction": -x}[target]
        return alpha * x, wanted

    oracle, eager = gradient(plain, x0.double()), gradient(plain, x0)
    assert_close_to_oracle(gradient(q_sample, x0), oracle, eager)


def test_q_sample_gradient_of_one_output(route: str) -> None:
    x0, t, table, seed = inputs((3, 5))
    x0.requires_grad_()
    alpha, sigma = table[t].float()[:, :, None].unbind(1)
    x_t, wanted = q_sample(x0, t, table, seed, "v_prediction")
    torch.testing.assert_close(torch.autograd.grad(x_t.sum(), x0, retain_graph=True)[0], alpha.expand(3, 5))
    torch.testing.assert_close(torch.autograd.grad(wanted.sum(), x0)[0], -sigma.expand(3, 5))


def test_q_sample_epsilon_needs_no_gradient(route: str) -> None:
    x0, t, table, seed = inputs((3, 5))
    x_t, epsilon = q_sample(x0.requires_grad_(), t, table, seed)
    assert x_t.requires_grad
    assert not epsilon.requires_grad


@pytest.mark.parametrize("target", TARGETS)
def test_q_sample_gradient_through_a_checkpoint(route: str, target: str) -> None:
    """Noise that is drawn a second time in the backward pass is the same noise."""
    x0, t, table, seed = inputs((5, 33))

    def loss(x: Tensor) -> Tensor:
        x_t, wanted = q_sample(x, t, table, seed, target)
        return ((x_t.sin() - wanted) ** 2).sum()

    plain, replayed = x0.clone().requires_grad_(), x0.clone().requires_grad_()
    loss(plain).backward()
    checkpoint(loss, replayed, use_reentrant=False).backward()
    assert plain.grad is not None and replayed.grad is not None
    assert torch.equal(plain.grad, replayed.grad)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_q_sample_compiles_in_one_graph(route: str, compiler: str, target: str) -> None:
    if compiler == "inductor" and (route != "native" or target != "v_prediction"):
        pytest.skip("one inductor case is enough: it compiles C++")
    x0, t, table, seed = inputs((3, 21))

    def loss(x: Tensor) -> Tensor:
        x_t, wanted = q_sample(x, t, table, seed, target)
        return (x_t * wanted).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    ours, expected = x0.clone().requires_grad_(), x0.clone().requires_grad_()
    loss(expected).backward()
    compiled(ours).backward()
    torch.testing.assert_close(ours.grad, expected.grad)


def test_q_sample_keeps_its_dtype_under_autocast(route: str) -> None:
    x0, t, table, seed = inputs((3, 21))
    with torch.autocast("cpu", torch.bfloat16):
        actual = q_sample(x0, t, table, seed)
    for ours, expected in zip(actual, q_sample(x0, t, table, seed), strict=True):
        assert torch.equal(ours, expected)


def test_q_sample_registration() -> None:
    x0, t, table, seed = inputs((3, 10))
    for target in range(len(TARGETS)):
        torch.library.opcheck(torch.ops.diffgap.q_sample.default, (x0, t, table, seed, target, True))
        arguments = (x0, x0.flip(0), t, table, target)
        torch.library.opcheck(torch.ops.diffgap.q_sample_backward.default, arguments)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 2.0**-9, 1 / 3, 5.0])
def test_native_q_sample_rounds_every_value_as_torch_does(dtype: torch.dtype, factor: float) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x0 = patterns[~patterns.isnan()][None]
    table = torch.tensor([[factor, 0.0]], dtype=torch.float64)
    x_t, *_ = torch.ops.diffgap.q_sample(x0, torch.zeros(1, dtype=torch.int64), table, sample_seeds(1), 0, False)
    assert torch.equal(x_t, (x0.float() * table[0, 0].float()).to(dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", LOW)
def test_q_sample_keeps_what_is_not_finite_where_it_is(route: str, dtype: torch.dtype, target: str, bad: float) -> None:
    x0, t, table, seed = inputs((3, 45), dtype)
    x0[1, 29] = bad
    noised, wanted, noise = q_sample(x0, t, table, seed, target, return_noise=True)
    for ours, exact in zip((noised, wanted), formula(x0.double(), t, table, seed, target)[:2], strict=True):
        assert ours[1, 29].isnan() == exact[1, 29].isnan()
        assert exact[1, 29].isfinite() or ours[1, 29] == exact[1, 29] or ours[1, 29].isnan()
    for result in (noised, wanted, noise):
        result[1, 29] = 0.0
        assert result.isfinite().all()


@needs_native
def test_native_q_sample_does_not_depend_on_the_number_of_threads() -> None:
    arguments = (*inputs((37, 999)), 2, True)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(torch.ops.diffgap.q_sample(*arguments))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


INDEX = torch.ones(3, dtype=torch.int64)
BAD_INPUT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x0": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "x0"),
    ({"x0": torch.tensor(1.0)}, ValueError, "x0"),
    ({"t": torch.ones(3)}, TypeError, "t"),
    ({"t": torch.ones(3, dtype=torch.int32)}, TypeError, "t"),
    ({"t": 1}, TypeError, "t"),
    ({"t": torch.ones(2, dtype=torch.int64)}, ValueError, "t"),
    ({"t": torch.tensor(1)}, ValueError, "t"),
    ({"t": INDEX.to("meta")}, ValueError, "t"),
    ({"t": torch.tensor([0, 1, 6])}, ValueError, "t"),
    ({"t": torch.tensor([0, -1, 5])}, ValueError, "t"),
    ({"table": torch.ones(6, 3)}, ValueError, "table"),
    ({"table": torch.ones(6)}, ValueError, "table"),
    ({"table": torch.ones(6, 2, dtype=torch.int64)}, ValueError, "table"),
    ({"table": torch.ones(6, 2, device="meta")}, ValueError, "table"),
    ({"table": [[1.0, 0.0]]}, ValueError, "table"),
    ({"seed": torch.ones(4, dtype=torch.int64)}, ValueError, "seed"),
    ({"seed": torch.ones(3, 1, dtype=torch.int64)}, ValueError, "seed"),
    ({"seed": INDEX.to("meta")}, ValueError, "seed"),
    ({"seed": torch.ones(3)}, TypeError, "seed"),
    ({"seed": 3}, TypeError, "seed"),
    ({"target": "noise"}, ValueError, "target"),
    ({"target": 0}, ValueError, "target"),
]


@pytest.mark.parametrize("backend", ["eager", "auto", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize(("change", "error", "named"), BAD_INPUT)
def test_q_sample_refuses_bad_input(
    backend: _dispatch.Backend, change: dict[str, Any], error: type[Exception], named: str
) -> None:
    x0, t, table, seed = inputs((3, 4))
    arguments: dict[str, Any] = {"x0": x0, "t": t, "table": table, "seed": seed, **change}
    with _dispatch.backend(backend), pytest.raises(error, match=f"^{named}: "):
        q_sample(**arguments)
