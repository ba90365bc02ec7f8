"""All parts of a run into one embedding store, part by part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from diffgap._files import atomic_folder
from diffgap.data._modality import DTYPES, Modality, write_modality
from diffgap.data._schema import check_index, write_index
from diffgap.embed.folder import PartsFolder, Plan
from diffgap.embed.parts import Failure, read_table, read_tensors
from diffgap.embed.report import NOT_LISTED
from diffgap.embed.survey import Survey
from diffgap.encoders import Encoder

_PLAN_KEY = b"diffgap_embed_plan"
_FAILURES = pa.schema([(name, pa.string()) for name in ("id", "modality", "source", "reason", "message")])
Flags = npt.NDArray[np.bool_]


def plan_of(store: Path) -> str | None:
    """``Plan.key`` of the run that made a store; None where none did."""
    try:
        metadata = pq.read_schema(store / "failures.parquet").metadata or {}
    except (OSError, pa.ArrowException):
        return None
    key = metadata.get(_PLAN_KEY)
    return None if key is None else key.decode()


def merge(
    folder: PartsFolder,
    plan: Plan,
    listed: Survey,
    encoders: Mapping[str, Encoder],
    output: Path,
    *,
    least: int,
    overwrite: bool,
) -> None:
    """Writes the store: rows of items with at least ``least`` embeddings, and the embeddings that those rows refer to.

    Raises:
        ValueError: No medium of a modality was embedded, or no row is left; or embeddings that are all alike.
        OSError: The store cannot be written.
    """
    parts = [folder.part(number) for number in range(plan.parts)]
    failures = {(f.modality, f.item): f for part in parts for f in _failures(part)}
    lengths = {name: np.zeros(plan.count, dtype=np.int64) for name in encoders}  # 0: not embedded
    for part in parts:
        for name in encoders:
            tensors = _tensors(part, name, "items", "lengths")
            if tensors:
                lengths[name][tensors["items"].numpy()] = tensors.get("lengths", torch.ones(())).numpy()
    there: dict[str, Flags] = {}
    for name, owners in listed.owners.items():
        there[name] = (owners >= 0) & (lengths[name][owners] > 0)
        if not there[name].any():
            raise ValueError(_nothing(f"no {name} medium could be embedded", failures, folder, name))
    kept = np.sum(list(there.values()), axis=0) >= least
    if not kept.any():
        raise ValueError(_nothing(f"no item has {least} modalities that could be embedded", failures, folder))

    rows, used = {}, {}
    for name, owners in listed.owners.items():
        used[name] = np.zeros(plan.count, dtype=bool)
        used[name][owners[kept & there[name]]] = True
        number = np.cumsum(used[name]) - 1
        rows[name] = np.where(there[name], number[owners], -1)[kept]
    shapes = {}
    for name, encoder in encoders.items():
        frames = (int(lengths[name][used[name]].max()),) if encoder.sequence else ()
        shapes[name] = (int(used[name].sum()), *frames, encoder.dim)

    tables: list[pa.Table] = []
    failed: list[dict[str, Any]] = []
    for at, part in enumerate(parts):
        table = read_table(part / "index.parquet")
        span = slice(at * plan.chunk, at * plan.chunk + table.num_rows)
        here = {name: owners[span] for name, owners in listed.owners.items()}
        failed += _failed(table["id"].to_pylist(), here, failures, kept[span], least)
        tables.append(table.filter(pa.array(kept[span])))
    index = pa.concat_tables(tables, promote_options="permissive")
    for name in encoders:
        if not np.array_equal(rows[name], np.arange(shapes[name][0])):
            index = index.append_column(f"row_{name}", pa.array(rows[name], pa.int64()))
    check_index(index, {name: Modality(torch.empty(shape, device="meta")) for name, shape in shapes.items()}, "index")

    with folder.explained(), atomic_folder(output, overwrite=overwrite, within=folder.path) as store:
        for name, encoder in encoders.items():
            held = torch.from_numpy(lengths[name][used[name]]) if encoder.sequence else None
            stream = _stream(parts, name, used[name], shapes[name])
            try:
                write_modality(
                    store / f"{name}.safetensors", stream, shapes[name], DTYPES[plan.dtype[name]],
                    lengths=held, encoder=encoder.fingerprint,
                )  # fmt: skip
            except ValueError as error:
                raise ValueError(
                    f"{name} encoder {encoder.fingerprint!r}: {error}. The parts are kept in {folder.path}: put the "
                    "encoder right, delete them, and run again"
                ) from None
        table = pa.Table.from_pylist(failed, _FAILURES.with_metadata({_PLAN_KEY: plan.key()}))
        pq.write_table(table, store / "failures.parquet")
        write_index(store / "index.parquet", index)


def _tensors(part: Path, modality: str, *names: str) -> dict[str, torch.Tensor]:
    file = part / f"{modality}.safetensors"
    return read_tensors(file, *names) if file.is_file() else {}


def _failures(part: Path) -> Iterator[Failure]:
    for row in read_table(part / "failures.parquet").to_pylist():
        yield Failure(**row)


def _stream(
    parts: list[Path], modality: str, used: Flags, shape: tuple[int, ...]
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The embeddings of the parts that rows refer to, and their scales; sequences as long as the longest."""
    for part in parts:
        tensors = _tensors(part, modality, "items", "embeddings", "scale")
        if not tensors:
            continue
        picked = torch.from_numpy(used)[tensors["items"]]
        data = tensors["embeddings"][picked]
        if data.dim() == 3:
            padded = data.new_zeros(len(data), *shape[1:])
            frames = min(data.shape[1], shape[1])  # the longest of the part may be of no row
            padded[:, :frames] = data[:, :frames]
            data = padded
        yield data, tensors["scale"][picked] if "scale" in tensors else None


def _failed(
    ids: list[str],
    owners: Mapping[str, npt.NDArray[np.int64]],
    failures: Mapping[tuple[str, int], Failure],
    kept: Flags,
    least: int,
) -> Iterator[dict[str, Any]]:
    """Rows of the table of failures, of one part's items in their order."""
    for at, name in enumerate(ids):
        found = [f for modality in owners if (f := failures.get((modality, int(owners[modality][at]))))]
        for failure in found:
            yield {"id": name, **{k: v for k, v in failure._asdict().items() if k != "item"}}
        if not found and not kept[at]:
            lacking = [modality for modality in owners if owners[modality][at] < 0]
            has = ", ".join(modality for modality in owners if modality not in lacking) or "none of the modalities"
            message = f"it lists {has} and no {', '.join(lacking)}; a row needs {least}"
            yield {"id": name, "modality": lacking[0], "source": "", "reason": NOT_LISTED, "message": message}


def _nothing(
    what: str, failures: Mapping[tuple[str, int], Failure], folder: PartsFolder, modality: str | None = None
) -> str:
    """One line with the commonest reason."""
    of = [failure for failure in failures.values() if modality in (None, failure.modality)]
    if not of:
        return f"{what}: no item lists so many; ask for fewer modalities"
    reason, count = Counter(failure.reason for failure in of).most_common(1)[0]
    example = next(failure.message for failure in of if failure.reason == reason)
    return (
        f"{what}; the commonest reason is {reason!r} ({count} of {len(of)}), as in: {example}. Put it right, delete "
        f"{folder.path}, and run again"
    )
