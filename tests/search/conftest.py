"""A store with media, a run trained on it, and an index over both."""

from __future__ import annotations

import struct
import threading
import wave
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from diffgap.data.store import EmbeddingStore, write_store
from diffgap.search.index import SearchIndex, build_index
from diffgap.search.media import MediaFiles
from diffgap.search.server import SearchServer
from tests.helpers import run
from tests.synthetic import make_config, make_store

ENCODERS = {
    "text": "tests.search.encoders:Words",
    "audio": "tests.search.encoders:Tones",
    "image": "tests.search.encoders:Pictures",
}


@dataclass(frozen=True)
class Workshop:
    """Folders: the store, its media, a run, and an index of the run's audio with all encoders."""

    store: Path
    media: Path
    run: Path
    index: Path

    def open(self) -> SearchIndex:
        return SearchIndex.open(self.index)


def write_tone(path: Path, hertz: float, seconds: float = 0.3) -> None:
    time = np.arange(int(16_000 * seconds)) / 16_000
    samples = (8000 * np.sin(2 * np.pi * hertz * time)).astype("<i2")
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.tobytes())


def write_png(path: Path, colour: tuple[int, int, int], side: int = 16) -> None:
    rows = b"".join(b"\0" + bytes(colour) * side for _ in range(side))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def store_with_media(media: Path) -> EmbeddingStore:
    """The synthetic store of three modalities; rows 0 to 39 have a sound, all but each fifth a picture."""
    plain = make_store(("audio", "text", "image"))
    count = len(plain)
    columns: dict[str, list[str | None]] = {
        "id": [f"clip{i:02}" for i in range(count)],
        "group": list(plain.column("group")),
        "split": list(plain.column("split")),
        "caption": [f"sound <b>number</b> {i} & more" for i in range(count)],
        "path_audio": [f"sounds/{i:02}.wav" if i < 40 else None for i in range(count)],
        "image_file": [f"{i:02}.png" if i % 5 else None for i in range(count)],
    }
    for i in range(count):
        if i < 40:
            write_tone(media / f"sounds/{i:02}.wav", 200 + 20 * i)
        if i % 5:
            write_png(media / f"{i:02}.png", (3 * i % 256, 255 - 3 * i, 90))
    fingerprints = {name: f"{name}:1" for name in plain.modalities}
    arrays = {name: plain.embeddings(name) for name in plain.modalities}
    return EmbeddingStore.from_arrays(arrays, columns, encoders=fingerprints)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("search")
    found = Workshop(folder / "store", folder / "media", folder / "run", folder / "index")
    write_store(found.store, store_with_media(found.media))
    make_config(found.store, steps=2).save(folder / "run.yaml")
    assert run("train", found.run, "--config", folder / "run.yaml") == 0
    build_index(found.run, found.index, modality="audio", alpha=0.5, encoders=ENCODERS, media=found.media)
    return found


@contextmanager
def serving(workshop: Workshop, index: SearchIndex | None = None) -> Iterator[SearchServer]:
    """The workshop's index, or another, served from a thread."""
    index = workshop.open() if index is None else index
    media = MediaFiles(index.store, None if index.meta.media is None else Path(index.meta.media))
    with SearchServer(index, index.encoders(), media) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
