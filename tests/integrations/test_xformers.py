"""memory_efficient_attention: xformers' signature and shapes, against its formula in float64."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import diffgap
from diffgap import memory_efficient_attention
from tests.helpers import assert_close_to_oracle
from tests.integrations.attention_calls import attention_calls
from tests.integrations.test_attention_bias import LowerTriangularMask, each_by_itself, stand_in, with_gradients


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The one in xformers' documentation, for any number of dimensions of heads between those of tokens and width."""
    q, k, v = (x.movedim(1, -2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return ((logits if bias is None else logits + bias).softmax(-1) @ v).movedim(-2, 1)


HEADS = [(), (3,), (2, 3)]
CAUSAL = torch.full((5, 7), -torch.inf, dtype=torch.float64).triu(1)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", ["none", "causal", "tensor", "wide values"])
def test_equals_xformers_formula(heads: tuple[int, ...], kind: str) -> None:
    wide = [random(2, n, *heads, d, seed=i) for i, (n, d) in enumerate([(5, 8), (7, 8), (7, 11 if "v" in kind else 8)])]
    bias = random(2, *heads, 5, 7) if kind == "tensor" else None
    given = LowerTriangularMask() if kind == "causal" else None if bias is None else bias.float()
    exact = with_gradients(lambda *x: formula(*x, CAUSAL if kind == "causal" else bias, 0.4), wide)
    narrow = [x.float() for x in wide]
    actual = with_gradients(lambda *x: memory_efficient_attention(*x, given, 0.0, 0.4), narrow)
    for ours, oracle in zip(actual, exact, strict=True):
        assert_close_to_oracle(ours, oracle)
    assert actual[0].is_contiguous()
    is_ours = kind in ("none", "causal")
    assert (attention_calls(lambda: memory_efficient_attention(*narrow, given))[0] == 1) == is_ours
    if not is_ours:
        with diffgap.backend("native"), pytest.raises(RuntimeError, match="'native' was asked for"):
            memory_efficient_attention(*narrow, given)


@pytest.mark.parametrize("heads", HEADS)
def test_sequences_end_to_end(heads: tuple[int, ...]) -> None:
    q, k, v = (random(1, 9, *heads, 8, seed=i) for i in range(3))
    bias = stand_in("BlockDiagonalCausalMask", [4, 5], [4, 5])
    flat = (x.reshape(1, 9, -1, 8) for x in (q, k, v))
    expected = each_by_itself(*flat, [4, 5], [4, 5], True).reshape(q.shape)
    actual = memory_efficient_attention(q.float(), k.float(), v.float(), attn_bias=bias)
    assert_close_to_oracle(actual, expected)


def test_grouped_queries_as_xformers_documents_them() -> None:
    q, k, v = random(2, 5, 6, 8), random(2, 7, 2, 8, seed=1), random(2, 7, 2, 8, seed=2)
    grouped = [x.unflatten(2, (2, -1)).expand(-1, -1, -1, 3, -1).float() for x in (q, k, v)]
    actual = memory_efficient_attention(*grouped)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*heads, enable_gqa=True).transpose(1, 2)
    assert_close_to_oracle(actual.flatten(2, 3), expected)


@pytest.mark.parametrize(
    ("dtype", "output_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64)],
)
def test_output_dtype(dtype: torch.dtype, output_dtype: torch.dtype) -> None:
    tensors = [random(2, 5, 3, 8, seed=i).to(dtype) for i in range(3)]
    actual = memory_efficient_attention(*tensors, output_dtype=output_dtype)
    assert actual.dtype == output_dtype
    exact = formula(*(x.double() for x in tensors))
    assert_close_to_oracle(actual, exact, formula(*(x.to(output_dtype) for x in tensors)))


def test_dropout_is_torchs() -> None:
    q, k, v = (random(2, 5, 3, 8, seed=i).float() for i in range(3))
    torch.manual_seed(0)
    actual = memory_efficient_attention(query=q, key=k, value=v, p=0.5)
    torch.manual_seed(0)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), dropout_p=0.5).transpose(1, 2)
    assert torch.equal(actual, expected)
    assert not torch.allclose(actual, memory_efficient_attention(q, k, v))


def test_signature_is_that_of_xformers() -> None:
    pytest.importorskip("xformers", reason="not installed: pip install xformers --no-deps")
    theirs = inspect.signature(importlib.import_module("xformers.ops").memory_efficient_attention).parameters
    ours = inspect.signature(memory_efficient_attention).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.ones(2, 8)}, ValueError, r"query \(2, 8\).* as \(B, M, H, K\)"),
        ({"key": torch.ones(1, 9, 8)}, ValueError, r"key \(1, 9, 8\)"),
        ({"key": torch.ones(1, 9, 1, 8)}, ValueError, r"expand\(\) key and value"),
        ({"value": torch.ones(2, 9, 2, 8)}, ValueError, r"expand\(\) key and value"),
        ({"p": 1.5}, ValueError, "p is 1.5"),
        ({"p": 0.1, "attn_bias": stand_in("BlockDiagonalMask", [4, 5], [4, 5])}, ValueError, "no dropout with a Block"),
        ({"op": (1, 2)}, ValueError, r"op is \(1, 2\), but xformers' kernels"),
        ({"output_dtype": torch.int32}, TypeError, "output_dtype is torch.int32"),
        ({"attn_bias": torch.zeros(9, 9)}, ValueError, r"attn_bias has shape \(9, 9\)"),
        (
            {"attn_bias": stand_in("BlockDiagonalCausalFromBottomRightMask", [9], [9])},
            TypeError,
            "attn_bias is a Block",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {name: torch.ones(1, 9, 2, 8) for name in ("query", "key", "value")} | change
    with pytest.raises(error, match=message):
        memory_efficient_attention(**arguments)
