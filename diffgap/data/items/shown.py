"""Items with what a person is shown of them: their captions, and where their media are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from diffgap.data.items import Item, ItemList
from diffgap.data.media import MediaError, Source
from diffgap.data.media.text import TextReader


class ShownItems:
    """The items, with columns that they do not have yet: "caption", the text, also where it is in a file, and
    "path_<modality>" of media that are files of their own, relative to ``root``.

    A medium outside of ``root`` or inside of an archive has no path, a text that cannot be read no caption.
    """

    def __init__(self, items: ItemList, root: Path) -> None:
        self._items, self._root = items, os.path.abspath(root)
        self.description = items.description

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        for item in self._items:
            columns: dict[str, str | int | float] = {}
            if "caption" not in item.columns and (caption := _caption(item.media.get("text"))) is not None:
                columns["caption"] = caption
            for modality, source in item.media.items():
                if modality != "text" and (path := self._path(source)) is not None:
                    columns[f"path_{modality}"] = path
            yield replace(item, columns={**columns, **item.columns})

    @property
    def notes(self) -> list[str]:
        return self._items.notes

    def _path(self, source: Source) -> str | None:
        if source.path is None or source.offset or source.size is not None:
            return None
        path = os.path.relpath(os.path.abspath(source.path), self._root)
        return None if path.split(os.sep)[0] == os.pardir else path


def _caption(source: Source | None) -> str | None:
    try:
        return None if source is None else TextReader()(source)
    except MediaError:
        return None
