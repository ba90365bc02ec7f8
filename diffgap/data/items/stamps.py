"""The recordings of the Tux Paint stamps as items, from Debian's package of the media.

apt-get download tuxpaint-stamps-default=2022.06.04-1
dpkg-deb -x tuxpaint-stamps-default_2022.06.04-1_all.deb DIR
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from diffgap.data.items import Item
from diffgap.data.media import Source
from diffgap.data.stamps import STAMPS_FOLDER

__all__ = ["EXCLUDED", "HOW_TO_GET", "LANGUAGES", "Stamp", "StampItems", "bundled_parts", "find_media", "scan"]

PACKAGE = "tuxpaint-stamps-default"
VERSION = "2022.06.04-1"
MEDIA_SHA256 = "91d5d12f3fc951f555127d8ebf5821381deed7f4c4cdb55c52f2d17e26675ff6"
HOW_TO_GET = f"apt-get download {PACKAGE}={VERSION} && dpkg-deb -x {PACKAGE}_*.deb DIR"
# The other four languages have under 100 recordings each.
LANGUAGES = ("be", "bg", "ca", "da", "el", "es", "fr", "ro", "ru")
EXCLUDED = "symbols"  # letters of both cases and languages share recordings: not concepts of their own


@dataclass(frozen=True)
class Stamp:
    """One stamp: its name is the path below the stamps folder without a suffix."""

    name: str
    caption: str
    image: Path
    recordings: dict[str, Path] = field(repr=False)

    @property
    def folder(self) -> str:
        return self.name.rpartition("/")[0]

    @property
    def category(self) -> str:
        return self.name.partition("/")[0]


def find_media(root: Path) -> Path:
    """The stamps folder below an extracted package (or that folder itself), after its digest was checked.

    Raises ValueError for other media.
    """
    below = root / "usr/share/tuxpaint/stamps"
    media = below if below.is_dir() else root
    files = sorted(p for p in media.rglob("*") if p.suffix in {".txt", ".png", ".svg", ".ogg"})
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(media).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest())
    if digest.hexdigest() != MEDIA_SHA256:
        raise ValueError(
            f"{media}: its {len(files)} media files are not those of {PACKAGE} {VERSION}; get them with: {HOW_TO_GET}"
        )
    return media


def scan(media: Path) -> list[Stamp]:
    """Stamps with a text, a picture and a recording, by name; mirrored and flipped variants are left out."""
    stamps = []
    for text in sorted(media.rglob("*.txt")):
        if text.stem.endswith(("_mirror", "_flip")):
            continue
        pictures = [p for suffix in (".png", ".svg") if (p := text.with_suffix(suffix)).is_file()]
        spoken = {lang: text.with_name(f"{text.stem}_desc_{lang}.ogg") for lang in LANGUAGES}
        spoken = {lang: path for lang, path in spoken.items() if path.is_file()}
        if pictures and spoken:
            name = text.relative_to(media).with_suffix("").as_posix()
            caption = text.read_text(encoding="utf-8").splitlines()[0].strip()
            stamps.append(Stamp(name, caption, pictures[0], spoken))
    return stamps


def bundled_parts() -> dict[str, str]:
    """The part (train, val or test) of every caption in the bundled set's first list."""
    table = pq.read_table(STAMPS_FOLDER / "splits.parquet", columns=["group", "concept_0"])
    return dict(zip(*(column.to_pylist() for column in table.columns), strict=True))


class StampItems:
    """One item per recording of ``stamps``: audio, its English caption as text, and the stamp's picture as image.

    A caption that ``parts`` does not have is in "train".
    """

    def __init__(self, stamps: Sequence[Stamp], parts: Mapping[str, str]) -> None:
        self._stamps, self._parts = stamps, parts
        self.description = f"{PACKAGE} {VERSION}"
        self.notes: list[str] = []

    def __len__(self) -> int:
        return sum(len(stamp.recordings) for stamp in self._stamps)

    def __iter__(self) -> Iterator[Item]:
        # The same recording under two languages would be centred twice, so it is one source per language.
        first: dict[tuple[bytes, str], Path] = {}
        for stamp in self._stamps:
            for language, path in sorted(stamp.recordings.items()):
                content = hashlib.sha256(path.read_bytes()).digest()
                media = {
                    "audio": Source(path=first.setdefault((content, language), path)),
                    "text": Source(text=stamp.caption),
                    "image": Source(path=stamp.image),
                }
                columns = {
                    "caption": stamp.caption,
                    "source": self.description,
                    "language": language,
                    "category": stamp.category,
                    "folder": stamp.folder,
                    "image_file": stamp.name + stamp.image.suffix,
                }
                split = self._parts.get(stamp.caption, "train")
                yield Item(f"{stamp.name}_desc_{language}", stamp.caption, split, media, columns)
