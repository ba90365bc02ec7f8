"""The kernels of clip_loss, through the public function and by themselves, against float64."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest
import torch
from diffgap.kernels import clip_loss as kernels
from torch import Tensor

from diffgap.ops.clip_loss import clip_loss
from tests.helpers import assert_close_to_oracle
from tests.kernels.interpreted.kernels_as_ops import TILE, use_kernels
from tests.ops.contrastive_cases import assert_matches, gradients, ids_for, leaf, pairs
from tests.ops.test_clip_loss import oracle

definition = import_module("diffgap.ops.clip_loss")
FLOAT32 = torch.float32


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, "clip_loss")


def inputs(rows: int, columns: int, width: int, scale: float = 14.3, dtype: torch.dtype = FLOAT32) -> list[Tensor]:
    return [*pairs(rows, columns, width, dtype), leaf(scale, FLOAT32)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (7, 100), (63, 33), (70, 64), (100, 100)])
def test_clip_loss_matches_the_oracle(rows: int, width: int, reduction: Any) -> None:
    assert_matches(
        lambda a, b, s: clip_loss(a, b, s, reduction=reduction),
        lambda *x: oracle(*x, reduction=reduction),
        inputs(rows, rows, width),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_clip_loss_of_low_precision(dtype: torch.dtype, scale: float) -> None:
    assert_matches(clip_loss, oracle, inputs(70, 70, 100, scale, dtype))


@pytest.mark.parametrize("scale", [-20.0, 0.0, 100.0])
@pytest.mark.parametrize("keep", [False, True])
def test_clip_loss_at_any_scale_with_logits_kept_or_not(scale: float, keep: bool) -> None:
    budget = 4 * 40 * 40 if keep else None
    assert_matches(lambda a, b, s: clip_loss(a, b, s, memory_budget=budget), oracle, inputs(40, 40, 512, scale))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("keep", [False, True])
def test_clip_loss_with_ids(keep: bool, reduction: Any) -> None:
    ids_a, ids_b = ids_for(35, 9), ids_for(35, 14, seed=1)
    positive = ids_a[:, None] == ids_b
    assert positive.sum(1).max() > 1 and not positive.any(0).all()
    options: dict[str, Any] = {"reduction": reduction, "memory_budget": 4 * 35 * 35 if keep else None}
    assert_matches(
        lambda a, b, s: clip_loss(a, b, s, ids_a=ids_a, ids_b=ids_b, **options),
        lambda *x: oracle(*x, positive=positive, reduction=reduction),
        inputs(35, 35, 20),
    )


@pytest.mark.parametrize(("rows", "columns"), [(3, 50), (50, 17)])
@pytest.mark.parametrize("one_sided", [False, True])
def test_clip_loss_with_ids_of_sides_of_unequal_length(rows: int, columns: int, one_sided: bool) -> None:
    ids_a, ids_b = torch.arange(rows), torch.arange(columns) % rows
    assert_matches(
        lambda a, b, s: clip_loss(a, b, s, ids_a=ids_a, ids_b=ids_b, one_sided=one_sided),
        lambda *x: oracle(*x, positive=ids_a[:, None] == ids_b, one_sided=one_sided),
        inputs(rows, columns, 16),
    )


@pytest.mark.parametrize("offset", [0, 5, 31])
def test_clip_loss_one_sided_with_an_offset(offset: int) -> None:
    positive = torch.arange(19)[:, None] + offset == torch.arange(50)
    assert_matches(
        lambda a, b, s: clip_loss(a, b, s, one_sided=True, label_offset=offset),
        lambda *x: oracle(*x, positive=positive, one_sided=True),
        inputs(19, 50, 16),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [1, 2 * 32 * 16 * 4])
def test_clip_loss_in_macro_tiles_of_any_size(budget: int, dtype: torch.dtype) -> None:
    assert_matches(lambda a, b, s: clip_loss(a, b, s, memory_budget=budget), oracle, inputs(70, 70, 20, dtype=dtype))


def test_clip_loss_of_float16_keeps_gradients_that_float16_cannot_hold() -> None:
    # 1e-9 a pair, below float16's smallest number, before a loss scale of 2^20 multiplies the sum.
    a, b, scale = inputs(40, 40, 64, 1.0, torch.float16)
    exact = [x.detach().double().requires_grad_() for x in (a, b)]
    factors = [torch.full((40,), 1e-6) for _ in range(4)]
    _, _, rows_lse, columns_lse, logits = kernels.forward(
        a.detach(), b.detach(), scale.detach(), None, None, None, None, False, 0, None, False, TILE
    )
    grad_a, grad_b, _ = kernels.backward(
        a.detach(), b.detach(), scale.detach(), None, None, rows_lse, columns_lse, *factors, logits, 0, None, TILE
    )
    loss = 2 * 40e-6 * oracle(*exact, torch.ones((), dtype=torch.float64))
    for actual, wanted in zip((grad_a, grad_b), torch.autograd.grad(loss, exact), strict=True):
        assert_close_to_oracle((actual * 2**20).half(), wanted * 2**20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clip_loss_is_finite_at_a_huge_scale(dtype: torch.dtype) -> None:
    a, b, scale = inputs(20, 20, 64, 1e30, dtype)
    loss = clip_loss(a, b, scale)
    assert_close_to_oracle(loss, oracle(a.double(), b.double(), scale.double()))
    assert all(torch.isfinite(x).all() for x in gradients(loss, (a, b, scale)))


def test_clip_loss_of_a_nearly_solved_batch_keeps_what_float32_can() -> None:
    # 1 + 2e-4, the sum of exponentials, rounds at 1e-7 once per tile; a log-sum-exp in one part would at 1e-6.
    values = [torch.eye(40).requires_grad_(), torch.eye(40).requires_grad_(), leaf(12.0, FLOAT32)]
    exact = [x.detach().double().requires_grad_() for x in values]
    loss, wanted = clip_loss(*values), oracle(*exact)
    assert 1e-4 < wanted < 3e-4
    bound = 4 * torch.finfo(FLOAT32).eps
    assert abs(loss.item() - wanted.item()) <= bound
    gradients_of = [torch.autograd.grad(x, y) for x, y in ((loss, values), (wanted, exact))]
    # What an error of a probability is multiplied by: the scale over the number of rows, or their mean.
    for actual, expected, factor in zip(*gradients_of, (12 / 40, 12 / 40, 1), strict=True):
        assert (actual - expected).abs().max() <= bound * factor


def test_clip_loss_of_a_collapsed_model() -> None:
    a = torch.ones(50, 64).div(8).requires_grad_()
    loss = clip_loss(a, a, 100.0)
    torch.testing.assert_close(loss.item(), math.log(50), rtol=1e-6, atol=0)
    torch.testing.assert_close(*torch.autograd.grad(loss, a), torch.zeros(50, 64), rtol=0, atol=1e-6)


def test_clip_loss_shows_nan() -> None:
    a, b, _ = inputs(20, 20, 16)
    with torch.no_grad():
        a[3] = math.nan
    rows = clip_loss(a, b, 10.0, one_sided=True, reduction="none")
    assert rows.isnan().nonzero().flatten().tolist() == [3]
    assert clip_loss(a, b, 10.0).isnan()


def test_clip_loss_takes_any_strides() -> None:
    a, b, scale = inputs(30, 30, 24)
    transposed = a.detach().T.contiguous().T.requires_grad_()
    strided = torch.stack([b.detach(), b.detach()], dim=2)[..., 0].requires_grad_()
    assert not transposed.is_contiguous() and not strided.is_contiguous()
    assert_matches(clip_loss, oracle, [transposed, strided, scale])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_clip_loss_is_deterministic(dtype: torch.dtype) -> None:
    values = inputs(50, 50, 32, dtype=dtype)
    ids = ids_for(50, 20)
    runs = []
    for _ in range(2):
        loss = clip_loss(*values, ids_a=ids, ids_b=ids)
        runs.append([loss, *gradients(loss, values)])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize(("rows", "columns", "width"), [(0, 0, 8), (0, 5, 8), (5, 0, 8), (3, 3, 0)])
def test_clip_loss_of_nothing(rows: int, columns: int, width: int) -> None:
    a, b, scale = torch.zeros(rows, width), torch.zeros(columns, width), torch.tensor(10.0)
    ids_a, ids_b = torch.arange(rows), torch.arange(columns) + 100
    weights = torch.zeros(rows), torch.zeros(columns)
    arguments = (a, b, scale, ids_a, ids_b)
    options = (False, None, None, False)
    outputs = kernels.forward(*arguments, *weights, *options, TILE)
    for actual, wanted in zip(outputs, definition._forward(*arguments, *weights, *options), strict=True):
        torch.testing.assert_close(actual, wanted)
    grads = kernels.backward(*arguments, *outputs[2:4], *weights, *weights, outputs[4], None, None, TILE)
    assert [x.shape for x in grads] == [a.shape, b.shape, scale.shape]
    assert all(x.eq(0).all() for x in grads)


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize(("offset", "with_ids"), [(None, False), (-20, False), (7, False), (None, True)])
def test_clip_loss_ops_of_a_part_of_a_batch(offset: int | None, with_ids: bool, one_sided: bool) -> None:
    """As a ring of ranks calls them: factors of its own, positives partly or wholly elsewhere."""
    a, b, scale = (x.detach() for x in inputs(35, 50, 20))
    ids_a, ids_b = (ids_for(35, 9), ids_for(50, 14, seed=1)) if with_ids else (None, None)
    empty = torch.zeros(0)
    factors = [torch.rand(35), empty if one_sided else torch.rand(50)] * 2
    exact = [x.double() for x in (a, b, scale)]
    _, _, *wanted_lse, _ = definition._forward(*exact, None, None, None, None, one_sided, None, None, False)
    rows, columns, *lse, logits = kernels.forward(
        a, b, scale, None, None, None, None, one_sided, None, None, True, TILE
    )
    assert rows.eq(0).all() and columns.eq(0).all()
    for actual, wanted in zip(lse, wanted_lse, strict=True):
        assert_close_to_oracle(actual, wanted)
    expected = definition._backward(
        *exact, ids_a, ids_b, *wanted_lse, *(x.double() for x in factors), logits, offset, None
    )
    for given in (logits, torch.empty(0, 0)):
        actual = kernels.backward(a, b, scale, ids_a, ids_b, *lse, *factors, given, offset, None, TILE)
        for x, wanted in zip(actual, expected, strict=True):
            assert_close_to_oracle(x, wanted)
