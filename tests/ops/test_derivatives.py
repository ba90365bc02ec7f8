"""Derivatives that kernels do not have: the reference's or an error, never a wrong one."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffgap import ops
from diffgap.ops import _dispatch


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
