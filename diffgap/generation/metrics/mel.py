"""How far a clip's spectrum is from its recording's, without a network.

Of a log-mel spectrogram in dB, ``x[f, m] = 20 log10 max(sum_k A[m, k] |STFT[k, f]|, floor)`` over frames f, each band m
has a mean and a (population) standard deviation. The mel distance of a generated clip g and its recording r is

    d = sqrt(1/M sum_m (mean_m(g) - mean_m(r))^2 + (std_m(g) - std_m(r))^2)        dB

the root mean square over the M bands of the 2-Wasserstein distance between the bands' levels, taken as Gaussians
(Dowson and Landau 1982; in one dimension it is that of means and standard deviations). It hears loudness, colour and
how much a band moves, but not when: clips need not be of one length, nor aligned.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from diffgap.data.media import Reader
from diffgap.data.media.audio import AudioReader
from diffgap.generation.mel import MelSettings
from diffgap.generation.metrics._rows import Floats, Values, as_pairs
from diffgap.generation.metrics.backbone import Described, FloatArray, Output

__all__ = ["MelStatistics", "mel_distances"]

_DECIBELS = 20 / math.log(10)
"""Of the natural logarithm of a magnitude."""


class MelStatistics:
    """A backbone that gives "mel", (2 M,): the means of the M bands, then their standard deviations, in dB.

    Args:
        settings: Of the spectrograms; 64 bands from 0 to 8 kHz at 16 kHz by default.
    """

    name, space = "mel", ""
    outputs: frozenset[Output] = frozenset({"mel"})

    def __init__(self, settings: MelSettings | None = None) -> None:
        self.settings = settings or MelSettings()
        self.sample_rate = self.settings.sample_rate
        self.reader: Reader = AudioReader(self.sample_rate)
        self.fingerprint = f"mel:{hashlib.sha256(self.settings.description.encode()).hexdigest()[:32]}"

    def __call__(self, waveforms: Sequence[FloatArray]) -> list[Described]:
        spectra = (_DECIBELS * self.settings.log_mel(wave).astype(np.float64) for wave in waveforms)
        return [{"mel": np.concatenate([x.mean(0), x.std(0)]).astype(np.float32)} for x in spectra]


def mel_distances(generated: Values, reference: Values) -> Floats:
    """Mel distance of each pair, (N,) float64 in dB, from what :class:`MelStatistics` says of both, (N, 2 M).

    Raises:
        ValueError: shapes that differ or are not (N, 2 M), values that are not finite.
    """
    g, r = as_pairs("generated", generated, "reference", reference)
    if g.shape[1] % 2:
        raise ValueError(f"generated and reference must be (N, 2 M), means and deviations; got {g.shape}")
    return np.asarray(np.sqrt(np.square(g - r).sum(1) / (g.shape[1] // 2)))
