"""Items whose recordings are embedded twice: as they sound, and as the spectrograms that a generator learns from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from diffgap.data.items import Item, ItemList


class HeardItems:
    """The items, each with its recording as the medium "mel" too."""

    def __init__(self, items: ItemList) -> None:
        self._items = items
        self.description = items.description

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        for item in self._items:
            audio = item.media.get("audio")
            yield item if audio is None else replace(item, media={**item.media, "mel": audio})

    @property
    def notes(self) -> list[str]:
        return self._items.notes
