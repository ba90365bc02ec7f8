"""The beginning of an item list."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from diffgap.data.items import Item, ItemList


class FirstItems:
    """The first ``count`` items of a list. Raises ValueError for a count below 1."""

    def __init__(self, items: ItemList, count: int) -> None:
        if count < 1:
            raise ValueError(f"limit is {count}; use 1 item or more")
        self._items, self._count = items, min(count, len(items))
        self.description = f"{items.description}, the first {self._count} items"

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        return islice(iter(self._items), self._count)

    @property
    def notes(self) -> list[str]:
        """Those of the whole list."""
        return self._items.notes
