"""What names mean: which modality a suffix is, which split a folder is, how an odd name becomes text."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from diffgap.data.media import Source

# Where one medium is there in several formats the first in its row is taken: lossless before lossy, pixels before svg.
SUFFIXES = {
    "audio": (".wav", ".flac", ".aiff", ".aif", ".au", ".caf", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".aac", ".wma"),
    "image": (".png", ".tiff", ".tif", ".bmp", ".webp", ".jpg", ".jpeg", ".gif", ".svg"),
    "video": (".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".mpg", ".mpeg", ".ogv", ".flv", ".wmv", ".3gp"),
    "text": (".txt",),
}
MODALITIES = tuple(SUFFIXES)
MODALITY_OF = {suffix: modality for modality, suffixes in SUFFIXES.items() for suffix in suffixes}
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {name: split for split, names in _SPLIT_NAMES.items() for name in names}
_NUMBERED = re.compile(r"(.+)\.(\d+)", re.DOTALL)


def split_named(name: str) -> str:
    """The split that a folder, a file or a column calls ``name``, in any case; "" if it is none."""
    return SPLIT_OF.get(name.lower(), "")


def printable(name: str) -> str:
    """A file name as text for the index: NFC, and bytes that are not UTF-8 as ``\\xNN``.

    Systems disagree about composing accents, so without NFC one data set would have two lists of ids.
    """
    if name.isascii():
        return name
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))


def media_by_suffix(files: Mapping[str, Source]) -> dict[str, Source]:
    """Modalities of files that share a name, by suffix; a video is the audio too where there is none of its own."""
    media = {}
    for modality, suffixes in SUFFIXES.items():
        found = next((suffix for suffix in suffixes if suffix in files), None)
        if found is not None:
            media[modality] = files[found]
    if "video" in media:
        media.setdefault("audio", media["video"])
    return media


def numbered(stem: str) -> tuple[str, int] | None:
    """("bark", 2) for "bark.2", the stem of the second of several captions; None without a number."""
    match = _NUMBERED.fullmatch(stem)
    return (match[1], int(match[2])) if match and len(match[2]) < 10 else None


class MediaFolder:
    """Resolves the paths that a list names: every one lies in ``folder``, or is refused.

    The rule goes by the words of the path: it is joined to ``folder``, ``..`` and ``.`` are taken out, and what is left
    must start with ``folder``; an absolute path must do so too. ``folder`` = ``/`` therefore allows all. Links
    inside of the folder are its owner's and are followed.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"media folder {folder} does not exist or is no folder; check the path")
        self.folder = os.path.abspath(folder)
        self._inside = self.folder.rstrip(os.sep) + os.sep

    def resolve(self, name: str, where: str) -> Path:
        """Raises ValueError, with ``where``, for a path out of the folder, a URL and a NUL byte."""
        if "\0" in name or "://" in name:
            kind = "a URL; download it first" if "://" in name else "no path: it holds a NUL byte"
            raise ValueError(f"{where}: {name!r:.80} is {kind}")
        path = os.path.normpath(os.path.join(self.folder, name))
        if not path.startswith(self._inside):
            raise ValueError(
                f"{where}: {name!r:.200} is not in the media folder {self.folder}; give media (--media) the folder "
                f"that holds all of them, '/' to allow every path"
            )
        return Path(path)
