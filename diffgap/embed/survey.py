"""A first pass over an item list: is it sound, which media are the same, and is it the list of an earlier run?"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from diffgap.data._schema import REQUIRED_COLUMNS, SPLITS, TEXT_COLUMNS
from diffgap.data.items import Item, ItemList
from diffgap.data.media import Source

_KEY_BYTES = 16
_KINDS: Mapping[type, str] = {str: "text", int: "numbers", float: "numbers", bool: "true or false"}


@dataclass(frozen=True)
class Survey:
    """What a first pass over N items found.

    Attributes:
        count: N.
        digest: Changes whenever an id, a source, a column or the order does.
        owners: By modality (N,) int64: the first item that has the same source as item i, which is i itself for every
            source that is embedded; -1 where item i lacks the modality.
    """

    count: int
    digest: str
    owners: Mapping[str, npt.NDArray[np.int64]]

    def distinct(self, modality: str) -> npt.NDArray[np.bool_]:
        """(N,): whether the item is the first to have its source."""
        return self.owners[modality] == np.arange(self.count)


def survey(items: ItemList, modalities: Sequence[str]) -> Survey:
    """Passes over the items once, in memory 16 bytes an item and modality beside 16 an id.

    Raises:
        ValueError: No items, or other than ``len(items)``; an id that is empty or twice there, an empty group, an
            unknown split; columns that an index cannot hold; a modality that no item has.
    """
    digest, ids = blake2b(digest_size=_KEY_BYTES), bytearray()
    keys = {name: bytearray() for name in modalities}
    holders: dict[str, list[int]] = {name: [] for name in modalities}
    kinds: dict[str, str] = {}
    offered: set[str] = set()
    count = 0
    for item in items:
        _check_item(item, kinds)
        ids += _key(item.id)
        record: list[object] = [item.id, item.group, item.split, sorted(item.columns.items())]
        for name in modalities:
            if name in item.media:
                key = source_key(item.media[name])
                keys[name] += key
                holders[name].append(count)
                record.append((name, key))
        offered.update(item.media)
        digest.update(repr(record).encode())
        count += 1
    if not count:
        raise ValueError(f"{items.description}: there are no items; check the path and the format")
    if count != len(items):
        raise ValueError(f"{items.description}: {count} items came where {len(items)} were announced; they must agree")
    for name in modalities:
        if not holders[name]:
            have = ", ".join(sorted(offered)) or "no media at all"
            raise ValueError(f"{items.description}: no item has modality {name!r}; they have {have}")
    _, first = np.unique(_rows(ids), return_index=True)
    if len(first) < count:
        twice = np.setdiff1d(np.arange(count), first)
        name = next(itertools.islice(items, int(twice[0]), None)).id
        raise ValueError(f"{items.description}: {len(twice)} ids repeat, the first {name!r}; every item needs its own")
    owners = {}
    for name in modalities:
        owners[name] = np.full(count, -1, dtype=np.int64)
        _, first, inverse = np.unique(_rows(keys[name]), return_index=True, return_inverse=True)
        where = np.array(holders[name], dtype=np.int64)
        owners[name][where] = where[first[inverse]]
    return Survey(count, digest.hexdigest(), owners)


def source_key(source: Source) -> bytes:
    """16 bytes that are equal for equal sources."""
    path = None if source.path is None else os.fspath(source.path)
    data = None if source.data is None else blake2b(source.data).hexdigest()
    part = (source.offset, source.size, source.suffix, source.start, source.stop)
    return _key(repr((path, source.text, data, part)))


def _key(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES).digest()


def _rows(keys: bytearray) -> npt.NDArray[np.bytes_]:
    return np.frombuffer(keys, dtype=f"S{_KEY_BYTES}")


def _check_item(item: Item, kinds: dict[str, str]) -> None:
    """Whatever an index would refuse hours later; ``kinds`` holds what the columns have been so far."""
    for name, text in (("id", item.id), ("group", item.group)):
        if not isinstance(text, str) or not text:
            raise ValueError(f"item {item.id!r} has {name} {text!r}; every item needs a text that is not empty")
    if item.split not in SPLITS:
        raise ValueError(f"item {item.id!r} has split {item.split!r}; use one of {', '.join(SPLITS)}")
    for name, value in item.columns.items():
        if name in REQUIRED_COLUMNS or name.startswith("row_"):
            raise ValueError(f"item {item.id!r} has a column {name!r}, which the index keeps for itself; rename it")
        kind = _KINDS.get(type(value))
        if kind is None or (name in TEXT_COLUMNS and kind != "text"):
            expected = "text" if name in TEXT_COLUMNS else "text or a number"
            raise ValueError(f"item {item.id!r} has {name}={value!r}; the column takes {expected}")
        if kinds.setdefault(name, kind) != kind:
            raise ValueError(f"item {item.id!r} has {name}={value!r}, where earlier items have {kinds[name]}; use one")
