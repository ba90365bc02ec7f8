"""Schema of an embedding store's index: its columns, their types, their agreement with the modality files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from diffgap.data._modality import FORMAT_VERSION, Modality, check_version

SPLITS = ("train", "val", "test")
REQUIRED_COLUMNS = ("id", "group", "split")
TEXT_COLUMNS = (*REQUIRED_COLUMNS, "caption", "source", "language")
_VERSION_KEY = b"diffgap_format_version"


def read_index(path: Path) -> pa.Table:
    """Reads ``index.parquet`` and checks its format version."""
    try:
        table = pq.read_table(path)
        table.validate(full=True)  # of strings, which would fail at their first use
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a readable parquet file ({reason}); write the store again") from error
    version = (table.schema.metadata or {}).get(_VERSION_KEY)
    check_version(None if version is None else version.decode(), path)
    return table


def write_index(path: Path, index: pa.Table) -> None:
    """Writes ``index.parquet`` with the format version in its metadata."""
    pq.write_table(index.replace_schema_metadata({_VERSION_KEY: FORMAT_VERSION.encode()}), path)


def as_columns(index: Mapping[str, Any] | pa.Table | None, counts: Mapping[str, int]) -> pa.Table:
    columns: dict[str, Any] = {}
    if isinstance(index, pa.Table):
        columns = {name: index[name] for name in index.column_names}
    elif index is not None:
        for name, values in index.items():
            kind = pa.string() if name in TEXT_COLUMNS else pa.int64() if name.startswith("row_") else None
            try:
                columns[name] = pa.array(values.tolist() if isinstance(values, torch.Tensor) else values, kind)
            except (pa.ArrowException, TypeError) as error:
                raise TypeError(f"index column {name!r} is not of type {kind}: {str(error).splitlines()[0]}") from error
    sizes = {name: len(values) for name, values in columns.items()} or dict(counts)
    if len(set(sizes.values())) > 1:
        raise ValueError(f"index columns and arrays differ in length: {sizes}; give every column one value a row")
    count = next(iter(sizes.values()), 0)
    columns.setdefault("id", pa.array([str(i) for i in range(count)], pa.string()))
    columns.setdefault("group", columns["id"])
    columns.setdefault("split", pa.array(["train"] * count, pa.string()))
    return pa.table(columns)


def check_index(
    table: pa.Table, modalities: Mapping[str, Modality], where: str
) -> tuple[pa.Table, Mapping[str, Modality], dict[str, np.ndarray]]:
    """Validates the index against the modalities; returns it, its row columns taken out as arrays."""
    table = _check_text_columns(table, where)
    rows = {}
    for column in [c for c in table.column_names if c.startswith("row_")]:
        name = column.removeprefix("row_")
        if name not in modalities:
            raise ValueError(f"{where}: column {column!r} has no file {name}.safetensors beside it")
        if table[column].type != pa.int64() or table[column].null_count:
            nulls = f" with {table[column].null_count} nulls" if table[column].null_count else ""
            raise ValueError(
                f"{where}: column {column!r} must be int64, -1 where a row has none; got {table[column].type}{nulls}"
            )
        rows[name] = table[column].to_numpy().copy()  # arrow's memory is read-only
        count, bad = len(modalities[name].data), rows[name]
        outside = int(((bad < -1) | (bad >= count)).sum())
        if outside:
            raise ValueError(f"{where}: {outside} values of {column!r} lie outside -1..{count - 1}")
        table = table.drop_columns([column])
    for name, modality in modalities.items():
        if name not in rows:
            if len(modality.data) != table.num_rows:
                raise ValueError(
                    f"{where}: {table.num_rows} index rows but {len(modality.data)} {name!r} embeddings; "
                    f"add a column 'row_{name}' or give one embedding a row"
                )
            rows[name] = np.arange(table.num_rows, dtype=np.int64)
    return table.replace_schema_metadata(None), modalities, rows


def _check_text_columns(table: pa.Table, where: str) -> pa.Table:
    missing = [name for name in REQUIRED_COLUMNS if name not in table.column_names]
    if missing:
        raise ValueError(f"{where}: column {missing[0]!r} is missing; it has {', '.join(table.column_names) or 'none'}")
    for name in [c for c in TEXT_COLUMNS if c in table.column_names]:
        kind = table[name].type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"{where}: column {name!r} must be strings; got {table[name].type}")
        column = table[name].cast(pa.string())
        # An empty group would make strangers positives of each other.
        empty = pc.sum(pc.fill_null(pc.equal(column, ""), True)).as_py() if name in REQUIRED_COLUMNS else 0
        if empty:
            raise ValueError(f"{where}: column {name!r} has {empty} empty values; every row needs one")
        table = table.set_column(table.column_names.index(name), name, column)
    distinct = len(table["id"].unique())
    if distinct != table.num_rows:
        raise ValueError(f"{where}: {table.num_rows - distinct} duplicate ids; every row needs its own id")
    check_splits(table["split"].unique().to_pylist(), where)
    return table


def check_splits(names: Sequence[str], where: str) -> None:
    unknown = sorted({str(n) for n in names} - set(SPLITS))
    if unknown:
        raise ValueError(f"{where}: split {unknown[0]!r} is unknown; use {', '.join(SPLITS)}")
