"""A backbone of a dozen numbers, a reader of its own wav files, and the clips that they hear."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.io import wavfile

from diffgap.data.media import MediaError, Source

RATE = 8000
FloatArray = npt.NDArray[np.float32]


class WavReader:
    """Float wav files at one rate."""

    sample_rate = RATE

    def __init__(self, description: str = "toy wav") -> None:
        self.description = description

    def __call__(self, source: Source) -> FloatArray:
        with source.open() as file:
            try:
                rate, wave = wavfile.read(io.BytesIO(file.read()))
            except ValueError as error:
                raise MediaError("undecodable", f"{source} cannot be decoded: {error}") from error
        assert rate == RATE
        return np.asarray(wave, dtype=np.float32)


class Spectral:
    """Energies of eight bands, in one row or four frames, and logits of which third of the spectrum is loudest."""

    sample_rate = RATE

    def __init__(
        self,
        name: str = "toy",
        *,
        outputs: Sequence[str] = ("features", "logits"),
        frames: int = 1,
        space: str = "",
        version: str = "v1",
        description: str = "toy wav",
    ) -> None:
        self.name, self.outputs, self.frames, self.space = name, frozenset(outputs), frames, space
        self.fingerprint = f"{name}:{version}"
        self.reader = WavReader(description)
        self.heard = 0

    def __call__(self, waveforms: Sequence[FloatArray]) -> list[dict[str, FloatArray]]:
        self.heard += len(waveforms)
        said = []
        for wave in waveforms:
            rows = np.stack([bands(part, 8) for part in np.array_split(wave, self.frames)])
            features = rows if self.frames > 1 else rows[0]
            both = {"features": features, "logits": 10 * bands(wave, 3)}
            said.append({name: value for name, value in both.items() if name in self.outputs})
        return said


def bands(wave: FloatArray, count: int) -> FloatArray:
    """Share of the energy in each of ``count`` equal bands."""
    power = np.abs(np.fft.rfft(wave)) ** 2
    energy = np.array([part.sum() for part in np.array_split(power, count)])
    return np.asarray(energy / energy.sum(), dtype=np.float32)


def tones(count: int, *, seed: int, low: float = 300.0, high: float = 3500.0) -> dict[str, FloatArray]:
    """``count`` noisy tones of 0.1 s between ``low`` and ``high`` Hz."""
    rng = np.random.default_rng(seed)
    time = np.arange(RATE // 10) / RATE
    return {
        f"clip{number:03d}": np.asarray(
            np.sin(2 * np.pi * rng.uniform(low, high) * time) + 0.3 * rng.normal(size=len(time)), dtype=np.float32
        )
        for number in range(count)
    }


def write(folder: Path, clips: dict[str, FloatArray]) -> Path:
    """The clips as wav files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, wave in clips.items():
        wavfile.write(folder / f"{name}.wav", RATE, wave)
    return folder
