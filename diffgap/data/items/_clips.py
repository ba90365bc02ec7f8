"""Where the clips of a known data set are: names that downloaders give, looked up in one pass over the folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from diffgap.data.items._checked import Notes
from diffgap.data.items._names import MODALITY_OF, SPLIT_OF, SUFFIXES, printable
from diffgap.data.items.folder import walk

_SPLIT_FOLDERS = {**SPLIT_OF, "development": "train"}  # Clotho's name for what it trains on
_RANK = {suffix: rank for suffixes in SUFFIXES.values() for rank, suffix in enumerate(suffixes)}


@dataclass(frozen=True)
class Found:
    """A file of a clip, and which of the names looked for it has."""

    path: Path
    stem: str


class MediaIndex:
    """Audio and video files below ``folder`` by their name without suffix; about 150 bytes a file.

    A file below a folder called like a split is found for that split only, any other for all.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"media folder {folder} does not exist or is no folder; check the path")
        self.folder, self.notes = folder, Notes()
        # A file is a number of its (folder, suffix), which are few, under its stem: no path is held.
        self._places: list[tuple[str, str]] = []
        self._files: dict[str, dict[str, int]] = {"audio": {}, "video": {}}
        self._raw: dict[str, str] = {}  # stems that ``printable`` changed
        numbers: dict[tuple[str, str], int] = {}
        for relative, names in walk(folder, self.notes):
            split = next((s for part in PurePath(relative).parts if (s := _SPLIT_FOLDERS.get(part.lower()))), "")
            for name in names:
                stem, suffix = os.path.splitext(name)
                files = self._files.get(MODALITY_OF.get(suffix.lower(), ""))
                if files is None:
                    continue
                key = f"{split}/{printable(stem)}"
                known = files.get(key)
                if known is not None and _RANK[self._places[known][1].lower()] <= _RANK[suffix.lower()]:
                    continue
                number = numbers.setdefault((relative, suffix), len(self._places))
                if number == len(self._places):
                    self._places.append((relative, suffix))
                files[key] = number
                if printable(stem) != stem:
                    self._raw[f"{number}/{printable(stem)}"] = stem

    def find(self, split: str, stems: Sequence[str]) -> dict[str, Found]:
        """{"audio": ..., "video": ...}: of each, the file with the first of ``stems`` that is there, if one is.

        A video is the audio too where there is no file of its own.
        """
        found = {}
        for modality, files in self._files.items():
            for key, stem in ((f"{folder}/{stem}", stem) for stem in stems for folder in (split, "")):
                if key in files:
                    relative, suffix = self._places[files[key]]
                    raw = self._raw.get(f"{files[key]}/{stem}", stem)
                    found[modality] = Found(self.folder / relative / (raw + suffix), stem)
                    break
        if "video" in found:
            found.setdefault("audio", found["video"])
        return found


def split_tables(source: Path, names: Iterable[str]) -> dict[str, Path]:
    """{split: csv} of a folder, or of one csv, by the words of the file's name ("clotho_captions_validation.csv").

    Raises FileNotFoundError if there is none, ValueError if one split has two.
    """
    single = not source.is_dir()
    paths = [source] if single else sorted(source.glob("*.csv"))
    tables: dict[str, Path] = {}
    for path in paths:
        splits = {s for word in path.stem.lower().replace("-", "_").split("_") if (s := _SPLIT_FOLDERS.get(word))}
        if len(splits) == 1 and path.is_file():
            other = tables.setdefault(split := splits.pop(), path)
            if other != path:
                raise ValueError(f"{source}: both {other.name} and {path.name} are the {split} split; keep one of them")
    if not tables:
        raise FileNotFoundError(
            f"{source} is or holds none of {', '.join(names)}; they come from the data set's own site"
        )
    return {split: tables[split] for split in ("train", "val", "test") if split in tables}
