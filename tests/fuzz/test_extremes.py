"""Inputs that are not finite, or very large or small: what every op and loss makes of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from diffgap import ops
from tests.fuzz.budget import fuzzed
from tests.fuzz.tensors import DTYPES, Op, compare

WIDTH = 8
ROWS = st.sampled_from((1, 5, 17, 40, 100))
BAD = st.sampled_from((math.nan, math.inf, -math.inf))


def _clip(a: Tensor, b: Tensor, **options: Any) -> Tensor:
    return ops.clip_loss(a, b, torch.tensor(14.0), **options)


def _siglip(a: Tensor, b: Tensor, **options: Any) -> Tensor:
    return ops.siglip_loss(a, b, torch.tensor(14.0), torch.tensor(-10.0), **options)


def _q_sample(x0: Tensor) -> Tensor:
    each = torch.arange(len(x0))
    table = torch.stack([each / len(x0), 1 - each / len(x0)], 1).double()
    output: Tensor = ops.q_sample(x0, each, table, each, target="v_prediction")[0]
    return output


#: By name, the op and the shapes of its inputs for a number of rows.
CASES: dict[str, tuple[Op, Any]] = {
    "adaln": (ops.adaln, lambda n: {"x": (2, n, WIDTH), "branch": (2, n, WIDTH)} | dict.fromkeys(
        ("gate", "shift", "scale"), (2, WIDTH))),
    "attention": (ops.attention, lambda n: dict.fromkeys("qkv", (2, n, 2, WIDTH))),
    "normed attention": (ops.attention, lambda n: dict.fromkeys("qkv", (2, n, 2, WIDTH)) | dict.fromkeys(
        ("q_weight", "k_weight"), (WIDTH,))),
    "clip": (_clip, lambda n: dict.fromkeys("ab", (n, WIDTH))),
    "siglip": (_siglip, lambda n: dict.fromkeys("ab", (n, WIDTH))),
    "linear": (ops.linear, lambda n: {"x": (n, WIDTH), "weight": (6, WIDTH), "bias": (6,)}),
    "q_sample": (_q_sample, lambda n: {"x0": (n, WIDTH)}),
    "silu_mul": (ops.silu_mul, lambda n: {"pair": (n, 2 * WIDTH)}),
}  # fmt: skip


def drawn(name: str, rows: int, seed: int) -> dict[str, Tensor]:
    """Inputs of a case in float64; those of losses have norm 1."""
    generator = torch.Generator().manual_seed(seed)
    given = {
        key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in CASES[name][1](rows).items()
    }
    return {key: F.normalize(x, dim=1) for key, x in given.items()} if name in ("clip", "siglip") else given


@fuzzed(100, data=st.data(), name=st.sampled_from(list(CASES)), dtype=DTYPES, rows=ROWS, bad=BAD, loss=st.booleans())
def test_what_is_not_finite_is_seen_where_it_is_in_eager_code(
    data: Any, name: str, dtype: torch.dtype, rows: int, bad: float, loss: bool
) -> None:
    """Outputs and gradients are not finite in the same places, and as accurate as ever in all others."""
    given = {key: x.to(dtype) for key, x in drawn(name, rows, data.draw(st.integers(0, 2**32))).items()}
    key = data.draw(st.sampled_from(list(given)))
    # Of a query whose logits are all -inf eager code makes NaN, and the kernels zeros, as if all keys were masked.
    if "attention" in name and key != "v":
        bad = math.nan
    given[key].view(-1)[data.draw(st.integers(0, given[key].numel() - 1))] = bad
    options = {"reduction": "none"} if loss and name in ("clip", "siglip") else {}
    compare(CASES[name][0], given, options, same_kind=False)


@fuzzed(100, data=st.data(), name=st.sampled_from(list(CASES)), dtype=DTYPES, rows=ROWS, up=st.booleans())
def test_large_and_small_numbers(data: Any, name: str, dtype: torch.dtype, rows: int, up: bool) -> None:
    """One input is many powers of ten away from 1, as far as its square is a number of the dtype."""
    given = drawn(name, rows, data.draw(st.integers(0, 2**32)))
    key = data.draw(st.sampled_from(list(given)))
    largest = 100.0 if dtype == torch.float16 else 1e15
    given[key] *= largest if up else 1 / largest
    compare(CASES[name][0], {name: x.to(dtype) for name, x in given.items()}, same_kind=False)
