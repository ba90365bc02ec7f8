"""What Whisper hears (Radford et al., arXiv 2212.04356): log-mel spectrograms of waveforms at 16 kHz."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from diffgap.encoders._input import FloatArray

SAMPLE_RATE = 16_000
HOP = 160
_N_FFT = 400
_N_MELS = 80


def log_mel(waveform: FloatArray) -> FloatArray:
    """Whisper's log-mel spectrogram: (samples,) at 16 kHz to (80, samples // 160) float32.

    ``max(log10(mel), max - 8) / 4 + 1`` of the power spectrum: Hann window of 400 samples, hop 160, reflected
    ends, last frame dropped; 80 Slaney-scaled bands from 0 to 8 kHz. ``samples`` must be at least 400.
    """
    padded = np.pad(waveform, _N_FFT // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, _N_FFT)[::HOP][:-1]
    window = np.hanning(_N_FFT + 1)[:-1].astype(np.float32)
    power = np.abs(np.fft.rfft(frames * window, axis=1)) ** 2
    logarithm = np.log10(np.maximum(_filters() @ power.T, 1e-10))
    return np.asarray(np.maximum(logarithm, logarithm.max() - 8.0) / 4.0 + 1.0, dtype=np.float32)


@cache
def _filters() -> npt.NDArray[np.float64]:
    """(80, 201) triangular filters of unit area on Slaney's mel scale: linear to 1 kHz, logarithmic above."""
    top_mel = 15.0 + 27.0 * np.log(SAMPLE_RATE / 2 / 1000.0) / np.log(6.4)
    mels = np.linspace(0.0, top_mel, _N_MELS + 2)
    edges = np.where(mels < 15.0, mels * 200.0 / 3.0, 1000.0 * 6.4 ** ((mels - 15.0) / 27.0))
    bins = np.fft.rfftfreq(_N_FFT, 1.0 / SAMPLE_RATE)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (edges[2:] - edges[:-2]))[:, None]
