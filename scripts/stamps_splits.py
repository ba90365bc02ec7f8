"""Fixed train/val/test lists of the stamps: which captions stay together, and how the sets are filled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}


class LinkedSets:
    """Disjoint sets of names (union-find)."""

    def __init__(self, names: Iterable[str]) -> None:
        self._parent = {name: name for name in names}

    def find(self, name: str) -> str:
        while self._parent[name] != name:
            self._parent[name] = self._parent[self._parent[name]]
            name = self._parent[name]
        return name

    def link(self, a: str, b: str) -> None:
        self._parent[self.find(a)] = self.find(b)

    def sets(self) -> list[list[str]]:
        """The sets, each sorted, in the order of their first names."""
        found: dict[str, list[str]] = {}
        for name in sorted(self._parent):
            found.setdefault(self.find(name), []).append(name)
        return sorted(found.values())


def near_pairs(rows: npt.NDArray[np.float32], groups: Sequence[str], threshold: float) -> list[tuple[str, str, float]]:
    """Pairs of groups that hold rows of cosine >= ``threshold``, with the highest cosine, by name."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    best: dict[tuple[str, str], float] = {}
    for i, row in enumerate(unit):
        cosines = unit[i + 1 :] @ row
        for j in np.flatnonzero(cosines >= threshold):
            pair = (min(groups[i], groups[i + 1 + j]), max(groups[i], groups[i + 1 + j]))
            if pair[0] != pair[1]:
                best[pair] = max(best.get(pair, -1.0), float(cosines[j]))
    return [(a, b, cosine) for (a, b), cosine in sorted(best.items())]


def fill(sets: Sequence[Sequence[str]], seed: int) -> dict[str, str]:
    """Deals whole sets into train, val and test, 70/10/20 by the number of names; returns {name: part}.

    The largest sets go first (ties in random order), each to a part drawn with the chance of its remaining
    room.
    """
    generator = np.random.default_rng(seed)
    order = sorted(generator.permutation(len(sets)), key=lambda i: -len(sets[i]))
    total = sum(map(len, sets))
    room = {part: share * total for part, share in SHARES.items()}
    parts: dict[str, str] = {}
    for i in order:
        open_parts = [part for part in SHARES if room[part] >= len(sets[i])] or [max(room, key=room.__getitem__)]
        chances = np.array([room[part] for part in open_parts])
        part = open_parts[int(generator.choice(len(open_parts), p=chances / chances.sum()))]
        room[part] -= len(sets[i])
        parts |= dict.fromkeys(sets[i], part)
    return parts


def split_lists(groups: Mapping[str, set[str]], pairs: Iterable[tuple[str, str]], seeds: int) -> dict[str, list[str]]:
    """Columns of ``splits.parquet``: group, concept_0 .. and folder_0 .. (train, val or test).

    ``groups`` maps a group to the folders it occurs in and ``pairs`` names groups that must not be separated.
    The folder lists also keep folders whole; folders that share a group are one.
    """
    names = sorted(groups)
    concepts = LinkedSets(names)
    folders = LinkedSets([*names, *{f"folder {f}" for found in groups.values() for f in found}])
    for a, b in pairs:
        concepts.link(a, b)
        folders.link(a, b)
    for name, found in groups.items():
        for folder in found:
            folders.link(name, f"folder {folder}")
    whole = [[name for name in linked if name in groups] for linked in folders.sets()]
    columns: dict[str, list[str]] = {"group": names}
    for kind, sets in (("concept", concepts.sets()), ("folder", whole)):
        for seed in range(seeds):
            parts = fill(sets, seed)
            columns[f"{kind}_{seed}"] = [parts[name] for name in names]
    return columns
