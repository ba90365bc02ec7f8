"""Items: what a folder, a manifest or a data set lists, before any of it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from diffgap.data.media import Source

__all__ = ["Item", "ItemList"]


@dataclass(frozen=True)
class Item:
    """One row of the embedding store to be: media that belong together, by modality.

    ``group`` is shared by rows that match one another (five captions of one clip); media that are the same
    :class:`Source` in several rows are embedded once. ``columns`` go into the index as they are.
    """

    id: str
    group: str
    split: str
    media: Mapping[str, Source]
    columns: Mapping[str, str | int | float] = field(default_factory=dict)


class ItemList(Protocol):
    """Items in a fixed order, listed anew by every ``iter`` without being held in memory all at once.

    ``description`` says where they come from and how they are listed; with the items' number it tells a resumed run
    that the list is still the same. ``notes`` are lines about what is not listed and why (missing clips, for one),
    filled once a first pass is done.
    """

    description: str

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...

    @property
    def notes(self) -> list[str]: ...
