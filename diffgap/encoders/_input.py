"""What encoders are given, beside what their readers make."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffgap.data.media import Reader, Source

FloatArray = npt.NDArray[np.float32]


def as_read(item: Any, reader: Reader) -> Any:
    """``item`` as ``reader`` gives it: a path or a Source is read now, anything else is taken for read already.

    Raises MediaError for a medium that cannot be read.
    """
    if isinstance(item, (str, os.PathLike)):
        item = Source(path=Path(item))
    return reader(item) if isinstance(item, Source) else item


def as_waveform(item: Any, reader: Reader) -> FloatArray:
    """:func:`as_read` for sound: (samples,). Raises ValueError for an array that no file would have given."""
    wave: FloatArray = as_read(item, reader)
    if wave.ndim != 1 or not len(wave):
        raise ValueError(f"waveform must be mono, at least 1 sample; got shape {wave.shape}")
    if not np.isfinite(wave).all() or not wave.any():
        raise ValueError("waveform is silent or holds samples that are not finite; drop it")
    return wave
