"""Items gone through once before any of them is embedded: counted, told apart, each column of one type."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from diffgap.data._schema import SPLITS
from diffgap.data.importers import assign_splits
from diffgap.data.items import Item

Located: TypeAlias = tuple[Item, str]
_CHUNK = 1024
_KEY_BYTES = 16


class Notes:
    """Lines about what is not listed: one a reason, with its count and its first example."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._counts: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def say(self, line: str) -> None:
        self._lines.append(line)

    def add(self, reason: str, example: str) -> None:
        self._counts[reason] = self._counts.get(reason, 0) + 1
        self._first.setdefault(reason, example)

    @property
    def lines(self) -> list[str]:
        return self._lines + [f"{reason}: {n:,} (first: {self._first[reason]})" for reason, n in self._counts.items()]


class CheckedItems:
    """The :class:`~diffgap.data.items.ItemList` over a ``scan`` that yields (item, where it stands).

    The constructor makes one pass. What it keeps of an item is 33 bytes: the hashes of its id and group, its split.

    ``scan`` gives an empty ``split`` where the source names none: it is then drawn by the hash of the group with the
    shares ``fractions``. Media of other modalities than ``modalities`` (all, if None) are left out, and so is an item
    without any. A column with integers and floats becomes floats, so that parts of a run agree in their types.

    Raises:
        ValueError: no item is left; a modality asked for is nowhere; an id twice (both places are named); an id or
            group that is empty or no text; a column that holds both text and numbers, or integers beyond 64 bits.
    """

    def __init__(
        self,
        what: str,
        scan: Callable[[Notes], Iterator[Located]],
        modalities: Sequence[str] | None,
        fractions: Sequence[float],
        seed: int,
    ) -> None:
        self._what, self._scan, self._wanted = what, scan, None if modalities is None else frozenset(modalities)
        self._fractions, self._seed = tuple(fractions), seed
        self._types: dict[str, type] = {}
        self._notes = Notes()
        ids, groups, splits = bytearray(), bytearray(), bytearray()
        contents = hashlib.blake2b(digest_size=8)
        counts = dict.fromkeys(modalities or (), 0)
        for item, where in self._items(self._notes):
            try:
                self._check(item, where)
                ids += hashlib.blake2b(item.id.encode(), digest_size=_KEY_BYTES).digest()
                groups += hashlib.blake2b(item.group.encode(), digest_size=_KEY_BYTES).digest()
                contents.update(_identity(item))
            except UnicodeEncodeError as error:
                raise ValueError(f"{where}: {error.object!r:.80} is no text (half of a surrogate pair)") from None
            splits.append(SPLITS.index(item.split))
            for modality in item.media:
                counts[modality] = counts.get(modality, 0) + 1
        self._count = len(splits)
        self._refuse_absent(counts)
        self._refuse_repeated(_equal_neighbours(ids))
        self._note_leaks(_equal_neighbours(groups), np.frombuffer(splits, np.uint8))
        held = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
        self.description = f"{what} ({held}; contents {contents.hexdigest()})"

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        """Raises RuntimeError at the end if the source has another number of items than when it was checked."""
        count = 0
        for count, (item, _) in enumerate(self._items(Notes()), 1):  # noqa: B007
            floats = {n: float(v) for n, v in item.columns.items() if self._types.get(n) is float}
            yield replace(item, columns={**item.columns, **floats}) if floats else item
        if count != self._count:
            raise RuntimeError(f"{self._what} changed: {self._count:,} items when it was checked, {count:,} now")

    @property
    def notes(self) -> list[str]:
        return self._notes.lines

    def _items(self, notes: Notes) -> Iterator[Located]:
        """Items with the media that are wanted, and a split each."""
        located = self._scan(notes)
        while chunk := list(islice(located, _CHUNK)):
            drawn = assign_splits([item.group for item, _ in chunk], self._fractions, seed=self._seed)
            for (item, where), split in zip(chunk, drawn, strict=True):
                media: Mapping[str, object] = item.media
                if self._wanted is not None and not self._wanted >= media.keys():
                    item = replace(item, media={m: s for m, s in item.media.items() if m in self._wanted})
                if not item.media:
                    asked = ", ".join(sorted(self._wanted)) if self._wanted else "audio, image, video and text"
                    notes.add(f"items that hold none of {asked}", where)
                    continue
                yield (item if item.split else replace(item, split=split)), where

    def _check(self, item: Item, where: str) -> None:
        if not item.id or not item.group:
            raise ValueError(f"{where}: {'id' if not item.id else 'group'} is empty; give every item one")
        if item.split not in SPLITS:
            raise ValueError(f"{where}: split {item.split!r} is unknown; use {', '.join(SPLITS)}")
        for name, value in item.columns.items():
            kind = type(value)
            known = self._types.setdefault(name, kind)
            if kind is int and not -(1 << 63) <= value < 1 << 63:  # type: ignore[operator]
                raise ValueError(f"{where}: {name!r} = {value} does not fit 64 bits; make the column text")
            if kind is not known:
                if str in (kind, known):
                    raise ValueError(
                        f"{where}: column {name!r} holds text here and numbers elsewhere; make it one kind"
                    )
                self._types[name] = float

    def _refuse_absent(self, counts: Mapping[str, int]) -> None:
        notes = "".join(f"; {line}" for line in self._notes.lines)
        if not self._count:
            raise ValueError(f"{self._what} holds nothing to embed{notes}")
        absent = [name for name, count in counts.items() if not count]
        if absent:
            found = ", ".join(sorted(set(counts) - set(absent)))
            raise ValueError(f"{self._what}: no item has {absent[0]!r}, only {found}; ask for what is there{notes}")

    def _refuse_repeated(self, pairs: npt.NDArray[np.int64]) -> None:
        if not len(pairs):
            return
        rows = sorted(pairs[pairs[:, 1].argmin()].tolist())
        places = {}
        for row, (item, where) in enumerate(islice(self._items(Notes()), rows[1] + 1)):
            if row in rows:
                places[row] = f"{where} (id {item.id!r})"
        raise ValueError(
            f"{self._what}: {len(pairs):,} ids are repeated, the first at {places[rows[0]]} and {places[rows[1]]}; "
            f"give every item its own id"
        )

    def _note_leaks(self, pairs: npt.NDArray[np.int64], splits: npt.NDArray[np.uint8]) -> None:
        leaks = int((splits[pairs[:, 0]] != splits[pairs[:, 1]]).sum()) if len(pairs) else 0
        if leaks:
            self._notes.say(
                f"groups have items in more than one split ({leaks:,} times): what is trained on is also tested on"
            )


def _identity(item: Item) -> bytes:
    """Everything about an item but the folder its media are in, so that moved data stay the same data.

    Raises UnicodeEncodeError for what the index, which is UTF-8, cannot hold.
    """
    parts = [item.id, item.group, item.split]
    for name, value in sorted(item.columns.items()):
        parts += [name, str(value)]
    for name, source in sorted(item.media.items()):
        parts += [name, source.text or "", repr(source.path and source.path.name)]
        parts.append(f"{source.offset} {source.size} {source.start} {source.stop}")
    return "\0".join((*parts, "")).encode()


def _equal_neighbours(keys: bytearray) -> npt.NDArray[np.int64]:
    """Pairs (n, 2) of rows with equal 16-byte keys that follow one another; row numbers rise within a pair."""
    halves = np.frombuffer(keys, np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable
    ordered = halves[order]
    same = np.flatnonzero((ordered[1:] == ordered[:-1]).all(axis=1))
    return np.stack([order[same], order[same + 1]], axis=1)
