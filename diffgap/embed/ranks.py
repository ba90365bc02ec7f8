"""The place of this process in a job of ``torchrun`` or ``accelerate launch``, as their environment variables say."""

from __future__ import annotations

import os
from typing import NamedTuple


class Ranks(NamedTuple):
    """This process's number and the number of processes."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_environment(cls) -> Ranks:
        """From RANK and WORLD_SIZE; alone without. Raises ValueError for what no launcher sets."""
        given = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
        if None in given.values():
            return cls()
        try:
            ranks = cls(*(int(value or "") for value in given.values()))
        except ValueError:
            ranks = cls(0, 0)
        if not 0 <= ranks.rank < ranks.world:
            raise ValueError(f"RANK={given['RANK']!r} and WORLD_SIZE={given['WORLD_SIZE']!r} are no rank; unset them")
        return ranks

    def owns(self, chunk: int) -> bool:
        """Whether a chunk of items is this process's."""
        return chunk % self.world == self.rank
