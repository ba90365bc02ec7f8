"""Waveforms to log-mel spectrograms: what the generator draws, and what a vocoder turns back into sound."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from diffgap.encoders._packages import require

__all__ = ["MelSettings"]

INSTALL = "pip install 'diffgap[generation]'"

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class MelSettings:
    """``x[f, m] = log(max(sum_k A[m, k] |STFT(wave)[k, f]|, floor))``, natural logarithm, A triangular mel filters.

    Centred Hann windows of ``n_fft`` samples, ``hop`` apart: n samples give ``1 + n // hop`` frames.
    """

    sample_rate: int = 16_000
    """Hz."""
    n_fft: int = 1024
    """Samples of a window."""
    hop: int = 256
    """Samples between frames."""
    bands: int = 64
    """Mel bands."""
    low: float = 0.0
    """Hz, where the lowest band begins."""
    high: float = 8_000.0
    """Hz, where the highest band ends."""
    htk: bool = False
    """HTK's mel scale with filters of height 1, instead of Slaney's with filters of area 1."""
    floor: float = 1e-5
    """Magnitudes below it count as it."""

    def __post_init__(self) -> None:
        for name in ("low", "high", "floor"):  # 4000 and 4000.0 are the same settings, and have one description
            object.__setattr__(self, name, float(getattr(self, name)))
        for name in ("sample_rate", "n_fft", "hop", "bands"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more")
        if self.hop > self.n_fft:
            raise ValueError(f"hop {self.hop} exceeds n_fft {self.n_fft}, so samples would be left out; lower it")
        if not 0 <= self.low < self.high <= self.sample_rate / 2:
            raise ValueError(f"low {self.low} and high {self.high} must ascend within 0..{self.sample_rate / 2:g} Hz")
        if not self.floor > 0:
            raise ValueError(f"floor is {self.floor}; use a positive number")

    @classmethod
    def vocos(cls) -> MelSettings:
        """What charactr/vocos-mel-24khz takes."""
        return cls(24_000, 1024, 256, 100, 0.0, 12_000.0, htk=True, floor=1e-7)

    @property
    def frames_per_second(self) -> float:
        """Frame rate, Hz."""
        return self.sample_rate / self.hop

    def frames(self, seconds: float) -> int:
        """Frames of a recording of that many seconds."""
        return 1 + int(seconds * self.sample_rate) // self.hop

    def seconds(self, frames: int) -> float:
        """Length of what has that many frames, the last of them centred on its end."""
        return (frames - 1) * self.hop / self.sample_rate

    @property
    def description(self) -> str:
        """All of it in one line, for fingerprints and files; :meth:`parse` reads it."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def parse(cls, description: str) -> MelSettings:
        """The settings behind a :attr:`description`. Raises ValueError for anything else."""
        try:
            return cls(**json.loads(description))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{str(description)[:80]!r} describes no mel settings ({error})") from error

    def log_mel(self, wave: FloatArray) -> FloatArray:
        """(n,) samples in -1..1 at ``sample_rate`` -> (1 + n // hop, bands) float32.

        Raises ValueError for another shape, no samples, or values that are not finite.
        """
        if wave.ndim != 1 or not len(wave) or not np.isfinite(wave).all():
            raise ValueError(f"wave is {wave.shape} or not finite; pass finite mono samples (n,), n >= 1")
        require("librosa", "librosa", INSTALL)
        import librosa

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "n_fft=.* is too large")  # a short sound is padded like any other
            mel = librosa.feature.melspectrogram(
                y=np.asarray(wave, np.float32), n_fft=self.n_fft, hop_length=self.hop, power=1.0, pad_mode="constant",
                **self.filters,
            )  # fmt: skip
        return np.log(np.maximum(mel.T, self.floor)).astype(np.float32)

    @property
    def filters(self) -> dict[str, Any]:
        """A, as librosa's arguments."""
        return {
            "sr": self.sample_rate, "n_mels": self.bands, "fmin": self.low, "fmax": self.high, "htk": self.htk,
            "norm": None if self.htk else "slaney",
        }  # fmt: skip

    def magnitudes(self, log_mel: FloatArray) -> FloatArray:
        """(F, bands) -> |STFT| (1 + n_fft / 2, F): ``max(A^+ exp(x), 0)``.

        The pseudo-inverse solves for the spectrogram exactly, and what lies below 0 is cut off. Non-negative least
        squares (``librosa.feature.inverse.mel_to_stft``) sounds the same, and takes seconds for a second of sound.
        """
        require("librosa", "librosa", INSTALL)
        magnitudes: FloatArray = np.maximum(_inverse(self) @ np.exp(log_mel.T), 0).astype(np.float32)
        return magnitudes


@cache
def _inverse(settings: MelSettings) -> FloatArray:
    """A^+ (1 + n_fft / 2, bands)."""
    import librosa

    inverse: FloatArray = np.linalg.pinv(librosa.filters.mel(n_fft=settings.n_fft, **settings.filters))
    return inverse
