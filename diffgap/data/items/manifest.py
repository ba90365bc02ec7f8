"""A manifest: a csv, tsv, jsonl or parquet file with a row an item (what its columns mean: ``_rows``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from diffgap.data.items._checked import Located, Notes
from diffgap.data.items._names import MediaFolder
from diffgap.data.items._rows import check_columns, items_of_rows, refuse_unknown, renamed
from diffgap.data.items._tables import Row, read_rows


def scan_manifest(path: Path, media: Path | None, columns: Mapping[str, str], notes: Notes) -> Iterator[Located]:
    """Items of the rows; paths are relative to ``media``, by default the manifest's folder, and must stay in it."""
    refuse_unknown(columns, "a manifest's columns")
    folder = MediaFolder(path.parent if media is None else media)
    return items_of_rows(_rows(path, columns), folder, notes)


def _rows(path: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    unseen = dict(columns)
    first: list[str] = []
    for where, row in read_rows(path):
        # Objects of a jsonl may each have other columns: one that is named must be in some of them.
        unseen = {role: column for role, column in unseen.items() if column not in row}
        if not first:
            first = list(row)
            check_columns(first, {r: c for r, c in columns.items() if r not in unseen}, str(path))
        yield where, renamed(row, columns)
    if first:
        check_columns(first, unseen, str(path))
