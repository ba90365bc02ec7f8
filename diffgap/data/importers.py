"""Importers: other tools' embedding files into an embedding store, shard by shard.

Both write the same store (see ``diffgap.data.store``) atomically, hold one chunk of embeddings and the index
in memory, and refuse degenerate embeddings with their count.
"""

from __future__ import annotations

import hashlib
import os
import re
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch

from diffgap._files import atomic_folder
from diffgap.data._modality import DTYPES, Modality, quantize, validate_modality_name, write_modality
from diffgap.data._schema import SPLITS, TEXT_COLUMNS, check_index, write_index
from diffgap.data.store import EmbeddingStore, check_replaceable

__all__ = ["assign_splits", "import_clip_retrieval", "import_npy"]

StrPath = str | os.PathLike[str]
_CHUNK_ELEMENTS = 1 << 22
_ID_COLUMNS = ("id", "key", "image_path", "audio_path", "video_path")
_MODALITY_NAMES = {"img": "image"}
NPY_DAMAGES = (ValueError, OSError, EOFError, SyntaxError, MemoryError, OverflowError, tokenize.TokenError)
"""What numpy raises on a .npy file that is damaged: it parses the header as Python."""


def assign_splits(groups: Sequence[str], fractions: Sequence[float] = (0.8, 0.1, 0.1), *, seed: int = 0) -> list[str]:
    """Train, val or test for each group by a hash of its name: rows of a group stay together.

    A group's part depends on nothing but ``seed``, ``fractions`` and its own name (SHA-256), so adding data
    moves no group. Raises ValueError unless there are three fractions >= 0 that sum to 1.
    """
    shares = np.asarray(fractions, dtype=np.float64)
    if shares.shape != (3,) or not (shares >= 0).all() or abs(shares.sum() - 1) > 1e-6:
        raise ValueError(f"split fractions {list(fractions)} must be three numbers >= 0 (train, val, test) with sum 1")
    bounds = np.cumsum(shares)[:2]
    parts = {}
    for group in set(groups):
        digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
        position = int.from_bytes(digest[:8], "big") / 2**64
        parts[group] = SPLITS[int(np.searchsorted(bounds, position, side="right"))]
    return [parts[group] for group in groups]


def import_npy(
    source: StrPath | Mapping[str, StrPath],
    output: StrPath,
    *,
    csv: StrPath | None = None,
    id: str | None = None,
    group: str | None = None,
    split: str | Sequence[float] | None = None,
    split_seed: int = 0,
    dtype: str | None = None,
    overwrite: bool = False,
) -> EmbeddingStore:
    """Imports one ``.npy`` per modality, (R, D) or (R, T, D) floats, and a csv with one line per index row.

    ``source`` is a folder of ``<modality>.npy`` files (with at most one csv beside them) or {modality: file}.
    Row i of every array belongs to line i of the csv, unless the csv has an integer column
    ``row_<modality>``; where that is empty or -1, the line has no such embedding. ``id``, ``group`` and ``split``
    name csv columns; ``split`` may also be three fractions, hashed by group (``assign_splits``). By default the
    columns of these names are taken; without them the id is the line number, the group the id, the split
    0.8/0.1/0.1. ``dtype`` is "float32", "float16" or "int8" (default: float16 stays, all else becomes float32).
    Returns the new store, opened.
    """
    if isinstance(source, Mapping):
        files = {name: Path(file) for name, file in source.items()}
    else:
        folder = _existing_folder(source)
        files = {file.stem: file for file in sorted(folder.glob("*.npy"))}
        if packed := sorted(folder.glob("*.npz")):
            raise ValueError(
                f"{packed[0]} is not read; save each of its arrays as <modality>.npy, or move it elsewhere"
            )
        found = sorted(folder.glob("*.csv"))
        if csv is None and len(found) > 1:
            raise ValueError(f"{folder} holds {len(found)} csv files; name one with csv= (--csv)")
        csv = csv if csv is not None else next(iter(found), None)
    if not files:
        raise FileNotFoundError(f"source {source!s} holds no .npy files; give a folder of <modality>.npy or a mapping")
    shards = {validate_modality_name(name): [_open_npy(file)] for name, file in files.items()}
    if csv is None:
        table = pa.table({"id": pa.array([str(i) for i in range(len(next(iter(shards.values()))[0]))], pa.string())})
    else:
        table = _read_csv(Path(csv), {c for c in (id, group, split) if isinstance(c, str)})
        _check_header(table, str(csv), len(next(iter(shards.values()))[0]))
    table = _with_required_columns(table, str(csv or source), id, group, split, split_seed)
    return _write(output, shards, table, str(csv or source), dtype, overwrite)


def import_clip_retrieval(
    folder: StrPath,
    output: StrPath,
    *,
    id: str | None = None,
    group: str | None = None,
    split: str | Sequence[float] | None = None,
    split_seed: int = 0,
    dtype: str | None = None,
    overwrite: bool = False,
) -> EmbeddingStore:
    """Imports clip-retrieval's layout: ``X_emb/X_emb_N.npy`` and ``metadata/metadata_N.parquet``.

    Every folder ``X_emb`` becomes modality X (``img`` becomes ``image``); shards are joined in the order of N
    and must agree in number and in rows. Nested metadata columns are dropped. ``id`` defaults to the first of
    id, key, image_path, audio_path, video_path that the metadata has, else to "N_row"; the other options are
    those of ``import_npy``.
    """
    top = _existing_folder(folder)
    shards: dict[str, dict[int, Path]] = {}
    for place in sorted(top.glob("*_emb")):
        prefix = place.name.removesuffix("_emb")
        name = validate_modality_name(_MODALITY_NAMES.get(prefix, prefix))
        shards[name] = _numbered(place, f"{place.name}_", ".npy")
    if not shards:
        raise FileNotFoundError(
            f"{top} holds no *_emb folder; expected img_emb/, text_emb/ or audio_emb/ and metadata/"
        )
    metadata = _numbered(_existing_folder(top / "metadata"), "metadata_", ".parquet")
    arrays: dict[str, list[np.ndarray[Any, Any]]] = {}
    for name, files in shards.items():
        if files.keys() != metadata.keys():
            odd = sorted(files.keys() ^ metadata.keys())
            raise ValueError(f"{top}: shard {odd[0]} is missing in {name!r} or in metadata; every shard needs both")
        arrays[name] = [_open_npy(files[n]) for n in sorted(files)]
    tables = []
    for position, number in enumerate(sorted(metadata)):
        part = _read_metadata(metadata[number])
        for name, parts in arrays.items():
            if len(parts[position]) != part.num_rows:
                raise ValueError(
                    f"{metadata[number]}: {part.num_rows} rows but {len(parts[position])} {name!r} "
                    f"embeddings in shard {number}; they must match"
                )
        if id is None and not set(_ID_COLUMNS) & set(part.column_names):
            part = part.append_column("id", pa.array([f"{number}_{i}" for i in range(part.num_rows)], pa.string()))
        tables.append(part)
    table = pa.concat_tables(tables, promote_options="permissive")
    source = next((c for c in _ID_COLUMNS if c in table.column_names), None) if id is None else id
    table = _with_required_columns(table, str(top / "metadata"), source, group, split, split_seed)
    return _write(output, arrays, table, str(top / "metadata"), dtype, overwrite)


def _existing_folder(path: StrPath) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; check the path")
    return folder


def _numbered(folder: Path, prefix: str, suffix: str) -> dict[int, Path]:
    pattern = re.compile(re.escape(prefix) + r"(\d+)" + re.escape(suffix))
    found = {int(m[1]): f for f in folder.iterdir() if (m := pattern.fullmatch(f.name))}
    if not found:
        raise FileNotFoundError(f"{folder} holds no {prefix}N{suffix} file; it is not the clip-retrieval layout")
    return found


def _open_npy(path: Path) -> np.ndarray[Any, Any]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; check the path") from None
    except NPY_DAMAGES as error:
        raise ValueError(f"{path}: not a readable .npy file ({' '.join(str(error).split())})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim not in (2, 3):
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{path}: expected floats of shape (R, D) or (R, T, D); got {got}")
    return array


def _read_csv(path: Path, text: set[str]) -> pa.Table:
    if not path.is_file():
        raise FileNotFoundError(f"csv file {path} does not exist; check the path")
    _check_separator(path)
    strings = {*TEXT_COLUMNS, *text}
    try:
        # Ids such as 007 must stay text; row columns are the only ones whose type matters beside them.
        options = pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(strings, pa.string()), strings_can_be_null=False
        )
        table = pyarrow.csv.read_csv(path, convert_options=options)
        names = table.column_names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable csv file ({str(error).splitlines()[0]})") from error
    if len(set(names)) != len(names):
        raise ValueError(f"{path}: column names repeat: {names}; give each column its own name")
    return _row_numbers(table, str(path))


def _check_separator(path: Path) -> None:
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline()
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if separator in first and "," not in first:
            raise ValueError(f"{path}: its columns are separated by {name}; save it with commas")


def _check_header(table: pa.Table, where: str, rows: int) -> None:
    """Raises ValueError for a csv of one line less than there are embeddings, and no column of a known name."""
    names = table.column_names
    known = any(name in TEXT_COLUMNS or name.startswith("row_") for name in names)
    if table.num_rows == rows - 1 and not known:
        raise ValueError(
            f"{where}: {rows} embeddings need as many lines below a header, and the first line is no header: "
            f"{', '.join(names)!r:.80}; put the names of the columns above it, e.g. id,caption"
        )


def _row_numbers(table: pa.Table, where: str) -> pa.Table:
    """The columns ``row_<modality>`` as int64, -1 where they are empty; what pandas makes of those is "1.0" and "".

    Raises ValueError for values that are no whole numbers.
    """
    for position, name in enumerate(table.column_names):
        if name.startswith("row_"):
            try:
                column = table[name].cast(pa.int64()).fill_null(-1)
            except pa.ArrowException as error:
                raise ValueError(
                    f"{where}: column {name!r} must hold whole numbers, and nothing or -1 where there is no embedding; "
                    f"its values are {table[name].type}"
                ) from error
            table = table.set_column(position, name, column)
    return table


def _read_metadata(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
        table.validate(full=True)  # of strings, which would fail at their first use
        flat = [field.name for field in table.schema if not pa.types.is_nested(field.type)]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error
    return table.select(flat).replace_schema_metadata(None)


def _with_required_columns(
    table: pa.Table,
    where: str,
    id: str | None,
    group: str | None,
    split: str | Sequence[float] | None,
    seed: int,
) -> pa.Table:
    """Adds or replaces id, group and split as the importers' options say."""

    def column(option: str, name: str) -> pa.ChunkedArray:
        if name not in table.column_names:
            raise ValueError(f"{option}={name!r}: {where} has no such column; it has {', '.join(table.column_names)}")
        return table[name].cast(pa.string())

    has = set(table.column_names)
    ids = column("id", id) if id is not None else table["id"] if "id" in has else None
    if ids is None:
        ids = pa.array([str(i) for i in range(table.num_rows)], pa.string())
    groups = column("group", group) if group is not None else table["group"] if "group" in has else ids
    if isinstance(split, str):
        splits = column("split", split)
    elif split is None and "split" in has:
        splits = table["split"]
    else:
        names = groups.cast(pa.string()).to_pylist()
        splits = pa.array(
            assign_splits(names, seed=seed, **({} if split is None else {"fractions": split})), pa.string()
        )
    rest = table.drop_columns([c for c in ("id", "group", "split") if c in has])
    columns = {"id": ids, "group": groups, "split": splits}
    return pa.table({**columns, **{name: rest[name] for name in rest.column_names}})


def _write(
    output: StrPath,
    shards: Mapping[str, Sequence[np.ndarray[Any, Any]]],
    table: pa.Table,
    where: str,
    dtype: str | None,
    overwrite: bool,
) -> EmbeddingStore:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
    shapes = {}
    for name, parts in shards.items():
        rests = {part.shape[1:] for part in parts}
        if len(rests) > 1:
            raise ValueError(f"shards of {name!r} differ in shape: {sorted(rests)}; re-embed them with one encoder")
        shapes[name] = (sum(len(part) for part in parts), *rests.pop())
    empty = [name for name, shape in shapes.items() if not shape[0]]
    if empty:
        raise ValueError(f"{where}: {empty[0]!r} holds no embeddings, its shape is {shapes[empty[0]]}; leave it out")
    # The index is checked against the shapes alone, before anything is written.
    check_index(table, {n: Modality(torch.empty(s, device="meta")) for n, s in shapes.items()}, where)
    check_replaceable(output, overwrite=overwrite)
    with atomic_folder(output, overwrite=overwrite) as folder:
        for name, parts in shards.items():
            half = all(part.dtype == np.float16 for part in parts)
            target = DTYPES[dtype] if dtype is not None else torch.float16 if half else torch.float32
            file = Path(str(getattr(parts[0], "filename", name)))
            source = str(file if len(parts) == 1 else file.parent)
            chunks = _stream(parts, target)
            write_modality(folder / f"{name}.safetensors", chunks, shapes[name], target, source=source)
        write_index(folder / "index.parquet", table)
    return EmbeddingStore.open(output, check=False)  # every row was checked while it was written


def _stream(
    parts: Sequence[np.ndarray[Any, Any]], target: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    for part in parts:
        step = max(1, _CHUNK_ELEMENTS // max(1, int(np.prod(part.shape[1:]))))
        for start in range(0, len(part), step):
            with np.errstate(over="ignore"):  # what does not fit becomes infinite, which is refused with its rows
                values = np.array(part[start : start + step], dtype=np.float32)
            yield quantize(torch.from_numpy(values), target)
