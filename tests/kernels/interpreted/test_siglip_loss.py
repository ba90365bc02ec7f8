"""The kernels of siglip_loss, through the public function, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffgap.kernels import siglip_loss as kernels
from torch import Tensor
from torch.nn import functional as F

from diffgap.ops.siglip_loss import siglip_loss
from tests.helpers import assert_close_to_oracle
from tests.kernels.interpreted.kernels_as_ops import TILE, use_kernels
from tests.ops.contrastive_cases import assert_matches, gradients, ids_for, leaf, pairs

FLOAT32 = torch.float32


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, "siglip_loss")


def oracle(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, *, positive: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    logits = scale * (a @ b.T) + bias
    positive = torch.eye(*logits.shape, dtype=torch.bool) if positive is None else positive
    rows = -F.logsigmoid(torch.where(positive, logits, -logits)).sum(1)
    return rows if reduction == "none" else rows.sum() / (a.shape[0] if reduction == "mean" else 1)


def inputs(
    rows: int, columns: int, width: int, scale: float = 10.0, bias: float = -10.0, dtype: torch.dtype = FLOAT32
) -> list[Tensor]:
    return [*pairs(rows, columns, width, dtype), leaf(scale, FLOAT32), leaf(bias, FLOAT32)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("rows", "columns", "width"), [(1, 1, 8), (7, 7, 100), (63, 20, 33), (70, 70, 64), (20, 100, 100)]
)
def test_siglip_loss_matches_the_oracle(rows: int, columns: int, width: int, reduction: Any) -> None:
    options = {"label_offset": None} if rows > columns else {}
    positive = torch.zeros(rows, columns, dtype=torch.bool) if rows > columns else None
    assert_matches(
        lambda *x: siglip_loss(*x, reduction=reduction, **options),
        lambda *x: oracle(*x, positive=positive, reduction=reduction),
        inputs(rows, columns, width),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (10.0, -10.0), (100.0, -10.0)])
def test_siglip_loss_of_low_precision(dtype: torch.dtype, scale: float, bias: float) -> None:
    assert_matches(siglip_loss, oracle, inputs(70, 70, 100, scale, bias, dtype))


@pytest.mark.parametrize(("scale", "bias"), [(0.0, 0.0), (-30.0, 3.0), (100.0, -20.0), (1.0, -60.0), (1.0, 60.0)])
def test_siglip_loss_at_any_scale_and_bias(scale: float, bias: float) -> None:
    assert_matches(siglip_loss, oracle, inputs(40, 40, 64, scale, bias))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("rows", "columns"), [(35, 35), (20, 50)])
def test_siglip_loss_with_ids(rows: int, columns: int, reduction: Any) -> None:
    ids_a, ids_b = ids_for(rows, 9), ids_for(columns, 14, seed=1)
    positive = ids_a[:, None] == ids_b
    assert positive.sum(1).max() > 1 and not positive.any(0).all()
    assert_matches(
        lambda *x: siglip_loss(*x, ids_a=ids_a, ids_b=ids_b, reduction=reduction),
        lambda *x: oracle(*x, positive=positive, reduction=reduction),
        inputs(rows, columns, 20),
    )


@pytest.mark.parametrize("offset", [None, 0, 5, 31])
def test_siglip_loss_with_an_offset(offset: int | None) -> None:
    positive = torch.arange(19)[:, None] + (99 if offset is None else offset) == torch.arange(50)
    assert_matches(
        lambda *x: siglip_loss(*x, label_offset=offset),
        lambda *x: oracle(*x, positive=positive),
        inputs(19, 50, 16),
    )


@pytest.mark.parametrize("budget", [1, 2 * 32 * 16 * 4])
def test_siglip_loss_in_macro_tiles_of_any_size(budget: int) -> None:
    assert_matches(lambda *x: siglip_loss(*x, memory_budget=budget), oracle, inputs(70, 70, 20))
    a, b, scale, bias = (x.detach() for x in inputs(70, 70, 20))
    with torch.no_grad():
        whole, parts = (siglip_loss(a, b, scale, bias, memory_budget=m) for m in (None, budget))
    torch.testing.assert_close(parts, whole)


def test_siglip_loss_of_float16_keeps_gradients_that_float16_cannot_hold() -> None:
    # sigmoid(-20) is 2e-9, below float16's smallest number.
    a, b, scale, bias = (x.detach() for x in inputs(30, 30, 64, 1.0, -20.0, torch.float16))
    exact = [x.double().requires_grad_() for x in (a, b)]
    _, grad_a, grad_b, _, _ = kernels.backward(torch.ones(30), a, b, scale, bias, None, None, None, None, TILE)
    nothing = torch.zeros(30, 30, dtype=torch.bool)
    loss = oracle(*exact, scale.double(), bias.double(), positive=nothing, reduction="sum")
    for actual, wanted in zip((grad_a, grad_b), torch.autograd.grad(loss, exact), strict=True):
        assert_close_to_oracle((actual * 2**20).half(), wanted * 2**20)


def test_siglip_loss_is_finite_at_a_huge_scale() -> None:
    values = inputs(20, 20, 64, 1e30)
    loss = siglip_loss(*values)
    assert_close_to_oracle(loss, oracle(*(x.double() for x in values)))
    assert all(torch.isfinite(x).all() for x in gradients(loss, values))


def test_siglip_loss_shows_nan() -> None:
    a, b, *_ = inputs(20, 20, 16)
    with torch.no_grad():
        a[3] = torch.nan
    assert siglip_loss(a, b, 10.0, reduction="none").isnan().nonzero().flatten().tolist() == [3]


def test_siglip_loss_takes_any_strides() -> None:
    a, b, *scalars = inputs(30, 30, 24)
    transposed = a.detach().T.contiguous().T.requires_grad_()
    assert not transposed.is_contiguous()
    assert_matches(siglip_loss, oracle, [transposed, b, *scalars])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_siglip_loss_is_deterministic(dtype: torch.dtype) -> None:
    values = inputs(50, 50, 32, dtype=dtype)
    runs = []
    for _ in range(2):
        loss = siglip_loss(*values)
        runs.append([loss, *gradients(loss, values)])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 5), (5, 0)])
def test_siglip_loss_of_nothing(rows: int, columns: int) -> None:
    values = [torch.zeros(n, 8, requires_grad=True) for n in (rows, columns)]
    loss = siglip_loss(*values, 10.0, -10.0, label_offset=None)
    assert loss == 0
    assert all(x.eq(0).all() for x in torch.autograd.grad(loss, values))
