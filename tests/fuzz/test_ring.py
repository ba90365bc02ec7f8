"""The losses of ranks on any split of any batch, beside one process that holds the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from diffgap.ops import backend, clip_loss
from tests.fuzz.budget import fuzzed
from tests.fuzz.ring_ranks import RANKS, Ranks
from tests.fuzz.tensors import (
    DTYPES,
    FLOAT32_CHANGES,
    LAYOUTS,
    assert_equal_enough,
    contrastive,
    laid_out,
    softmax_terms,
    widened,
)
from tests.ring_oracle import from_whole_batch

#: ``local_loss`` and ``gather_with_grad``.
CLIP_MODES = [(local, with_grad) for local in (False, True) for with_grad in (False, True)]

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
        plain, exact, *float32 = (
            _flat(from_whole_batch(loss, list(map(change, inputs)), ids, (rows_a, rows_b), upstream))
            for change in (Tensor.detach, widened, *FLOAT32_CHANGES)
        )
        # The gradients if no rank's weight were negative, so that no two ranks' terms cancel.
        alike = _flat(
            from_whole_batch(loss, list(map(widened, inputs)), ids, (rows_a, rows_b), list(map(abs, upstream)))
        )
    # Together the ranks have their number of times the mean over all rows.
    size = {x: world * y for x, y in softmax_terms(logit_scale, sum(rows_a), sum(rows_b), ids, ("a", "b")).items()}
    if loss == "siglip":
        size |= {"a": 0.0, "b": 0.0, "logit_bias": size["logit_scale"]}
    assert_as_whole(found, [plain, exact, *float32], alike, size)


@fuzzed(
    40,
    data=st.data(),
    mode=st.sampled_from((*CLIP_MODES, "SigLipLoss")),
    dtype=DTYPES,
    width=st.sampled_from((2, 8, 17, 64)),
    logit_scale=st.sampled_from((1.0, 14.3, 100.0)),
)
def test_losses_of_open_clips_form_in_four_ranks(
    ranks: Ranks, data: Any, mode: str | tuple[bool, bool], dtype: torch.dtype, width: int, logit_scale: float
) -> None:
    ring = mode == "SigLipLoss" or mode == (True, True)
    rows = [data.draw(ROWS) for _ in range(RANKS)] if ring else [data.draw(ROWS)] * RANKS
    given = data.draw(contrastive(dtype, sum(rows), sum(rows), width, False))
    inputs = [given["a"], given["b"], torch.tensor(logit_scale)]
    if mode == "SigLipLoss":
        inputs.append(torch.tensor(-10.0))
        module, options = mode, {"dist_impl": data.draw(st.sampled_from(("bidir", "gather")))}
    else:
        module, options = "ClipLoss", {"local_loss": mode[0], "gather_with_grad": mode[1]}
    upstream = data.draw(st.sampled_from(([1.0] * RANKS, [1.0, 0.5, -2.0, 0.0])))

    def own(x: Tensor, rank: int) -> Tensor:
        return laid_out(x.split(rows)[rank], data.draw(st.sampled_from(LAYOUTS[:-1])))

    calls = [
        {"loss": module, "inputs": [own(inputs[0], rank), own(inputs[1], rank), *inputs[2:]]} for rank in range(RANKS)
    ]
    found = ranks([{**call, "upstream": weight, **options} for call, weight in zip(calls, upstream, strict=True)])

    def whole(changed: Sequence[Tensor], weights: list[float]) -> list[Tensor]:
        if ring:
            loss = "siglip" if mode == "SigLipLoss" else "clip"
            return _flat(from_whole_batch(loss, changed, None, (rows, rows), weights))
        return _flat(gathered_clip_loss(changed, rows[0], weights, *mode))

    with backend("eager"):
        references = [
            whole(list(map(change, inputs)), upstream) for change in (Tensor.detach, widened, *FLOAT32_CHANGES)
        ]
        alike = whole(list(map(widened, inputs)), list(map(abs, upstream)))
    terms = softmax_terms(logit_scale, sum(rows), sum(rows), None, ("a", "b"))
    size = {name: RANKS * value for name, value in terms.items()}
    if mode == "SigLipLoss":
        size |= {"a": 0.0, "b": 0.0, "logit_bias": size["logit_scale"]}
    assert_as_whole(found, references, alike, size)


def gathered_clip_loss(
    inputs: Sequence[Tensor], rows: int, weights: Sequence[float], local_loss: bool, gather_with_grad: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """open_clip's ``ClipLoss`` of each rank where features are gathered, and the gradients of their weighted sum.

    Without ``gather_with_grad`` the rows of other ranks are constants to a rank; with ``local_loss`` all keys are.
    """
    a, b, scale = (x.detach().requires_grad_() for x in inputs)
    losses = []
    for rank in range(len(weights)):
        own = slice(rank * rows, (rank + 1) * rows)

        def gathered(x: Tensor, own: slice = own) -> Tensor:
            every = x if gather_with_grad else x.detach().clone()
            if not gather_with_grad and not local_loss:
                every[own] = x[own]
            return every

        if local_loss:
            sides = (
                clip_loss(x[own], gathered(y), scale, one_sided=True, label_offset=own.start)
                for x, y in ((a, b), (b, a))
            )
            losses.append(sum(sides) / 2)
        else:
            losses.append(clip_loss(gathered(a), gathered(b), scale))
    weighted = torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()
    return [x.detach() for x in losses], list(torch.autograd.grad(weighted, (a, b, scale)))


def assert_as_whole(
    found: Sequence[Sequence[Tensor]], references: Sequence[list[Tensor]], alike: list[Tensor], size: dict[str, float]
) -> None:
    """Assert the contract of what ranks found, beside one process in the inputs' dtype, in float64, and changed.

    ``alike`` has the gradients if no rank's weight were negative, ``size`` norms of what the gradients sum.
    """
    plain, exact, *float32 = references
    for index in (0, -1):
        mine = torch.stack([x[index] for x in found])
        assert_equal_enough(mine, plain[0], exact[0], [x[0] for x in float32], size["output"])
    for index, name in enumerate(("a", "b", "logit_scale", "logit_bias")[: len(exact) - 1], 1):
        parts = [answer[index] for answer in found]
        mine = torch.cat(parts) if exact[index].ndim else torch.stack(parts).sum()
        terms = max(size[name], alike[index].norm().item())
        assert_equal_enough(mine, plain[index], exact[index], [x[index] for x in float32], terms)


def _flat(results: tuple[Sequence[Tensor], Sequence[Tensor]]) -> list[Tensor]:
    """The losses of all ranks in one tensor, and then the gradients."""
    losses, gradients = results
    return [torch.stack(list(losses)), *gradients]
