"""Rows of a table (column -> value) as items: what each column means, whoever the table is read by.

audio, image, video     path of the medium, or the medium itself as bytes or {bytes, path}
text, caption, captions the first of them that is there is the text; a list of them gives an item each, "id#1",
                        "id#2" ..., in one group
id                      else the row's number, from 0
group                   else the path of the audio, video or image (first of them, with its times), so that rows
                        about one clip are matches of one another; else the id
split                   train, val, test or another common name for them; else drawn by the hash of the group
start, stop             seconds of audio and video that count; audio_start, video_stop ... for one of them
others                  text and numbers are kept in the index; cells that are empty are not
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from diffgap.data._schema import SPLITS
from diffgap.data.items import Item
from diffgap.data.items._checked import Located, Notes
from diffgap.data.items._names import MediaFolder, split_named
from diffgap.data.media import Source

MEDIA_COLUMNS = ("audio", "video", "image")  # the order in which they name a group
TEXT_COLUMNS = ("text", "caption", "captions")
_TIMED = ("audio", "video")
_TIMES = tuple(f"{m}{end}" for m in ("", *(f"{m}_" for m in _TIMED)) for end in ("start", "stop"))
ROLES = frozenset((*MEDIA_COLUMNS, *TEXT_COLUMNS, "id", "group", "split", *_TIMES))
_ALWAYS_TEXT = ("caption", "source", "language")  # the store's index wants them so


def caption_items(
    id: str,
    group: str,
    split: str,
    media: Mapping[str, Source],
    captions: Sequence[Source],
    columns: Mapping[str, str | int | float] | None = None,
) -> Iterator[Item]:
    """One item, or one a caption if there are several: "id#1", "id#2" ... of one group."""
    columns = columns or {}
    if not captions:
        yield Item(id, group, split, media, columns)
    for number, text in enumerate(captions, 1):
        own = id if len(captions) == 1 else f"{id}#{number}"
        kept = columns if text.text is None else {"caption": text.text, **columns}
        yield Item(own, group, split, {**media, "text": text}, kept)


def refuse_unknown(mapping: Mapping[str, str], what: str) -> None:
    """Raises ValueError for a role that no column can have."""
    for role in mapping:
        if role not in ROLES:
            raise ValueError(f"columns: {what} have no role {role!r}; use {', '.join(sorted(ROLES))}")


def renamed(row: Mapping[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """The row with the columns that ``mapping`` {role: column} names under their roles."""
    if not mapping:
        return dict(row)
    taken = set(mapping.values()) | mapping.keys()
    return {n: v for n, v in row.items() if n not in taken} | {r: row[c] for r, c in mapping.items() if c in row}


def check_columns(columns: Sequence[str], mapping: Mapping[str, str], where: str) -> None:
    """Raises ValueError if a column that ``mapping`` names is missing, or none can be embedded."""
    there = ", ".join(map(repr, columns))
    for role, column in mapping.items():
        if column not in columns:
            raise ValueError(f"{where}: column {column!r}, named as {role}, is missing; it has {there}")
    if not {*MEDIA_COLUMNS, *TEXT_COLUMNS} & {*columns, *mapping}:
        raise ValueError(
            f"{where}: none of the columns audio, image, video, text and caption is there; it has {there}. Rename one, "
            f"or say which is which with columns (--column audio=NAME){_known_format(columns)}"
        )


def _known_format(columns: Sequence[str]) -> str:
    known = {"audiocaps": "audiocap_id", "clotho": "caption_1"}
    return "".join(f", or read it with --format {name}" for name, column in known.items() if column in columns)


def items_of_rows(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    media: MediaFolder,
    notes: Notes,
    *,
    prefix: str = "",
    split: str = "",
) -> Iterator[Located]:
    """Items of (where, row) pairs whose columns are named by their roles.

    ``prefix`` stands before the ids that are row numbers; ``split`` is that of all rows, if given.
    """
    for number, (where, row) in enumerate(rows):
        id = str(row["id"]).strip() if row.get("id") is not None else f"{prefix}{number}"
        sources = {m: _source(row[m], m, row, media, where) for m in MEDIA_COLUMNS if not _blank(row.get(m))}
        if "video" in sources and "audio" not in row:
            sources["audio"] = _source(row["video"], "audio", row, media, where)
        texts = texts_of(next((row[c] for c in TEXT_COLUMNS if c in row), None), where)
        group = _group(row, sources) or id
        columns = kept_columns(row, notes, where)
        for item in caption_items(id, group, split or _split(row, where), sources, texts, columns):
            yield item, where


def texts_of(value: Any, where: str) -> list[Source]:
    """Inline texts of a cell: one, or a list of them; those that are blank are left out."""
    values = value if isinstance(value, list) else [value]
    texts = [v for v in values if not _blank(v)]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{where}: a text is expected, or a list of them; got {type(text).__name__}")
    return [Source(text=text.strip()) for text in texts]


def kept_columns(row: Mapping[str, Any], notes: Notes, where: str) -> dict[str, str | int | float]:
    """Columns without a role that the index can hold."""
    text = next((c for c in TEXT_COLUMNS if c in row), None)
    columns: dict[str, str | int | float] = {}
    for name, value in row.items():
        if value is None or value == "" or name == text or (name in ROLES and name not in TEXT_COLUMNS):
            continue
        if not isinstance(value, str | int | float) or name.startswith("row_") or not name:
            notes.add("cells that the index cannot hold (lists, bytes, columns named row_...)", f"{where}, {name!r}")
        elif name in _ALWAYS_TEXT:
            columns[name] = str(value)
        else:
            columns[name] = int(value) if isinstance(value, bool) else value
    return columns


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _source(value: Any, modality: str, row: Mapping[str, Any], media: MediaFolder, where: str) -> Source:
    start = stop = None
    if modality in _TIMED:
        start, stop = (_seconds(row, modality, end, where) for end in ("start", "stop"))
        if stop is not None and stop <= (start or 0):
            raise ValueError(f"{where}: stop {stop:g} s must be after start {start or 0:g} s")
    suffix = ""
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        suffix = PurePath(value.get("path") or "").suffix.lower()
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Source):
        return Source(value.path, None, value.data, value.offset, value.size, value.suffix, start, stop)
    if isinstance(value, bytes):
        return Source(data=value, suffix=suffix, start=start, stop=stop)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {modality} must be a path or bytes; got {type(value).__name__}")
    return Source(path=media.resolve(value.strip(), where), start=start, stop=stop)


def _seconds(row: Mapping[str, Any], modality: str, end: str, where: str) -> float | None:
    for name in (f"{modality}_{end}", end):
        value = row.get(name)
        if not _blank(value):
            try:
                seconds = float(value)  # type: ignore[arg-type]
            except (TypeError, ValueError):
                seconds = math.nan
            if not 0 <= seconds < math.inf:
                raise ValueError(f"{where}: {name} = {value!r:.40} must be seconds, a number >= 0")
            return seconds
    return None


def _group(row: Mapping[str, Any], sources: Mapping[str, Source]) -> str:
    if not _blank(row.get("group")):
        return str(row["group"]).strip()
    for name in MEDIA_COLUMNS:
        if isinstance(row.get(name), str) and name in sources:
            source = sources[name]
            times = f"@{source.start or 0:g}-{'' if source.stop is None else f'{source.stop:g}'}"
            return str(row[name]).strip() + (times if source.start is not None or source.stop is not None else "")
    return ""


def _split(row: Mapping[str, Any], where: str) -> str:
    value = row.get("split")
    if _blank(value):
        return ""
    split = split_named(str(value).strip())
    if not split:
        raise ValueError(f"{where}: split {value!r:.40} is unknown; use {', '.join(SPLITS)}, or leave it empty")
    return split
