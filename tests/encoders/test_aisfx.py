"""The encoder of sound effects, against the package's own code: network, blocks and (by librosa) log-mel."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import numpy as np
import pytest
import torch

from diffgap.encoders import aisfx
from diffgap.encoders._packages import package_folder


def package_module(path: str) -> ModuleType:
    """A file of the package by its path: importing the package itself needs librosa and more."""
    if importlib.util.find_spec("aisfx") is None:
        pytest.skip(f"needs aisfx: {aisfx._INSTALL}")
    file = package_folder("aisfx", "aisfx") / path
    spec = importlib.util.spec_from_file_location(f"aisfx_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def encoder() -> aisfx.AisfxAudio:
    if importlib.util.find_spec("aisfx") is None:
        pytest.skip(f"needs aisfx: {aisfx._INSTALL}")
    return aisfx.AisfxAudio()


def noise(samples: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal(samples) * np.linspace(0.1, 1, samples)
    return rows.astype(np.float32)


@pytest.mark.parametrize("samples", [1, 1023, 1024, 50_000, 44_100 * 26])
def test_log_mel_is_that_of_librosa(samples: int) -> None:
    librosa = pytest.importorskip("librosa", reason="needs librosa")
    wave = 3 * noise(samples)
    mel = librosa.feature.melspectrogram(
        y=wave / np.abs(wave).max(), sr=44_100, n_mels=96, norm=1.0, fmin=0.0, fmax=22_050.0, htk=True, power=2.0,
        hop_length=1024, win_length=2048,
    )  # fmt: skip
    expected = np.log10(mel * 10_000 + 1).T / 9.457798957824707
    found = aisfx.log_mel(wave)
    assert found.shape == (1 + samples // 1024, 96) and found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("hertz", [500, 2000, 9000])
def test_tone_peaks_in_its_band(hertz: float) -> None:
    """HTK's scale: the k-th of 96 bands peaks at the (k+1)-th of 97 equal steps."""
    wave = np.sin(2 * np.pi * hertz * np.arange(44_100) / 44_100).astype(np.float32)
    expected = np.log10(1 + hertz / 700) / np.log10(1 + 22_050 / 700) * 97 - 1
    assert abs(int(aisfx.log_mel(wave)[20].argmax()) - expected) <= 1


@pytest.mark.parametrize("frames", [1, 99, 100, 101, 150, 151, 430])
def test_blocks_are_the_packages(frames: int) -> None:
    mel = np.random.default_rng(0).random((frames, 96)).astype(np.float32)
    expected = package_module("preprocessing.py").blocking(mel, 100, 50, drop_partial_block=False)
    assert np.array_equal(aisfx._blocks(mel), expected)


def test_network_is_the_packages(encoder: aisfx.AisfxAudio) -> None:
    """Its own class takes the same weights by the same names and gives the same embeddings."""
    own = package_module("models/cnn2d.py").EmbeddingNet("max", 3, 1, 64).eval()
    own.load_state_dict(encoder._model.state_dict())
    wave = noise(44_100 * 22)  # more blocks than are computed at once
    blocks = aisfx._blocks(aisfx.log_mel(wave))
    assert len(blocks) > aisfx._BLOCKS_AT_ONCE
    with torch.inference_mode():
        expected = torch.cat([own(torch.from_numpy(block[None])) for block in blocks]).mean(dim=0).numpy()
    found = encoder.encode([wave])
    assert found.shape == (1, 512) and found.dtype == np.float32
    assert np.linalg.norm(found[0] - expected) < 1e-5 * np.linalg.norm(expected)


def test_rows_depend_on_their_own_sound_and_not_on_its_level(encoder: aisfx.AisfxAudio) -> None:
    waves = [noise(400), noise(70_000, 1), noise(200_000, 2)]
    rows = encoder.encode(waves)
    assert np.isfinite(rows).all() and np.linalg.norm(rows[0] - rows[1]) > 0.1 * np.linalg.norm(rows[0])
    assert np.array_equal(rows[::-1], np.concatenate([encoder.encode([wave / 4]) for wave in waves[::-1]]))


def test_bad_waveform(encoder: aisfx.AisfxAudio) -> None:
    for wave, message in ((np.zeros(500, np.float32), "silent"), (np.ones((2, 500), np.float32), "mono")):
        with pytest.raises(ValueError, match=message):
            encoder.encode([wave])


def test_missing_package_names_its_own_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps aisfx==0\.1\.2"):
        aisfx.AisfxAudio()
