"""WebDataset shards: tar files whose members are listed where they lie. Nothing is ever extracted.

Members that follow one another and share a key make a sample; the key is the name up to the first dot of its base
name, what is behind that dot says what a member is (WebDataset's rule, https://github.com/webdataset/webdataset):

    dog.wav .png .mp4 ...   media, by suffix; a video is the audio too where there is none of its own
    dog.txt  dog.1.txt ...  a text; several make an item each
    dog.json                texts (text, caption or captions) where there is no .txt; group, split; columns
    dog.cls                 a class number, column "cls"

An item's id is "shard/key", its column "key" the key. Its split is that of the json, else the folder or first word of
the shard ("train-000.tar"), else drawn by the hash of the group. Names in a tar, absolute ones and ".." among them,
are only ever labels. Links, devices and sparse members have no bytes of their own in one place and are left out, with
a note. Of a shard that is cut off, all samples but the last are listed: nobody can know whether that one is whole.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from diffgap.data.items._checked import Located, Notes
from diffgap.data.items._names import MODALITY_OF, media_by_suffix, numbered, printable, split_named
from diffgap.data.items._rows import caption_items, kept_columns, texts_of
from diffgap.data.media import Source

_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")
_COMPRESSED = re.compile(rb"(\x1f\x8b)|(BZh[1-9]1AY&SY)|(\xfd7zXZ)|(\x28\xb5\x2f\xfd)")
_UNPACK = ("gunzip", "bunzip2", "unxz", "unzstd")
_LONGEST_JSON = 1 << 20
_MOST_SHARDS = 1_000_000
_BLOCK = 512


@dataclass
class Sample:
    """Members of one key: suffix without the dot, lower case -> where the bytes are."""

    key: str
    members: dict[str, Source] = field(default_factory=dict)


def find_shards(source: str) -> list[Path]:
    """Tar files that a path, a folder, a glob or braces ("a-{000..009}.tar", "{train,val}.tar") name, in order.

    A folder's are its own and those of its folders train, val, test. Raises FileNotFoundError for what is not
    there, ValueError for what cannot be read in place.
    """
    if os.path.isdir(source):
        found = shards_of_folder(source)
    elif not os.path.exists(source):
        found = [path for name in expand_braces(source) for path in _existing(name)]
    else:
        found = [source]
    if not found:
        raise FileNotFoundError(f"{source} holds no .tar; check the path")
    shards = [Path(path) for path in sorted(set(found), key=os.fsencode)]
    for shard in shards:
        _refuse_compressed(shard)
    return shards


def shards_of_folder(folder: str | os.PathLike[str]) -> list[str]:
    """The .tar files of a folder and of those in it that are called like a split, hidden ones apart."""
    folders = [os.fspath(folder), *(os.path.join(folder, name) for name in os.listdir(folder) if split_named(name))]
    paths = (os.path.join(place, n) for place in folders if os.path.isdir(place) for n in os.listdir(place))
    return [p for p in paths if p.endswith(".tar") and not os.path.basename(p).startswith(".") and os.path.isfile(p)]


def expand_braces(pattern: str) -> list[str]:
    """Bash's expansion of ``{a,b}`` and ``{000..127}`` (numbers only)."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices, total = [], 1
    for position, part in enumerate(parts):
        numbers = re.fullmatch(r"(\d+)\.\.(\d+)", part) if position % 2 else None
        if numbers:
            first, last = int(numbers[1]), int(numbers[2])
            total *= abs(last - first) + 1
            if total > _MOST_SHARDS:
                raise ValueError(f"{pattern} names more than {_MOST_SHARDS:,} shards; check its numbers")
            width = max(map(len, numbers.groups())) if part.startswith("0") or numbers[2].startswith("0") else 0
            steps = range(first, last + 1) if first <= last else range(first, last - 1, -1)
            choices.append([f"{n:0{width}d}" for n in steps])
        else:
            choices.append(part.split(",") if position % 2 else [part])
    return ["".join(chosen) for chosen in product(*choices)]


def _existing(name: str) -> list[str]:
    found = glob.glob(name) if glob.has_magic(name) else [name] * os.path.isfile(name)
    if not found:
        raise FileNotFoundError(f"shard {name} does not exist; check the path and the numbers in braces")
    return found


def _refuse_compressed(shard: Path) -> None:
    with open(shard, "rb") as file:
        packed = _COMPRESSED.match(file.read(16))
    if packed or not shard.name.endswith(".tar"):
        command = _UNPACK[packed.lastindex - 1] if packed and packed.lastindex else "gunzip"
        raise ValueError(
            f"{shard} is not a plain .tar, and members of a compressed one cannot be read where they lie; unpack it "
            f"once: {command} {shard}"
        )


def scan_shards(shards: list[Path], notes: Notes) -> Iterator[Located]:
    """Items of the samples of all shards."""
    root = os.path.commonpath([shard.parent for shard in shards])
    for shard in shards:
        name = printable(os.path.relpath(shard, root)).removesuffix(".tar")
        words = [*name.split("/")[:-1], re.split(r"[^A-Za-z]", name.split("/")[-1])[0]]
        split = next(filter(None, map(split_named, words)), "")
        with open(shard, "rb") as file:
            for sample in samples(shard, notes):
                for item in _items(sample, name, split, file.fileno(), notes):
                    yield item, f"{shard}, {item.id!r}"


def samples(shard: Path, notes: Notes) -> Iterator[Sample]:
    """Samples of one shard, in order, by WebDataset's rule."""
    current: Sample | None = None
    for member in _members(shard, notes):
        if member is None:  # cut off: the sample at hand may lack members
            return
        match = _KEY.match(member.name)
        if _META.match(member.name) or match is None:
            continue
        key, suffix = match[1], match[2].lower()
        if current is None or key != current.key:
            if current is not None:
                yield current
            current = Sample(key)
        if suffix in current.members:
            notes.add("members twice in a sample, the second left out", f"{shard}, {printable(member.name)!r}")
            continue
        ending = suffix.rpartition(".")[2]
        current.members[suffix] = Source(path=shard, offset=member.offset_data, size=member.size, suffix=f".{ending}")
    if current is not None:
        yield current


def _members(shard: Path, notes: Notes) -> Iterator[tarfile.TarInfo | None]:
    """Regular members; None, then nothing, where the shard breaks off."""
    size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            end = 0
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]
                plain = member.isreg() and not member.issparse()
                stop = member.offset_data + (member.size if plain else 0)
                if member.size < 0 or member.offset < end or stop > size:
                    break
                end = stop
                if plain:
                    yield member
                elif not member.isdir():
                    reason = "members that are links, devices or sparse files, left out"
                    notes.add(reason, f"{shard}, {printable(member.name)!r}")
            else:
                if _ends_at(shard, tar.offset):
                    return
        reason = "it is cut off"
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        reason = str(error)
    notes.add("shards that are damaged, listed up to there but for the last sample", f"{shard}: {reason}")
    yield None


def _ends_at(shard: Path, offset: int) -> bool:
    with open(shard, "rb") as file:
        file.seek(offset)
        return file.read(_BLOCK) == bytes(_BLOCK)


def _items(sample: Sample, shard: str, split: str, descriptor: int, notes: Notes) -> Iterator[Any]:
    key = printable(sample.key).removeprefix("./")
    id = f"{shard}/{key}"
    members = sample.members
    row = _json(members["json"], descriptor, id, notes) if "json" in members else {}
    media = media_by_suffix({f".{suffix}": source for suffix, source in members.items() if f".{suffix}" in MODALITY_OF})
    texts = [media.pop("text")] if "text" in media else []
    captions = [(found[1], members[s]) for s in members if s.endswith(".txt") and (found := numbered(f"_.{s[:-4]}"))]
    texts += [source for _, source in sorted(captions, key=lambda caption: caption[0])]
    columns = {n: v for n, v in kept_columns(row, notes, id).items() if n not in ("id", "key")} | {"key": key}
    if not texts:
        texts = texts_of(next((row[c] for c in ("text", "caption", "captions") if c in row), None), id)
    if "cls" in members:
        label = _bytes(members["cls"], descriptor)[:20].strip()
        if label.isdigit():
            columns["cls"] = int(label)
    group = row.get("group")
    named = split_named(str(row.get("split", "")))
    yield from caption_items(
        id, group if isinstance(group, str) and group else id, named or split, media, texts, columns
    )


def _bytes(source: Source, descriptor: int) -> bytes:
    return os.pread(descriptor, source.size or 0, source.offset)


def _json(source: Source, descriptor: int, id: str, notes: Notes) -> dict[str, Any]:
    if (source.size or 0) <= _LONGEST_JSON:
        try:
            row = json.loads(_bytes(source, descriptor))
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            return row
    notes.add(f".json members that are no object of at most {_LONGEST_JSON:,} bytes, not read", repr(id))
    return {}
