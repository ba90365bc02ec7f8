r"""The way round all ranks: every rank's block of tensors visits each of them, and what they found comes home.

With W ranks, L on each node, the block of rank q = (node x, place l) is at step s = 0, ..., W - 1 at

.. math::
    \text{node } x + h \bmod W / L, \quad \text{place } l + s - h \bmod L, \qquad h = \lfloor s / L \rfloor

It visits all places of a node over the fast links inside it, then all blocks go to the next node at once, each over its
own rank's link. On one node this is the plain ring, from rank r to r + 1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ring:
    """The ranks of a group in their order.

    Attributes:
        group: The ranks; ``None`` is the default group.
        rank: This process's, in the group.
        rows: Of every rank's block, by rank.
        per_node: How many consecutive ranks share a node; a divisor of their number.
    """

    group: dist.ProcessGroup | None
    rank: int
    rows: tuple[int, ...]
    per_node: int

    @property
    def world(self) -> int:
        """The number of ranks."""
        return len(self.rows)

    def circulate(
        self,
        block: Sequence[Tensor],
        tile: Callable[..., tuple[list[Tensor], list[Tensor]]],
        merge: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Carry ``block`` past every rank; what the tiles found about this rank's rows, and about its block.

        The next block travels while a tile is computed, and so does what the earlier ranks found about theirs.

        Args:
            block: This rank's tensors of ``rows[rank]`` rows; but for the rows, all ranks' have the same shapes.
            tile: Called as ``tile(own, *block)`` with the block at hand, ``own`` on the first call. Returns what it
                found about this rank's rows, and about the block's, which follows the block home.
            merge: Joins what two tiles found; it may write to the first.
        """
        next_block = _Exchange(block, self, 0)
        rows, columns = tile(True, *block)
        found_columns = _Exchange(columns, self, 0)
        for step in range(1, self.world):
            block = next_block.wait()
            if step + 1 < self.world:
                next_block = _Exchange(block, self, step)
            found_rows, columns = tile(False, *block)
            rows = [merge(*pair) for pair in zip(rows, found_rows, strict=True)]
            columns = [merge(*pair) for pair in zip(found_columns.wait(), columns, strict=True)]
            found_columns = _Exchange(columns, self, step)
        return rows, found_columns.wait()

    def neighbours(self, step: int) -> tuple[int, int]:
        """The rank that the block held at ``step`` goes to next, and the rank that the next one comes from."""
        after = self._moved(self._moved(self.rank, step, -1), step + 1, 1)
        before = self._moved(self._moved(self.rank, step + 1, -1), step, 1)
        return after, before

    def arriving(self, step: int) -> int:
        """Rows of the block that this rank has after ``step``."""
        return self.rows[self._moved(self.rank, step + 1, -1)]

    def _moved(self, rank: int, step: int, direction: int) -> int:
        """Where the block of ``rank`` is at ``step``; for direction -1 whose block ``rank`` has at ``step``."""
        node, place = divmod(rank, self.per_node)
        hops = step % self.world // self.per_node  # after the last step it goes home
        node = (node + direction * hops) % (self.world // self.per_node)
        return node * self.per_node + (place + direction * (step % self.world - hops)) % self.per_node


def ranks_per_node(group: dist.ProcessGroup | None) -> int:
    """``LOCAL_WORLD_SIZE`` as torchrun sets it, for the default group; without it, or for another, all ranks."""
    world = dist.get_world_size(group)
    return int(os.environ.get("LOCAL_WORLD_SIZE", world)) if group in (None, dist.group.WORLD) else world


class _Exchange:
    """Tensors on their way to the next rank, while those that come here arrive."""

    def __init__(self, tensors: Sequence[Tensor], ring: Ring, step: int) -> None:
        group = ring.group or dist.group.WORLD
        assert group is not None, "a ring has a process group"
        after, before = (dist.get_global_rank(group, rank) for rank in ring.neighbours(step))
        self._sent = [x.contiguous() for x in tensors]  # kept until they have left
        self._received = [x.new_empty(ring.arriving(step), *x.shape[1:]) for x in self._sent]
        sends = [dist.P2POp(dist.isend, x, after, group) for x in self._sent if x.numel()]
        receives = [dist.P2POp(dist.irecv, x, before, group) for x in self._received if x.numel()]
        self._works = dist.batch_isend_irecv(sends + receives) if sends or receives else []

    def wait(self) -> list[Tensor]:
        """What has arrived."""
        for work in self._works:
            work.wait()
        return self._received
