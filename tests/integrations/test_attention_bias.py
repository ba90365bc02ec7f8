"""attention with what ``xformers.ops.memory_efficient_attention`` takes, against each sequence by itself in float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import diffgap
from diffgap import attention
from tests.helpers import assert_close_to_oracle

LENGTHS = [
    ([3, 1, 6], [3, 1, 6]),
    ([3, 1, 6], [2, 7, 4]),
    ([5, 0, 2], [4, 3, 1]),
    ([4, 4], [4, 4]),
    ([2, 2, 2], [5, 3, 9]),
    ([2, 5, 3], [6, 6, 6]),
    ([17], [33]),
]


@dataclass
class SeqInfo:
    """Of xformers' ``_SeqLenInfo`` what an attention function needs."""

    seqstart: Tensor
    seqstart_py: list[int]

    @classmethod
    def of(cls, lengths: list[int]) -> SeqInfo:
        starts = [0, *accumulate(lengths)]
        return cls(torch.tensor(starts, dtype=torch.int32), starts)


@dataclass
class BlockDiagonalMask:
    q_seqinfo: SeqInfo
    k_seqinfo: SeqInfo


class BlockDiagonalCausalMask(BlockDiagonalMask):
    pass


class LowerTriangularMask:
    pass


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    pass


def stand_in(name: str, *lengths: list[int]) -> Any:
    return globals()[name](*(SeqInfo.of(n) for n in lengths))


def xformers_own(name: str, *lengths: list[int]) -> Any:
    attn_bias = importlib.import_module("xformers.ops.fmha.attn_bias")
    mask = getattr(attn_bias, name)
    return mask.from_seqlens(*lengths, device=torch.device("cpu")) if lengths else mask()


@pytest.fixture(params=[stand_in, xformers_own], ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    if request.param is xformers_own:
        pytest.importorskip("xformers", reason="not installed: pip install xformers --no-deps")
    return request.param


@pytest.fixture(params=["native", "eager"])
def backend(request: pytest.FixtureRequest) -> Any:
    with diffgap.backend(request.param):
        yield request.param


def inputs(*sizes: int, heads: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v of one row."""
    generator = torch.Generator().manual_seed(0)
    n_q, n_k = sizes
    shapes = [(1, n, heads, 8) for n in (n_q, n_k, n_k)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def with_gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    output = function(*leaves)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output, *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


def each_by_itself(q: Tensor, k: Tensor, v: Tensor, n_q: list[int], n_k: list[int], causal: bool) -> Tensor:
    """The oracle: torch's attention, one sequence after the other."""
    blocks = zip(q.split(n_q, 1), k.split(n_k, 1), v.split(n_k, 1), strict=True)
    outputs = [
        F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in block), is_causal=causal) for block in blocks
    ]
    return torch.cat(outputs, 2).transpose(1, 2)


@pytest.mark.parametrize("name", ["BlockDiagonalMask", "BlockDiagonalCausalMask"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.usefixtures("backend")
def test_block_diagonal(name: str, lengths: tuple[list[int], list[int]], make: Callable[..., Any]) -> None:
    n_q, n_k = lengths
    tensors = inputs(sum(n_q), sum(n_k))
    bias = make(name, n_q, n_k)
    actual = with_gradients(lambda *x: attention(*x, bias), tensors)
    wide = [x.double() for x in tensors]
    exact = with_gradients(lambda *x: each_by_itself(*x, n_q, n_k, name == "BlockDiagonalCausalMask"), wide)
    for ours, oracle in zip(actual, exact, strict=True):
        assert_close_to_oracle(ours, oracle)


def test_block_diagonal_of_a_list_of_tensors() -> None:
    """As in xformers' own example, batches of several sequences in the list."""
    attn_bias = pytest.importorskip("xformers.ops.fmha.attn_bias", reason="not installed: pip install xformers")
    sequences = [torch.randn(b, n, 2, 8) for b, n in ((1, 3), (2, 6), (1, 2))]
    bias, packed = attn_bias.BlockDiagonalMask.from_tensor_list(sequences)
    for actual, x in zip(bias.split(attention(packed, packed, packed, bias)), sequences, strict=True):
        assert_close_to_oracle(actual, attention(x, x, x).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_block_diagonal_low_precision(dtype: torch.dtype, make: Callable[..., Any]) -> None:
    n_q, n_k = [3, 1, 6], [2, 7, 4]
    tensors = inputs(sum(n_q), sum(n_k), dtype=dtype)
    bias = make("BlockDiagonalMask", n_q, n_k)
    actual = with_gradients(lambda *x: attention(*x, bias), tensors)
    eager = with_gradients(lambda *x: each_by_itself(*x, n_q, n_k, False), tensors)
    exact = with_gradients(lambda *x: each_by_itself(*x, n_q, n_k, False), [x.double() for x in tensors])
    for ours, oracle, torchs in zip(actual, exact, eager, strict=True):
        assert_close_to_oracle(ours, oracle, torchs)


@pytest.mark.usefixtures("backend")
def test_block_diagonal_with_all_options() -> None:
    """Norm weights, scale, a key mask over the row, and causal blocks asked for by the argument."""
    n_q, n_k = [3, 1, 6], [3, 2, 7]
    q, k, v = inputs(sum(n_q), sum(n_k))
    weights = {"q_weight": torch.rand(8) + 0.5, "k_weight": torch.rand(8) + 0.5}
    key_mask = torch.ones(1, sum(n_k), dtype=torch.bool)
    key_mask[0, [1, 6, 11]] = False
    bias = stand_in("BlockDiagonalMask", n_q, n_k)
    actual = attention(q, k, v, bias, key_mask=key_mask, causal=True, scale=0.5, **weights)
    blocks = zip(q.split(n_q, 1), k.split(n_k, 1), v.split(n_k, 1), key_mask.split(n_k, 1), strict=True)
    with diffgap.backend("eager"):
        expected = [
            attention(*(x.double() for x in qkv), key_mask=mask, causal=True, scale=0.5, **weights)
            for *qkv, mask in blocks
        ]
    assert_close_to_oracle(actual, torch.cat(expected, 1))


def test_block_diagonal_blocks_do_not_see_one_another() -> None:
    q, k, v = inputs(10, 10)
    bias = stand_in("BlockDiagonalMask", [3, 1, 6], [3, 1, 6])
    clean = attention(q, k, v, bias)
    for x in (q, k, v):
        x[:, 3:4] = float("nan")
    poisoned = attention(q, k, v, bias)
    others = [i for i in range(10) if i != 3]
    torch.testing.assert_close(poisoned[:, others], clean[:, others], rtol=0, atol=0)


def test_block_diagonal_needs_no_copy_of_equal_lengths() -> None:
    q, k, v = inputs(12, 12)
    bias = stand_in("BlockDiagonalMask", [4, 4, 4], [4, 4, 4])
    batch = attention(*(x.view(3, 4, 2, 8) for x in (q, k, v)))
    torch.testing.assert_close(attention(q, k, v, bias), batch.view(1, 12, 2, 8), rtol=0, atol=0)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_block_diagonal_compiles(compiler: str, make: Callable[..., Any]) -> None:
    n_q, n_k = [3, 1, 6], [2, 7, 4]
    tensors = inputs(sum(n_q), sum(n_k))
    bias = make("BlockDiagonalCausalMask", n_q, n_k)
    compiled = torch.compile(attention, fullgraph=True, backend=compiler)
    exact = with_gradients(lambda *x: each_by_itself(*x, n_q, n_k, True), [x.double() for x in tensors])
    for actual, oracle in zip(with_gradients(lambda *x: compiled(*x, bias), tensors), exact, strict=True):
        assert_close_to_oracle(actual, oracle)


@pytest.mark.parametrize("sizes", [(7, 7), (5, 9), (9, 5)])
@pytest.mark.usefixtures("backend")
def test_lower_triangular(sizes: tuple[int, int], make: Callable[..., Any]) -> None:
    tensors = inputs(*sizes)
    actual = with_gradients(lambda *x: attention(*x, make("LowerTriangularMask")), tensors)
    wide = [x.double() for x in tensors]
    exact = with_gradients(lambda *x: each_by_itself(*x, [sizes[0]], [sizes[1]], True), wide)
    for ours, oracle in zip(actual, exact, strict=True):
        assert_close_to_oracle(ours, oracle)


@pytest.mark.usefixtures("backend")
def test_inputs_without_heads() -> None:
    tensors = [x.squeeze(2).expand(3, -1, -1) for x in inputs(5, 7, heads=1)]
    actual = with_gradients(lambda *x: attention(*x, scale=0.4), tensors)
    exact = with_gradients(lambda *x: F.scaled_dot_product_attention(*x, scale=0.4), [x.double() for x in tensors])
    for ours, oracle in zip(actual, exact, strict=True):
        assert_close_to_oracle(ours, oracle)


def test_inputs_without_heads_take_a_bias() -> None:
    q, k, v = (x[:, :, 0] for x in inputs(9, 9))
    bias = stand_in("BlockDiagonalMask", [4, 5], [4, 5])
    expected = attention(q[:, :, None], k[:, :, None], v[:, :, None], bias)[:, :, 0]
    torch.testing.assert_close(attention(q, k, v, bias), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["BlockDiagonalCausalFromBottomRightMask"])
def test_other_masks_are_refused(name: str, make: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=f"attn_bias is a {name}; pass None, xformers' LowerTriangularMask"):
        attention(*inputs(9, 9), make(name, [4, 5], [4, 5]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attn_bias": torch.zeros(10, 10)}, TypeError, "attn_bias is a Tensor; pass None"),
        (
            {"q": torch.ones(1, 9, 2, 8)},
            ValueError,
            r"q has shape \(1, 9, 2, 8\) but attn_bias's blocks hold 10 tokens",
        ),
        ({"q": torch.ones(2, 10, 2, 8)}, ValueError, r"lay them end to end in one row, \(1, 10, ...\)"),
        ({"k": torch.ones(1, 12, 2, 8)}, ValueError, "attention: k has shape"),
        ({"v": torch.ones(1, 12, 2, 8)}, ValueError, "attention: v has shape"),
        ({"key_mask": torch.ones(1, 9).bool()}, ValueError, r"attention: key_mask has shape \(1, 9\)"),
        (
            {"attn_bias": stand_in("BlockDiagonalMask", [3, 7], [3, 1, 6])},
            ValueError,
            "2 blocks of queries but 3 of keys",
        ),
        ({"q": torch.ones(1, 10, 8)}, ValueError, "attention: q has shape"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    bias = stand_in("BlockDiagonalMask", [3, 1, 6], [3, 1, 6])
    arguments = {**dict(zip("qkv", inputs(10, 10), strict=True)), "attn_bias": bias, **change}
    with pytest.raises(error, match=message):
        attention(**arguments)
