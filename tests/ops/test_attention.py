"""attention: the reference, the registered ops and the C++ kernels against float64 and torch's own attention."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffgap.ops._native import CPU_MISSING
from tests.attention_terms import attention_terms
from tests.helpers import assert_close_to_oracle
from tests.ops.routes import ROUTES, take

attention_module = importlib.import_module("diffgap.ops.attention")
attention: Callable[..., Tensor] = attention_module.attention


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take(request.param, monkeypatch, attention_module, _attention="_forward", _attention_backward="_backward")
    return str(request.param)


# What torch.compile traces does not depend on the implementation behind the registered op.
compiled_routes = pytest.mark.parametrize("route", [r for r in ROUTES if r != "registered"], indirect=True)


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
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """torch's own RMS norm and attention."""
    d = q.shape[-1]
    q, k = (x if w is None else F.rms_norm(x, (d,), w, 1e-6) for x, w in ((q, q_weight), (k, k_weight)))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if causal:
        past = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        mask = past if mask is None else mask & past
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def outputs_and_gradients(function: Callable[..., Tensor], arguments: dict[str, Any]) -> list[Tensor]:
    """The output and the gradient of each floating-point argument, for a fixed incoming gradient."""
    leaves = {name: x.detach().clone().requires_grad_() if is_float(x) else x for name, x in arguments.items()}
    output = function(**leaves)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    wanted = [x for x in leaves.values() if is_float(x)]
    return [output, *torch.autograd.grad(output, wanted, grad)]


def assert_all_close(actual: list[Tensor], exact: list[Tensor], eager: list[Tensor]) -> None:
    """Each within tolerance; with a single key, the gradients of queries and keys are zero up to rounding."""
    for ours, oracles, torchs in zip(actual, exact, eager, strict=True):
        if oracles.norm() < 1e-12:
            assert ours.norm() < 1e-5
        else:
            assert_close_to_oracle(ours, oracles, torchs)


def doubled(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if is_float(x) else x for name, x in arguments.items()}


# (B, N_q, N_k, H, d). Pairs of batch and head that fill no whole vector, blocks of queries that are not full.
SHAPES = [
    (2, 1, 1, 2, 24),
    (2, 3, 7, 1, 40),
    (3, 4, 4, 3, 64),
    (3, 7, 7, 3, 16),
    (3, 16, 16, 2, 16),
    (1, 17, 33, 3, 80),
    (2, 33, 3, 2, 24),
    (1, 77, 77, 2, 40),
    (1, 3, 257, 1, 128),
    (1, 257, 130, 2, 24),
]


OPTIONS = {
    "plain": [],
    "normed": ["q_weight", "k_weight"],
    "one_normed": ["k_weight"],
    "masked": ["key_mask"],
    "all": ["q_weight", "k_weight", "key_mask"],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_attention_matches_torch(shape: tuple[int, ...], options: str, causal: bool, route: str) -> None:
    every = inputs(*shape, dtype=torch.float32 if route == "native" else torch.float64)
    arguments: dict[str, Any] = {name: every[name] for name in ("q", "k", "v", *OPTIONS[options])}
    arguments["causal"] = causal
    if "key_mask" in arguments:  # not even the first query may be without a key
        arguments["key_mask"][:, 0] = True
    exact = outputs_and_gradients(oracle, doubled(arguments))
    assert_all_close(outputs_and_gradients(attention, arguments), exact, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("route")
def test_attention_accuracy(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = inputs(*shape, dtype=dtype)
    exact = outputs_and_gradients(oracle, doubled(arguments))
    ours, torchs = (outputs_and_gradients(f, arguments) for f in (attention, oracle))
    assert {x.dtype for x in ours} == {dtype}
    assert_all_close(ours, exact, torchs)


def assert_alike_keys_leave_rounding(keys: int) -> None:
    """No attention weight matters then: of the queries' gradient, rounding remains, which may not add up over keys."""
    arguments = {name: inputs(2, 3, keys, 2, 24)[name] for name in "qkv"}
    arguments |= {name: arguments[name][:, :1].repeat(1, keys, 1, 1) for name in "kv"}
    _, gradient, *_ = outputs_and_gradients(attention, arguments)
    grad = torch.randn(2, 3, 2, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    terms = attention_terms(**arguments, grad=grad, scale=24**-0.5)
    assert gradient.norm() <= 4 * torch.finfo(torch.float32).eps * terms["q"]


@pytest.mark.parametrize("keys", [63, 130, 1000])
@pytest.mark.usefixtures("route")
def test_attention_of_keys_that_are_alike(keys: int) -> None:
    assert_alike_keys_leave_rounding(keys)


@pytest.mark.usefixtures("route")
def test_attention_scale() -> None:
    arguments = {name: inputs(2, 3, 5, 2, 8, torch.float64)[name] for name in "qkv"}
    assert_close_to_oracle(attention(**arguments, scale=0.7), oracle(**arguments, scale=0.7))
    assert_close_to_oracle(attention(**arguments), oracle(**arguments, scale=8**-0.5))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.usefixtures("route")
def test_attention_gradcheck(causal: bool) -> None:
    arguments = inputs(2, 2, 3, 2, 3, dtype=torch.float64)
    arguments["key_mask"][1] = False
    mask = arguments.pop("key_mask")
    leaves = [x.requires_grad_() for x in arguments.values()]

    def function(q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        return attention(q, k, v, q_weight=q_weight, k_weight=k_weight, key_mask=mask, causal=causal)

    assert torch.autograd.gradcheck(function, leaves)


def test_attention_reference_is_twice_differentiable() -> None:
    q, k, v = (inputs(1, 2, 2, 1, 2, torch.float64)[name].requires_grad_() for name in "qkv")
    assert torch.autograd.gradgradcheck(lambda *x: attention(*x), (q, k, v))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_opcheck(normed: bool, masked: bool, dtype: torch.dtype) -> None:
    x = inputs(2, 3, 5, 2, 8)
    x |= {name: x[name].to(dtype) for name in "qkv"}
    q_weight, k_weight = (x["q_weight"], x["k_weight"]) if normed else (None, None)
    arguments = (x["q"], x["k"], x["v"], q_weight, k_weight, x["key_mask"] if masked else None, 0.3, False)
    torch.library.opcheck(torch.ops.diffgap.attention.default, arguments)
    grads = (torch.ones_like(x["q"]), None, None)
    torch.library.opcheck(torch.ops.diffgap.attention_backward.default, (*grads, *arguments))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@compiled_routes
@pytest.mark.usefixtures("route")
def test_attention_compiles(compiler: str) -> None:
    arguments = inputs(2, 3, 5, 2, 8)
    compiled = torch.compile(lambda **x: attention(**x) * 2, fullgraph=True, backend=compiler)
    plain = outputs_and_gradients(lambda **x: attention(**x) * 2, arguments)
    for actual, expected in zip(outputs_and_gradients(compiled, arguments), plain, strict=True):
        assert_close_to_oracle(actual, expected)


@compiled_routes
@pytest.mark.usefixtures("route")
def test_attention_compiles_for_one_tensor_as_query_key_and_value() -> None:
    q = inputs(2, 3, 3, 2, 8)["q"].requires_grad_()
    compiled = torch.compile(lambda x: attention(x, x, x), fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(q).sum(), q)
    (expected,) = torch.autograd.grad(oracle(q, q, q).sum(), q)
    assert_close_to_oracle(actual, expected.double())


@compiled_routes
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


@pytest.mark.parametrize("n", [4, 20])
def test_attention_any_strides(route: str, n: int) -> None:
    x = inputs(2, n, n, 2, 16, torch.float32 if route == "native" else torch.float64)
    packed = torch.stack([x["q"], x["k"], x["v"]], 2).requires_grad_()
    output = attention(*packed.unbind(2))
    grad = torch.ones(2, 1, 1, 16, dtype=packed.dtype).expand_as(output)
    (actual,) = torch.autograd.grad(output, packed, grad)
    leaves = {name: x[name].double().requires_grad_() for name in "qkv"}
    expected = torch.autograd.grad(oracle(**leaves).sum(), list(leaves.values()))
    assert_close_to_oracle(output, oracle(**leaves))
    assert_close_to_oracle(actual, torch.stack(expected, 2))

    one = x["k"][:1, :1].expand(2, n, 2, 16)
    assert_close_to_oracle(attention(x["q"], one, one), oracle(*(t.double() for t in (x["q"], one, one))))
    exact = oracle(**{name: x[name].double() for name in "qkv"})
    for layout in ((0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0)):  # what is contiguous once permuted
        back = [layout.index(i) for i in range(4)]
        strided = {name: x[name].permute(layout).contiguous().permute(back) for name in "qkv"}
        assert_close_to_oracle(attention(**strided), exact)


@pytest.mark.parametrize("dim", range(4))
@pytest.mark.usefixtures("route")
def test_attention_gradients_of_strided_inputs(dim: int) -> None:
    """Every other element, and a gradient that is transposed."""
    full = torch.randn(6, 8, 4, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = full.unflatten(dim, (-1, 2)).select(dim + 1, 0)
    output = attention(x, x, x)
    grad = torch.randn(output.shape[::-1], generator=torch.Generator().manual_seed(1)).permute(3, 2, 1, 0)
    (actual,) = torch.autograd.grad(output, full, grad)
    exact = full.detach().double().requires_grad_()
    y = exact.unflatten(dim, (-1, 2)).select(dim + 1, 0)
    (expected,) = torch.autograd.grad(oracle(y, y, y), exact, grad.double())
    assert_close_to_oracle(actual, expected)


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


@pytest.mark.parametrize("shape", [(2, 3, 5, 2, 8), (2, 3, 5, 2, 16), (1, 20, 20, 1, 16)])
@pytest.mark.usefixtures("route")
def test_attention_ignores_what_masked_keys_hold(shape: tuple[int, ...]) -> None:
    arguments = inputs(*shape)
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
    wide = doubled(arguments)
    logits = torch.einsum("bqhd,bkhd->bhqk", wide["q"], wide["k"]) * 16**-0.5
    assert logits.abs().max() > 1e4
    actual = outputs_and_gradients(attention, arguments)
    assert all(torch.isfinite(a).all() for a in actual)
    # float32 logits of 1e4 are known to 1e-3, so their exponentials are too.
    torch.testing.assert_close(actual[0].double(), oracle(**wide), rtol=0, atol=2e-2)


@pytest.mark.usefixtures("route")
def test_attention_of_infinite_differences() -> None:
    """Logits so far apart that all probabilities but one vanish, at both ends of the range."""
    x = inputs(2, 5, 7, 2, 16)
    for scale in (1e6, -1e6):
        actual = attention(x["q"], x["k"], x["v"], scale=scale)
        assert_close_to_oracle(actual, oracle(*(x[name].double() for name in "qkv"), scale=scale))


@pytest.mark.usefixtures("route")
def test_attention_passes_on_what_is_not_a_number() -> None:
    x = inputs(2, 6, 6, 2, 16)
    x["q"][1, 2, 0, 3] = float("nan")
    output = attention(x["q"], x["k"], x["v"])
    hit = output.isnan().any(-1)
    assert hit[1, 2, 0] and hit.sum() == 1


@pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))
@pytest.mark.parametrize("shape", [(5, 4, 4, 3, 64), (3, 16, 16, 4, 24), (1, 300, 70, 1, 64), (2, 7, 33, 5, 40)])
def test_attention_is_deterministic(shape: tuple[int, ...], threads: Callable[[int], None]) -> None:
    """The same bits in every run, with any number of threads, and for a sample whatever it stands beside."""
    arguments = inputs(*shape)
    runs = []
    for count in (1, 1, 2, 3):
        threads(count)
        runs.append(outputs_and_gradients(attention, arguments))
    for other in runs[1:]:
        for actual, expected in zip(other, runs[0], strict=True):
            assert torch.equal(actual, expected)
    last = {name: x[-1:] if x.ndim > 1 else x for name, x in arguments.items()}
    assert torch.equal(attention(**last), runs[0][0][-1:])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_attention_of_every_instruction_set(isa: str) -> None:
    """The instruction set is chosen once a process."""
    selected = "test_attention_matches_torch or test_attention_accuracy or alike or strid or hold or extreme"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", f"native and ({selected})"],
        env=os.environ | {"DIFFGAP_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


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
        ({"scale": torch.ones((), requires_grad=True)}, TypeError, "attention: scale is a number"),
    ],
)
def test_attention_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention(**{**inputs(2, 3, 5, 2, 8), **change})
