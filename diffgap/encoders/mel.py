"""Recordings to log-mel spectrograms, kept in a store beside embeddings: what a generator is trained to draw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from diffgap.data.media import Reader
from diffgap.data.media.audio import AudioReader
from diffgap.encoders import Encoded
from diffgap.generation.mel import MelSettings

__all__ = ["LogMel"]

FloatArray = npt.NDArray[np.float32]


class LogMel:
    """Waveforms (n,) to spectrograms (B, T, bands), T = 1 + n // hop; see :class:`MelSettings` for the formula.

    Args:
        settings: Of the spectrograms; :attr:`fingerprint` holds them all.
        max_seconds: Longer recordings are refused: every spectrogram takes the room of the longest.
    """

    modality = "mel"
    sequence = True
    normalized = False
    space = ""

    def __init__(self, settings: MelSettings | None = None, max_seconds: float = 30.0) -> None:
        self.settings = settings = settings or MelSettings()
        self.dim = settings.bands
        self.fingerprint = f"log-mel:{settings.description}"
        self.reader: Reader = AudioReader(settings.sample_rate, max_seconds=max_seconds)

    def encode(self, batch: Sequence[FloatArray]) -> Encoded:
        """Waveforms at ``settings.sample_rate`` to (B, T, bands) float32 and lengths (B,), zeros beyond them.

        Raises ValueError for a waveform that is empty or not finite.
        """
        mels = [self.settings.log_mel(wave) for wave in batch]
        lengths = np.array([len(mel) for mel in mels], dtype=np.int64)
        values = np.zeros((len(mels), lengths.max(initial=0), self.dim), dtype=np.float32)
        for row, mel in zip(values, mels, strict=True):
            row[: len(mel)] = mel
        return values, lengths
