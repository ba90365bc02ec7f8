"""Sound files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from diffgap._files import atomic_file, check_output_file
from diffgap.encoders._packages import require
from diffgap.generation.mel import INSTALL

__all__ = ["SUFFIXES", "check_sound_file", "write_sound"]

SUFFIXES = (".wav", ".flac", ".ogg")


def check_sound_file(path: Path, *, overwrite: bool = True) -> None:
    """Raises ValueError for a suffix that no sound is written under, or a path where nothing can be written.

    Raises FileExistsError for a file in the way, and for a folder or a device whatever ``overwrite`` is.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"output {path} ends in none of {', '.join(SUFFIXES)}; choose one of these endings")
    check_output_file(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another path, or give --overwrite")
    require("soundfile", "soundfile", INSTALL)


def write_sound(path: Path, wave: npt.NDArray[np.float32], sample_rate: int) -> None:
    """Write samples (n,) in -1..1 as 16 bits, whole or not at all; the suffix names the format."""
    check_sound_file(path)
    import soundfile

    encoded = io.BytesIO()  # of a full disk soundfile would say no more than "System error"
    soundfile.write(encoded, wave, sample_rate, format=path.suffix[1:].upper())
    with atomic_file(path) as temporary:
        temporary.write_bytes(encoded.getbuffer())
