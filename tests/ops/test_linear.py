"""linear and swiglu against torch in float64, through oneDNN and through torch's own product."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffgap.ops import _dispatch
from diffgap.ops.linear import linear, swiglu
from tests.helpers import assert_close_to_oracle

module = importlib.import_module("diffgap.ops.linear")

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")


@pytest.fixture(params=["torch", pytest.param("onednn", marks=needs_onednn)])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(_dispatch, "prefers", lambda *_: request.param == "onednn")
    monkeypatch.setattr(module, "_WORTHWHILE", 1)
    return str(request.param)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (7, 63), (100, 7), (3, 5, 16), (0, 8), (2, 0, 8)])
def test_linear_and_its_gradients(route: str, shape: tuple[int, ...], bias: bool) -> None:
    x, weight, offset, grad = tensors(shape, (9, shape[-1]), (9,), (*shape[:-1], 9))
    inputs = [x, weight, offset] if bias else [x, weight]
    leaves = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    ours, expected = linear(*leaves), F.linear(*exact)
    assert_close_to_oracle(ours, expected)
    for found, wanted in zip(
        torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
    ):
        assert_close_to_oracle(found, wanted)
    with torch.no_grad():
        assert_close_to_oracle(linear(*leaves), expected)


def test_linear_gives_only_the_gradients_that_are_wanted(route: str) -> None:
    x, weight, bias = tensors((4, 6), (5, 6), (5,))
    for wanted in ({0}, {1}, {2}, {0, 2}):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((x, weight, bias))]
        linear(*leaves).sum().backward()
        assert {i for i, leaf in enumerate(leaves) if leaf.grad is not None} == wanted


def test_linear_takes_any_strides(route: str) -> None:
    x, weight, bias = tensors((6, 10, 4), (12, 10), (14,))
    views = (x.transpose(0, 2), weight.t(), bias[2:])  # (4, 10, 6), (10, 12)
    spread = (views[0].transpose(1, 2), views[1].t(), views[2])
    expected = F.linear(*(t.double() for t in spread))
    assert_close_to_oracle(linear(*spread), expected)
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in spread]
    result = linear(*leaves)
    found = torch.autograd.grad(result, leaves, torch.ones(()).expand(result.shape))
    assert_close_to_oracle(found[1], spread[0].double().sum((0, 1)).expand(12, 10))


@pytest.mark.parametrize("layout", ["repeated", "every second", "one number"])
def test_any_bias(route: str, layout: str) -> None:
    x, weight, values = tensors((5, 16), (18, 16), (36,))
    bias = {"repeated": values[:1].expand(18), "every second": values[::2], "one number": values[:1]}[layout]
    expected = F.linear(x.double(), weight.double(), bias.double())
    assert_close_to_oracle(linear(x, weight, bias), expected)
    if layout != "one number":
        gate, up = expected.chunk(2, -1)
        assert_close_to_oracle(swiglu(x, weight, bias), F.silu(gate) * up)


def test_linear_refuses_what_torch_does(route: str) -> None:
    x, weight, bias, wrong = tensors((6, 8), (10, 8), (10,), (9,))
    for inputs in (
        (x, weight, wrong),
        (x, weight, bias.double()),
        (x, weight, bias.to("meta")),
        (x, weight[:, :7], None),
    ):
        with pytest.raises(RuntimeError) as theirs:
            F.linear(*inputs)
        with pytest.raises(RuntimeError) as ours:
            linear(*inputs)
        assert str(ours.value) == str(theirs.value)


def test_swiglu_refuses_rows_that_are_no_two_halves(route: str) -> None:
    x, weight, bias = tensors((6, 8), (9, 8), (9,))
    with pytest.raises(ValueError, match="the gate's half first"):
        swiglu(x, weight, bias)


@pytest.mark.parametrize("rows", [0, 1, 7, 63, 100, 1000])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (9, 1), (1, 40), (63, 100), (300, 130), (0, 5), (5, 0)])
@pytest.mark.parametrize("strided", [False, True])
def test_linear_gradients(rows: int, outputs: int, inputs: int, strided: bool) -> None:
    """One block of rows and several, whole tiles and parts of them."""
    grad, x = tensors((outputs, rows), (rows, 2 * inputs))
    grad, x = (grad.t(), x[:, ::2]) if strided else (grad.t().contiguous(), x[:, ::2].contiguous())
    dweight, dbias = torch.ops.diffgap.linear_gradients(grad, x)
    assert_close_to_oracle(dweight, grad.double().t() @ x.double())
    assert_close_to_oracle(dbias, grad.double().sum(0))
    assert dweight.is_contiguous()


def test_linear_gradients_do_not_depend_on_the_number_of_threads() -> None:
    grad, x = tensors((1100, 300), (1100, 130))
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        results.append(torch.ops.diffgap.linear_gradients(grad, x))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_linear_gradients_opcheck() -> None:
    torch.library.opcheck(torch.ops.diffgap.linear_gradients.default, tuple(tensors((7, 5), (7, 3))))


@pytest.mark.parametrize("shape", [(7, 16), (3, 5, 63), (0, 8)])
def test_swiglu(route: str, shape: tuple[int, ...]) -> None:
    x, weight, bias = tensors(shape, (10, shape[-1]), (10,))
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    gate, up = F.linear(*exact).chunk(2, -1)
    expected = F.silu(gate) * up
    with torch.no_grad():
        assert_close_to_oracle(swiglu(x, weight, bias), expected)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    ours = swiglu(*leaves)
    assert_close_to_oracle(ours, expected)
    for found, wanted in zip(
        torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(expected.sum(), exact), strict=True
    ):
        assert_close_to_oracle(found, wanted)


def test_autocast_and_other_dtypes_are_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WORTHWHILE", 1)
    x, weight, bias = tensors((4, 6), (5, 6), (5,))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    low = [t.bfloat16() for t in (x, weight, bias)]
    assert torch.equal(linear(*low), F.linear(*low))
    exact = [t.double() for t in (x, weight, bias)]
    assert torch.equal(linear(*exact), F.linear(*exact))


def test_small_products_and_backend_eager_are_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("oneDNN was called")

    monkeypatch.setattr(module, "_product", refuse)
    x, weight, bias = tensors((300, 128), (128, 128), (128,))
    linear(x[:64], weight, bias)
    with _dispatch.backend("eager"):
        linear(x, weight, bias)
        swiglu(x, weight, bias)


def test_compiles_whole(route: str) -> None:
    x, weight, bias = tensors((300, 64), (128, 64), (128,))
    compiled = torch.compile(lambda *t: swiglu(*t) + linear(*t)[:, :64], fullgraph=True, backend="aot_eager")
    product = F.linear(x.double(), weight.double(), bias.double())
    expected = F.silu(product[:, :64]) * product[:, 64:] + product[:, :64]
    assert_close_to_oracle(compiled(x, weight, bias), expected)
