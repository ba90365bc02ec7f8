"""clip_loss against a float64 oracle, on the eager reference and through the registered ops."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffgap.ops._contrastive import positive_weights
from diffgap.ops.clip_loss import clip_loss
from tests.helpers import relative_l2
from tests.ops.contrastive_cases import LargestTensor, assert_matches, gradients, ids_for, leaf, pairs, take
from tests.ops.routes import ROUTES

SHAPES = [(1, 8), (7, 100), (70, 64), (100, 512)]


module = importlib.import_module("diffgap.ops.clip_loss")


@pytest.fixture(params=ROUTES, autouse=True)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take(request.param, monkeypatch, module, _forward_op="_forward", _backward_op="_backward")
    return str(request.param)


def oracle(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    *,
    positive: Tensor | None = None,
    reduction: str = "mean",
    one_sided: bool = False,
) -> Tensor:
    """The formula, row by row; ``positive`` is a bool matrix, by default the diagonal."""
    logits = scale * (a @ b.T)
    positive = torch.eye(*logits.shape, dtype=torch.bool) if positive is None else positive

    def side(logits: Tensor, positive: Tensor) -> Tensor:
        losses = torch.stack(
            [
                -row.log_softmax(0)[wanted].mean() if wanted.any() else 0 * row.sum()
                for row, wanted in zip(logits, positive, strict=True)
            ]
        )
        if reduction == "none":
            return losses
        return losses.sum() / (positive.any(1).sum() if reduction == "mean" else 1)

    rows = side(logits, positive)
    return rows if one_sided else (rows + side(logits.T, positive.T)) / 2


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_clip_loss_matches_the_oracle(rows: int, width: int, reduction: Any) -> None:
    inputs = [*pairs(rows, rows, width), leaf(14.3)]
    assert_matches(
        lambda a, b, s: clip_loss(a, b, s, reduction=reduction),
        lambda *x: oracle(*x, reduction=reduction),
        inputs,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_clip_loss_accumulates_low_precision_in_float32(dtype: torch.dtype, scale: float) -> None:
    assert_matches(clip_loss, oracle, [*pairs(70, 70, 100, dtype), leaf(scale, torch.float32)])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [13, 20])
def test_clip_loss_with_ids_spreads_the_target_over_all_positives(rows: int, reduction: Any) -> None:
    ids_a, ids_b = ids_for(rows, 5), ids_for(rows, 9, seed=1)
    positive = ids_a[:, None] == ids_b
    assert positive.sum(1).max() > 1
    assert not positive.any(0).all(), "a column without a positive is wanted"
    assert_matches(
        lambda a, b, s: clip_loss(a, b, s, ids_a=ids_a, ids_b=ids_b, reduction=reduction),
        lambda *x: oracle(*x, positive=positive, reduction=reduction),
        [*pairs(rows, rows, 16), leaf(10.0)],
    )


@pytest.mark.parametrize(("rows", "columns"), [(3, 15), (9, 4)])
def test_clip_loss_with_ids_takes_sides_of_unequal_length(rows: int, columns: int) -> None:
    ids_a, ids_b = torch.arange(rows), torch.arange(columns) % rows
    assert_matches(
        lambda a, b, s: clip_loss(a, b, s, ids_a=ids_a, ids_b=ids_b),
        lambda *x: oracle(*x, positive=ids_a[:, None] == ids_b),
        [*pairs(rows, columns, 16), leaf(10.0)],
    )


def test_clip_loss_keeps_the_digits_of_a_small_softmax() -> None:
    """A target of 1 / 133 is subtracted from softmaxes near it, not from their difference from 1."""
    ids = torch.zeros(133, dtype=torch.int64)
    assert_matches(
        lambda a, b, s: clip_loss(a, b, s, ids_a=ids, ids_b=ids),
        lambda *x: oracle(*x, positive=torch.ones(133, 133, dtype=torch.bool)),
        [*pairs(133, 133, 64, torch.float32), leaf(1.0, torch.float32)],
    )


def test_clip_loss_with_distinct_ids_is_the_plain_loss() -> None:
    a, b = pairs(9, 9, 16)
    ids = torch.arange(9) * 7 - 20
    torch.testing.assert_close(clip_loss(a, b, 10.0, ids_a=ids, ids_b=ids), clip_loss(a, b, 10.0))


@pytest.mark.parametrize("budget", [None, 2**30])
@pytest.mark.parametrize("with_ids", [False, True])
def test_clip_loss_over_many_blocks(with_ids: bool, budget: int | None) -> None:
    """Wide rows, so that kernels cut both sides into several blocks, none of them full."""
    rows, columns = (500, 470) if with_ids else (500, 500)
    ids = (ids_for(rows, 90), ids_for(columns, 90, seed=1)) if with_ids else (None, None)
    positive = ids[0][:, None] == ids[1] if ids[0] is not None else None
    assert_matches(
        lambda a, b, s: clip_loss(a, b, s, ids_a=ids[0], ids_b=ids[1], memory_budget=budget),
        lambda *x: oracle(*x, positive=positive),
        [*pairs(rows, columns, 2048), leaf(20.0)],
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("offset", [0, 5, 14])
def test_clip_loss_one_sided_looks_for_the_positive_behind_the_offset(offset: int, reduction: Any) -> None:
    positive = torch.arange(6)[:, None] + offset == torch.arange(20)
    assert_matches(
        lambda a, b, s: clip_loss(a, b, s, one_sided=True, label_offset=offset, reduction=reduction),
        lambda *x: oracle(*x, positive=positive, one_sided=True, reduction=reduction),
        [*pairs(6, 20, 16), leaf(10.0)],
    )


def test_clip_loss_one_sided_with_ids() -> None:
    ids_a, ids_b = ids_for(6, 4), ids_for(11, 4, seed=1)
    assert_matches(
        lambda a, b, s: clip_loss(a, b, s, ids_a=ids_a, ids_b=ids_b, one_sided=True),
        lambda *x: oracle(*x, positive=ids_a[:, None] == ids_b, one_sided=True),
        [*pairs(6, 11, 16), leaf(10.0)],
    )


def test_clip_loss_mean_is_the_mean_of_none_and_sum_its_sum() -> None:
    a, b = pairs(8, 8, 16)
    rows = clip_loss(a, b, 10.0, reduction="none")
    assert rows.shape == (8,)
    torch.testing.assert_close(clip_loss(a, b, 10.0), rows.mean())
    torch.testing.assert_close(clip_loss(a, b, 10.0, reduction="sum"), rows.sum())


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("budget_rows", [0.5, 3, 1000])
def test_clip_loss_memory_budget_bounds_scratch_and_changes_nothing(
    budget_rows: float, one_sided: bool, with_ids: bool
) -> None:
    inputs = [*pairs(25, 25, 3), leaf(10.0)]
    ids = ids_for(25, 9) if with_ids else None
    options: dict[str, Any] = {"ids_a": ids, "ids_b": ids, "one_sided": one_sided}
    whole = clip_loss(*inputs, **options)
    with LargestTensor() as largest:
        blocks = clip_loss(*inputs, **options, memory_budget=int(budget_rows * 4 * 25 * 8))
        block_gradients = gradients(blocks, inputs)
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(block_gradients, gradients(whole, inputs))
    if budget_rows < 25:
        assert largest.elements < 25 * 25


@pytest.mark.parametrize("scale", [100.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clip_loss_is_finite_at_any_scale(scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # Near-orthogonal unit vectors: exp(S - scale) would underflow in every column.
    a, b = torch.nn.functional.normalize(torch.randn(2, 64, 512, generator=generator), dim=2).to(dtype)
    inputs = [a.requires_grad_(), b.requires_grad_(), leaf(scale, torch.float32)]
    loss = clip_loss(*inputs)
    assert loss.isfinite() and loss > 1
    assert all(gradient.isfinite().all() for gradient in gradients(loss, inputs))


@pytest.mark.parametrize("budget", [None, 2**20])
def test_clip_loss_keeps_the_gradient_of_a_nearly_solved_batch(budget: int | None, route: str) -> None:
    """What is left to learn is about 1e-10 of a softmax: plain float32 rounds it away, a kernel must not."""
    if route != "native":
        pytest.skip("the eager forms subtract a softmax of almost 1 from 1")
    a, b = pairs(64, 64, 128, torch.float32)
    with torch.no_grad():
        b.copy_(torch.nn.functional.normalize(a / 2 + b, dim=1))
    inputs = [a, b, leaf(100.0, torch.float32)]
    loss = clip_loss(*inputs, memory_budget=budget)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = oracle(*exact)
    assert 1e-13 < expected < 1e-6
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    for actual, wanted in zip(gradients(loss, inputs), gradients(expected, exact), strict=True):
        # Logits near 100 are themselves only good to 1e-5.
        assert relative_l2(actual, wanted) < 1e-4


def test_clip_loss_does_not_depend_on_the_number_of_threads(route: str) -> None:
    if route != "native":
        pytest.skip("a promise of the kernel")
    inputs = [*pairs(700, 700, 100), leaf(20.0)]
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        loss = clip_loss(*inputs)
        results.append([loss.detach(), *gradients(loss, inputs)])
    torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_clip_loss_of_a_collapsed_model_is_log_n(dtype: torch.dtype) -> None:
    row = torch.nn.functional.normalize(torch.randn(1, 100, generator=torch.Generator().manual_seed(0)), dim=1)
    a = row.to(dtype).repeat(50, 1)
    assert clip_loss(a, a, 100.0).item() == pytest.approx(math.log(50), rel=1e-5)


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("similarity", [0.6, 0.9, 0.99])
def test_clip_loss_has_softmaxes_that_sum_to_one(similarity: float, budget: int | None) -> None:
    # Elsewhere the rows' common part, of which embeddings have much, would leave a gradient.
    a = torch.tensor([[similarity, 0.0]], requires_grad=True)
    b = torch.tensor([[1.0, 0.0]]).repeat(7, 1)
    clip_loss(a, b, torch.tensor(100.0), one_sided=True, memory_budget=budget).backward()
    assert a.grad is not None
    assert a.grad.abs().max() <= 100 * 4 * torch.finfo(torch.float32).eps


def test_clip_loss_shows_nan() -> None:
    a, b = pairs(4, 4, 8)
    with torch.no_grad():
        a[2, 3] = math.nan
    assert clip_loss(a, b, 10.0).isnan()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("rows", "columns", "with_ids"), [(0, 0, False), (0, 0, True), (0, 5, True), (5, 0, True)])
def test_clip_loss_of_an_empty_batch_is_zero(rows: int, columns: int, with_ids: bool, reduction: Any) -> None:
    options: dict[str, Any] = {"reduction": reduction, "one_sided": reduction == "none"}
    if with_ids:
        options |= {"ids_a": torch.arange(rows), "ids_b": torch.arange(columns)}
    inputs = [*pairs(rows, columns, 8, torch.float32), leaf(10.0, torch.float32)]
    loss = clip_loss(*inputs, **options)
    assert loss.shape == ((rows,) if reduction == "none" else ())
    assert (loss == 0).all()
    assert all((gradient == 0).all() for gradient in gradients(loss, inputs))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_clip_loss_takes_any_strides(layout: str) -> None:
    a, b = (x.detach() for x in pairs(10, 10, 12))
    if layout == "transposed":
        views = [a.T.contiguous().T, b.T.contiguous().T]
    elif layout == "strided":
        views = [x.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3] for x in (a, b)]
    else:
        a = a[:1].repeat(10, 1)
        views = [a[:1].expand(10, 12), b]
    expected, actual = [a, b], views
    for x in (*expected, *actual):
        x.requires_grad_()
    losses = [clip_loss(*x, 10.0, reduction="none") for x in (actual, expected)]
    torch.testing.assert_close(losses[0], losses[1])
    # .sum() hands back an expanded gradient.
    torch.testing.assert_close(
        torch.autograd.grad(losses[0].sum(), actual), torch.autograd.grad(losses[1].sum(), expected)
    )


def test_clip_loss_takes_one_tensor_as_both_sides() -> None:
    a, _ = pairs(6, 6, 8)
    ids = ids_for(6, 3)
    loss = clip_loss(a, a, 10.0, ids_a=ids, ids_b=ids)
    copy = a.detach().clone().requires_grad_()
    expected = clip_loss(a, copy, 10.0, ids_a=ids, ids_b=ids.clone())
    torch.testing.assert_close(loss, expected)
    (actual,) = torch.autograd.grad(loss, a)
    torch.testing.assert_close(actual, sum(torch.autograd.grad(expected, [a, copy])))


@pytest.mark.parametrize("make", [float, lambda x: leaf(x, torch.bfloat16), lambda x: leaf(x)[None].detach()])
def test_clip_loss_takes_a_scale_in_any_form(make: Any) -> None:
    a, b = pairs(6, 6, 8, torch.float32)
    scale = make(16.0)
    loss = clip_loss(a, b, scale)
    torch.testing.assert_close(loss, clip_loss(a, b, 16.0))
    if isinstance(scale, Tensor) and scale.requires_grad:
        (gradient,) = torch.autograd.grad(loss, scale)
        assert gradient.shape == scale.shape and gradient.dtype == scale.dtype


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_clip_loss_leaves_a_frozen_input_without_gradient(frozen: int) -> None:
    inputs = [*pairs(6, 6, 8), leaf(10.0)]
    expected = gradients(clip_loss(*inputs), inputs)
    inputs[frozen] = inputs[frozen].detach()
    learnt = [i for i in range(3) if i != frozen]
    actual = gradients(clip_loss(*inputs), [inputs[i] for i in learnt])
    torch.testing.assert_close(actual, [expected[i] for i in learnt])


def test_clip_loss_gradcheck(route: str) -> None:
    if route == "native":
        pytest.skip("kernels take no float64")
    inputs = [*pairs(4, 4, 3), leaf(5.0)]
    assert torch.autograd.gradcheck(lambda *x: clip_loss(*x, reduction="none"), inputs)
    ids = ids_for(4, 2)
    assert torch.autograd.gradcheck(lambda *x: clip_loss(*x, ids_a=ids, ids_b=ids), inputs)
    if route == "reference":
        assert torch.autograd.gradgradcheck(clip_loss, inputs)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("with_ids", [False, True])
def test_clip_loss_compiles_into_one_graph(backend: str, with_ids: bool, route: str) -> None:
    if backend == "inductor" and (with_ids or route == "registered"):
        pytest.skip("one inductor case is enough: it compiles C++")
    torch._dynamo.reset()
    inputs = [*pairs(8, 8, 16, torch.float32), leaf(10.0, torch.float32)]
    ids = ids_for(8, 3) if with_ids else None

    def function(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return clip_loss(a, b, scale, ids_a=ids, ids_b=ids)

    expected = function(*inputs)
    actual = torch.compile(function, fullgraph=True, backend=backend)(*inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, inputs), gradients(expected, inputs))


def test_clip_loss_compiles_with_a_memory_budget() -> None:
    torch._dynamo.reset()
    inputs = [*pairs(8, 8, 16, torch.float32), leaf(10.0, torch.float32)]
    compiled = torch.compile(clip_loss, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*inputs, memory_budget=400), clip_loss(*inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [None, 400])
def test_clip_loss_ignores_autocast(dtype: torch.dtype, budget: int | None) -> None:
    inputs = [*pairs(8, 8, 16, dtype), leaf(100.0, torch.float32)]
    expected = clip_loss(*inputs, memory_budget=budget)
    with torch.autocast("cpu", torch.bfloat16):
        actual = clip_loss(*inputs, memory_budget=budget)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients(actual, inputs), gradients(expected, inputs), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("one_sided", [False, True])
def test_clip_loss_ops_pass_opcheck(dtype: torch.dtype, with_ids: bool, one_sided: bool, route: str) -> None:
    if route == "reference":
        pytest.skip("the reference is not an op")
    a, b = (x.detach() for x in pairs(5, 9 if one_sided else 5, 8, dtype))
    ids = (ids_for(5, 3), ids_for(b.shape[0], 3)) if with_ids else (None, None)
    offset = 0 if with_ids or not one_sided else 2
    weights = positive_weights(*ids, torch.float32)
    inputs = (a, b, torch.tensor(10.0), *ids)
    arguments = (*inputs, *weights, one_sided, offset, None, True)
    torch.library.opcheck(torch.ops.diffgap.clip_loss.default, arguments)
    rows, columns, rows_lse, columns_lse, kept = torch.ops.diffgap.clip_loss.default(*arguments)
    factors = [torch.rand_like(x) for x in (rows, columns, rows, columns)]
    for logits in (kept, kept.new_empty((0, 0))):
        saved = (*inputs, rows_lse, columns_lse, *factors, logits, offset, None)
        torch.library.opcheck(torch.ops.diffgap.clip_loss_backward.default, saved)

    logits = 10.0 * a.float() @ b.float().T
    torch.testing.assert_close(rows_lse.sum(1), logits.logsumexp(1))
    if not one_sided:
        torch.testing.assert_close(columns_lse.sum(1), logits.logsumexp(0))
    torch.testing.assert_close(kept, logits)


MATRIX = torch.zeros(4, 3)
IDS = torch.arange(4)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "a must be a tensor, got list", ([[0.0]], MATRIX, 1.0), {}),
        (ValueError, r"b must be \(rows, width\), got shape \(3,\)", (MATRIX, torch.zeros(3), 1.0), {}),
        (TypeError, "a must be float32, .* got torch.int64", (MATRIX.long(), MATRIX.long(), 1.0), {}),
        (ValueError, "one width, got 3 and 2", (MATRIX, torch.zeros(4, 2), 1.0), {}),
        (TypeError, "one dtype, got torch.float32 and torch.float16", (MATRIX, MATRIX.half(), 1.0), {}),
        (ValueError, "one device, got cpu and meta", (MATRIX, MATRIX.to("meta"), 1.0), {}),
        (ValueError, "a has 4 rows and b has 5", (MATRIX, torch.zeros(5, 3), 1.0), {}),
        (ValueError, "a has 4 rows and b has 2", (MATRIX, torch.zeros(2, 3), 1.0), {}),
        (ValueError, "logit_scale must be finite, got inf", (MATRIX, MATRIX, math.inf), {}),
        (ValueError, "logit_scale must be finite, got nan", (MATRIX, MATRIX, torch.tensor(math.nan)), {}),
        (ValueError, r"logit_scale must be .* shape \(2,\)", (MATRIX, MATRIX, torch.ones(2)), {}),
        (TypeError, "logit_scale must be a number .* got str", (MATRIX, MATRIX, "14"), {}),
        (ValueError, "reduction must be one of .* got 'max'", (MATRIX, MATRIX, 1.0), {"reduction": "max"}),
        (
            ValueError,
            "memory_budget must be a positive .* got 0",
            (MATRIX, MATRIX, 1.0),
            {"memory_budget": 0},
        ),
        (ValueError, "ids_b is missing", (MATRIX, MATRIX, 1.0), {"ids_a": IDS}),
        (
            TypeError,
            "ids_a must be int64, got torch.int32",
            (MATRIX, MATRIX, 1.0),
            {"ids_a": IDS.int(), "ids_b": IDS},
        ),
        (ValueError, r"ids_b must be \(4,\)", (MATRIX, MATRIX, 1.0), {"ids_a": IDS, "ids_b": IDS[:3]}),
        (ValueError, "label_offset=1 needs one_sided", (MATRIX, MATRIX, 1.0), {"label_offset": 1}),
        (ValueError, "label_offset that fits", (MATRIX, MATRIX, 1.0), {"label_offset": 1, "one_sided": True}),
        (
            ValueError,
            "label_offset=1 has no meaning with ids",
            (MATRIX, MATRIX, 1.0),
            {"label_offset": 1, "one_sided": True, "ids_a": IDS, "ids_b": IDS},
        ),
        (
            ValueError,
            "one_sided=True",
            (MATRIX, MATRIX[:2], 1.0),
            {"reduction": "none", "ids_a": IDS, "ids_b": IDS[:2]},
        ),
    ],
)
def test_clip_loss_refuses(error: type[Exception], message: str, arguments: Any, options: Any) -> None:
    with pytest.raises(error, match=f"^clip_loss: .*{message}") as caught:
        clip_loss(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_clip_loss_on_meta_tensors() -> None:
    x = torch.empty(3, 8, device="meta", requires_grad=True)
    loss = clip_loss(x, x, 10.0)
    loss.backward()
    assert loss.is_meta and loss.shape == () and x.grad is not None and x.grad.shape == x.shape
