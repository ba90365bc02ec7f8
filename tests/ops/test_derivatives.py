"""Derivatives that kernels do not have: the reference's or an error, never a wrong one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffgap import ops
from diffgap.ops import _dispatch
from diffgap.ops._native import CPU_MISSING
from tests.helpers import assert_close_to_oracle


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


N, D = 4, 6
ROWS, OTHER = random(N, D), random(D, N).t()
MODULATION = random(2, D).flip(0)
TABLE = torch.rand((3, 16), generator=torch.Generator().manual_seed(0))
SEED = torch.arange(N)

#: Each op as a function of one tensor.
OPS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "adaln": (lambda x: ops.adaln(x, x.square(), *(MODULATION,) * 3)[1], random(2, 3, D)),
    "attention": (lambda x: ops.attention(x, x.square(), x), random(2, 3, 1, D)),
    "clip_loss": (lambda x: ops.clip_loss(x, OTHER, 10.0), ROWS),
    "linear": (lambda x: ops.linear(x, x), ROWS),
    "q_sample": (lambda x: ops.q_sample(x, SEED % 3, TABLE[:, :2], SEED, "v_prediction")[1], ROWS),
    "siglip_loss": (lambda x: ops.siglip_loss(x, OTHER, 10.0, -10.0), ROWS),
    "siglip_loss none": (lambda x: ops.siglip_loss(x, OTHER, 10.0, -10.0, reduction="none"), ROWS),
    "silu_mul": (lambda x: ops.silu_mul(x), ROWS),
    "solver_step": (lambda x: ops.solver_step(x, OTHER, TABLE, 1, history=(x,) * 3, last_sample=x, seed=SEED).x0, ROWS),
    "swiglu": (lambda x: ops.swiglu(x, x, x[:, 0].contiguous()), ROWS),
}


#: Those without a second derivative by x, or whose reference gives every derivative.
EXACT = {"q_sample", "solver_step"}


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has it, however small the product and whatever the CPU."""
    monkeypatch.setattr(importlib.import_module("diffgap.ops.linear"), "_WORTHWHILE", 1)
    if torch.backends.mkldnn.is_available():
        monkeypatch.setitem(_dispatch._ops, "linear", {"cpu": _dispatch.Native("oneDNN", (torch.float32,))})


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_is_that_of_the_reference(op: str) -> None:
    function, x = OPS[op]

    def along(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            tangent: Tensor = forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.cos(x)))).tangent
        return tangent

    found, functional = along(x), torch.func.jvp(function, (x,), (torch.cos(x),))[1]
    with _dispatch.backend("eager"):
        expected = along(x)
    assert expected.abs().max() > 0.0
    assert torch.equal(found, expected)
    torch.testing.assert_close(functional, expected)


def loss_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).cos().sum(), x)[0]


def rows_apart(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.stack([function(x), function(x.cos())])


#: By transform of torch.func: it, and the same without it.
TRANSFORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "grad": (lambda f, x: torch.func.grad(lambda x: f(x).cos().sum())(x), loss_gradient),
    "vjp": (lambda f, x: torch.func.vjp(lambda x: f(x).cos().sum(), x)[1](x.new_ones(()))[0], loss_gradient),
    "jacrev": (lambda f, x: torch.func.jacrev(f)(x), lambda f, x: torch.autograd.functional.jacobian(f, x)),
    "vmap": (lambda f, x: torch.vmap(f)(torch.stack([x, x.cos()])), rows_apart),
    "vmap of grad": (
        lambda f, x: torch.vmap(torch.func.grad(lambda x: f(x).cos().sum()))(torch.stack([x, x.cos()])),
        lambda f, x: rows_apart(lambda x: loss_gradient(f, x), x),
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", OPS)
def test_transforms_of_torch_func_are_those_of_the_reference(op: str, transform: str) -> None:
    function, x = OPS[op]
    transformed, plain = TRANSFORMS[transform]
    with _dispatch.backend("eager"):
        expected = plain(function, x)
    assert expected.abs().max() > 0.0
    assert_close_to_oracle(transformed(function, x), expected)


def test_kernels_say_that_they_have_no_rule_for_transforms() -> None:
    explained: list[_dispatch.Choice] = []

    def function(x: Tensor) -> Tensor:
        explained.extend(ops.explain())
        return ops.silu_mul(x)

    torch.vmap(function)(random(2, 3, D))
    rows = [row for row in explained if row.op == "adaln"]
    assert all(row.backend == "eager" for row in rows)
    assert CPU_MISSING or all("the transforms of torch.func" in row.reason for row in rows)
    with _dispatch.backend("native"), pytest.raises(RuntimeError, match="'native' was asked for, but"):
        torch.vmap(lambda x: ops.adaln(x, None, None, MODULATION, MODULATION)[1])(random(2, 2, 3, D))


def penalised(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of a loss whose own gradient is penalised."""
    x = x.clone().requires_grad_()
    loss = function(x).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    total = loss + gradient.square().sum() if gradient.requires_grad else loss
    (result,) = torch.autograd.grad(total, x)
    return result


@pytest.mark.parametrize("op", sorted(OPS.keys() - EXACT))
def test_a_second_derivative_is_refused(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the gradient that comes in is a constant."""
    monkeypatch.setattr(_dispatch, "choose", lambda *_: "native")
    monkeypatch.setattr(_dispatch, "prefers", lambda *_: True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        penalised(*OPS[op])


@pytest.mark.parametrize("op", sorted(EXACT))
def test_a_second_derivative_that_is_zero_is_no_error(op: str) -> None:
    function, x = OPS[op]
    found = penalised(function, x)
    with _dispatch.backend("eager"):
        torch.testing.assert_close(found, penalised(function, x))
