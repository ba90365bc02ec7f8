"""scaled_dot_product_attention: the calls that are ours against torch's in float64, and those that are torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import diffgap
from diffgap.integrations.attention import scaled_dot_product_attention
from diffgap.ops._dispatch import Backend
from tests.helpers import assert_close_to_oracle
from tests.integrations.attention_calls import attention_calls

SEVEN_KEYS = torch.tensor([True, False, True, True, False, True, True])
ROWS = torch.stack([SEVEN_KEYS, SEVEN_KEYS.flip(0) | (torch.arange(7) == 1)])

#: Name: shapes of query and of key and value, and the options.
OURS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "4d": ((2, 3, 5, 8), (2, 3, 7, 8), {}),
    "odd width": ((2, 3, 5, 17), (2, 3, 7, 17), {}),
    "scale": ((2, 3, 5, 8), (2, 3, 7, 8), {"scale": 0.7}),
    "causal": ((2, 3, 5, 8), (2, 3, 5, 8), {"is_causal": True}),
    "causal, more keys": ((2, 3, 5, 8), (2, 3, 7, 8), {"is_causal": True}),
    "causal, more queries": ((2, 3, 9, 8), (2, 3, 7, 8), {"is_causal": True}),
    "2d": ((5, 8), (7, 8), {}),
    "2d, keys": ((5, 8), (7, 8), {"attn_mask": SEVEN_KEYS[None]}),
    "3d": ((2, 5, 8), (2, 7, 8), {}),
    "3d, rows of keys": ((2, 5, 8), (2, 7, 8), {"attn_mask": ROWS[:, None]}),
    "3d, keys": ((2, 5, 8), (2, 7, 8), {"attn_mask": SEVEN_KEYS[None]}),
    "5d": ((2, 3, 2, 5, 8), (2, 3, 2, 7, 8), {}),
    "5d, rows of keys": ((2, 3, 2, 5, 8), (2, 3, 2, 7, 8), {"attn_mask": ROWS[:, None, None, None]}),
    "4d, rows of keys": ((2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": ROWS[:, None, None]}),
    "4d, one row of keys": ((2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": SEVEN_KEYS[None, None, None]}),
    "4d, keys": ((2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": SEVEN_KEYS[None]}),
    "4d, expanded over queries": (
        (2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": ROWS[:, None, None].expand(2, 3, 5, 7)[:, :1]}
    ),
    "4d, expanded": ((2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": SEVEN_KEYS.expand(2, 1, 1, 7)}),
    "gqa": ((2, 6, 5, 8), (2, 2, 7, 8), {"enable_gqa": True}),
    "gqa, one head of keys": ((2, 6, 5, 8), (2, 1, 7, 8), {"enable_gqa": True}),
    "gqa, equal heads": ((2, 3, 5, 8), (2, 3, 7, 8), {"enable_gqa": True}),
    "gqa, 3d": ((6, 5, 8), (2, 7, 8), {"enable_gqa": True, "attn_mask": SEVEN_KEYS[None, None]}),
    "gqa, 5d": ((2, 1, 4, 5, 8), (2, 1, 2, 7, 8), {"enable_gqa": True, "attn_mask": ROWS[:, None, None, None]}),
}  # fmt: skip
#: Calls that are torch's, with what backend native says of them.
TORCHS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], str]] = {
    "bias": ((2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": torch.zeros(5, 7)}, "boolean masks only"),
    "pairs": ((2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": torch.ones(5, 7).tril().bool()}, "keys alone"),
    "expanded heads": ((2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": SEVEN_KEYS.expand(2, 3, 5, 7)}, "between heads"),
    "heads": ((2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": SEVEN_KEYS.expand(2, 3, 1, 7)}, "between heads"),
    "3d gqa heads": (
        (6, 5, 8), (2, 7, 8), {"enable_gqa": True, "attn_mask": SEVEN_KEYS.expand(6, 1, 7)}, "between heads"
    ),
    "dropout": ((2, 3, 5, 8), (2, 3, 7, 8), {"dropout_p": 0.5}, "no dropout"),
    "broadcast": ((2, 3, 5, 8), (1, 3, 7, 8), {}, "leading dimensions"),
    "broadcast gqa": ((2, 6, 5, 8), (1, 2, 7, 8), {"enable_gqa": True}, "leading dimensions"),
}  # fmt: skip


def inputs(query: tuple[int, ...], key: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in (query, key, key)]


def output_and_gradients(function: Any, tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    output = function(*leaves, **options)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output, *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", OURS)
def test_ours_matches_torch(case: str, dtype: torch.dtype) -> None:
    query, key, options = OURS[case]
    tensors = inputs(query, key, dtype)
    backend = "eager" if dtype == torch.float64 else "native"
    with diffgap.backend(backend):
        actual = output_and_gradients(scaled_dot_product_attention, tensors, options)
    torchs = output_and_gradients(F.scaled_dot_product_attention, tensors, options)
    exact = output_and_gradients(F.scaled_dot_product_attention, [x.double() for x in tensors], options)
    for ours, oracle, eager in zip(actual, exact, torchs, strict=True):
        assert ours.dtype == dtype
        assert_close_to_oracle(ours, oracle, eager)


@pytest.mark.parametrize("case", OURS)
def test_ours_is_one_call_of_the_op(case: str) -> None:
    query, key, options = OURS[case]
    tensors = inputs(query, key, torch.float32)
    assert attention_calls(lambda: scaled_dot_product_attention(*tensors, **options)) == (1, 0)


@pytest.mark.parametrize("case", TORCHS)
def test_torchs_is_torchs(case: str) -> None:
    query, key, options, message = TORCHS[case]
    tensors = inputs(query, key, torch.float32)
    assert attention_calls(lambda: scaled_dot_product_attention(*tensors, **options))[0] == 0
    results = []
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        torch.manual_seed(0)
        results.append(function(*tensors, **options))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    with diffgap.backend("native"), pytest.raises(RuntimeError, match=f"'native' was asked for, but .*{message}"):
        scaled_dot_product_attention(*tensors, **options)


def test_values_of_another_width_are_torchs() -> None:
    q, k, _ = inputs((2, 3, 5, 8), (2, 3, 7, 8), torch.float32)
    v = torch.randn(2, 3, 7, 4)
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v), expected, rtol=0, atol=0)
    with diffgap.backend("native"), pytest.raises(RuntimeError, match="differ in width"):
        scaled_dot_product_attention(q, k, v)


def test_a_dtype_without_a_kernel_is_torchs() -> None:
    tensors = inputs((2, 3, 5, 8), (2, 3, 7, 8), torch.float64)
    ours, torchs = attention_calls(lambda: scaled_dot_product_attention(*tensors))
    assert ours == 0 and torchs > 0
    with diffgap.backend("native"), pytest.raises(RuntimeError, match="does not take torch"):
        scaled_dot_product_attention(*tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_causal": True, "attn_mask": torch.ones(1, 1, 1, 7).bool()}, "is_causal"),
        ({"key": torch.ones(2, 3, 7, 8, dtype=torch.float64)}, "dtype"),
        ({"key": torch.ones(2, 4, 7, 8), "value": torch.ones(2, 4, 7, 8)}, None),
        ({"attn_mask": torch.ones(2, 1, 1, 6).bool()}, None),
    ],
)
def test_what_torch_refuses_is_refused(change: dict[str, Any], message: str | None) -> None:
    tensors = dict(zip(("query", "key", "value"), inputs((2, 3, 5, 8), (2, 3, 7, 8), torch.float32), strict=True))
    for function in (F.scaled_dot_product_attention, scaled_dot_product_attention):
        with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
            function(**{**tensors, **change})


def test_queries_without_keys_give_zeros() -> None:
    leaves = [x.requires_grad_() for x in inputs((2, 3, 5, 8), (2, 3, 7, 8), torch.float32)]
    mask = torch.stack([SEVEN_KEYS, torch.zeros(7).bool()])[:, None, None]
    output = scaled_dot_product_attention(*leaves, attn_mask=mask)
    for x in (output, *torch.autograd.grad(output.sum(), leaves)):
        assert (x[1] == 0).all()
        assert (x[0] != 0).any()


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_layouts_of_a_projection_are_views(backend: Backend) -> None:
    """(B, N, H, d) memory, as every module has it, goes to the op and comes back without a copy."""
    q, k, v = (
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs((2, 3, 5, 8), (2, 3, 7, 8), torch.float32)
    )
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    with diffgap.backend(backend):
        actual = scaled_dot_product_attention(q, k, v)
    # How heads are joined after torch's function.
    assert_close_to_oracle(*(x.transpose(1, 2).view(2, 5, 24) for x in (actual, expected)))


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("case", OURS)
def test_heads_can_be_joined_by_a_view(case: str, backend: Backend) -> None:
    query, key, options = OURS[case]
    with diffgap.backend(backend):
        output = scaled_dot_product_attention(*inputs(query, key, torch.float32), **options)
    if len(query) > 3:
        output.transpose(-3, -2).view(*query[:-3], query[-2], -1)
    elif not options.get("enable_gqa"):
        output.view(-1)


@pytest.mark.parametrize("case", ["4d", "causal", "3d, rows of keys", "5d, rows of keys", "gqa"])
def test_compiles(case: str) -> None:
    query, key, options = OURS[case]
    tensors = inputs(query, key, torch.float32)
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    exact = output_and_gradients(F.scaled_dot_product_attention, [x.double() for x in tensors], options)
    for actual, oracle in zip(output_and_gradients(compiled, tensors, options), exact, strict=True):
        assert_close_to_oracle(actual, oracle)


def test_autocast() -> None:
    tensors = inputs((2, 3, 5, 8), (2, 3, 7, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = scaled_dot_product_attention(*tensors)
        expected = F.scaled_dot_product_attention(*tensors)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert_close_to_oracle(actual, F.scaled_dot_product_attention(*(x.double() for x in tensors)), expected)
