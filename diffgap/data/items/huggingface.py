"""A folder that Hugging Face ``datasets`` saved by ``save_to_disk``, read by pyarrow alone.

What save_to_disk writes is Arrow: ``state.json`` names the files, ``dataset_info.json`` the features. Nothing is
decoded: bytes of an Audio, Image or Video feature become the run of bytes of the arrow file that they are, a path
becomes that file. The columns' roles are those of a manifest (``_rows``); media columns are found by their feature. A
DatasetDict's splits give the split.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa

from diffgap.data.items._checked import Located, Notes
from diffgap.data.items._names import MediaFolder, split_named
from diffgap.data.items._rows import check_columns, items_of_rows, refuse_unknown, renamed
from diffgap.data.media import Source

_FEATURES = {"Audio": "audio", "Image": "image", "Video": "video"}


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``folder`` is a Dataset or a DatasetDict on disk."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def scan_saved(folder: Path, media: Path | None, columns: Mapping[str, str], notes: Notes) -> Iterator[Located]:
    """Items of all splits; paths in it must lie in ``media``, by default the folder itself."""
    refuse_unknown(columns, "a data set's columns")
    files = MediaFolder(folder if media is None else media)
    if not (folder / "dataset_dict.json").is_file():
        yield from _scan_split(folder, files, columns, notes, prefix="", split="")
        return
    for name in _entry(folder / "dataset_dict.json", "splits", list):
        split = split_named(str(name))
        if not split:
            raise ValueError(
                f"{folder}: split {name!r} is none of train, validation and test; give the folder of one split "
                f"as the source"
            )
        place = MediaFolder(folder).resolve(name, str(folder))
        yield from _scan_split(place, files, columns, notes, prefix=f"{name}/", split=split)


def _scan_split(
    folder: Path, media: MediaFolder, columns: Mapping[str, str], notes: Notes, *, prefix: str, split: str
) -> Iterator[Located]:
    features = _entry(folder / "dataset_info.json", "features", dict)
    mapping = {**_found_by_feature(features, columns, folder), **columns}
    check_columns(list(features), mapping, str(folder))
    rows = ((where, renamed(row, mapping)) for where, row in _rows(folder, features))
    return items_of_rows(rows, media, notes, prefix=prefix, split=split)


def _found_by_feature(features: Mapping[str, Any], columns: Mapping[str, str], folder: Path) -> dict[str, str]:
    """{modality: column} for the media features that neither ``columns`` nor their own name tells."""
    found: dict[str, str] = {}
    for kind, modality in _FEATURES.items():
        names = [name for name in features if _type(features[name]) == kind]
        if modality in columns or modality in features:
            continue
        if len(names) > 1:
            raise ValueError(
                f"{folder}: columns {', '.join(names)} all hold {modality}; say which with columns (--column "
                f"{modality}={names[0]})"
            )
        found.update(dict.fromkeys([modality] * len(names), names[0] if names else ""))
    return found


def _rows(folder: Path, features: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    inside = MediaFolder(folder)
    labels = {name: feature.get("names") for name, feature in features.items() if _type(feature) == "ClassLabel"}
    media = {name for name, feature in features.items() if _type(feature) in _FEATURES}
    state = folder / "state.json"
    for entry in _entry(state, "_data_files", list):
        if not isinstance(entry, dict) or not isinstance(entry.get("filename"), str):
            raise ValueError(f"{state}: {entry!r:.80} names no file; save the data set again")
        path = inside.resolve(entry["filename"], str(state))
        try:
            with pa.memory_map(str(path)) as mapped:
                whole = mapped.read_buffer()
                number = 0
                for batch in pa.ipc.open_stream(pa.BufferReader(whole)):
                    batch.validate(full=True)  # offsets of a damaged file may point anywhere
                    columns = [_values(batch, name, name in media, path, whole) for name in batch.schema.names]
                    for values in zip(*columns, strict=True):
                        number += 1
                        row = dict(zip(batch.schema.names, values, strict=True))
                        for name, names in labels.items():
                            row[name] = _label(row.get(name), names, f"{path}, row {number}, {name!r}")
                        yield f"{path}, row {number}", row
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: not a readable arrow file ({str(error).splitlines()[0]}); save it again"
            ) from error


def _values(batch: pa.RecordBatch, name: str, medium: bool, path: Path, whole: pa.Buffer) -> Iterator[Any]:
    """Values of a column; of structs {bytes, path} the bytes where they lie in the mapped file, or else the path."""
    column = batch.column(name)
    if not medium:
        yield from (value.as_py() for value in column)
        return
    kind = column.type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0 or kind.get_field_index("path") < 0:
        raise ValueError(f"{path}: column {name!r} is {kind}, and media are {{bytes, path}}; save the data set again")
    content, names = column.field("bytes"), column.field("path")
    if not (pa.types.is_binary(content.type) or pa.types.is_large_binary(content.type)):
        raise ValueError(f"{path}: the bytes of column {name!r} are {content.type}; save the data set again")
    _, ends, data = content.buffers()
    width = np.int64 if pa.types.is_large_binary(content.type) else np.int32
    bounds = np.frombuffer(ends, width)[content.offset :] if ends else np.zeros(0, width)
    base = (data.address if data else whole.address) - whole.address
    for row in range(len(column)):
        name = names[row].as_py() or ""
        if not column[row].is_valid or not content[row].is_valid:
            yield name or None
            continue
        start, stop, suffix = base + int(bounds[row]), base + int(bounds[row + 1]), PurePath(name).suffix.lower()
        if 0 <= start <= stop <= whole.size:
            yield Source(path=path, offset=start, size=stop - start, suffix=suffix)
        else:  # a batch that is compressed is not in the file as such
            yield Source(data=content[row].as_py(), suffix=suffix)


def _type(feature: Any) -> str:
    """What a feature is called by ``datasets``; "" for lists and for what is none."""
    return str(feature.get("_type", "")) if isinstance(feature, dict) else ""


def _label(value: Any, names: Any, where: str) -> str | None:
    """The class of that number; None for none."""
    if value is None or (isinstance(value, int) and value < 0):
        return None
    if not isinstance(value, int) or not isinstance(names, list) or value >= len(names):
        raise ValueError(f"{where}: {value!r:.40} is the number of no class; save the data set again")
    return str(names[value])


def _entry(path: Path, name: str, kind: type) -> Any:
    """An entry of the JSON object in a file, which must be of that kind; an empty one where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({str(error)[:120]}); save the data set again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: no JSON object; save the data set again")
    value = content.get(name)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{path}: {name} is {value!r:.80}, no {kind.__name__}; save the data set again")
    return value or kind()
