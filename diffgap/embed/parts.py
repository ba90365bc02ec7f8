"""A part: what became of one chunk of items, in a folder that appears whole or not at all.

index.parquet            id, group, split and columns of every item, whatever became of its media
<modality>.safetensors   "embeddings" (R, D) or (R, T, D) as the store will hold them, "scale" of int8 rows, "lengths"
                         of sequences, "items" (R,) int64: the item that owns each; no file where R is 0
failures.parquet         item, modality, source, reason, message of every medium that could not be embedded
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from diffgap._files import atomic_folder
from diffgap.data._modality import dequantize, quantize
from diffgap.data._schema import REQUIRED_COLUMNS, TEXT_COLUMNS
from diffgap.data.items import Item
from diffgap.data.media import MediaError, Source

FloatArray = npt.NDArray[np.float32]
_TEXTS = ("modality", "source", "reason", "message")
_FAILURE = pa.schema([("item", pa.int64()), *((name, pa.string()) for name in _TEXTS)])


class Failure(NamedTuple):
    """Why the medium that item ``item`` was the first to have is not embedded."""

    item: int
    modality: str
    source: str
    reason: str
    message: str


@dataclass
class Part:
    """Embeddings and failures of one chunk, as they come in.

    ``rows`` holds vectors (D,) or sequences (length, D) by modality, ``owners`` the items and sources they belong to.
    """

    rows: dict[str, list[FloatArray]] = field(default_factory=dict)
    owners: dict[str, list[tuple[int, Source]]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def add(self, modality: str, item: int, source: Source, row: FloatArray) -> None:
        """Keeps an embedding."""
        self.rows.setdefault(modality, []).append(row)
        self.owners.setdefault(modality, []).append((item, source))

    def fail(self, modality: str, item: int, source: Source, error: MediaError) -> None:
        """Keeps the reason why there is none."""
        self.failures.append(Failure(item, modality, str(source), error.reason, str(error)))

    def write(self, path: Path, items: Sequence[Item], dtypes: Mapping[str, torch.dtype]) -> None:
        """Writes the part of a chunk's ``items``; embeddings that no store takes, NaN or all zero, become failures."""
        with atomic_folder(path) as folder:
            for modality in self.rows:
                tensors = self._tensors(modality, dtypes[modality])
                if len(tensors["items"]):
                    (folder / f"{modality}.safetensors").write_bytes(save(tensors))
            self.failures.sort()
            failures = pa.Table.from_pylist([failure._asdict() for failure in self.failures], _FAILURE)
            pq.write_table(failures, folder / "failures.parquet")
            pq.write_table(_index(items), folder / "index.parquet")

    def _tensors(self, modality: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        rows, owners = self.rows[modality], self.owners[modality]
        tensors = {"items": torch.tensor([item for item, _ in owners])}
        if rows[0].ndim == 2:
            lengths = torch.tensor([len(row) for row in rows])
            values = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)
            tensors["lengths"] = lengths
        else:
            values = torch.from_numpy(np.stack(rows))
        stored, scale = quantize(values, dtype)
        tensors["embeddings"] = stored
        if scale is not None:
            tensors["scale"] = scale
        peak = dequantize(stored, scale).flatten(1).abs().amax(1)
        sound = peak.isfinite() & (peak > 0)
        for at in (~sound).nonzero()[:, 0].tolist():
            item, source = owners[at]
            what = "all zero" if peak[at] == 0 else f"not finite as {str(dtype).removeprefix('torch.')}"
            self.fail(modality, item, source, MediaError("not finite", f"{source}: its embedding is {what}"))
        return {name: tensor[sound].contiguous() for name, tensor in tensors.items()}


def _index(items: Sequence[Item]) -> pa.Table:
    columns: dict[str, pa.Array] = {}
    for name in REQUIRED_COLUMNS:
        columns[name] = pa.array([getattr(item, name) for item in items], pa.string())
    for name in dict.fromkeys(name for item in items for name in item.columns):
        values = [item.columns.get(name) for item in items]
        columns[name] = pa.array(values, pa.string() if name in TEXT_COLUMNS else None)
    return pa.table(columns)


def read_tensors(path: Path, *names: str) -> dict[str, torch.Tensor]:
    """Those of the tensors named that a part's modality file has."""
    with undamaged(path.parent), safe_open(path, framework="pt") as handle:
        return {name: handle.get_tensor(name) for name in names if name in handle.keys()}  # noqa: SIM118


def read_table(path: Path) -> pa.Table:
    """A table of a part."""
    with undamaged(path.parent):
        return pq.read_table(path)


@contextmanager
def undamaged(part: Path) -> Iterator[None]:
    """Says which part it is that cannot be read, and what to do."""
    try:
        yield
    except (SafetensorError, pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{part} is damaged ({reason}); delete that folder and run again, to make it anew") from error
