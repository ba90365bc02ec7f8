"""``list_items``: what a folder, a manifest, shards or a data set list, whichever of them it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from diffgap.data.items import ItemList
from diffgap.data.items import formats as known
from diffgap.data.items._checked import CheckedItems, Located, Notes
from diffgap.data.items._names import MODALITIES, MODALITY_OF
from diffgap.data.items._tables import TABLE_SUFFIXES
from diffgap.data.items.folder import scan_folder
from diffgap.data.items.huggingface import is_saved_dataset, scan_saved
from diffgap.data.items.manifest import scan_manifest
from diffgap.data.items.webdataset import expand_braces, find_shards, scan_shards, shards_of_folder

__all__ = ["FORMATS", "list_items"]

FORMATS = ("folder", "manifest", "webdataset", "huggingface", "audiocaps", "clotho", "vggsound")
_TAKE_COLUMNS = ("manifest", "huggingface")
_TAKE_MEDIA = ("manifest", "huggingface", "audiocaps", "clotho", "vggsound")
_TAKE_WHOLE = ("audiocaps", "vggsound")


def list_items(
    source: str | os.PathLike[str],
    *,
    format: str | None = None,
    media: str | os.PathLike[str] | None = None,
    modalities: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    whole: bool = False,
    split: Sequence[float] = (0.8, 0.1, 0.1),
    split_seed: int = 0,
) -> ItemList:
    """Items of ``source``, checked in one pass; no medium is opened.

    Args:
        source: A folder of media, a .csv, .tsv, .jsonl or .parquet manifest, WebDataset shards (.tar, a folder of
            them, a glob, braces), a folder of ``datasets``' save_to_disk, or the folder or csv of a known data set.
        format: One of ``FORMATS``. Recognised if None, but for the known data sets, which must be named.
        media: Folder that holds the media a list names (manifest, huggingface, audiocaps, clotho, vggsound), by
            default where the list is. Paths out of it are refused; "/" allows all.
        modalities: Which of audio, image, video and text to list, each of which must be there; None: what is there.
        columns: {role: column} where a manifest or data set calls its columns otherwise.
        whole: AudioCaps and VGGSound: files called by the video's id are whole videos, not yet the 10 s.
        split, split_seed: Shares of train, val and test, drawn by the hash of the group where no split is named.

    Raises:
        FileNotFoundError: a source, shard or folder is missing.
        ValueError: what is malformed, with file and line; see also :class:`~diffgap.data.items._checked.CheckedItems`.
    """
    name = os.fspath(source)
    if format is not None and format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown; choose one of {', '.join(FORMATS)}")
    for modality in modalities or ():
        if modality not in MODALITIES:
            raise ValueError(f"modality {modality!r} is unknown; choose among {', '.join(MODALITIES)}")
    if modalities is not None and not modalities:
        raise ValueError(f"modalities is empty; choose among {', '.join(MODALITIES)}")
    format = format or _recognised(name)
    for option, given, takers in (
        ("media", media is not None, _TAKE_MEDIA),
        ("columns", bool(columns), _TAKE_COLUMNS),
        ("whole", whole, _TAKE_WHOLE),
    ):
        if given and format not in takers:
            raise ValueError(f"{option} means nothing for {name!r}, a {format}; it is for {', '.join(takers)}")
    scan = _scan(name, format, None if media is None else Path(os.path.abspath(media)), columns or {}, whole)
    return CheckedItems(f"{format} {os.path.abspath(name)}", scan, modalities, split, split_seed)


def _scan(
    name: str, format: str, media: Path | None, columns: Mapping[str, str], whole: bool
) -> Callable[[Notes], Iterator[Located]]:
    if format == "webdataset":
        return partial(scan_shards, [Path(os.path.abspath(shard)) for shard in find_shards(name)])
    path = Path(os.path.abspath(name))
    if not path.exists():
        raise FileNotFoundError(f"source {name} does not exist; check the path")
    if format == "audiocaps":
        return known.audiocaps(path, media, whole)
    if format == "clotho":
        return known.clotho(path, media)
    if format == "vggsound":
        return known.vggsound(path, media, whole)
    if format == "manifest":
        if not path.is_file() or path.suffix.lower() not in TABLE_SUFFIXES:
            raise ValueError(f"{path} is no manifest; a file that ends in {', '.join(TABLE_SUFFIXES)} is")
        return lambda notes: scan_manifest(path, media, columns, notes)
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; {format} means one")
    if format == "huggingface":
        if not is_saved_dataset(path):
            raise ValueError(f"{path} holds neither state.json nor dataset_dict.json; save it with save_to_disk")
        return lambda notes: scan_saved(path, media, columns, notes)
    return partial(scan_folder, path)


def _recognised(name: str) -> str:
    path = Path(name)
    if path.is_dir():
        return "huggingface" if is_saved_dataset(path) else _kind_of_folder(path)
    lower = name.lower()
    if lower.endswith(TABLE_SUFFIXES) and path.is_file():
        return "manifest"
    if ".tar" in os.path.basename(lower) or lower.endswith(".tgz") or len(expand_braces(name)) > 1:
        return "webdataset"
    if not path.exists():
        raise FileNotFoundError(f"source {name} does not exist; check the path")
    raise ValueError(
        f"{name} is neither a folder, nor a table ({', '.join(TABLE_SUFFIXES)}), nor a .tar; give one of these, or "
        f"say what it is with format (--format)"
    )


def _kind_of_folder(folder: Path) -> str:
    if not shards_of_folder(folder):
        return "folder"
    if any(os.path.splitext(name)[1].lower() in MODALITY_OF for name in os.listdir(folder)):
        raise ValueError(f"{folder} holds both .tar shards and media; say which with format: webdataset or folder")
    return "webdataset"
