"""Small encoders of queries, named as ``tests.search.encoders:Words`` and so on."""

from __future__ import annotations

import io
import wave
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffgap.data.media import MediaError, Source
from tests.synthetic import DIMS


class _Reader:
    def __init__(self, description: str) -> None:
        self.description = description

    def __call__(self, source: Source) -> Any:
        if self.description == "text":
            return source.text
        with source.open() as file:
            content = file.read()
        if self.description == "image":
            if not content.startswith(b"\x89PNG"):
                raise MediaError("undecodable", f"{source} is no picture that can be read")
            return content
        try:
            with wave.open(io.BytesIO(content)) as sound:
                return sound.readframes(sound.getnframes())
        except (wave.Error, EOFError) as error:
            raise MediaError("undecodable", f"{source} is no sound that can be read") from error


class _Hashed:
    """A unit vector for each distinct input, drawn by its checksum."""

    sequence, normalized, space = False, True, ""

    def __init__(self) -> None:
        self.dim, self.fingerprint, self.reader = DIMS[self.modality], f"{self.modality}:1", _Reader(self.modality)

    modality = ""

    def encode(self, batch: Sequence[Any]) -> np.ndarray:
        rows = []
        for item in batch:
            content = item.encode() if isinstance(item, str) else item
            row = np.random.default_rng(zlib.crc32(content)).standard_normal(self.dim)
            rows.append(row / np.linalg.norm(row))
        return np.array(rows, dtype=np.float32)


class Words(_Hashed):
    """Texts."""

    modality = "text"


class Tones(_Hashed):
    """Wave files."""

    modality = "audio"


class Pictures(_Hashed):
    """Png files."""

    modality = "image"


class OtherWords(Words):
    """Texts, by other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fingerprint = "text:2"


class WideWords(Words):
    """Texts, too wide."""

    def __init__(self) -> None:
        super().__init__()
        self.dim += 1
