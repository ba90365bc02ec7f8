"""Attention in every form that it is called in: with heads and without, xformers' biases, torch's arguments."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from diffgap import ops
from diffgap.integrations.attention import scaled_dot_product_attention
from tests.attention_terms import attention_terms
from tests.fuzz.budget import fuzzed
from tests.fuzz.tensors import DTYPES, SIZES, WIDTHS, compare, tensors, upstream
from tests.integrations.test_attention_bias import (
    BlockDiagonalCausalMask,
    BlockDiagonalMask,
    LowerTriangularMask,
    SeqInfo,
)

DATA = st.data()


@fuzzed(60, data=DATA, dtype=DTYPES, batch=st.integers(0, 4), queries=SIZES, keys=SIZES, heads=st.integers(0, 3))
def test_attention(data: Any, dtype: torch.dtype, batch: int, queries: int, keys: int, heads: int) -> None:
    width = data.draw(st.sampled_from((1, 3, 8, 16, 24, 32, 64, 65)))
    given = {"q": data.draw(tensors((batch, queries, heads, width), dtype, 1.0))}
    given |= {name: data.draw(tensors((batch, keys, heads, width), dtype, 1.0)) for name in ("k", "v")}
    for name in ("q_weight", "k_weight"):
        given[name] = data.draw(st.one_of(st.none(), tensors((width,), dtype, 1.0)))
    options: dict[str, Any] = {
        "causal": data.draw(st.booleans()),
        "scale": data.draw(st.sampled_from((None, 0.0, -1.0))),
    }
    if data.draw(st.booleans()):
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
        options["key_mask"] = torch.rand(batch, keys, generator=generator) < data.draw(st.sampled_from((0.0, 0.5, 1.0)))
        hidden = ~options["key_mask"][:, :, None, None]
        given |= {name: given[name].masked_fill(hidden, torch.nan) for name in ("k", "v")}
    # A single number is its own norm: the gradient of x / |x| is nothing but rounding.
    normed = given["q_weight"] is not None or given["k_weight"] is not None
    mask = options.get("key_mask")
    terms = _terms(**given, causal=options["causal"], scale=options["scale"], key_mask=mask)
    compare(ops.attention, given, options, backward=width > 1 or not normed, terms=terms)


@fuzzed(40, data=DATA, dtype=DTYPES, batch=st.integers(0, 4), queries=SIZES, keys=SIZES, causal=st.booleans())
def test_attention_of_a_single_head(
    data: Any, dtype: torch.dtype, batch: int, queries: int, keys: int, causal: bool
) -> None:
    width = data.draw(st.sampled_from((1, 8, 24, 65)))
    given = {"q": data.draw(tensors((batch, queries, width), dtype, 1.0))}
    given |= {name: data.draw(tensors((batch, keys, width), dtype, 1.0)) for name in ("k", "v")}

    def with_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q[:, :, None], k[:, :, None], v[:, :, None], causal=causal)[:, :, 0]

    bias = LowerTriangularMask() if causal else None
    terms = _terms(**{name: x[:, :, None] for name, x in given.items()}, causal=causal)
    compare(ops.attention, given, {"attn_bias": bias}, terms=terms, reference=lambda attn_bias, **x: with_heads(**x))


@fuzzed(60, data=DATA, dtype=DTYPES, blocks=st.integers(1, 4), heads=st.integers(1, 3), causal=st.booleans())
def test_attention_of_sequences_end_to_end(
    data: Any, dtype: torch.dtype, blocks: int, heads: int, causal: bool
) -> None:
    width = data.draw(st.sampled_from((3, 8, 16, 64)))
    lengths = [[data.draw(SIZES) for _ in range(blocks)] for _ in range(2)]
    if data.draw(st.booleans()):
        lengths[1] = lengths[0]
    given = {"q": data.draw(tensors((1, sum(lengths[0]), heads, width), dtype, 1.0))}
    given |= {name: data.draw(tensors((1, sum(lengths[1]), heads, width), dtype, 1.0)) for name in ("k", "v")}
    for name in ("q_weight", "k_weight"):
        given[name] = data.draw(st.one_of(st.none(), tensors((width,), dtype, 1.0)))

    def one_by_one(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, **weights: Any) -> Tensor:
        parts = zip(q.split(lengths[0], 1), k.split(lengths[1], 1), v.split(lengths[1], 1), strict=True)
        return torch.cat([ops.attention(*part, causal=causal, **weights) for part in parts], 1)

    kind = BlockDiagonalCausalMask if causal else BlockDiagonalMask
    bias = kind(*(SeqInfo.of(each) for each in lengths))
    sequence = [torch.arange(blocks).repeat_interleave(torch.tensor(each)) for each in lengths]
    position = [torch.cat([torch.arange(length) for length in each]) for each in lengths]
    hidden = sequence[0][:, None] != sequence[1]
    if causal:
        hidden |= position[0][:, None] < position[1]
    terms = _terms(**given, hidden=hidden)
    compare(ops.attention, given, {"attn_bias": bias}, terms=terms, reference=one_by_one)


@fuzzed(
    60,
    data=DATA,
    dtype=DTYPES,
    leading=st.lists(st.integers(1, 3), max_size=2),
    queries=WIDTHS,
    keys=WIDTHS,
    groups=st.one_of(st.none(), st.integers(1, 3)),
    scale=st.sampled_from((None, 0.5, 2.0)),  # torch takes the root of it
    hiding=st.sampled_from(("none", "causal", "keys", "expanded")),
)
def test_scaled_dot_product_attention(
    data: Any,
    dtype: torch.dtype,
    leading: list[int],
    queries: int,
    keys: int,
    groups: int | None,
    scale: float | None,
    hiding: str,
) -> None:
    """Against torch's own function, with heads in groups and leading dimensions of any number."""
    width = data.draw(st.sampled_from((1, 8, 24, 64)))
    if groups is not None:
        leading = [*leading, 2]
    few = (*leading, keys, width)
    many = (*leading[:-1], leading[-1] * groups, queries, width) if groups else (*leading, queries, width)
    given = {"query": data.draw(tensors(many, dtype, 1.0))}
    given |= {name: data.draw(tensors(few, dtype, 1.0)) for name in ("key", "value")}
    options: dict[str, Any] = {"is_causal": hiding == "causal", "scale": scale, "enable_gqa": groups is not None}
    if hiding in ("keys", "expanded"):
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
        shape = (*(1 if i == len(many) - 3 else n for i, n in enumerate(many[:-2])), 1, keys)
        mask = torch.rand(shape, generator=generator) < 0.5
        options["attn_mask"] = mask.expand(*shape[:-2], queries, keys) if hiding == "expanded" else mask
    # The gradients of grouped keys are sums, of what is rounded to half precision before.
    backward = groups is None or dtype == torch.float32
    reference = F.scaled_dot_product_attention
    each = (given["query"], *(x.repeat_interleave(groups, -3) if groups else x for x in (given["key"], given["value"])))
    heads = (x.reshape(-1, 1, *x.shape[-2:]).transpose(1, 2) for x in each)
    hidden = ~options.get("attn_mask", torch.tensor(True)).expand(*many[:-1], keys).reshape(-1, 1, queries, keys)
    found = _terms(*heads, causal=options["is_causal"], scale=scale, hidden=hidden)
    terms = {"query": found["q"], "key": found["k"] * (groups or 1) ** 0.5}
    compare(scaled_dot_product_attention, given, options, backward=backward, terms=terms, reference=reference)


def _terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    hidden: Tensor | None = None,
) -> dict[str, float]:
    """Sizes of what cancels in the gradients of queries, keys and their weights: see :func:`compare`."""
    away = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool) if hidden is None else hidden
    if causal:
        away = away | torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
    if key_mask is not None:
        away = away | ~key_mask[:, None, None]
    (grad,) = upstream(q.shape)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attention_terms(q, k, v, grad, scale, q_weight, k_weight, away)
