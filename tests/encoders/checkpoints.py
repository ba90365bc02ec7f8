"""What tests of encoders share: tokenizers, media, comparisons, and a network that must not be used."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests.helpers import FLOAT32_RTOL, relative_l2

if TYPE_CHECKING:
    from PIL.Image import Image


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever opens a connection fails the test, though what it raises be caught."""

    def refuse(self: socket.socket, address: object) -> None:
        pytest.fail(f"a connection to {address} was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *args, **_: pytest.fail(f"the address of {args[0]} was asked for")
    )


def byte_symbols() -> list[str]:
    """The 256 characters that stand for bytes in GPT-2's vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in plain] + [chr(256 + index) for index in range(256 - len(plain))]


def write_roberta_tokenizer(folder: Path, size: int) -> None:
    """vocab.json and merges.txt as RoBERTa's: special tokens first, bytes, two merges, and words no text holds."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *byte_symbols(), "do", "dog"]
    words += [f"unused{index}" for index in range(size - len(words) - 1)] + ["<mask>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nd o\ndo g\n")
    settings = {"tokenizer_class": "RobertaTokenizer", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_clip_tokenizer(folder: Path) -> int:
    """vocab.json and merges.txt as CLIP's, small; gives the number of tokens."""
    symbols = byte_symbols()
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "do", "dog</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nd o\ndo g</w>\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(words)


def waveform(seconds: float, rate: int = 48_000, seed: int = 0) -> np.ndarray:
    """A chord under noise, float32 in [-1, 1]."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    tones = sum(np.sin(2 * np.pi * rng.uniform(100, 4_000) * time + rng.uniform(0, 6)) for _ in range(3))
    return (0.2 * tones + 0.05 * rng.standard_normal(len(time))).astype(np.float32)


def write_wav(path: Path, wave: np.ndarray, rate: int = 48_000) -> Path:
    """A 32-bit float wav, so that what is read is what was written."""
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(os.fspath(path), wave, rate, subtype="FLOAT")
    return path


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    """Row by row within the relative L2 error that float32 is allowed: batches may round differently, no more."""
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    for row, (one, other) in enumerate(zip(actual, expected, strict=True)):
        error = relative_l2(torch.from_numpy(one), torch.from_numpy(np.asarray(other)))
        assert error <= FLOAT32_RTOL, f"row {row}: relative L2 error {error:.3g}"


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image:
    """Coloured noise in patches, RGB."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize(size, Image.Resampling.BILINEAR)
