"""silu_mul: the reference, the registered ops and the kernels against float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import diffgap
from diffgap.ops import _dispatch
from diffgap.ops._native import CPU_MISSING
from tests.helpers import assert_close_to_oracle
from tests.ops.routes import ROUTES, take

module = importlib.import_module("diffgap.ops.silu_mul")
silu_mul: Callable[[Tensor], Tensor] = module.silu_mul

SHAPES = [(1, 2), (7, 126), (3, 5, 200), (63, 14), (100, 2000), (2000,), (0, 8), (4, 0)]

needs_kernel = pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take(request.param, monkeypatch, module, _silu_mul="_forward", _silu_mul_backward="_backward")
    return str(request.param)


def explicit(pair: Tensor) -> Tensor:
    gate, up = pair.tensor_split(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def both(function: Callable[[Tensor], Tensor], pair: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient for a fixed incoming one."""
    leaf = pair.detach().requires_grad_()
    output = function(leaf)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return output, torch.autograd.grad(output, leaf, grad)[0]


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("route")
def test_silu_mul_and_its_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pair = values(shape, dtype)
    for ours, exact, plain in zip(
        both(silu_mul, pair), both(explicit, pair.double()), both(module.silu_mul_reference, pair), strict=True
    ):
        assert ours.dtype == dtype
        assert_close_to_oracle(ours, exact, plain)


@pytest.mark.usefixtures("route")
def test_silu_mul_gradcheck() -> None:
    assert torch.autograd.gradcheck(silu_mul, values((3, 6), torch.float64).requires_grad_())


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [30.0, 90.0, 1e4, 1e30])
def test_silu_mul_of_large_gates(size: float, sign: int) -> None:
    """silu(g) is g or 0 there, its slope 1 or 0, and nothing overflows on the way."""
    pair = torch.tensor([[sign * size] * 40 + [0.5] * 40])
    output, grad = both(silu_mul, pair)
    exact, exact_grad = both(lambda p: F.silu(p[:, :40]) * p[:, 40:], pair.double())
    torch.testing.assert_close(output.double(), exact, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-6, atol=1e-30)


@pytest.mark.usefixtures("route")
def test_silu_mul_passes_nan_on() -> None:
    pair = values((3, 80))
    pair[1, 7] = torch.nan
    output, grad = both(silu_mul, pair)
    assert output.isnan().nonzero().tolist() == [[1, 7]]
    assert grad.isnan().nonzero().tolist() == [[1, 7], [1, 47]]


@pytest.mark.usefixtures("route")
def test_silu_mul_takes_any_strides() -> None:
    wide = values((12, 5, 40))
    for view in (wide.transpose(0, 1), wide[::2], wide[..., 3:17], wide[:1].expand(6, 5, 40)):
        for ours, exact in zip(both(silu_mul, view), both(explicit, view.double()), strict=True):
            assert_close_to_oracle(ours, exact)
    leaf = values((4, 6)).requires_grad_()
    (grad,) = torch.autograd.grad(silu_mul(leaf).sum(), leaf)  # the incoming gradient is expanded
    assert_close_to_oracle(grad, torch.autograd.functional.jacobian(lambda p: explicit(p).sum(), leaf.double()))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3000, 100), (5, 40000)])
def test_silu_mul_does_not_depend_on_the_number_of_threads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    results, threads = [], torch.get_num_threads()
    with diffgap.backend("native"):
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(both(silu_mul, values(shape, dtype)))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_silu_mul_reference_is_twice_differentiable() -> None:
    assert torch.autograd.gradgradcheck(module.silu_mul_reference, values((2, 6), torch.float64).requires_grad_())


def test_silu_mul_opcheck() -> None:
    pair = values((3, 12))
    torch.library.opcheck(torch.ops.diffgap.silu_mul.default, (pair,))
    torch.library.opcheck(torch.ops.diffgap.silu_mul_backward.default, (torch.ones(3, 6), pair))


@pytest.mark.parametrize("choice", ["eager", "native"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_silu_mul_compiles(compiler: str, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "choose", lambda *_: choice)
    compiled = torch.compile(lambda pair: silu_mul(pair) * 2, fullgraph=True, backend=compiler)
    pair = values((3, 12))
    for ours, exact in zip(both(compiled, pair), both(lambda p: explicit(p) * 2, pair.double()), strict=True):
        assert_close_to_oracle(ours, exact)


def test_silu_mul_on_meta_tensors() -> None:
    assert silu_mul(torch.empty(3, 8, device="meta")).shape == (3, 4)


@pytest.mark.parametrize(
    ("pair", "error", "message"),
    [
        (torch.ones(3, 5), ValueError, r"silu_mul: pair has shape \(3, 5\); pass \(..., 2 \* hidden\)"),
        (torch.ones(()), ValueError, r"silu_mul: pair has shape \(\)"),
        (torch.ones(3, 4, dtype=torch.int64), TypeError, "silu_mul: pair has dtype torch.int64; use a floating-point"),
    ],
)
def test_silu_mul_bad_input(pair: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        silu_mul(pair)
