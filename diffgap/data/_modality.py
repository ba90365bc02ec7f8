"""Modality files of an embedding store and the checks of their rows.

A modality file is plain safetensors, read by the safetensors package (memory-mapped). It is written here by
hand because that package wants the whole tensor at once: the header is fixed by the shape, so rows can be
streamed behind it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

FORMAT_VERSION = "1"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
_HEADER_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.int8: "I8", torch.int64: "I64"}
_MODALITY = re.compile(r"[a-z][a-z0-9_]*")
_CHUNK_ELEMENTS = 1 << 22
_ALIKE_SAMPLE = 512
_ALIKE_COSINE = 0.999
_NAMED_ROWS = 5


@dataclass(frozen=True)
class Modality:
    """Rows of one modality as stored: (R, D) or (R, T, D), scales of int8 rows, lengths of sequences."""

    data: torch.Tensor
    scale: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    encoder: str = ""

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows as float32, in new memory; zeros in the frames beyond a sequence's length, whatever is stored there."""
        values = dequantize(self.data.index_select(0, rows), None if self.scale is None else self.scale[rows])
        return values if self.lengths is None else without_padding(values, self.lengths[rows])

    def chunks(self) -> Iterator[torch.Tensor]:
        """Runs of row numbers, each of about 16 MB of float32."""
        row = max(1, self.data[:1].numel())
        yield from torch.arange(len(self.data)).split(max(1, _CHUNK_ELEMENTS // row))


def validate_modality_name(name: str) -> str:
    """The name becomes a file name and a column name, so nothing but ``[a-z][a-z0-9_]*`` is let through."""
    if not isinstance(name, str) or not _MODALITY.fullmatch(name):
        raise ValueError(f"modality name {name!r} must match [a-z][a-z0-9_]*, for example 'audio' or 'text_2'")
    return name


def dequantize(data: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Stored values as float32: ``data * scale`` for int8 rows, a cast for the rest."""
    values = data.to(torch.float32)
    return values if scale is None else values * scale.view(-1, *([1] * (data.dim() - 1)))


def without_padding(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sequences (n, T, D) with zeros in the frames from ``lengths`` (n,) on."""
    return values.masked_fill((torch.arange(values.shape[1]) >= lengths[:, None])[..., None], 0.0)


def quantize(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values as ``dtype``; int8 takes one symmetric scale a row, ``scale = max|x| / 127``."""
    if dtype is not torch.int8:
        return values.to(dtype), None
    flat = values.float().flatten(1)
    # A row that is zero or not finite keeps scale 0 or nan: RowCheck counts it after dequantisation.
    scale = flat.abs().amax(1) / 127
    quantized = (flat / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).nan_to_num().round()
    return quantized.to(torch.int8).view(values.shape), scale


class RowCheck:
    """Counts degenerate rows while they stream by: not finite, too large to be normalised, all zero, or all alike.

    A row of n values is too large if one is above sqrt(float32's greatest / n): the square of its norm may overflow.
    "Alike" is a mean pairwise cosine above 0.999 over up to 512 rows at equal distances,
    (|sum u|^2 - n) / (n (n - 1)) for unit rows u: what a text tower with a broken tokenizer gives.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        #: What is wrong: how many rows, and the first of them.
        self._bad: dict[str, tuple[int, list[int]]] = {}
        self._seen = 0
        self._stride = -(-total // _ALIKE_SAMPLE) or 1
        self._sample: list[torch.Tensor] = []

    def add(self, values: torch.Tensor, lengths: torch.Tensor | None = None) -> None:
        """Adds float32 rows (n, D) or (n, T, D), the latter with lengths (n,); padding does not count."""
        values = values if lengths is None else without_padding(values, lengths)
        peak = values.flatten(1).abs().amax(1) if values.shape[0] else values.new_zeros(0)
        limit = (torch.finfo(torch.float32).max / max(1, values[:1].numel())) ** 0.5
        for what, bad in (
            ("NaN or infinite", ~peak.isfinite()),
            (f"too large (above {limit:.1g})", peak.isfinite() & (peak > limit)),
            ("all zero", peak == 0),
        ):
            count, first = self._bad.get(what, (0, []))
            found = bad.nonzero().flatten()
            named = (found[: _NAMED_ROWS - len(first)] + self._seen).tolist()
            self._bad[what] = (count + len(found), first + named)
        picked = torch.arange(-self._seen % self._stride, len(values), self._stride)
        self._seen += len(values)
        rows = values[picked]
        self._sample.append((rows.sum(1) if rows.dim() == 3 else rows).double())

    def finish(self, where: str) -> None:
        """Raises one ValueError with the count and the first rows, counted from 0, if the rows are degenerate."""
        for what, (count, rows) in self._bad.items():
            if count:
                named = ", ".join(map(str, rows)) + (" ..." if count > len(rows) else "")
                raise ValueError(
                    f"{where}: {count} of {self.total} embeddings are {what}; drop or re-embed them: rows {named} "
                    "(counted from 0)"
                )
        units = torch.nn.functional.normalize(torch.cat(self._sample), dim=1) if self._sample else torch.zeros(0, 1)
        n = len(units)
        if n < 2:
            return
        cosine = float((units.sum(0).square().sum() - n) / (n * (n - 1)))
        if cosine > _ALIKE_COSINE:
            raise ValueError(
                f"{where}: all {self.total} embeddings are alike (mean cosine {cosine:.4f} over {n}); "
                "the encoder has collapsed: check its tokenizer and weights"
            )


def check_modality(modality: Modality, where: str, *, rows: bool = True) -> None:
    """Raises ValueError for a wrong shape, dtype or length, and (``rows``) for degenerate rows."""
    data, scale, lengths = modality.data, modality.scale, modality.lengths
    if data.dim() not in (2, 3) or 0 in data.shape[1:]:
        raise ValueError(f"{where}: embeddings have shape {tuple(data.shape)}; expected (R, D) or (R, T, D)")
    if data.dtype not in DTYPES.values():
        raise ValueError(f"{where}: embeddings have dtype {data.dtype}; expected one of {', '.join(DTYPES)}")
    if (scale is not None) != (data.dtype is torch.int8):
        raise ValueError(f"{where}: 'scale' belongs to int8 embeddings and to no others; got {data.dtype}")
    for name, tensor, dtype in (("scale", scale, torch.float32), ("lengths", lengths, torch.int64)):
        if tensor is not None and (tensor.dtype is not dtype or tensor.shape != data.shape[:1]):
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{where}: {name!r} is {got}; expected {dtype} ({len(data)},)")
    if lengths is not None:
        if data.dim() != 3:
            raise ValueError(f"{where}: 'lengths' needs embeddings of shape (R, T, D); got {tuple(data.shape)}")
        bad = int(((lengths < 1) | (lengths > data.shape[1])).sum())
        if bad:
            raise ValueError(f"{where}: {bad} of {len(lengths)} lengths lie outside 1..{data.shape[1]}")
    if rows:
        check = RowCheck(len(data))
        for part in modality.chunks():
            check.add(modality.gather(part), None if lengths is None else lengths[part])
        check.finish(where)


def read_modality(path: Path) -> Modality:
    """Opens a modality file memory-mapped; the rows are read when they are gathered."""
    try:
        with safe_open(path, framework="pt") as handle:
            names, metadata = set(handle.keys()), handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in names & {"embeddings", "scale", "lengths"}}
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable safetensors file ({reason}); write the store again") from error
    if "embeddings" not in names:
        raise ValueError(f"{path}: holds no tensor 'embeddings', only {sorted(names)}; write it with write_store")
    check_version(metadata.get("format_version"), path)
    return Modality(tensors["embeddings"], tensors.get("scale"), tensors.get("lengths"), metadata.get("encoder", ""))


def check_version(version: str | None, path: Path) -> None:
    """Raises ValueError unless ``version`` is the format this package reads."""
    if version != FORMAT_VERSION:
        found = "no format version" if version is None else f"format version {version!r}"
        raise ValueError(f"{path}: {found}, this diffgap reads {FORMAT_VERSION!r}; convert it with `diffgap import`")


def write_modality(
    path: Path,
    chunks: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    lengths: torch.Tensor | None = None,
    encoder: str = "",
    source: str = "",
) -> None:
    """Streams ``(data, scale)`` chunks into a modality file of known shape and checks every row.

    ``source`` is where they come from, for the message of degenerate rows; the file by default.
    """
    count = shape[0]
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    # Widest items first, so that every tensor starts aligned to its item size.
    if lengths is not None:
        tensors["lengths"] = (torch.int64, (count,))
    if dtype is torch.int8:
        tensors["scale"] = (torch.float32, (count,))
    tensors["embeddings"] = (dtype, shape)
    header: dict[str, object] = {"__metadata__": {"format_version": FORMAT_VERSION, "encoder": encoder}}
    offsets, end = {}, 0
    for name, (kind, size) in tensors.items():
        offsets[name] = end
        end += torch.Size(size).numel() * kind.itemsize
        header[name] = {
            "dtype": _HEADER_NAMES[kind],
            "shape": list(size),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    base = len(text) + 8
    check, done, scales = RowCheck(count), 0, []
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(base + offsets["embeddings"])
        for data, scale in chunks:
            if tuple(data.shape[1:]) != shape[1:] or done + len(data) > count:
                raise ValueError(f"{path.name}: rows {tuple(data.shape)} at row {done} do not fit shape {shape}")
            part = None if lengths is None else lengths[done : done + len(data)]
            check.add(dequantize(data, scale), part)
            file.write(data.contiguous().numpy().data)
            done += len(data)
            if scale is not None:
                scales.append(scale)
        if done != count:
            raise ValueError(f"{path.name}: got {done} rows, expected {count}")
        for name, tensor in (("lengths", lengths), ("scale", torch.cat(scales) if scales else None)):
            if name in offsets and tensor is not None:
                file.seek(base + offsets[name])
                file.write(tensor.contiguous().numpy().tobytes())
        check.finish(source or path.name)
        file.flush()
        os.fsync(file.fileno())
