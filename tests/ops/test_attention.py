"""attention: the reference and the registered ops against float64 and torch's own attention."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers import assert_close_to_oracle

attention_module = importlib.import_module("diffgap.ops.attention")
attention: Callable[..., Tensor] = attention_module.attention


@pytest.fixture(params=["reference", "registered"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    choice = "eager" if request.param == "reference" else "native"
    monkeypatch.setattr(attention_module, "choose", lambda *_: choice)
    return request.param


def inputs(b: int, n_q: int, n_k: int, h: int, d: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random q, k, v, norm weights and a mask that hides about a third of the keys, never all."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(b, n_k, generator=generator) > 0.3
    mask[:, :1] = True
    q, k, v = (torch.randn(b, n, h, d, generator=generator, dtype=torch.float64) for n in (n_q, n_k, n_k))
    weights = (torch.randn(d, generator=generator, dtype=torch.float64) + 1 for _ in range(2))
    tensors = dict(zip(("q", "k", "v", "q_weight", "k_weight"), (q, k, v, *weights), strict=True))
    return {**{name: x.to(dtype) for name, x in tensors.items()}, "key_mask": mask}


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """torch's own RMS norm and attention."""
    d = q.shape[-1]
    q, k = (x if w is None else F.rms_norm(x, (d,), w, 1e-6) for x, w in ((q, q_weight), (k, k_weight)))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)


def outputs_and_gradients(function: Callable[..., Tensor], arguments: dict[str, Tensor]) -> list[Tensor]:
    """The output and the gradient of each floating-point argument, for a fixed incoming gradient."""
    leaves = {
        name: x.detach().clone().requires_grad_() if x.is_floating_point() else x for name, x in arguments.items()
    }
    output = function(**leaves)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    wanted = [x for x in leaves.values() if x.requires_grad]
    return [output, *torch.autograd.grad(output, wanted, grad)]


def assert_all_close(actual: list[Tensor], exact: list[Tensor], eager: list[Tensor]) -> None:
    """Each within tolerance; with a single key, the gradients of queries and keys are zero up to rounding."""
    for ours, oracles, torchs in zip(actual, exact, eager, strict=True):
        if oracles.norm() < 1e-12:
            assert ours.norm() < 1e-5
        else:
            assert_close_to_oracle(ours, oracles, torchs)


SHAPES = [
    (2, 1, 1, 2, 24),
    (2, 3, 7, 1, 40),
    (1, 17, 33, 3, 80),
    (2, 33, 3, 2, 24),
    (1, 77, 77, 2, 40),
    (3, 16, 16, 2, 16),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", ["plain", "normed", "masked", "all"])
@pytest.mark.usefixtures("route")
def test_attention_matches_torch(shape: tuple[int, ...], options: str) -> None:
    arguments = inputs(*shape, dtype=torch.float64)
    names = {"plain": [], "normed": ["q_weight", "k_weight"], "masked": ["key_mask"]}
    keep = ["q", "k", "v", *names.get(options, ["q_weight", "k_weight", "key_mask"])]
    arguments = {name: arguments[name] for name in keep}
    exact = outputs_and_gradients(oracle, arguments)
    assert_all_close(outputs_and_gradients(attention, arguments), exact, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("route")
def test_attention_accuracy(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = inputs(*shape, dtype=dtype)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in arguments.items()}
    exact = outputs_and_gradients(oracle, wide)
    ours, torchs = (outputs_and_gradients(f, arguments) for f in (attention, oracle))
    assert {x.dtype for x in ours} == {dtype}
    assert_all_close(ours, exact, torchs)


@pytest.mark.usefixtures("route")
def test_attention_scale() -> None:
    arguments = {name: inputs(2, 3, 5, 2, 8, torch.float64)[name] for name in "qkv"}
    assert_close_to_oracle(attention(**arguments, scale=0.7), oracle(**arguments, scale=0.7))
    assert_close_to_oracle(attention(**arguments), oracle(**arguments, scale=8**-0.5))


@pytest.mark.usefixtures("route")
def test_attention_gradcheck() -> None:
    arguments = inputs(2, 2, 3, 2, 3, dtype=torch.float64)
    arguments["key_mask"][1] = False
    mask = arguments.pop("key_mask")
    leaves = [x.requires_grad_() for x in arguments.values()]

    def function(q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        return attention(q, k, v, q_weight=q_weight, k_weight=k_weight, key_mask=mask)

    assert torch.autograd.gradcheck(function, leaves)


def test_attention_reference_is_twice_differentiable() -> None:
    q, k, v = (inputs(1, 2, 2, 1, 2, torch.float64)[name].requires_grad_() for name in "qkv")
    assert torch.autograd.gradgradcheck(lambda *x: attention(*x), (q, k, v))


def test_attention_registered_refuses_a_second_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "choose", lambda *_: "native")
    q = inputs(1, 2, 2, 1, 2)["q"].requires_grad_()
    (grad,) = torch.autograd.grad(attention(q, q, q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_opcheck(normed: bool, masked: bool) -> None:
    x = inputs(2, 3, 5, 2, 8)
    q_weight, k_weight = (x["q_weight"], x["k_weight"]) if normed else (None, None)
    arguments = (x["q"], x["k"], x["v"], q_weight, k_weight, x["key_mask"] if masked else None, 0.3)
    torch.library.opcheck(torch.ops.diffgap.attention.default, arguments)
    torch.library.opcheck(torch.ops.diffgap.attention_backward.default, (torch.ones_like(x["q"]), *arguments))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.usefixtures("route")
def test_attention_compiles(compiler: str) -> None:
    arguments = inputs(2, 3, 5, 2, 8)
    compiled = torch.compile(lambda **x: attention(**x) * 2, fullgraph=True, backend=compiler)
    plain = outputs_and_gradients(lambda **x: attention(**x) * 2, arguments)
    for actual, expected in zip(outputs_and_gradients(compiled, arguments), plain, strict=True):
        assert_close_to_oracle(actual, expected)


@pytest.mark.usefixtures("route")
def test_attention_compiles_for_one_tensor_as_query_key_and_value() -> None:
    q = inputs(2, 3, 3, 2, 8)["q"].requires_grad_()
    compiled = torch.compile(lambda x: attention(x, x, x), fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(q).sum(), q)
    (expected,) = torch.autograd.grad(oracle(q, q, q).sum(), q)
    assert_close_to_oracle(actual, expected.double())


@pytest.mark.usefixtures("route")
def test_attention_compiles_once_for_many_lengths() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, fullgraph=True, backend=counter, dynamic=True)
    for n in (3, 5, 9):
        x = inputs(2, n, n + 2, 2, 8)
        torch.testing.assert_close(compiled(x["q"], x["k"], x["v"]), attention(x["q"], x["k"], x["v"]))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("route")
def test_attention_autocast() -> None:
    arguments = inputs(2, 3, 5, 2, 8)
    arguments["k"] = arguments["k"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        actual = attention(**arguments)
    rounded = {name: arguments[name].bfloat16() for name in "qkv"}
    expected = attention(**{**arguments, **rounded})
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 3, 5, 2, 8), (2, 0, 5, 2, 8), (2, 3, 0, 2, 8), (2, 3, 5, 0, 8)])
@pytest.mark.usefixtures("route")
def test_attention_empty(shape: tuple[int, ...]) -> None:
    output, *gradients = outputs_and_gradients(attention, inputs(*shape))
    b, n_q, _, h, d = shape
    assert output.shape == (b, n_q, h, d)
    assert all((x == 0).all() for x in (output, *gradients))


@pytest.mark.usefixtures("route")
def test_attention_any_strides() -> None:
    x = inputs(2, 4, 4, 2, 8, torch.float64)
    packed = torch.stack([x["q"], x["k"], x["v"]], 2).requires_grad_()
    output = attention(*packed.unbind(2))
    grad = torch.ones(2, 1, 1, 8, dtype=torch.float64).expand_as(output)
    (actual,) = torch.autograd.grad(output, packed, grad)
    leaves = {name: x[name].clone().requires_grad_() for name in "qkv"}
    expected = torch.autograd.grad(oracle(**leaves).sum(), list(leaves.values()))
    assert_close_to_oracle(output, oracle(**leaves))
    assert_close_to_oracle(actual, torch.stack(expected, 2))

    one = x["k"][:1, :1].expand(2, 4, 2, 8)
    assert_close_to_oracle(attention(x["q"], one, one), oracle(x["q"], one, one))
    transposed = x["q"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_close_to_oracle(attention(transposed, x["k"], x["v"]), oracle(x["q"], x["k"], x["v"]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("route")
def test_attention_fully_masked_rows_are_zero(dtype: torch.dtype) -> None:
    arguments = inputs(3, 3, 5, 2, 8, dtype)
    arguments["key_mask"][1] = False
    output, dq, dk, dv, *weights = outputs_and_gradients(attention, arguments)
    for x in (output, dq, dk, dv):
        assert (x[1] == 0).all()
        assert (x[0] != 0).any()
    assert all(torch.isfinite(x).all() for x in weights)


@pytest.mark.usefixtures("route")
def test_attention_ignores_what_masked_keys_hold() -> None:
    arguments = inputs(2, 3, 5, 2, 8)
    clean = outputs_and_gradients(attention, arguments)
    hidden = ~arguments["key_mask"]
    for name, garbage in (("k", float("nan")), ("v", float("inf"))):
        arguments[name] = arguments[name].masked_fill(hidden[..., None, None], garbage)
    for actual, expected in zip(outputs_and_gradients(attention, arguments), clean, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("route")
def test_attention_extreme_logits(dtype: torch.dtype) -> None:
    x = inputs(2, 7, 7, 2, 16, dtype)
    arguments = {"q": x["q"] * 100, "k": x["k"] * 100, "v": x["v"], "key_mask": x["key_mask"]}
    wide = {name: a.double() if a.is_floating_point() else a for name, a in arguments.items()}
    logits = torch.einsum("bqhd,bkhd->bhqk", wide["q"], wide["k"]) * 16**-0.5
    assert logits.abs().max() > 1e4
    actual = outputs_and_gradients(attention, arguments)
    assert all(torch.isfinite(a).all() for a in actual)
    # float32 logits of 1e4 are known to 1e-3, so their exponentials are too.
    torch.testing.assert_close(actual[0].double(), oracle(**wide), rtol=0, atol=2e-2)


def test_attention_on_meta_tensors() -> None:
    q = torch.empty(2, 3, 4, 8, device="meta")
    assert attention(q, q, q).shape == (2, 3, 4, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(2, 3, 8)}, ValueError, r"attention: q has shape \(2, 3, 8\)"),
        ({"q": torch.ones(2, 3, 2, 8, dtype=torch.int64)}, TypeError, "attention: q has dtype torch.int64"),
        (
            {"k": torch.ones(1, 5, 2, 8)},
            ValueError,
            r"attention: k has shape \(1, 5, 2, 8\), expected \(2, 5, 2, 8\)",
        ),
        ({"k": torch.ones(2, 5, 2, 4)}, ValueError, "attention: k has shape"),
        ({"k": torch.ones(8)}, ValueError, r"attention: k has shape \(8,\)"),
        ({"v": torch.ones(2, 4, 2, 8)}, ValueError, "attention: v has shape"),
        (
            {"v": torch.ones(2, 5, 2, 8).half()},
            TypeError,
            "attention: v has dtype torch.float16 but q torch.float32",
        ),
        ({"v": torch.ones(2, 5, 2, 8, device="meta")}, ValueError, "attention: v is on meta but q on cpu"),
        ({"q_weight": torch.ones(7)}, ValueError, r"attention: q_weight has shape \(7,\); pass \(8,\)"),
        ({"k_weight": torch.ones(8).bool()}, TypeError, "attention: k_weight has dtype torch.bool"),
        (
            {"key_mask": torch.ones(2, 3).bool()},
            ValueError,
            r"attention: key_mask has shape \(2, 3\); pass \(2, 5\)",
        ),
        ({"key_mask": torch.ones(2, 5)}, TypeError, "attention: key_mask has dtype torch.float32"),
        ({"scale": float("nan")}, ValueError, "attention: scale is nan"),
    ],
)
def test_attention_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention(**{**inputs(2, 3, 5, 2, 8), **change})
