"""The kernels of attention, through the public function and by themselves, against float64."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from diffgap.kernels import attention as kernels
from diffgap.kernels.configs import Attention, attention_config, product_kind
from torch import Tensor

from diffgap.ops import _dispatch
from tests.helpers import assert_close_to_oracle
from tests.ops.test_attention import (
    OPTIONS,
    assert_alike_keys_leave_rounding,
    assert_all_close,
    doubled,
    inputs,
    oracle,
    outputs_and_gradients,
)

definition = importlib.import_module("diffgap.ops.attention")
attention = definition.attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# Of the tests that put NaN and infinities in.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")

# (B, N_q, N_k, H, d). Pairs that share a tile, pairs too few for the last one, widths of more than one chunk, and a
# width that 8 does not divide.
SHORT_SHAPES = [
    (2, 1, 1, 2, 24),
    (5, 4, 4, 3, 16),
    (2, 3, 7, 1, 40),
    (3, 7, 7, 3, 80),
    (2, 4, 33, 1, 64),
    (1, 17, 33, 2, 128),
    (2, 33, 3, 2, 24),
    (1, 64, 64, 1, 40),
    (2, 5, 6, 2, 7),
]
LONG_SHAPES = [(1, 77, 77, 1, 40), (2, 9, 100, 1, 24), (1, 70, 5, 2, 80), (1, 257, 130, 1, 16), (1, 70, 66, 2, 13)]


def config(q: Tensor, k: Tensor) -> Attention:
    """A row of the table on the short path, and on the long one blocks that do not divide the shapes above."""
    n_q, n_k, d = q.shape[1], k.shape[1], q.shape[3]
    if max(n_q, n_k) <= kernels.SHORT:
        return attention_config("sm_80", product_kind(q), n_q, n_k, d, "forward")
    return Attention(64, 32, 16 if q.dtype == torch.float32 else max(16, 1 << (d - 1).bit_length()), 4)


def forward(q: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return kernels.forward(q, k, *others, config=config(q, k))


def backward(grad: Tensor, output: Tensor | None, lse: Tensor | None, q: Tensor, k: Tensor, *others: Any) -> Any:
    return kernels.backward(grad, output, lse, q, k, *others, config=config(q, k))


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "choose", lambda op, tensor: "native")
    monkeypatch.setattr(definition, "_attention", forward)
    monkeypatch.setattr(definition, "_attention_backward", backward)


def assert_matches_the_oracle(arguments: dict[str, Any]) -> None:
    exact = outputs_and_gradients(oracle, doubled(arguments))
    assert_all_close(outputs_and_gradients(attention, arguments), exact, outputs_and_gradients(oracle, arguments))


def arguments_for(shape: tuple[int, ...], options: str, causal: bool, dtype: torch.dtype) -> dict[str, Any]:
    every = inputs(*shape, dtype=dtype)
    return {name: every[name] for name in ("q", "k", "v", *OPTIONS[options])} | {"causal": causal}


@pytest.mark.parametrize(
    ("options", "causal"),
    [("plain", False), ("plain", True), ("normed", False), ("one_normed", True), ("masked", False), ("all", True)],
)
@pytest.mark.parametrize("shape", SHORT_SHAPES)
def test_attention_of_few_tokens(shape: tuple[int, ...], options: str, causal: bool) -> None:
    assert_matches_the_oracle(arguments_for(shape, options, causal, torch.float32))


@pytest.mark.parametrize(
    ("options", "causal"), [("plain", False), ("plain", True), ("one_normed", False), ("all", True)]
)
@pytest.mark.parametrize("shape", LONG_SHAPES)
def test_attention_of_many_tokens(shape: tuple[int, ...], options: str, causal: bool) -> None:
    assert_matches_the_oracle(arguments_for(shape, options, causal, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("shape", [*SHORT_SHAPES[1:], *LONG_SHAPES])
def test_attention_of_low_precision(shape: tuple[int, ...], options: str, dtype: torch.dtype) -> None:
    assert_matches_the_oracle(arguments_for(shape, options, shape[1] == 7, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 3, 5, 2, 24), (3, 20, 20, 2, 24), (2, 70, 40, 1, 24)])
def test_attention_without_a_key_gives_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = inputs(*shape, dtype)
    arguments["key_mask"][1] = False
    output, dq, dk, dv, *_ = outputs_and_gradients(attention, arguments)
    for x in (output, dq, dk, dv):
        assert x[1].eq(0).all() and x[0].ne(0).any() and x.isfinite().all()
    # Rows without a key add nothing to the gradients of the weights either.
    others = {name: x if x.ndim == 1 else x[::2] for name, x in arguments.items()}
    grads = outputs_and_gradients(lambda **x: attention(**x)[::2], arguments)[4:]
    exact, eager = outputs_and_gradients(oracle, doubled(others))[4:], outputs_and_gradients(oracle, others)[4:]
    assert_all_close(grads, exact, eager)


@pytest.mark.parametrize("shape", [(2, 4, 4, 3, 24), (2, 20, 30, 1, 40), (2, 3, 70, 2, 24)])
def test_attention_ignores_what_masked_keys_hold(shape: tuple[int, ...]) -> None:
    arguments = inputs(*shape)
    clean = outputs_and_gradients(attention, arguments)
    hidden = ~arguments["key_mask"]
    for name, garbage in (("k", math.nan), ("v", math.inf)):
        arguments[name] = arguments[name].masked_fill(hidden[..., None, None], garbage)
    for actual, expected in zip(outputs_and_gradients(attention, arguments), clean, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("n", "garbage"), [(4, math.nan), (4, math.inf), (20, math.nan), (70, math.nan)])
@pytest.mark.parametrize("name", ["q", "k", "v", "grad"])
def test_attention_keeps_what_is_not_finite_in_its_own_batch_and_head(n: int, name: str, garbage: float) -> None:
    arguments = inputs(2 if n == 4 else 1, n, n, 2, 24)
    arguments = {x: arguments[x] for x in "qkv"}
    grad = torch.randn(arguments["q"].shape, generator=torch.Generator().manual_seed(1))

    def results(tensors: dict[str, Tensor]) -> list[Tensor]:
        leaves = [tensors[x].clone().requires_grad_() for x in "qkv"]
        output = attention(*leaves)
        return [output, *torch.autograd.grad(output, leaves, tensors["grad"])]

    clean = results(arguments | {"grad": grad})
    arguments["grad"] = grad
    arguments[name] = arguments[name].clone()
    arguments[name][-1, 0, 1, 3] = garbage
    poisoned = results(arguments)
    affected = torch.zeros(len(grad), 1, 2, 1, dtype=torch.bool)
    affected[-1, :, 1] = True
    for actual, expected in zip(poisoned, clean, strict=True):
        assert torch.equal(actual.masked_fill(affected, 0.0), expected.masked_fill(affected, 0.0))
    assert not poisoned[0 if name != "grad" else 1][-1, :, 1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [7, 33, 70])
def test_attention_of_extreme_logits(n: int, dtype: torch.dtype) -> None:
    x = inputs(2, n, n, 2, 16, dtype)
    arguments = {"q": x["q"] * 100, "k": x["k"] * 100, "v": x["v"], "key_mask": x["key_mask"]}
    wide = doubled(arguments)
    assert (torch.einsum("bqhd,bkhd->bhqk", wide["q"], wide["k"]) * 16**-0.5).abs().max() > 1e4
    actual = outputs_and_gradients(attention, arguments)
    assert all(torch.isfinite(a).all() for a in actual)
    # float32 logits of 1e4 are known to 1e-3, so their exponentials are too.
    torch.testing.assert_close(actual[0].double(), oracle(**wide), rtol=0, atol=2e-2)


@pytest.mark.parametrize("keys", [7, 33, 130])
def test_attention_of_keys_that_are_alike(keys: int) -> None:
    assert_alike_keys_leave_rounding(keys)


@pytest.mark.parametrize("n", [4, 20, 70])
def test_attention_takes_any_strides(n: int) -> None:
    x = inputs(2, n, n, 2, 24)
    packed = torch.stack([x["q"], x["k"], x["v"]], 2).requires_grad_()
    output = attention(*packed.unbind(2))
    grad = torch.linspace(-1, 1, 24).expand_as(output)
    (actual,) = torch.autograd.grad(output, packed, grad)
    leaves = {name: x[name].double().requires_grad_() for name in "qkv"}
    exact = oracle(**leaves)
    expected = torch.autograd.grad(exact, list(leaves.values()), grad.double())
    assert_close_to_oracle(output, exact)
    assert_close_to_oracle(actual, torch.stack(expected, 2))

    odd = torch.nn.functional.pad(x["q"], (0, 1))[..., :-1]  # rows that are not aligned
    transposed = x["k"].transpose(1, 2).contiguous().transpose(1, 2)
    strided = x["v"].transpose(1, 3).contiguous().transpose(1, 3)
    assert odd.stride(2) == 25 and transposed.stride(1) == 24 and strided.stride(3) != 1
    assert torch.equal(attention(odd, transposed, strided), attention(x["q"], x["k"], x["v"]))
    one = x["k"][:1, :1].expand(2, n, 2, 24)
    assert_close_to_oracle(attention(x["q"], one, one), oracle(x["q"].double(), one.double(), one.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_only_rows_that_are_not_aligned_are_copied(dtype: torch.dtype) -> None:
    aligned, shifted = (torch.randn(1 + 2 * 5 * 3 * 16).to(dtype)[first:][:480].view(2, 5, 3, 16) for first in (0, 1))
    narrow = aligned[..., :8]
    for x, copied in ((aligned, False), (narrow, False), (shifted, True), (aligned[..., 1:9], True)):
        (rows,), (strides,) = kernels._addressed(x)
        assert torch.equal(rows, x) and (rows is not x) == copied
        assert rows.data_ptr() % 16 == 0 and strides == tuple(stride // 8 for stride in rows.stride()[:3])


@pytest.mark.parametrize("n", [5, 70])
def test_attention_of_one_tensor_as_query_key_and_value(n: int) -> None:
    x = inputs(2, n, n, 2, 24)["q"].requires_grad_()
    exact = x.detach().double().requires_grad_()
    (actual,) = torch.autograd.grad(attention(x, x, x).square().sum(), x)
    (expected,) = torch.autograd.grad(oracle(exact, exact, exact).square().sum(), exact)
    assert_close_to_oracle(actual, expected)


@pytest.mark.parametrize(
    "shape", [(0, 3, 5, 2, 8), (2, 0, 5, 2, 8), (2, 3, 0, 2, 8), (2, 3, 5, 0, 8), (2, 70, 0, 2, 8), (2, 3, 0, 2, 7)]
)
def test_attention_of_nothing(shape: tuple[int, ...]) -> None:
    arguments = inputs(*shape)
    for given in (arguments, {name: arguments[name] for name in "qkv"}):
        results = outputs_and_gradients(attention, given)
        assert [x.shape for x in results[1:]] == [x.shape for name, x in given.items() if name != "key_mask"]
        assert all(x.eq(0).all() and x.is_contiguous() for x in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [4, 33, 70])
def test_attention_is_deterministic(n: int, dtype: torch.dtype) -> None:
    arguments = inputs(1 if n == 70 else 3, n, n, 2, 24, dtype)
    once, again = (outputs_and_gradients(attention, arguments) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [4, 64])
def test_both_paths_agree(n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs(2, n, n, 1, 40, dtype) | {"causal": True}
    exact, eager = outputs_and_gradients(oracle, doubled(arguments)), outputs_and_gradients(oracle, arguments)
    for short in (64, 0):
        monkeypatch.setattr(kernels, "SHORT", short)
        assert_all_close(outputs_and_gradients(attention, arguments), exact, eager)


def test_only_the_long_path_saves_log_sum_exps() -> None:
    for n, shape in ((64, (0,)), (65, (2, 2, 65))):
        x = inputs(2, n, n, 2, 16)
        x["key_mask"][1] = False
        output, lse = forward(x["q"], x["k"], x["v"], None, None, x["key_mask"], 0.3, False)
        fake = definition._forward_fake(x["q"], x["k"])
        assert output.shape == fake[0].shape and lse.shape == shape and lse.dtype == torch.float32
    logits = torch.einsum("bqhd,bkhd->bhqk", x["q"].double(), x["k"].double()) * 0.3
    wanted = logits.masked_fill(~x["key_mask"][:, None, None], -math.inf).logsumexp(-1)
    assert_close_to_oracle(lse[0], wanted[0])
    assert lse[1].eq(-math.inf).all()


def test_the_launch_functions_know_the_length_that_the_op_knows() -> None:
    assert kernels.SHORT == definition.SHORT


def test_an_old_gpu_is_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    x = torch.zeros(1, 4, 1, 16)
    with pytest.raises(RuntimeError, match=r"8\.0, this GPU has 7\.0; use diffgap\.backend\('eager'\)"):
        kernels.forward(x, x, x, None, None, None, 1.0, False)
