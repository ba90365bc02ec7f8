"""siglip_loss against a float64 oracle, on the eager reference and through the registered ops."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffgap.ops.siglip_loss import siglip_loss
from tests.helpers import relative_l2
from tests.ops.contrastive_cases import LargestTensor, assert_matches, gradients, ids_for, leaf, pairs, take
from tests.ops.routes import ROUTES

module = importlib.import_module("diffgap.ops.siglip_loss")


@pytest.fixture(params=ROUTES, autouse=True)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take(request.param, monkeypatch, module, _forward_op="siglip_loss_reference", _backward_op="_backward")
    return str(request.param)


def oracle(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    positive: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The formula, as softplus(-z S); ``positive`` is a bool matrix, by default the diagonal."""
    logits = scale * (a @ b.T) + bias
    positive = torch.eye(*logits.shape, dtype=torch.bool) if positive is None else positive
    z = 2 * positive.double() - 1
    rows = torch.logaddexp(torch.zeros((), dtype=torch.float64), -z * logits).sum(1)
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / a.shape[0]}[reduction]


def learnt(dtype: torch.dtype | None = None, scale: float = 10.0, bias: float = -3.0) -> list[Tensor]:
    """Logit scale and bias."""
    return [leaf(scale, dtype), leaf(bias, dtype)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (7, 100), (70, 64), (100, 512)])
def test_siglip_loss_matches_the_oracle(rows: int, width: int, reduction: Any) -> None:
    assert_matches(
        lambda *x: siglip_loss(*x, reduction=reduction),
        lambda *x: oracle(*x, reduction=reduction),
        [*pairs(rows, rows, width), *learnt()],
    )


@pytest.mark.parametrize("with_ids", [False, True])
def test_siglip_loss_over_many_blocks(with_ids: bool) -> None:
    """Wide rows, so that kernels cut both sides into several blocks, none of them full."""
    ids = (ids_for(500, 90), ids_for(510, 90, seed=1)) if with_ids else (None, None)
    positive = torch.eye(500, 510, dtype=torch.bool) if ids[0] is None else ids[0][:, None] == ids[1]
    assert_matches(
        lambda *x: siglip_loss(*x, ids_a=ids[0], ids_b=ids[1]),
        lambda *x: oracle(*x, positive=positive),
        [*pairs(500, 510, 2048), *learnt()],
    )


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_siglip_loss_keeps_the_gradient_of_a_solved_batch(scale: float, route: str) -> None:
    """Every pair is classified right by far: only losses and slopes near 0 are left."""
    a, b = pairs(40, 40, 64, torch.float32)
    with torch.no_grad():
        b.copy_(a)
    inputs = [a, b, leaf(scale, torch.float32), leaf(-scale / 2, torch.float32)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    loss, expected = siglip_loss(*inputs), oracle(*exact)
    # Logits of tens are good to 1e-5 only.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    for actual, wanted in zip(gradients(loss, inputs), gradients(expected, exact), strict=True):
        assert relative_l2(actual, wanted) < 1e-4


def test_siglip_loss_does_not_depend_on_the_number_of_threads(route: str) -> None:
    if route != "native":
        pytest.skip("a promise of the kernel")
    inputs = [*pairs(700, 650, 100), *learnt()]
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        loss = siglip_loss(*inputs, label_offset=None)
        results.append([loss.detach(), *gradients(loss, inputs)])
    torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (10.0, -10.0), (100.0, -10.0)])
def test_siglip_loss_accumulates_low_precision_in_float32(
    dtype: torch.dtype, scale: float, bias: float, reduction: Any
) -> None:
    assert_matches(
        lambda *x: siglip_loss(*x, reduction=reduction),
        lambda *x: oracle(*x, reduction=reduction),
        [*pairs(70, 70, 100, dtype), *learnt(torch.float32, scale, bias)],
    )


def test_siglip_loss_keeps_small_gradients_until_a_loss_scale_multiplies_them() -> None:
    a, b = pairs(32, 32, 64, torch.float16)
    scale, bias = learnt(torch.float32, 1.0, -16.0)
    loss = siglip_loss(a, b, scale, bias)
    (scaled,) = torch.autograd.grad(loss * 2.0**16, b)
    exact = [x.detach().double().requires_grad_() for x in (a, b, scale, bias)]
    (expected,) = torch.autograd.grad(oracle(*exact) * 2.0**16, exact[1])
    torch.testing.assert_close(scaled.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("rows", "columns"), [(12, 12), (3, 15), (9, 4)])
def test_siglip_loss_with_ids(rows: int, columns: int, reduction: Any) -> None:
    ids_a, ids_b = ids_for(rows, 5), ids_for(columns, 6, seed=1)
    positive = ids_a[:, None] == ids_b
    assert_matches(
        lambda *x: siglip_loss(*x, ids_a=ids_a, ids_b=ids_b, reduction=reduction),
        lambda *x: oracle(*x, positive=positive, reduction=reduction),
        [*pairs(rows, columns, 16), *learnt()],
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("offset", [0, 5, 14, None])
def test_siglip_loss_looks_for_the_positive_behind_the_offset(offset: int | None, reduction: Any) -> None:
    positive = torch.arange(6)[:, None] + (100 if offset is None else offset) == torch.arange(20)
    assert_matches(
        lambda *x: siglip_loss(*x, label_offset=offset, reduction=reduction),
        lambda *x: oracle(*x, positive=positive, reduction=reduction),
        [*pairs(6, 20, 16), *learnt()],
    )


def test_siglip_loss_without_positives_takes_any_shape() -> None:
    positive = torch.zeros(6, 2, dtype=torch.bool)
    assert_matches(
        lambda *x: siglip_loss(*x, label_offset=None),
        lambda *x: oracle(*x, positive=positive),
        [*pairs(6, 2, 16), *learnt()],
    )


def test_siglip_loss_of_blocks_adds_up_to_the_whole() -> None:
    """What a ring over ranks computes: the own block with positives, all others without."""
    a, b = pairs(6, 6, 16)
    blocks = [
        siglip_loss(a[i : i + 3], b[j : j + 3], 10.0, -3.0, reduction="sum", label_offset=0 if i == j else None)
        for i in (0, 3)
        for j in (0, 3)
    ]
    torch.testing.assert_close(sum(blocks) / 6, siglip_loss(a, b, 10.0, -3.0))


def test_siglip_loss_without_bias_has_bias_zero() -> None:
    a, b = pairs(6, 6, 8)
    torch.testing.assert_close(siglip_loss(a, b, 10.0), siglip_loss(a, b, 10.0, 0.0))


def test_siglip_loss_takes_scale_and_bias_in_any_form() -> None:
    a, b = pairs(6, 6, 8, torch.float32)
    expected = siglip_loss(a, b, 16.0, -4.0)
    torch.testing.assert_close(siglip_loss(a, b, torch.tensor([16.0]), torch.tensor(-4)[None].double()), expected)
    scale, bias = leaf(16.0, torch.bfloat16), leaf(-4.0)
    for x, gradient in zip((scale, bias), gradients(siglip_loss(a, b, scale, bias), [scale, bias]), strict=True):
        assert gradient.dtype == x.dtype


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("budget_rows", [0.5, 3, 1000])
def test_siglip_loss_memory_budget_bounds_scratch_and_changes_nothing(
    budget_rows: float, reduction: Any, with_ids: bool
) -> None:
    inputs = [*pairs(25, 25, 3), *learnt()]
    ids = ids_for(25, 9) if with_ids else None
    options: dict[str, Any] = {"ids_a": ids, "ids_b": ids, "reduction": reduction}
    whole = siglip_loss(*inputs, **options)
    with LargestTensor() as largest:
        blocks = siglip_loss(*inputs, **options, memory_budget=int(budget_rows * 4 * 25 * 8))
        block_gradients = gradients(blocks, inputs)
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(block_gradients, gradients(whole, inputs))
    if budget_rows < 25:
        assert largest.elements < 25 * 25


@pytest.mark.parametrize("scale", [100.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_siglip_loss_is_finite_at_any_scale(scale: float, dtype: torch.dtype) -> None:
    inputs = [*pairs(64, 64, 512, dtype), *learnt(torch.float32, scale)]
    loss = siglip_loss(*inputs)
    assert loss.isfinite() and loss > 1
    assert all(gradient.isfinite().all() for gradient in gradients(loss, inputs))


def test_siglip_loss_shows_nan() -> None:
    a, b = pairs(4, 4, 8)
    with torch.no_grad():
        a[2, 3] = math.nan
    assert siglip_loss(a, b, 10.0).isnan()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 5), (5, 0)])
def test_siglip_loss_of_an_empty_batch_is_zero(rows: int, columns: int, reduction: Any) -> None:
    inputs = [*pairs(rows, columns, 8, torch.float32), *learnt(torch.float32)]
    loss = siglip_loss(*inputs, label_offset=None, reduction=reduction)
    assert loss.shape == ((rows,) if reduction == "none" else ())
    assert (loss == 0).all()
    assert all((gradient == 0).all() for gradient in gradients(loss, inputs))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_siglip_loss_takes_any_strides(reduction: Any) -> None:
    a, b = (x.detach() for x in pairs(10, 10, 12))
    b = b[:1].repeat(10, 1)
    expected = [a.clone().requires_grad_(), b.requires_grad_()]
    actual = [a.T.contiguous().T.requires_grad_(), b.detach()[:1].expand(10, 12).requires_grad_()]
    losses = [siglip_loss(*x, 10.0, -3.0, reduction=reduction) for x in (actual, expected)]
    torch.testing.assert_close(losses[0], losses[1])
    # .sum() hands back an expanded gradient.
    torch.testing.assert_close(
        torch.autograd.grad(losses[0].sum(), actual), torch.autograd.grad(losses[1].sum(), expected)
    )


def test_siglip_loss_takes_one_tensor_as_both_sides() -> None:
    a, _ = pairs(6, 6, 8)
    ids = ids_for(6, 3)
    copy = a.detach().clone().requires_grad_()
    (actual,) = torch.autograd.grad(siglip_loss(a, a, 10.0, ids_a=ids, ids_b=ids), a)
    expected = torch.autograd.grad(siglip_loss(a, copy, 10.0, ids_a=ids, ids_b=ids.clone()), [a, copy])
    torch.testing.assert_close(actual, sum(expected))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_siglip_loss_leaves_a_frozen_input_without_gradient(frozen: int, reduction: Any) -> None:
    inputs = [*pairs(6, 6, 8), *learnt()]
    expected = gradients(siglip_loss(*inputs, reduction=reduction), inputs)
    inputs[frozen] = inputs[frozen].detach()
    others = [i for i in range(4) if i != frozen]
    actual = gradients(siglip_loss(*inputs, reduction=reduction), [inputs[i] for i in others])
    torch.testing.assert_close(actual, [expected[i] for i in others])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_siglip_loss_without_gradient_gives_the_same_loss(reduction: Any) -> None:
    inputs = [*pairs(6, 6, 8), *learnt()]
    expected = siglip_loss(*inputs, reduction=reduction)
    with torch.no_grad():
        actual = siglip_loss(*inputs, reduction=reduction)
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected.detach())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_siglip_loss_differentiates_a_retained_graph_again(reduction: Any) -> None:
    inputs = [*pairs(6, 6, 8), *learnt()]
    loss = siglip_loss(*inputs, reduction=reduction)
    passes = [torch.autograd.grad(loss.sum() * factor, inputs, retain_graph=True) for factor in (1.0, 3.0, 1.0)]
    torch.testing.assert_close(passes[2], passes[0], rtol=0, atol=0)
    torch.testing.assert_close(passes[1], tuple(3 * x for x in passes[0]))


def test_siglip_loss_gradcheck(route: str) -> None:
    if route == "native":
        pytest.skip("kernels take no float64")
    inputs = [*pairs(4, 5, 3), *learnt(scale=2.0, bias=-1.0)]
    assert torch.autograd.gradcheck(siglip_loss, inputs)
    assert torch.autograd.gradcheck(lambda *x: siglip_loss(*x, reduction="none", label_offset=1), inputs)
    if route == "reference":
        assert torch.autograd.gradgradcheck(siglip_loss, inputs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("with_ids", [False, True])
def test_siglip_loss_compiles_into_one_graph(with_ids: bool, reduction: Any, route: str) -> None:
    if route == "registered":
        pytest.skip("the default implementation differentiates, which only an op may do inside a graph")
    torch._dynamo.reset()
    inputs = [*pairs(8, 8, 16, torch.float32), *learnt(torch.float32)]
    ids = ids_for(8, 3) if with_ids else None

    def function(*inputs: Tensor) -> Tensor:
        return siglip_loss(*inputs, ids_a=ids, ids_b=ids, reduction=reduction)

    expected = function(*inputs)
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [None, 400])
def test_siglip_loss_ignores_autocast(dtype: torch.dtype, budget: int | None) -> None:
    inputs = [*pairs(8, 8, 16, dtype), *learnt(torch.float32, 100.0)]
    expected = siglip_loss(*inputs, memory_budget=budget)
    with torch.autocast("cpu", torch.bfloat16):
        actual = siglip_loss(*inputs, memory_budget=budget)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients(actual, inputs), gradients(expected, inputs), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_ids", [False, True])
def test_siglip_loss_ops_pass_opcheck(dtype: torch.dtype, with_ids: bool, route: str) -> None:
    if route == "reference":
        pytest.skip("the reference is not an op")
    a, b = (x.detach() for x in pairs(5, 9, 8, dtype))
    ids = (ids_for(5, 3), ids_for(9, 3)) if with_ids else (None, None)
    inputs = (a, b, torch.tensor(10.0), torch.tensor(-3.0), *ids, 2, None)
    torch.library.opcheck(torch.ops.diffgap.siglip_loss.default, inputs)
    torch.library.opcheck(torch.ops.diffgap.siglip_loss_backward.default, (torch.rand(5), *inputs))


MATRIX = torch.zeros(4, 3)
IDS = torch.arange(4)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "a must be a tensor, got list", ([[0.0]], MATRIX, 1.0), {}),
        (ValueError, r"b must be \(rows, width\), got shape \(3,\)", (MATRIX, torch.zeros(3), 1.0), {}),
        (ValueError, "one width, got 3 and 2", (MATRIX, torch.zeros(4, 2), 1.0), {}),
        (TypeError, "one dtype, got torch.float32 and torch.float16", (MATRIX, MATRIX.half(), 1.0), {}),
        (ValueError, "a has 4 rows and b has 2", (MATRIX, torch.zeros(2, 3), 1.0), {}),
        (ValueError, "logit_scale must be finite, got nan", (MATRIX, MATRIX, math.nan), {}),
        (
            ValueError,
            "logit_bias must be finite, got -inf",
            (MATRIX, MATRIX, 1.0, torch.tensor(-math.inf)),
            {},
        ),
        (TypeError, "logit_bias must be a number .* got str", (MATRIX, MATRIX, 1.0, "0"), {}),
        (ValueError, "reduction must be one of .* got 'max'", (MATRIX, MATRIX, 1.0), {"reduction": "max"}),
        (
            ValueError,
            "memory_budget must be a positive .* got -1",
            (MATRIX, MATRIX, 1.0),
            {"memory_budget": -1},
        ),
        (ValueError, "ids_a is missing", (MATRIX, MATRIX, 1.0), {"ids_b": IDS}),
        (ValueError, "label_offset that fits", (MATRIX, MATRIX, 1.0), {"label_offset": -1}),
        (
            ValueError,
            "no meaning with ids",
            (MATRIX, MATRIX, 1.0),
            {"label_offset": 1, "ids_a": IDS, "ids_b": IDS},
        ),
    ],
)
def test_siglip_loss_refuses(error: type[Exception], message: str, arguments: Any, options: Any) -> None:
    with pytest.raises(error, match=f"^siglip_loss: .*{message}") as caught:
        siglip_loss(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_siglip_loss_on_meta_tensors() -> None:
    x = torch.empty(3, 8, device="meta", requires_grad=True)
    loss = siglip_loss(x, x, 10.0, -10.0)
    loss.backward()
    assert loss.is_meta and loss.shape == () and x.grad is not None and x.grad.shape == x.shape
