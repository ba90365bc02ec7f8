"""adaln: the reference and the registered ops against float64 and torch's own layer norm."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers import assert_close_to_oracle

adaln_module = importlib.import_module("diffgap.ops.adaln")
adaln: Callable[..., tuple[Tensor, Tensor]] = adaln_module.adaln

NAMES = ("x", "branch", "gate", "shift", "scale")


@pytest.fixture(params=["reference", "registered"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    choice = "eager" if request.param == "reference" else "native"
    monkeypatch.setattr(adaln_module, "choose", lambda *_: choice)
    return request.param


def inputs(
    b: int,
    n: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    *,
    per_token: bool = False,
    first: bool = False,
) -> list[Tensor | None]:
    """Random x, branch, gate, shift and scale; no branch and gate for the ``first`` norm of a network."""
    generator = torch.Generator().manual_seed(0)
    modulation = (b, n, d) if per_token else (b, d)
    shapes = [(b, n, d), (b, n, d), modulation, modulation, modulation]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return [None if first and name in ("branch", "gate") else x for name, x in zip(NAMES, tensors, strict=True)]


def explicit(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The formula, written out."""
    gate, shift, scale = (t.unsqueeze(1) if t is not None and t.ndim == 2 else t for t in (gate, shift, scale))
    y = x if branch is None else x + gate * branch
    centred = y - y.mean(-1, keepdim=True)
    return y, centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift


def with_layer_norm(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """As DiT writes it, every operation in the inputs' dtype."""
    gate, shift, scale = (t.unsqueeze(1) if t is not None and t.ndim == 2 else t for t in (gate, shift, scale))
    y = x if branch is None else x + gate * branch
    return y, F.layer_norm(y, y.shape[-1:], eps=1e-6) * (1 + scale) + shift


def outputs_and_gradients(
    function: Callable[..., tuple[Tensor, Tensor]], arguments: list[Tensor | None]
) -> list[Tensor]:
    """Both outputs and the gradient of each argument, for fixed incoming gradients."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in arguments]
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
    wanted = [x for x in leaves if x is not None]
    return [*outputs, *torch.autograd.grad(outputs, wanted, grads)]


SHAPES = [(2, 1, 24), (2, 3, 40), (1, 7, 80), (3, 17, 33), (1, 77, 24), (2, 33, 512)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("oracle", [explicit, with_layer_norm])
@pytest.mark.usefixtures("route")
def test_adaln_matches_torch(
    shape: tuple[int, ...], per_token: bool, first: bool, oracle: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    arguments = inputs(*shape, torch.float64, per_token=per_token, first=first)
    for ours, expected in zip(
        outputs_and_gradients(adaln, arguments), outputs_and_gradients(oracle, arguments), strict=True
    ):
        assert_close_to_oracle(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.usefixtures("route")
def test_adaln_accuracy(shape: tuple[int, ...], per_token: bool, dtype: torch.dtype) -> None:
    arguments = inputs(*shape, dtype, per_token=per_token)
    exact = outputs_and_gradients(explicit, [x.double() for x in arguments])
    ours, torchs = (outputs_and_gradients(f, arguments) for f in (adaln, with_layer_norm))
    for actual, expected, eager in zip(ours, exact, torchs, strict=True):
        assert actual.dtype == dtype
        assert_close_to_oracle(actual, expected, eager)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.usefixtures("route")
def test_adaln_gradcheck(per_token: bool, first: bool) -> None:
    arguments = inputs(2, 3, 4, torch.float64, per_token=per_token, first=first)
    leaves = [None if x is None else x.requires_grad_() for x in arguments]
    assert torch.autograd.gradcheck(adaln, leaves)


@pytest.mark.parametrize("used", ["y", "h"])
@pytest.mark.usefixtures("route")
def test_adaln_gradient_through_one_output(used: str) -> None:
    def gradients(function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in inputs(2, 3, 8, torch.float64)]
        output = function(*leaves)[0 if used == "y" else 1]
        grads = torch.autograd.grad(output.square().sum(), leaves, allow_unused=True, materialize_grads=True)
        return list(grads)

    for actual, expected in zip(gradients(adaln), gradients(explicit), strict=True):
        assert_close_to_oracle(actual, expected)


def test_adaln_reference_is_twice_differentiable() -> None:
    leaves = [x.requires_grad_() for x in inputs(1, 2, 3, torch.float64)]
    assert torch.autograd.gradgradcheck(adaln, leaves)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_adaln_opcheck(per_token: bool, first: bool) -> None:
    x, branch, gate, _, scale = arguments = inputs(2, 3, 8, per_token=per_token, first=first)
    torch.library.opcheck(torch.ops.diffgap.adaln.default, arguments)
    grads = (None if first else torch.ones_like(x), torch.ones_like(x))
    torch.library.opcheck(torch.ops.diffgap.adaln_backward.default, (*grads, x, branch, gate, scale))


@pytest.mark.parametrize(("compiler", "first"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
@pytest.mark.usefixtures("route")
def test_adaln_compiles(compiler: str, first: bool) -> None:
    def function(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        y, h = adaln(*arguments)
        return y * 2, h + 1

    arguments = inputs(2, 3, 8, first=first)
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for actual, expected in zip(
        outputs_and_gradients(compiled, arguments), outputs_and_gradients(function, arguments), strict=True
    ):
        assert_close_to_oracle(actual, expected)


@pytest.mark.usefixtures("route")
def test_adaln_autocast_keeps_the_stream_in_its_dtype() -> None:
    x, *others = inputs(2, 3, 8)
    low = [t.bfloat16() for t in others]
    with torch.autocast("cpu", torch.bfloat16):
        y, h = adaln(x, *low)
    expected = adaln(x, *(t.float() for t in low))
    assert y.dtype == h.dtype == torch.float32
    torch.testing.assert_close((y, h), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.usefixtures("route")
def test_adaln_empty(shape: tuple[int, ...], first: bool) -> None:
    y, h, *gradients = outputs_and_gradients(adaln, inputs(*shape, first=first))
    assert y.shape == h.shape == shape
    assert all((x == 0).all() for x in gradients)


@pytest.mark.usefixtures("route")
def test_adaln_any_strides() -> None:
    x, branch, *_ = inputs(2, 3, 8, torch.float64)
    rows = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def outputs(function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (x, branch, rows)]
        transposed = leaves[0].transpose(1, 2).contiguous().transpose(1, 2)
        y, h = function(transposed, leaves[1][:, :1].expand(-1, 3, -1), *leaves[2].expand(2, -1, -1).unbind(1))
        grad = torch.arange(3.0, dtype=torch.float64)[:, None].expand(2, 3, 8)
        return [y, h, *torch.autograd.grad((y, h), leaves, (grad, -grad))]

    for actual, expected in zip(outputs(adaln), outputs(explicit), strict=True):
        assert_close_to_oracle(actual, expected)


@pytest.mark.usefixtures("route")
def test_adaln_of_equal_features_is_the_shift() -> None:
    x, _, _, shift, scale = inputs(2, 3, 8)
    _, h = adaln(torch.full_like(x, 1e4), None, None, shift, scale)
    assert torch.isfinite(h).all()
    torch.testing.assert_close(h, shift.unsqueeze(1).expand_as(h), rtol=0, atol=1e-5)


def test_adaln_on_meta_tensors() -> None:
    x, row = torch.empty(2, 3, 8, device="meta"), torch.empty(2, 8, device="meta")
    y, h = adaln(x, x, row, row, row)
    assert y.shape == h.shape == x.shape


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 8)}, ValueError, r"adaln: x has shape \(2, 8\)"),
        ({"x": torch.ones(2, 3, 8, dtype=torch.int64)}, TypeError, "adaln: x has dtype torch.int64"),
        ({"branch": None}, ValueError, "adaln: branch is None"),
        ({"gate": None}, ValueError, "adaln: gate is None"),
        (
            {"branch": torch.ones(2, 4, 8)},
            ValueError,
            r"adaln: branch has shape \(2, 4, 8\) but x \(2, 3, 8\)",
        ),
        ({"gate": torch.ones(2, 3, 8)}, ValueError, r"adaln: gate has shape \(2, 3, 8\) but shift \(2, 8\)"),
        ({"shift": torch.ones(8)}, ValueError, r"adaln: shift has shape \(8,\); pass \(2, 8\)"),
        ({"scale": torch.ones(2, 7)}, ValueError, r"adaln: scale has shape \(2, 7\) but shift \(2, 8\)"),
        (
            {"scale": torch.ones(2, 8).double()},
            TypeError,
            "adaln: scale has dtype torch.float64 but x torch.float32",
        ),
        ({"shift": torch.ones(2, 8, device="meta")}, ValueError, "adaln: shift is on meta but x on cpu"),
    ],
)
def test_adaln_bad_input(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    arguments = dict(zip(NAMES, inputs(2, 3, 8), strict=True))
    with pytest.raises(error, match=message):
        adaln(**{**arguments, **change})
