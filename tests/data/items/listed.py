"""What the tests of listing share: making stubs of media, and looking at what was listed."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffgap.data.items import Item
from diffgap.data.items.listing import list_items


def touch(folder: Path, *names: str, content: bytes = b"x") -> Path:
    """Files of these names; listing must never open them, so that what is in them does not matter."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def items(source: str | os.PathLike[str], **options: Any) -> list[Item]:
    return list(list_items(source, **options))


def by_id(source: str | os.PathLike[str], **options: Any) -> dict[str, Item]:
    found = items(source, **options)
    assert len({item.id for item in found}) == len(found)
    return {item.id: item for item in found}


def files(item: Item, root: Path) -> dict[str, str]:
    """{modality: path from ``root``, or the text itself}."""
    return {m: str(s.path.relative_to(root)) if s.path else f"text:{s.text}" for m, s in item.media.items()}


def tar(path: Path, members: Iterable[tuple[str, bytes]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def lines(*rows: Sequence[str]) -> str:
    return "".join(",".join(row) + "\n" for row in rows)
