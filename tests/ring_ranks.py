"""The cases of tests/test_ring.py, and what every one of their processes does."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from benchmarks.scaling_model import Calls
from diffgap import ring
from diffgap.ops import _dispatch
from diffgap.ops.clip_loss import clip_loss
from diffgap.ops.siglip_loss import siglip_loss
from diffgap.ring import Ring
from diffgap.ring_loss import ring_clip_loss, ring_siglip_loss
from tests.ops.contrastive_cases import LargestTensor

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
