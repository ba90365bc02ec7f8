"""ring_clip_loss and ring_siglip_loss in two and four gloo processes, beside one process with the whole batch."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks import ring_model, scaling_model
from benchmarks.gpus import A100
from diffgap import ring_loss
from diffgap.ops import _dispatch
from diffgap.ring import Ring
from diffgap.ring_loss import ring_clip_loss, ring_siglip_loss
from tests.helpers import assert_close_to_oracle
from tests.ring_oracle import from_whole_batch
from tests.ring_ranks import CASES, PART_CASES, REFUSED, SOLVED, WIDTH, WORLDS, Case, loss_of, plain_op, run_rank


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[Any, Any]]]:
    """What each process found, by the number of processes."""
    found = {}
    for world in WORLDS:
        results = tmp_path_factory.mktemp(f"world{world}")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(run_rank, (world, port, str(results)), nprocs=world)
        found[world] = [torch.load(results / f"{rank}.pt") for rank in range(world)]
    return found


def single_process(case: Case, world: int) -> tuple[list[Tensor], list[Tensor]]:
    """In float64, from the whole batch: each rank's loss, and the gradients of their sum weighted by the upstream."""
    ids = tuple(x for x in case.all_ids(world).values() if x is not None)
    inputs = [x.double() for x in case.batch(world)]
    upstream = [1 + case.upstream * rank for rank in range(world)]
    return from_whole_batch(case.loss, inputs, ids or None, case.sizes(world), upstream)  # type: ignore[arg-type]


def assert_ranks_match(case: Case, found: list[list[Tensor]]) -> None:
    world = len(found)
    losses, grads = single_process(case, world)
    assert_close_to_oracle(torch.stack([x[0] for x in found]), torch.stack(losses))
    torch.testing.assert_close([x[-1] for x in found], [x[0] for x in found])
    for index, expected in enumerate(grads):
        parts = [x[1 + index] for x in found]
        assert_close_to_oracle(torch.cat(parts) if expected.ndim else torch.stack(parts).sum(), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("world", WORLDS)
def test_ring_losses_equal_one_process_with_the_whole_batch(
    ranks: dict[int, list[dict[Any, Any]]], world: int, case: Case
) -> None:
    assert_ranks_match(case, [found[str(case)] for found in ranks[world]])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", [case for case in CASES if not case.ids and not case.upstream], ids=str)
def test_ring_losses_average_to_the_loss_of_the_plain_op(
    ranks: dict[int, list[dict[Any, Any]]], world: int, case: Case
) -> None:
    whole = plain_op(case)(*(x.double() for x in case.batch(world)))
    assert_close_to_oracle(torch.stack([found[str(case)][0] for found in ranks[world]]).mean(), whole)


@pytest.mark.parametrize("case", SOLVED, ids=str)
@pytest.mark.parametrize("world", WORLDS)
def test_ring_losses_of_a_solved_batch_equal_the_plain_op(
    ranks: dict[int, list[dict[Any, Any]]], world: int, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatch, "choose", lambda op, tensor: case.route)
    inputs = [x.requires_grad_() for x in case.batch(world)]
    loss = plain_op(case)(*inputs)
    losses, *grads = zip(*([x[:-1] for x in (found[str(case)] for found in ranks[world])]), strict=True)
    assert_close_to_oracle(torch.stack(losses).mean(), loss)
    for parts, expected in zip(grads, torch.autograd.grad(loss * world, inputs), strict=True):
        assert_close_to_oracle(torch.cat(parts) if expected.ndim else torch.stack(parts).sum(), expected)


@pytest.mark.parametrize("case", PART_CASES, ids=str)
def test_ring_losses_of_a_part_of_the_ranks(ranks: dict[int, list[dict[Any, Any]]], case: Case) -> None:
    assert_ranks_match(case, [ranks[4][rank]["group"][PART_CASES.index(case)] for rank in (1, 3)])


@pytest.mark.parametrize("case", PART_CASES, ids=str)
def test_ring_losses_on_two_nodes(ranks: dict[int, list[dict[Any, Any]]], case: Case) -> None:
    assert_ranks_match(case, [found["nodes"][PART_CASES.index(case)] for found in ranks[4]])


@pytest.mark.parametrize(("world", "per_node"), [(2, 2), (2, 1), (4, 2), (6, 2), (6, 3), (12, 4), (5, 5)])
def test_ring_visits_every_rank_once_and_leaves_a_node_as_seldom_as_it_can(world: int, per_node: int) -> None:
    places, left = list(range(world)), 0
    visited = [{rank} for rank in places]
    for step in range(world):
        routes = [Ring(None, rank, (1,) * world, per_node).neighbours(step) for rank in range(world)]
        assert sorted(after for after, _ in routes) == list(range(world))
        assert all(routes[after][1] == rank for rank, (after, _) in enumerate(routes))
        moved = [routes[place][0] for place in places]
        left += any(x // per_node != y // per_node for x, y in zip(places, moved, strict=True))
        places = moved
        for seen, place in zip(visited, places, strict=True):
            seen.add(place)
    assert places == list(range(world)), "home again"
    assert all(seen == set(range(world)) for seen in visited)
    assert left == (world // per_node if per_node < world else 0)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", REFUSED)
def test_ring_losses_refuse_on_every_rank(ranks: dict[int, list[dict[Any, Any]]], world: int, name: str) -> None:
    messages = {found["refused"][name] for found in ranks[world]}
    assert len(messages) == 1
    with pytest.raises(ValueError, match=REFUSED[name]):
        raise ValueError(messages.pop())


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_ring_memory_does_not_grow_with_the_number_of_ranks(ranks: dict[int, list[dict[Any, Any]]], loss: str) -> None:
    found = {world: {x["memory"][loss] for x in ranks[world]} for world in WORLDS}
    assert found[2] == found[4]
    ((largest, kept),) = found[2]
    assert largest == 64 * 64, "the tile of the eager reference"
    assert kept <= 4 * 64 * WIDTH + 10 * 64


@pytest.mark.parametrize("world", WORLDS)
def test_ring_transfers_overlap_the_tiles(ranks: dict[int, list[dict[Any, Any]]], world: int) -> None:
    for rank, found in enumerate(ranks[world]):
        events, rows, columns = found["order"]
        step = ["post", "tile", "wait", "post"]
        last = ["tile", "wait", "post", "wait"]
        assert events == [*("post", "tile", "post"), *("wait", *step) * (world - 2), "wait", *last]
        assert rows.item() == 2**world - 1
        assert columns.item() == (3**world - 1) / 2, rank


@pytest.mark.parametrize("world", WORLDS)
def test_ring_sends_the_bytes_of_the_paper_model(ranks: dict[int, list[dict[Any, Any]]], world: int) -> None:
    expected = ring_model.ours(A100, world, WIDTH, batch=7 * world).link_bytes
    assert {found["traffic"] for found in ranks[world]} == {expected}


def test_ring_makes_the_calls_of_the_paper_model(ranks: dict[int, list[dict[Any, Any]]]) -> None:
    """Every rank more is one step more."""
    counts = {world: torch.tensor([found["calls"] for found in ranks[world]]) for world in WORLDS}
    steps = (counts[4][:2] - counts[2]) / 2
    assert steps.tolist() == [list(scaling_model.RING_CALLS)] * 2


@pytest.mark.parametrize("world", WORLDS)
def test_ring_losses_of_no_rows_are_zero(ranks: dict[int, list[dict[Any, Any]]], world: int) -> None:
    assert all(loss == 0 for found in ranks[world] for loss in found["empty"])


@pytest.mark.parametrize("case", [Case("clip"), Case("siglip", ids=3), Case("clip", ids=3, memory_budget=64)], ids=str)
def test_ring_losses_without_a_process_group_are_the_plain_ops(case: Case) -> None:
    inputs, ids = case.batch(1), case.all_ids(1)
    torch.testing.assert_close(
        loss_of(case, *inputs, **ids),
        plain_op(case)(*inputs, **ids, memory_budget=case.memory_budget),
        rtol=0,
        atol=0,
    )


def test_ring_keeps_what_a_solved_row_still_has_to_learn() -> None:
    near, far = (torch.tensor([[x, 0.0, loss, count]]) for x, loss, count in ((100.0, 0.0, 1.0), (80.0, 0.0, 0.0)))
    *_, loss, count = ring_loss._merge_states(near, far)[0].tolist()
    assert math.isclose(loss, math.log1p(math.exp(-20)), rel_tol=1e-5)
    assert count == 1


@pytest.mark.parametrize("loss", [ring_clip_loss, ring_siglip_loss])
def test_ring_losses_check_their_arguments(loss: Callable[..., Tensor]) -> None:
    a = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"^ring_(clip|sigl?ip)_loss: a must be \(rows, width\)"):
        loss(a[0], a, 1.0)
    with pytest.raises(ValueError, match="memory_budget must be a positive number"):
        loss(a, a, 1.0, memory_budget=0)
