"""The embedding store: one folder that every command reads and writes.

    index.parquet            id (unique), group (rows of equal group are mutual positives), split
                             (train|val|test), and any further columns (caption, source, language ...);
                             `row_<modality>` int64 gives the row in that modality's file, -1 where it is
                             missing; without the column row i is row i
    <modality>.safetensors   "embeddings" (R, D) or (R, T, D), float32, float16, or int8 with "scale" (R,)
                             float32; "lengths" (R,) int64 for sequences, what stands beyond them is
                             read as zeros; encoder fingerprint and format version in the header
    failures.parquet         of ``diffgap embed``: id, modality, source, reason and message of what is not embedded

Modality files are memory-mapped: opening costs one pass over them to refuse degenerate rows (``check=False``
skips it), and gathering reads only the rows asked for. No pickle is read or written anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from diffgap._files import atomic_folder, check_writable
from diffgap.data._modality import (
    DTYPES,
    Modality,
    check_modality,
    quantize,
    read_modality,
    validate_modality_name,
    write_modality,
)
from diffgap.data._schema import SPLITS, as_columns, check_index, check_splits, read_index, write_index

__all__ = ["SPLITS", "EmbeddingStore", "write_store"]

Array = np.ndarray[Any, Any] | torch.Tensor
Rows = np.ndarray[Any, Any] | Sequence[int] | torch.Tensor


class EmbeddingStore:
    """Embeddings of several modalities over one index.

    Immutable: every ``with_*`` and every view is a new, light object that shares the embeddings. Index rows
    number the rows of *this* object (0 .. len - 1), also in a view.
    """

    def __init__(self, index: pa.Table, modalities: Mapping[str, Modality], rows: Mapping[str, np.ndarray]) -> None:
        self._index, self._modalities, self._rows = index, dict(modalities), dict(rows)
        self._columns: dict[str, np.ndarray] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check: bool = True) -> EmbeddingStore:
        """Opens a store folder memory-mapped; checks its schema and (``check``) every embedding.

        Raises FileNotFoundError for a missing folder or index, ValueError for what is malformed or
        degenerate.
        """
        folder = Path(path)
        file = folder / "index.parquet"
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} is not an embedding store: no index.parquet; make one with `diffgap import`"
            )
        table = read_index(file)
        modalities = {}
        for data in sorted(folder.glob("*.safetensors")):
            name = validate_modality_name(data.stem)
            modalities[name] = read_modality(data)
            check_modality(modalities[name], str(data), rows=check)
        return cls(*check_index(table, modalities, str(file)))

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, Array],
        index: Mapping[str, Any] | pa.Table | None = None,
        *,
        lengths: Mapping[str, Array] | None = None,
        encoders: Mapping[str, str] | None = None,
    ) -> EmbeddingStore:
        """A store in memory from {modality: (R, D) or (R, T, D) floats} and index columns.

        ``index`` may hold any columns, ``row_<modality>`` among them; ``id`` defaults to the row number,
        ``group`` to the id and ``split`` to "train". ``lengths`` gives (R,) frame counts of sequence
        modalities, ``encoders`` their fingerprints.
        """
        modalities = {}
        for name, array in arrays.items():
            validate_modality_name(name)
            modalities[name] = _in_memory(name, array, (lengths or {}).get(name), (encoders or {}).get(name, ""))
        columns = as_columns(index, {name: len(m.data) for name, m in modalities.items()})
        return cls(*check_index(columns, modalities, "index"))

    def __len__(self) -> int:
        return int(self._index.num_rows)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{m} {tuple(self._modalities[m].data.shape)}" for m in self.modalities)
        return f"EmbeddingStore({len(self)} rows; {sizes})"

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, sorted."""
        return tuple(sorted(self._modalities))

    @property
    def index(self) -> pa.Table:
        """The index as a pyarrow table, without the ``row_<modality>`` columns (see ``rows``)."""
        return self._index

    def column(self, name: str) -> np.ndarray:
        """One index column as a numpy array (strings as objects, None where null)."""
        if name not in self._columns:
            if name not in self._index.column_names:
                raise ValueError(f"index has no column {name!r}; it has {', '.join(self._index.column_names)}")
            column = self._index[name].to_numpy(zero_copy_only=False)
            column.flags.writeable = False
            self._columns[name] = column
        return self._columns[name]

    def group_ids(self, rows: Rows | None = None) -> torch.Tensor:
        """int64 code of each row's group: equal code, equal group. A view has codes of its own."""
        codes = self._group_codes if rows is None else self._group_codes[self._row_numbers(rows)]
        return torch.from_numpy(codes.astype(np.int64))

    @cached_property
    def _group_codes(self) -> np.ndarray:
        codes: np.ndarray = np.unique(self.column("group").astype(str), return_inverse=True)[1]
        return codes

    def dim(self, modality: str) -> int:
        """Width D of a modality."""
        return int(self._modality(modality).data.shape[-1])

    def num_frames(self, modality: str) -> int | None:
        """T of a sequence modality (R, T, D); None for pooled vectors."""
        data = self._modality(modality).data
        return int(data.shape[1]) if data.dim() == 3 else None

    def encoder(self, modality: str) -> str:
        """Fingerprint of the encoder that made this modality ("" if unknown)."""
        return self._modality(modality).encoder

    def rows(self, modality: str) -> np.ndarray:
        """(len,) int64: the row in the modality's file behind each index row, -1 where it is missing."""
        self._modality(modality)
        return self._rows[modality].copy()

    def present(self, *modalities: str) -> np.ndarray:
        """Index rows that have every one of the modalities named (all modalities if none is)."""
        found = np.ones(len(self), dtype=bool)
        for name in modalities or self.modalities:
            found &= self.rows(name) >= 0
        return np.flatnonzero(found)

    def unique_rows(self, modality: str) -> np.ndarray:
        """The first index row of each distinct embedding, ascending: a gallery without repeated items."""
        present = self.present(modality)
        _, first = np.unique(self._rows[modality][present], return_index=True)
        return present[np.sort(first)]

    def embeddings(self, modality: str, rows: Rows | None = None) -> torch.Tensor:
        """(n, D) or (n, T, D) float32 embeddings of index ``rows`` (default all), in new memory.

        Raises ValueError when one of the rows lacks the modality: pass ``rows=store.present(modality)``.
        """
        return self._modality(modality).gather(self._file_rows(modality, rows))

    def lengths(self, modality: str, rows: Rows | None = None) -> torch.Tensor | None:
        """(n,) int64 frame counts of index ``rows``: T where the file has none; None for pooled vectors."""
        frames, lengths = self.num_frames(modality), self._modality(modality).lengths
        if frames is None:
            return None
        picked = self._file_rows(modality, rows)
        return torch.full((len(picked),), frames) if lengths is None else lengths[picked]

    def select(self, rows: Rows) -> EmbeddingStore:
        """View of some index rows, in the order given."""
        picked = self._row_numbers(rows)
        index = self._index.take(pa.array(picked))
        return EmbeddingStore(index, self._modalities, {name: r[picked] for name, r in self._rows.items()})

    def only(self, modalities: Sequence[str]) -> EmbeddingStore:
        """View without the modalities that are not named; its rows are the same, with or without an embedding left."""
        kept = {name: self._modality(name) for name in modalities}
        return EmbeddingStore(self._index, kept, {name: self._rows[name] for name in kept})

    def split(self, name: str) -> EmbeddingStore:
        """View of the rows of one split. Raises ValueError for an unknown name and for an empty split."""
        if name not in SPLITS:
            raise ValueError(f"split {name!r} is unknown; choose one of {', '.join(SPLITS)}")
        rows = np.flatnonzero(self.column("split") == name)
        if not len(rows):
            have = ", ".join(sorted(set(self.column("split")))) or "no rows at all"
            raise ValueError(
                f"split {name!r} is empty: the store has {have}; assign splits with with_split or at import"
            )
        return self.select(rows)

    def with_split(self, parts: Mapping[str, str]) -> EmbeddingStore:
        """The same rows under another split, given as {group: "train" | "val" | "test"} for every group."""
        groups = self.column("group")
        missing = sorted({g for g in groups if g not in parts})
        if missing:
            raise ValueError(f"split mapping lacks {len(missing)} of the store's groups, for example {missing[0]!r}")
        names = [parts[g] for g in groups]
        check_splits(names, "split mapping")
        at = self._index.column_names.index("split")
        return EmbeddingStore(
            self._index.set_column(at, "split", pa.array(names, pa.string())), self._modalities, self._rows
        )

    def with_embeddings(self, modality: str, array: Array, *, lengths: Array | None = None) -> EmbeddingStore:
        """The same index with one modality replaced (or added) in memory.

        ``array`` has one row per ``unique_rows(modality)`` (rows that shared an embedding share the new one),
        or one per ``present(modality)`` (each index row gets its own). A new modality needs one row per index
        row.
        """
        validate_modality_name(modality)
        old = self._modalities.get(modality)
        replacement = _in_memory(modality, array, lengths, old.encoder if old is not None else "")
        count = len(replacement.data)
        rows = np.full(len(self), -1, dtype=np.int64)
        if old is None:
            wanted = {"rows": len(self)}
            rows[:] = np.arange(len(self))
        else:
            present, unique = self.present(modality), self.unique_rows(modality)
            wanted = {"distinct embeddings": len(unique), "rows": len(present)}
            if count == len(present):
                rows[present] = np.arange(count)
            elif count == len(unique):
                order = np.argsort(self._rows[modality][unique])
                at = np.searchsorted(self._rows[modality][unique][order], self._rows[modality][present])
                rows[present] = order[at]
        if count not in wanted.values():
            expected = " or ".join(f"{n} ({what})" for what, n in wanted.items())
            raise ValueError(f"array for {modality!r} has {count} rows; expected {expected}")
        return EmbeddingStore(self._index, {**self._modalities, modality: replacement}, {**self._rows, modality: rows})

    def _modality(self, name: str) -> Modality:
        if name not in self._modalities:
            have = ", ".join(self.modalities) or "none"
            raise ValueError(f"modality {name!r} is not in the store; it has {have}")
        return self._modalities[name]

    def _row_numbers(self, rows: Rows) -> np.ndarray:
        picked = np.asarray(rows)
        if picked.ndim != 1 or (picked.size and picked.dtype.kind not in "iu"):
            raise TypeError(f"rows must be a 1-D sequence of integers; got {picked.dtype} of shape {picked.shape}")
        if picked.size and (picked.min() < 0 or picked.max() >= len(self)):
            raise ValueError(f"rows reach from {picked.min()} to {picked.max()}; the store has 0..{len(self) - 1}")
        return picked.astype(np.int64)

    def _file_rows(self, modality: str, rows: Rows | None) -> torch.Tensor:
        picked = self._rows[modality] if rows is None else self._rows[modality][self._row_numbers(rows)]
        missing = int((picked < 0).sum())
        if missing:
            raise ValueError(
                f"{missing} of {len(picked)} rows have no {modality!r} embedding; pass rows=store.present({modality!r})"
            )
        return torch.from_numpy(np.ascontiguousarray(picked))


def check_replaceable(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Raises FileExistsError if writing to ``path`` would remove anything but (``overwrite``) a store.

    Raises ValueError if nothing can be written there.
    """
    target = Path(path)
    check_writable(target.parent, target)
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} exists and is not a folder; choose another path")
    if not overwrite:
        raise FileExistsError(f"{target} exists; pass overwrite=True (--overwrite) or choose another path")
    own = ("index.parquet", "splits.parquet", "failures.parquet")
    foreign = sorted(f.name for f in target.iterdir() if f.name not in own and f.suffix != ".safetensors")
    if foreign:
        raise FileExistsError(f"{target} also holds {foreign[0]!r}, not part of a store; choose another path")


def write_store(
    path: str | os.PathLike[str],
    store: EmbeddingStore,
    *,
    dtype: str | Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a store (of a view: only the embeddings it refers to) to ``path``, atomically.

    ``dtype`` is "float32", "float16" or "int8" (one scale a row), one for all or {modality: dtype}; by
    default each modality keeps its own. Written to a folder beside ``path`` and swapped in, so an error or a
    kill leaves ``path`` as it was. Returns the path. Raises FileExistsError if ``path`` exists, unless
    ``overwrite`` and it holds a store.
    """
    chosen = dict.fromkeys(store.modalities, dtype) if dtype is None or isinstance(dtype, str) else dict(dtype)
    for name, kind in chosen.items():
        if name not in store.modalities:
            raise ValueError(f"dtype names modality {name!r}; the store has {', '.join(store.modalities)}")
        if kind is not None and kind not in DTYPES:
            raise ValueError(f"dtype {kind!r} is not supported; choose one of {', '.join(DTYPES)}")
    check_replaceable(path, overwrite=overwrite)
    index = store.index
    with atomic_folder(path, overwrite=overwrite) as folder:
        for name in store.modalities:
            modality, rows = store._modality(name), store.rows(name)
            used = np.unique(rows[rows >= 0])
            new = np.where(rows < 0, -1, np.searchsorted(used, rows))
            if len(new) != len(used) or (new != np.arange(len(new))).any():
                index = index.append_column(f"row_{name}", pa.array(new, pa.int64()))
            kept = torch.from_numpy(used)
            kind = chosen.get(name)
            target = modality.data.dtype if kind is None else DTYPES[kind]
            write_modality(
                folder / f"{name}.safetensors",
                _encoded(modality, kept, target),
                (len(used), *modality.data.shape[1:]),
                target,
                lengths=None if modality.lengths is None else modality.lengths[kept],
                encoder=modality.encoder,
            )
        write_index(folder / "index.parquet", index)
    return Path(path)


def _encoded(
    modality: Modality, kept: torch.Tensor, target: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    step = next((len(part) for part in modality.chunks()), 1)
    for start in range(0, len(kept), step):
        part = kept[start : start + step]
        if modality.data.dtype is target:  # copied as stored: int8 is not rounded a second time
            yield (
                modality.data.index_select(0, part),
                None if modality.scale is None else modality.scale[part],
            )
        else:
            yield quantize(modality.gather(part), target)


def _in_memory(name: str, array: Array, lengths: Array | None, encoder: str) -> Modality:
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        array = array.copy()  # torch warns about read-only memory
    data = torch.as_tensor(array).detach().cpu()
    if not data.is_floating_point():
        raise TypeError(f"array for {name!r} must be floating point; got {data.dtype}")
    if data.dtype not in DTYPES.values():
        data = data.float()
    counts = None if lengths is None else torch.as_tensor(lengths).cpu().to(torch.int64)
    modality = Modality(data, None, counts, encoder)
    check_modality(modality, f"modality {name!r}")
    return modality
