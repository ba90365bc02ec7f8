"""The clips of an evaluation: found, named, read, and refused where there is nothing to hear."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.io import wavfile

from diffgap.data.media import MediaError, Reader, Source

__all__ = ["AUDIO_SUFFIXES", "Audio", "Broken", "Clip", "clip_of", "digest", "list_clips", "read_clip", "unpaired"]

#: A folder, files, or waveforms (samples,) by name (or in order, named by their number).
Audio: TypeAlias = (
    "str | os.PathLike[str] | Sequence[str | os.PathLike[str] | npt.NDArray[Any]] | Mapping[str, npt.NDArray[Any]]"
)

#: What counts as sound in a folder; a list of files may hold others.
AUDIO_SUFFIXES = frozenset(
    {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".aac", ".aif", ".aiff", ".au", ".wma"}
)


@dataclass(frozen=True)
class Clip:
    """One clip of a set: its name there, where it is and the sha256 of its bytes ("" if it has none to read)."""

    name: str
    source: Source
    sha256: str


@dataclass(frozen=True)
class Broken:
    """A clip that is not evaluated: the set it is of ("generated", "reference"), its name, and why."""

    set: str
    name: str
    reason: str
    message: str


def list_clips(argument: str, audio: Audio, sample_rate: int | None = None) -> list[Clip]:
    """The clips of ``audio``, sorted by name: the path inside the folder, or the file's name, without suffix.

    Args:
        argument: What error messages call it.
        sample_rate: Of waveforms, in Hz.

    Raises:
        ValueError: no clip, two of one name, waveforms without a rate or not (samples,) of floats.
        FileNotFoundError: no such folder.
    """
    if isinstance(audio, str | os.PathLike):
        sources = _folder(argument, Path(audio))
    elif isinstance(audio, Mapping):
        sources = [(str(name), _waveform(argument, str(name), wave, sample_rate)) for name, wave in audio.items()]
    else:
        sources = [
            (f"{number:06d}", _waveform(argument, str(number), item, sample_rate))
            if isinstance(item, np.ndarray)
            else (Path(item).stem, Source(path=Path(item)))
            for number, item in enumerate(audio)
        ]
    if not sources:
        raise ValueError(f"{argument} holds no clips")
    sources.sort(key=lambda named: named[0])
    names = [name for name, _ in sources]
    twice = sorted({a for a, b in pairwise(names) if a == b})
    if twice:
        raise ValueError(f"{argument} holds several clips of one name, {some(twice)}; clips are told apart by it")
    return [clip_of(name, source) for name, source in sources]


def clip_of(name: str, source: Source) -> Clip:
    """A clip with the digest of its bytes."""
    return Clip(name, source, _sha256(source))


def unpaired(first: str, a: Sequence[str], second: str, b: Sequence[str]) -> str:
    """What names are in one set only, as a sentence; "" where the sets hold the same ones."""
    lacking = [
        f"{len(rest)} of {here} are not in {there}: {some(sorted(rest))}"
        for here, there, rest in ((first, second, set(a) - set(b)), (second, first, set(b) - set(a)))
        if rest
    ]
    return "; ".join(lacking)


def read_clip(clip: Clip, reader: Reader) -> npt.NDArray[np.float32]:
    """The waveform. Raises MediaError also for what a reader lets pass: silence, and samples that are not finite."""
    wave = np.asarray(reader(clip.source))
    if not np.isfinite(wave).all():
        raise MediaError("not finite", f"{clip.name} holds samples that are not finite")
    if not wave.any():
        raise MediaError("silent", f"{clip.name} is silent")
    return wave


def digest(clips: Sequence[Clip]) -> str:
    """Of the clips' names and contents."""
    return hashlib.sha256("\n".join(f"{clip.name} {clip.sha256}" for clip in clips).encode()).hexdigest()


def some(names: Sequence[str], most: int = 8) -> str:
    """The names, or the first few and how many more."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _folder(argument: str, folder: Path) -> list[tuple[str, Source]]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{argument}: folder {folder} does not exist; give a folder, files or waveforms")
    files = (file for file in folder.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file())
    visible = [file for file in files if not any(part[0] == "." for part in file.relative_to(folder).parts)]
    return [(file.relative_to(folder).with_suffix("").as_posix(), Source(path=file)) for file in visible]


def _waveform(argument: str, name: str, wave: npt.NDArray[Any], sample_rate: int | None) -> Source:
    if sample_rate is None:
        raise ValueError(f"{argument} holds waveforms; give their sample_rate")
    if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.floating):
        raise ValueError(f"{argument}: waveform {name} must be (samples,) of floats; got {wave.dtype} {wave.shape}")
    file = io.BytesIO()
    wavfile.write(file, sample_rate, wave.astype(np.float32))
    return Source(data=file.getvalue(), suffix=".wav")


def _sha256(source: Source) -> str:
    content = hashlib.sha256()
    try:
        with source.open() as file:
            while block := file.read(1 << 20):
                content.update(block)
    except MediaError:
        return ""  # the reader says why
    return content.hexdigest()
