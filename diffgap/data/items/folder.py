"""A folder of media: files with the same path up to their suffix belong together.

    dog/bark.wav  dog/bark.txt  dog/bark.png     one item "dog/bark" with audio, text and image
    cat.mp4                                      one item "cat" with video, and its sound as audio
    cat.mp4  cat.wav                             ... the audio is cat.wav
    rain.wav  rain.1.txt  rain.2.txt             two items "rain#1", "rain#2" of one group: two captions
    train/...  val/...  test/...                 the split; elsewhere it is drawn by the hash of the group

A .txt is one text, however many lines it has. ``rain.1.txt`` is a caption of ``rain`` only if there is a medium of that
name and ``rain.1`` is nothing but text. Names that differ only in how accents are composed are the same name.

Hidden files and folders are skipped. A link to a file is followed if the file is inside of the folder; links that lead
out of it, and all links to folders (which would list files twice, or for ever), are not, and are noted. The order is
that of the names' UTF-8 bytes, folder by folder, whatever the file system or the locale says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from diffgap.data.items._checked import Located, Notes
from diffgap.data.items._names import MODALITY_OF, media_by_suffix, numbered, printable, split_named
from diffgap.data.items._rows import caption_items
from diffgap.data.media import Source


def scan_folder(folder: Path, notes: Notes) -> Iterator[Located]:
    """One item, or one a caption, for each path without its suffix."""
    for relative, names in walk(folder, notes):
        stems: dict[str, list[str]] = {}
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in MODALITY_OF:
                stems.setdefault(printable(stem), []).append(name)
            else:
                notes.add("files of no known kind", repr(os.path.join(relative, name)))
        captions = _numbered_captions(stems)
        place = folder / relative
        prefix = "".join(f"{printable(part)}/" for part in Path(relative).parts)
        split = split_named(prefix.split("/")[0]) if prefix else ""
        for stem, files in stems.items():
            by_suffix: dict[str, Source] = {}
            for name in files:
                source = Source(path=place / name)
                by_suffix.setdefault(source.suffix, source)
            media = media_by_suffix(by_suffix)
            used = {source.path for source in media.values()}
            for name in files:
                if place / name not in used:
                    notes.add("files beside a better one of their kind and name", repr(os.path.join(relative, name)))
            own = [media.pop("text")] if "text" in media else []
            texts = own + [Source(path=place / name) for _, name in sorted(captions.get(stem, ()))]
            key = prefix + stem
            for item in caption_items(key, key, split, media, texts):
                yield item, str(place / stem)


def _numbered_captions(stems: dict[str, list[str]]) -> dict[str, list[tuple[int, str]]]:
    """Takes the files ``stem.N.txt`` that are captions of ``stem`` out of ``stems``; gives [(N, name)] by stem."""

    def only_text(files: list[str]) -> bool:
        return all(name.lower().endswith(".txt") for name in files)

    captions: dict[str, list[tuple[int, str]]] = {}
    for stem in list(stems):
        found = numbered(stem)
        if found is not None and only_text(stems[stem]) and not only_text(stems.get(found[0], [])):
            captions.setdefault(found[0], []).extend((found[1], name) for name in stems.pop(stem))
    return captions


def walk(folder: Path, notes: Notes) -> Iterator[tuple[str, list[str]]]:
    """(folder relative to ``folder``, its regular files), in the order of names; one folder is held at a time."""
    root = os.path.realpath(folder)
    waiting = [""]
    while waiting:
        relative = waiting.pop()
        files, folders = [], []
        try:
            with os.scandir(folder / relative) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.name)
                    elif reason := _refused(entry, root):
                        notes.add(reason, repr(os.path.join(relative, entry.name)))
                    else:
                        files.append(entry.name)
        except OSError as error:
            if not relative:
                raise ValueError(f"{folder} cannot be listed: {error.strerror}") from None
            notes.add("folders that cannot be listed", f"{relative!r}: {error.strerror}")
            continue
        if files:
            yield relative, sorted(files, key=_order)
        waiting += [os.path.join(relative, name) for name in sorted(folders, key=_order, reverse=True)]


def _order(name: str) -> tuple[bytes, bytes]:
    return printable(name).encode(), os.fsencode(name)


def _refused(entry: os.DirEntry[str], root: str) -> str:
    """Why a directory entry that is no folder is not listed; "" if it is."""
    try:
        if entry.is_symlink():
            if entry.is_dir():
                return "links to folders, which are not followed (name the folder itself as the source)"
            if os.path.commonpath([root, os.path.realpath(entry.path)]) != root:
                return (
                    "links that lead out of the folder, which are not followed (copy the files, or list their folder)"
                )
        return "" if entry.is_file() else "neither files nor folders"
    except OSError:
        return "links that lead nowhere"
