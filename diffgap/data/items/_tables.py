"""Rows of csv, tsv, jsonl and parquet files, read a line or a batch at a time, with the place of each."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = tuple[str, dict[str, Any]]
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_LONGEST_ROW = 1 << 20  # characters; an unclosed quote would otherwise swallow the file into memory
_BATCH_ROWS = 1024


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a table by its suffix. Raises ValueError, with the line, for whatever is malformed."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return read_parquet(path)
    return read_jsonl(path) if suffix in (".jsonl", ".ndjson") else read_csv(path)


def read_csv(path: Path, names: Sequence[str] | None = None) -> Iterator[Row]:
    """Rows of a csv (RFC 4180: quotes doubled, line breaks inside quotes) or, by its suffix, a tsv, in UTF-8.

    ``names`` are the columns of a file without a header. A column without a name (the row numbers that pandas
    writes) is left out. Blank lines are skipped; any line ending will do, also several of them.
    """
    lines = _Lines(path)
    # strict: a quote in the wrong place is an error, not a row that differs from what was meant.
    reader = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    header = None if names is None else list(names)
    while True:
        first = lines.number + 1
        lines.begin_row()
        where = f"{path}, line {first}"
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise ValueError(
                f'{where}: {error}; quote a cell with " on both sides and double the quotes in it'
            ) from None
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            _refuse_repeated(header, where)
            continue
        if len(cells) != len(header):
            raise ValueError(
                f"{where}: {len(cells)} cells, but there are {len(header)} columns; quote cells with commas"
            )
        yield where, {name: cell for name, cell in zip(header, cells, strict=True) if name}
    if header is None:
        raise ValueError(f"{path} is empty; a header and a line an item are expected")


def read_jsonl(path: Path) -> Iterator[Row]:
    """One JSON object a line."""
    lines = _Lines(path)
    for line in lines:
        where = f"{path}, line {lines.number}"
        lines.begin_row()
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: no JSON ({str(error)[:120]}); one object a line is expected") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: {type(row).__name__} instead of an object; one object a line is expected")
        yield where, row


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows of a parquet file, batch by batch."""
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            _refuse_repeated(file.schema_arrow.names, str(path))
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error


class _Lines:
    """Lines of a UTF-8 file with their line ends; ``number`` counts them.

    Raises ValueError for bytes that are not UTF-8, for NUL, and for a row (see ``begin_row``) that does not end.
    """

    def __init__(self, path: Path) -> None:
        self.number = 0
        self._path, self._row_length = path, 0
        self._lines = self._read()

    def begin_row(self) -> None:
        self._row_length = 0

    def __iter__(self) -> Iterator[str]:
        return self._lines

    def _read(self) -> Iterator[str]:
        with open(self._path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            while line := file.readline(_LONGEST_ROW + 1):
                self.number += 1
                where = f"{self._path}, line {self.number}"
                self._row_length += len(line)
                if self._row_length > _LONGEST_ROW:
                    raise ValueError(f"{where}: a row of more than {_LONGEST_ROW:,} characters; is a quote not closed?")
                if not line.isascii():
                    try:
                        line.encode()
                    except UnicodeEncodeError:
                        raise ValueError(f"{where} is not UTF-8; convert the file: iconv -f ... -t utf-8") from None
                if "\0" in line:
                    raise ValueError(f"{where} holds a NUL byte; the file is damaged or not UTF-8 text")
                yield line


def _refuse_repeated(names: Sequence[str], where: str) -> None:
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise ValueError(f"{where}: column {twice[0]!r} is there more than once; give every column its own name")
