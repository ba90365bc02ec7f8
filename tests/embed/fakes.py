"""An item list, readers and encoders small enough to know what must come out."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diffgap.data.items import Item
from diffgap.data.media import MediaError, Source


@dataclass
class Listed:
    """Items in memory."""

    items: Sequence[Item]
    description: str = "a list"
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)


@dataclass(frozen=True)
class BytesReader:
    """A file's bytes, or a text's; what they begin with can make reading go wrong."""

    description: str = "bytes"
    seconds: float = 0.0

    def __call__(self, source: Source) -> bytes:
        if source.text is not None:
            content = source.text.encode()
        else:
            with source.open() as file:
                content = file.read()
        time.sleep(self.seconds)
        if content.startswith(b"crash"):
            os._exit(11)
        if content.startswith(b"hang"):
            time.sleep(1000)
        if content.startswith(b"broken"):
            raise MediaError("undecodable", f"{source} is broken")
        if content.startswith(b"fault"):
            raise KeyError("a fault in the reader")
        if content.startswith(b"package"):
            raise ModuleNotFoundError("package av is not installed; run: pip install av")
        return content


@dataclass
class HashEncoder:
    """Numbers in -1..1 from the digest of the bytes; sequences of as many frames as the first byte says, modulo 5."""

    modality: str = "audio"
    dim: int = 8
    sequence: bool = False
    normalized: bool = False
    fingerprint: str = "hash:1"
    space: str = ""
    reader: BytesReader = BytesReader()
    batches: list[int] = field(default_factory=list)

    def one(self, content: bytes) -> np.ndarray:
        if content.startswith(b"nan"):
            return np.full(self.dim, np.nan, dtype=np.float32)
        if content.startswith(b"zero"):
            return np.zeros(self.dim, dtype=np.float32)
        seed = int.from_bytes(hashlib.sha256(content + self.modality.encode()).digest()[:8], "little")
        return np.random.default_rng(seed).uniform(-1, 1, self.dim).astype(np.float32)

    def frames(self, content: bytes) -> np.ndarray:
        return np.stack([self.one(content + bytes([t])) for t in range(1 + content[-1] % 5)])

    def encode(self, batch: Sequence[bytes]) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        self.batches.append(len(batch))
        if any(content.startswith(b"refused") for content in batch):
            raise MediaError("too short", "the encoder refuses it")
        if not self.sequence:
            return np.stack([self.one(content) for content in batch])
        rows = [self.frames(content) for content in batch]
        lengths = np.array([len(row) for row in rows])
        padded = np.zeros((len(rows), lengths.max(), self.dim), dtype=np.float32)
        for at, row in enumerate(rows):
            padded[at, : len(row)] = row
        return padded, lengths


def make_items(folder: Path, count: int, per_group: int = 1, content: str = "sound") -> Listed:
    """``count`` files and captions; every ``per_group`` items share a file, and every third group its caption."""
    folder.mkdir(exist_ok=True, parents=True)
    items = []
    for number in range(count):
        group = number // per_group
        file = folder / f"{group:05d}.bin"
        if not file.exists():  # another process may be reading what it wrote
            file.write_text(f"{content} {group}")
        text = f"caption {number}" if group % 3 else f"caption of every third {group % 2}"
        media = {"audio": Source(path=file), "text": Source(text=text)}
        split = ("train", "val", "test")[group % 3]
        items.append(Item(f"item-{number}", f"group {group}", split, media, {"caption": text, "number": number}))
    return Listed(items)


def encoders(**options: object) -> dict[str, HashEncoder]:
    return {name: HashEncoder(modality=name, fingerprint=f"hash-{name}:1", **options) for name in ("audio", "text")}  # type: ignore[arg-type]


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file by name."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}
