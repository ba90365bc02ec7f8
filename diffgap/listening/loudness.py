"""Loudness of a mono sound, ITU-R BS.1770-4, so that level decides no comparison."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.signal import sosfilt

__all__ = ["integrated_loudness", "k_weighting"]

Floats = npt.NDArray[np.float64]

_OFFSET = -0.691
_BLOCK, _HOP = 0.4, 0.1  # s
_ABSOLUTE_GATE, _RELATIVE_GATE = -70.0, -10.0  # LUFS, LU


def k_weighting(sample_rate: int) -> Floats:
    """(2, 6) second-order sections of the K filter: a shelf for the head, then a high-pass.

    BS.1770-4 tabulates them for 48 kHz. These are the analogue prototypes behind the table through the bilinear
    transform (De Man, "Evaluation of implementations of the EBU R128 loudness measurement", AES 145, 2018), which give
    the table back at 48 kHz.

    Args:
        sample_rate: Hz, 4000 or more.
    """
    if sample_rate < 4000:
        raise ValueError(f"sample_rate is {sample_rate} Hz; loudness is defined from 4000 Hz on")
    f0, quality, gain = 1681.974450955533, 0.7071752369554196, 3.999843853973347
    k, high = math.tan(math.pi * f0 / sample_rate), 10 ** (gain / 20)
    band = high**0.4996667741545416
    a0 = 1 + k / quality + k * k
    shelf = [
        (high + band * k / quality + k * k) / a0, 2 * (k * k - high) / a0, (high - band * k / quality + k * k) / a0,
        1.0, 2 * (k * k - 1) / a0, (1 - k / quality + k * k) / a0,
    ]  # fmt: skip
    f0, quality = 38.13547087602444, 0.5003270373238773
    k = math.tan(math.pi * f0 / sample_rate)
    a0 = 1 + k / quality + k * k
    return np.array([shelf, [1.0, -2.0, 1.0, 1.0, 2 * (k * k - 1) / a0, (1 - k / quality + k * k) / a0]])


def integrated_loudness(wave: Floats, sample_rate: int) -> float:
    """``-0.691 + 10 log10(mean of z^2)`` LUFS over the gated blocks of the K-weighted sound z; -inf for silence.

    Blocks of 400 ms, 100 ms apart, count if they are louder than -70 LUFS, and than the mean of those less 10 LU. A
    sound that is shorter than a block is one block.

    Args:
        wave: (n,) samples in -1..1.
        sample_rate: Hz.
    """
    weighted = sosfilt(k_weighting(sample_rate), wave)
    size = min(round(_BLOCK * sample_rate), len(weighted))
    starts = np.arange(0, len(weighted) - size + 1, round(_HOP * sample_rate))
    energy = np.concatenate([[0.0], np.cumsum(weighted**2)])
    power = np.maximum(energy[starts + size] - energy[starts], 0.0) / size
    for gate in (lambda kept: _ABSOLUTE_GATE, lambda kept: _loudness(kept) + _RELATIVE_GATE):
        if power.size:
            power = power[power > 10 ** ((gate(power) - _OFFSET) / 10)]
    return _loudness(power)


def _loudness(power: Floats) -> float:
    mean = float(power.mean()) if power.size else 0.0
    return _OFFSET + 10 * math.log10(mean) if mean > 0 else -math.inf
