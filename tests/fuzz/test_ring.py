"""The losses of ranks on any split of any batch, beside one process that holds the whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from diffgap.ops import backend
from tests.fuzz.budget import fuzzed
from tests.fuzz.ring_ranks import RANKS, Ranks
from tests.fuzz.tensors import DTYPES, LAYOUTS, assert_equal_enough, contrastive, laid_out
from tests.ring_oracle import from_whole_batch

ROWS = st.one_of(st.integers(0, 5), st.sampled_from((15, 16, 17, 33)))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(tmp_path_factory.mktemp("ranks")) as processes:
        yield processes


@fuzzed(
    60,
    data=st.data(),
    loss=st.sampled_from(("clip", "siglip")),
    dtype=DTYPES,
    world=st.integers(2, RANKS),
    width=st.sampled_from((2, 3, 8, 17, 32, 64)),
    logit_scale=st.sampled_from((0.0, 1.0, 14.3, 100.0)),
    memory_budget=st.sampled_from((None, 1, 10_000)),
    with_ids=st.booleans(),
)
def test_ring_losses(
    ranks: Ranks,
    data: Any,
    loss: str,
    dtype: torch.dtype,
    world: int,
    width: int,
    logit_scale: float,
    memory_budget: int | None,
    with_ids: bool,
) -> None:
    rows_a = [data.draw(ROWS) for _ in range(world)]
    rows_b = [data.draw(ROWS) for _ in range(world)] if with_ids else rows_a
    given = data.draw(contrastive(dtype, sum(rows_a), sum(rows_b), width, with_ids))
    inputs = [given["a"], given["b"], torch.tensor(logit_scale)]
    if loss == "siglip":
        inputs.append(torch.tensor(data.draw(st.sampled_from((0.0, -10.0)))))
    ids = (given["ids_a"], given["ids_b"]) if with_ids else None
    upstream = data.draw(st.sampled_from(([1.0] * RANKS, [1.0, 0.5, -2.0, 0.0])))[:world]

    def own(x: Tensor, rows: list[int], rank: int) -> Tensor:
        return laid_out(x.split(rows)[rank], data.draw(st.sampled_from(LAYOUTS[:-1])))

    found = ranks(
        [
            {
                "loss": loss,
                "inputs": [own(inputs[0], rows_a, rank), own(inputs[1], rows_b, rank), *inputs[2:]],
                "ids": ids and (own(ids[0], rows_a, rank), own(ids[1], rows_b, rank)),
                "upstream": upstream[rank],
                "memory_budget": memory_budget,
            }
            for rank in range(world)
        ]
    )
    with backend("eager"):
        plain_losses, plain = from_whole_batch(loss, inputs, ids, (rows_a, rows_b), upstream)
        wide = [x.double() for x in inputs]
        exact_losses, exact = from_whole_batch(loss, wide, ids, (rows_a, rows_b), upstream)
    # A rank's loss, and the gradient of a row for a scale, are sums of at most this size.
    size = {"terms": 2.0 * world * (1.0 + logit_scale), "logit": logit_scale + 10.0}
    for index in (0, -1):
        assert_equal_enough(
            torch.stack([x[index] for x in found]), *map(torch.stack, (plain_losses, exact_losses)), **size
        )
    for index, (x, y) in enumerate(zip(plain, exact, strict=True)):
        parts = [answer[1 + index] for answer in found]
        assert_equal_enough(torch.cat(parts) if y.ndim else torch.stack(parts).sum(), x, y, **size)
