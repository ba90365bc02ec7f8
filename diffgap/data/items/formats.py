"""Known data sets, from their own csv files: AudioCaps, Clotho, VGGSound.

Clips whose file is not there are not listed; how many were found is said in the notes, against the official counts.
The files are looked for anywhere in the media folder; files below a folder called like a split belong to that split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffgap.data.items._checked import Located, Notes
from diffgap.data.items._clips import Found, MediaIndex, split_tables
from diffgap.data.items._names import SPLIT_OF, printable
from diffgap.data.items._rows import caption_items, texts_of
from diffgap.data.items._tables import read_csv
from diffgap.data.media import Source

_SECONDS = 10  # of a clip of AudioSet, and so of AudioCaps and VGGSound

# Clips. AudioCaps: distinct youtube_ids of dataset/{train,val,test}.csv in github.com/cdjkim/audiocaps; WavCaps' lists,
# which published numbers often go by: github.com/XinhaoMei/WavCaps, retrieval. Clotho 2.1: zenodo.org/records/4783391.
# VGGSound: lines of data/test.csv in github.com/hche11/VGGSound; that repository gives no other number.
OFFICIAL = {
    ("AudioCaps", "train"): 49_838,
    ("AudioCaps", "val"): 495,
    ("AudioCaps", "test"): 975,
    ("Clotho", "train"): 3_839,
    ("Clotho", "val"): 1_045,
    ("Clotho", "test"): 1_045,
    ("VGGSound", "test"): 15_446,
}
_WAVCAPS = {("AudioCaps", "val"): 494, ("AudioCaps", "test"): 957}


def audiocaps(source: Path, media: Path | None, whole: bool) -> Callable[[Notes], Iterator[Located]]:
    """Scan of AudioCaps: an item a caption, a group a clip (five captions in val and test).

    Files may be called by the video's id, with "Y" before it or not, with the start and end in seconds or
    milliseconds behind it ("abc_30", "abc_000030", "abc_30_40", "abc_30000_40000"), or by the audiocap_id. All are
    taken to be the 10 s already, as the downloaders cut them, and ``start_time`` is not applied again. With ``whole``
    a file called by the video's id alone is the whole video, and the 10 s from ``start_time`` are read.
    """
    tables = split_tables(source, ("train.csv", "val.csv", "test.csv"))
    index = MediaIndex(media or _folder(source))

    def scan(notes: Notes) -> Iterator[Located]:
        tally = _Tally("AudioCaps", index, notes)
        for split, path in tables.items():
            for where, row in _checked(path, ("audiocap_id", "youtube_id", "start_time", "caption")):
                clip, start = row["youtube_id"].strip(), _start(row["start_time"], where)
                stems = [*_cut_names(clip, start), f"Y{clip}", clip, row["audiocap_id"].strip()]
                found = tally.find(split, clip, stems, where)
                columns: dict[str, Any] = {"youtube_id": clip, "start_time": start}
                if found:
                    sources = _sources(found, clip if whole else "", start)
                    texts = texts_of(row["caption"], where)
                    for item in caption_items(row["audiocap_id"].strip(), clip, split, sources, texts, columns):
                        yield item, where
            tally.say(split, path)

    return scan


def clotho(source: Path, media: Path | None) -> Callable[[Notes], Iterator[Located]]:
    """Scan of Clotho: five items ("split/name#1" ...) and a group a clip; development is train, evaluation is test."""
    tables = split_tables(source, (f"clotho_captions_{s}.csv" for s in ("development", "validation", "evaluation")))
    index = MediaIndex(media or _folder(source))
    captions = [f"caption_{n}" for n in range(1, 6)]

    def scan(notes: Notes) -> Iterator[Located]:
        tally = _Tally("Clotho", index, notes)
        for split, path in tables.items():
            for where, row in _checked(path, ("file_name", *captions)):
                name = row["file_name"]
                stem = printable(name).removesuffix(".wav")
                found = tally.find(split, name, [stem, stem.strip()], where)
                if found:
                    texts = texts_of([row[c] for c in captions], where)
                    id = f"{split}/{stem}"
                    for item in caption_items(id, id, split, _sources(found), texts, {"file_name": name}):
                        yield item, where
            tally.say(split, path)

    return scan


def vggsound(source: Path, media: Path | None, whole: bool) -> Callable[[Notes], Iterator[Located]]:
    """Scan of VGGSound: an item and a group a clip, for video against audio is retrieved clip by clip.

    The label is the text and the column "caption"; the same label is one text for all its clips. Files are called by
    the id and the start ("abc_000030", "abc_30", ...); with ``whole`` also by the id alone, and are then the whole
    video, of which the 10 s from the start are read. The csv knows train and test only.
    """
    path = source / "vggsound.csv" if source.is_dir() else source
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; take it from github.com/hche11/VGGSound, data/vggsound.csv")
    index = MediaIndex(media or path.parent)

    def scan(notes: Notes) -> Iterator[Located]:
        tally = _Tally("VGGSound", index, notes)
        splits = set()
        for where, row in read_csv(path, names=("id", "start", "label", "split")):
            clip, start, split = row["id"].strip(), _start(row["start"], where), SPLIT_OF.get(row["split"].strip())
            if split is None:
                raise ValueError(f"{where}: split {row['split']!r:.40} is unknown; train or test is expected")
            splits.add(split)
            name = f"{clip}_{start:06d}"
            found = tally.find(split, name, [*_cut_names(clip, start), *([clip] if whole else [])], where)
            if found:
                sources, texts = _sources(found, clip, start), texts_of(row["label"], where)
                for item in caption_items(name, name, split, sources, texts, {"youtube_id": clip, "start_time": start}):
                    yield item, where
        for split in sorted(splits):
            tally.say(split, path)

    return scan


class _Tally:
    """Looks clips up and counts them, by split."""

    def __init__(self, dataset: str, index: MediaIndex, notes: Notes) -> None:
        self._dataset, self._index, self._notes = dataset, index, notes
        self._listed: dict[str, set[str]] = {}
        self._found: dict[str, set[str]] = {}
        for line in index.notes.lines:
            notes.say(line)

    def find(self, split: str, clip: str, stems: list[str], where: str) -> dict[str, Found]:
        found = self._index.find(split, stems)
        first_time = clip not in self._listed.setdefault(split, set())
        self._listed[split].add(clip)
        if found:
            self._found.setdefault(split, set()).add(clip)
        elif first_time:
            looked = ", ".join(map(repr, stems))
            self._notes.add(f"clips without a file in {self._index.folder}", f"{where}, looked for {looked}")
        return found

    def say(self, split: str, path: Path) -> None:
        """ "AudioCaps test: 940 of 975 clips found (957 in WavCaps' list)"."""
        listed, key = len(self._listed.get(split, ())), (self._dataset, split)
        official = OFFICIAL.get(key, listed)
        line = f"{self._dataset} {split}: {len(self._found.get(split, ())):,} of {official:,} clips found"
        if key in _WAVCAPS:
            line += f" ({_WAVCAPS[key]:,} in WavCaps' list)"
        self._notes.say(line + (f"; {path.name} itself lists {listed:,}" if listed != official else ""))


def _cut_names(clip: str, start: int) -> list[str]:
    stop = start + _SECONDS
    behind = (f"{start}", f"{start:06d}", f"{start}_{stop}", f"{start * 1000}_{stop * 1000}", f"{start}.000_{stop}.000")
    return [f"{before}{clip}_{times}" for before in ("", "Y") for times in behind]


def _sources(found: Mapping[str, Found], whole: str = "", start: int = 0) -> dict[str, Source]:
    """``whole``: the name of a file that is the whole video, of which 10 s from ``start`` count."""
    return {
        modality: Source(path=file.path, start=float(start), stop=float(start + _SECONDS))
        if file.stem == whole
        else Source(path=file.path)
        for modality, file in found.items()
    }


def _checked(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, str]]]:
    for where, row in read_csv(path):
        missing = [name for name in columns if name not in row]
        if missing:
            raise ValueError(f"{path}: column {missing[0]!r} is missing; it has {', '.join(row)}. Is it another file?")
        yield where, row


def _start(text: str, where: str) -> int:
    try:
        start = float(text)
    except ValueError:
        start = -1.0
    if start < 0 or start != int(start):
        raise ValueError(f"{where}: start {text!r:.40} must be whole seconds >= 0")
    return int(start)


def _folder(source: Path) -> Path:
    return source if source.is_dir() else source.parent
