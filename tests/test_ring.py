"""ring_clip_loss and ring_siglip_loss in two and four gloo processes, beside one process with the whole batch."""

from __future__ import annotations

import datetime
import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F

from benchmarks import ring_model, scaling_model
from benchmarks.gpus import A100
from benchmarks.scaling_model import Calls
from diffgap import ring, ring_loss
from diffgap.ops import _dispatch
from diffgap.ops.clip_loss import clip_loss
from diffgap.ops.siglip_loss import siglip_loss
from diffgap.ring import Ring
from diffgap.ring_loss import ring_clip_loss, ring_siglip_loss
from tests.helpers import assert_close_to_oracle
from tests.ops.contrastive_cases import LargestTensor
from tests.ring_oracle import from_whole_batch

WORLDS = [2, 4]
WIDTH = 24


@dataclass(frozen=True)
class Case:
    """One call on every rank.

    Attributes:
        loss: ``clip`` or ``siglip``.
        rows: Rows of a and of b on each rank, or their mean where these are ``uneven``.
        uneven: The first rank has no row of a and, with ids, the last no row of b.
        ids: Number of ids, shared by rows on all ranks; 0 for the diagonal.
        noise: Of b around a: below 1, at scale 100, nearly all rows are solved.
        route: Of the ops: ``eager``, or ``native`` for the registered op.
        upstream: What rank r multiplies its loss with is ``1 + upstream * r``.
    """

    loss: str
    rows: tuple[int, int] = (7, 7)
    ids: int = 0
    dtype: torch.dtype = torch.float32
    scale: float = 10.0
    noise: float = 4.0
    route: str = "eager"
    upstream: float = 0.0
    memory_budget: int | None = None
    autocast: bool = False
    uneven: bool = False

    def sizes(self, world: int) -> tuple[list[int], list[int]]:
        """Rows of a and of b on every rank."""
        if not self.uneven:
            a, b = ([rows] * world for rows in self.rows)
            return a, b
        a, b = ([0] + [rows] * (world - 2) + [2 * rows] for rows in self.rows)
        return a, b[::-1] if self.ids else b

    def batch(self, world: int) -> list[Tensor]:
        """All ranks' a and b, the scale and the bias."""
        generator = torch.Generator().manual_seed(0)
        count = world * max(self.rows)
        a = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
        b = a + self.noise * torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
        embeddings = [F.normalize(x, dim=1)[: world * rows] for x, rows in zip((a, b), self.rows, strict=True)]
        scalars = [torch.tensor(x, dtype=torch.float64) for x in (self.scale, -5.0)]
        wide = torch.promote_types(self.dtype, torch.float32)
        return [*(x.to(self.dtype) for x in embeddings), *(x.to(wide) for x in scalars[: self.scalars])]

    @property
    def scalars(self) -> int:
        return 1 if self.loss == "clip" else 2

    def all_ids(self, world: int) -> dict[str, Tensor | None]:
        if not self.ids:
            return {"ids_a": None, "ids_b": None}
        generator = torch.Generator().manual_seed(1)
        # One id more on each side than the other has: rows and columns without a positive.
        ids = [
            torch.randint(self.ids, (world * rows,), generator=generator) + 7 * i for i, rows in enumerate(self.rows)
        ]
        return {"ids_a": ids[0], "ids_b": ids[1]}


CASES = [
    replace(case, loss=loss)
    for loss in ("clip", "siglip")
    for case in (
        Case(loss),
        Case(loss, dtype=torch.float64),
        Case(loss, dtype=torch.bfloat16),
        Case(loss, route="native"),
        Case(loss, autocast=True),
        Case(loss, rows=(6, 6), memory_budget=400),
        Case(loss, rows=(1, 1), dtype=torch.float64),
        Case(loss, ids=12),
        Case(loss, ids=12, route="native"),
        Case(loss, ids=12, rows=(7, 5), dtype=torch.float64),
        Case(loss, ids=1000, dtype=torch.float64),
        Case(loss, rows=(31, 31), scale=100.0, noise=0.7),
        Case(loss, rows=(31, 31), scale=100.0, noise=0.6, dtype=torch.float64),
        Case(loss, scale=1e4, dtype=torch.float64),
        Case(loss, upstream=0.5),
        Case(loss, upstream=0.5, ids=12, dtype=torch.float64),
        Case(loss, uneven=True),
        Case(loss, uneven=True, route="native"),
        Case(loss, uneven=True, ids=12, rows=(7, 5), upstream=0.5, dtype=torch.float64),
        Case(loss, uneven=True, ids=12, rows=(7, 5), route="native"),
        Case(loss, uneven=True, ids=12, rows=(6, 6), memory_budget=400),
    )
]
#: The gradient of a solved batch's scale is a small difference of large sums: float32 owes it to the op alone.
SOLVED = [Case(loss, rows=(31, 31), scale=100.0, noise=0.7, route="native") for loss in ("clip", "siglip")]
REFUSED = {
    "width": r"rank 0 has a \(7, 24\) and b \(7, 24\).* and rank 1 has a \(7, 23\) and b \(7, 23\).*alike on all ranks",
    "dtype": r"torch.float32.*rank 1 has .* torch.float64",
    "ids": r"no ids.* and rank 1 has .* with ids",
    "gradient": r"no gradient.* and rank 1 has .* with gradient",
    "pairs": r"a has 7 rows and b has 8; give ids",
    "half": r"ids_b is missing",
}


def loss_of(case: Case, *inputs: Tensor, **options: Any) -> Tensor:
    function = ring_clip_loss if case.loss == "clip" else ring_siglip_loss
    return function(*inputs, memory_budget=case.memory_budget, **options)


def plain_op(case: Case) -> Callable[..., Tensor]:
    return clip_loss if case.loss == "clip" else siglip_loss


def run_case(case: Case, rank: int, world: int, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """This rank's loss, its gradients, and its loss where none are wanted."""
    a, b, *scalars = case.batch(world)
    sizes = case.sizes(world)
    all_ids = zip(case.all_ids(world).items(), sizes, strict=True)
    ids = {name: None if x is None else x.split(rows)[rank] for (name, x), rows in all_ids}
    own = (x.split(rows)[rank] for x, rows in zip((a, b), sizes, strict=True))
    inputs = [x.clone().requires_grad_() for x in (*own, *scalars)]
    with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        loss = loss_of(case, *inputs, **ids, group=group)
    grads = torch.autograd.grad(loss * (1 + case.upstream * rank), inputs)
    with torch.no_grad():
        plain = loss_of(case, *inputs, **ids, group=group)
    return [loss.detach(), *grads, plain]


def run_refused(name: str, rank: int) -> str:
    """The error this rank gets where rank 1 differs, or where all ranks are wrong."""
    odd = rank == 1
    columns, width = 7 + (name == "pairs"), WIDTH - (name == "width" and odd)
    dtype = torch.float64 if name == "dtype" and odd else torch.float32
    a, b = torch.ones(7, width, dtype=dtype), torch.ones(columns, width, dtype=dtype)
    a.requires_grad_(name == "gradient" and odd)
    ids = torch.arange(7)
    options = {"half": {"ids_a": ids}, "ids": {"ids_a": ids, "ids_b": ids} if odd else {}}.get(name, {})
    messages = []
    for function in (ring_clip_loss, ring_siglip_loss):
        with pytest.raises(ValueError, match=r"^ring_") as caught:
            function(a, b, 10.0, **options)
        messages.append(str(caught.value))
    assert messages[0] == messages[1].replace("siglip", "clip")
    return messages[0]


def run_memory(loss: str) -> tuple[int, int]:
    """Elements of the largest tensor of forward and backward pass, and of all that is kept in between."""
    case = Case(loss, rows=(64, 64))
    rank, world = dist.get_rank(), dist.get_world_size()
    a, b, *scalars = case.batch(world)
    inputs = [x.clone().requires_grad_() for x in (a.chunk(world)[rank], b.chunk(world)[rank], *scalars)]
    with LargestTensor() as largest:
        value = loss_of(case, *inputs)
        kept = sum(x.numel() for x in value.grad_fn.saved_tensors if x is not None)  # type: ignore[union-attr]
        value.backward()
    return largest.elements, kept


def run_traffic(rank: int, world: int) -> int:
    """Bytes this rank sends to others for one forward and backward pass of the CLIP loss in bfloat16."""
    sent = 0
    post = dist.batch_isend_irecv

    def counting(operations: list[Any]) -> list[Any]:
        nonlocal sent
        sent += sum(x.tensor.nbytes for x in operations if x.op is dist.isend)
        return post(operations)

    a, b, scale = Case("clip", dtype=torch.bfloat16).batch(world)
    inputs = [x.clone().requires_grad_() for x in (a.chunk(world)[rank], b.chunk(world)[rank])]
    dist.batch_isend_irecv = counting
    try:
        ring_clip_loss(*inputs, scale).backward()
    finally:
        dist.batch_isend_irecv = post
    return sent


def run_calls() -> tuple[int, int]:
    """Calls of the forward and of the backward pass of the CLIP loss with ids."""
    a, b, scale = Case("clip").batch(1)
    ids = torch.arange(7)
    a.requires_grad_()
    with Calls() as forward:
        loss = ring_clip_loss(a, b.requires_grad_(), scale.requires_grad_(), ids_a=ids, ids_b=ids)
    with Calls() as backward:
        loss.backward()
    return forward.count, backward.count


def run_order(rank: int, world: int) -> tuple[list[str], Tensor, Tensor]:
    """What happens in a ring, and the sums it makes of rank numbers."""
    events: list[str] = []
    post, exchange = dist.batch_isend_irecv, ring._Exchange

    class Recorded(exchange):  # type: ignore[misc, valid-type]
        def wait(self) -> list[Tensor]:
            events.append("wait")
            return super().wait()

    def posting(operations: list[Any]) -> list[Any]:
        events.append("post")
        return post(operations)

    def tile(own: bool, block: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        events.append("tile")
        assert own == (block.item() == 2.0**rank)
        return [block.clone()], [torch.tensor([3.0**rank])]

    dist.batch_isend_irecv, ring._Exchange = posting, Recorded
    try:
        (rows,), (columns,) = Ring(None, rank, (1,) * world, world).circulate(
            [torch.tensor([2.0**rank])], tile, Tensor.add_
        )
    finally:
        dist.batch_isend_irecv, ring._Exchange = post, exchange
    return events, rows, columns


def run_rank(rank: int, world: int, port: int, results: str) -> None:
    """Everything the tests look at, on one rank."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
    choose = _dispatch.choose
    found: dict[Any, Any] = {}
    for case in CASES + SOLVED:
        _dispatch.choose = lambda op, tensor, route=case.route: route
        found[str(case)] = run_case(case, rank, world)
    _dispatch.choose = choose
    found["refused"] = {name: run_refused(name, rank) for name in REFUSED}
    found["order"] = run_order(rank, world)
    found["traffic"] = run_traffic(rank, world)
    found["calls"] = run_calls()
    found["empty"] = [loss_of(case, torch.ones(0, WIDTH), torch.ones(0, WIDTH), 1.0) for case in CASES]
    with _dispatch.backend("eager"):
        found["memory"] = {loss: run_memory(loss) for loss in ("clip", "siglip")}
    if world == 4:
        os.environ["LOCAL_WORLD_SIZE"] = "2"
        found["nodes"] = [run_case(case, rank, world) for case in PART_CASES]
        group = dist.new_group([1, 3])
        if rank in (1, 3):
            found["group"] = [run_case(case, rank // 2, 2, group) for case in PART_CASES]
        else:
            with pytest.raises(ValueError, match="not in the group"):
                ring_clip_loss(torch.ones(2, 3), torch.ones(2, 3), 1.0, group=group)
    torch.save(found, Path(results, f"{rank}.pt"))
    dist.destroy_process_group()


PART_CASES = [Case("clip", ids=12), Case("siglip", ids=12)]


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
