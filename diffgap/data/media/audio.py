"""Sound: recordings of any common kind to mono float32 waveforms at one rate."""

from __future__ import annotations

import io
import struct
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from math import gcd
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from diffgap.data.media import _container
from diffgap.data.media._decoding import check_part, decoding
from diffgap.data.media.source import MediaError, Source
from diffgap.encoders._packages import require

__all__ = ["AudioReader"]

FloatArray = npt.NDArray[np.float32]

#: One step of a 16-bit recording: what stays below it is silence, or silence that a lossy codec has coded.
SILENCE = 2.0**-15
_BLOCK = 1 << 18
_MAX_RATE = 768_000
#: Seconds by which the number of samples in a header may exceed those there; encoders count their padding differently.
_SLACK = 0.1
_LAST_PAGE = 4
#: Where libsndfile (1.2.2) seeks inexactly: seen 192 samples off in an ogg, and not the same samples in an mp3.
_INEXACT = ("OGG", "MP3")


@dataclass(frozen=True)
class AudioReader:
    """Decodes a recording, or the sound track of a video, to mono float32 at ``sample_rate``.

    soundfile reads what libsndfile knows (wav, flac, ogg, mp3 ...), PyAV the rest (m4a, aac, webm, mp4, mkv ...); the
    content decides, not the name. Channels are averaged; the rate is changed by scipy's polyphase filter,
    ``resample_poly`` with its Kaiser window of 5.0. Of a part, ``start`` to ``stop`` of a source, no more than that is
    kept, and it is resampled as if the rest were not there; a ``stop`` beyond the end is the end. Decoding begins at
    the part where a format can be sought exactly (wav, flac, mp4, mkv, webm; the last two to the millisecond) and at
    the beginning elsewhere (ogg, mp3). Memory is that of the part, which ``max_seconds`` bounds while it is decoded.

    Args:
        sample_rate: Samples a second of what comes out.
        window: Seconds of each window, or None for the whole.
        hop: Seconds from window to window, at most ``window``, which is the default.
        min_seconds: Shortest recording, or part, that is read.
        max_seconds: Longest one; None is no bound.

    Called with a source it gives (samples,), or (n, samples) if ``window`` is given: whole windows every ``hop``, and
    one more that ends with the recording if they do not, so that no sound is left out. A recording shorter than one
    window is one row of its own length: encoders pad in their own ways.

    Raises:
        MediaError: "missing", "empty" (no bytes or no samples), "undecodable" (cut off counts), "no audio" (a picture,
            a video without a sound track), "too short", "too large", "silent" (below :data:`SILENCE` throughout),
            "not finite", "outside" (the part is not inside the recording).
        ModuleNotFoundError: soundfile or, for what it cannot read, av is not installed.
    """

    sample_rate: int
    window: float | None = None
    hop: float | None = None
    min_seconds: float = 0.05
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.sample_rate < 1:
            raise ValueError(f"sample_rate must be at least 1; got {self.sample_rate}")
        if self.window is None and self.hop is not None:
            raise ValueError("hop needs a window; pass both, in seconds")
        if self.window is not None and self.window * self.sample_rate < 1:
            raise ValueError(f"window must hold at least one sample; got {self.window} s")
        if self.hop is not None and not 1 <= self.hop * self.sample_rate <= (self.window or 0) * self.sample_rate:
            raise ValueError(f"hop must be at most the window of {self.window} s, and at least one sample")
        if self.max_seconds is not None and self.max_seconds < self.min_seconds:
            raise ValueError(f"max_seconds must be at least min_seconds; got {self.max_seconds}, {self.min_seconds}")

    @property
    def description(self) -> str:
        """What changes the samples that come out."""
        windows = "" if self.window is None else f" window{self.window:g}s hop{self.hop or self.window:g}s to-the-end"
        return f"mono {self.sample_rate}Hz polyphase{windows}"

    def __call__(self, source: Source) -> FloatArray:
        """See the class."""
        require("soundfile", "soundfile")
        check_part(source)
        with source.open() as file:
            wave = self._resampled(file, source)
        if not np.isfinite(wave).all():
            raise MediaError("not finite", f"{source} holds samples that are not finite")
        if np.abs(wave).max() < SILENCE:
            raise MediaError("silent", f"{source} is silent")
        return wave if self.window is None else self._windows(wave)

    def _resampled(self, file: BinaryIO, source: Source) -> FloatArray:
        blocks: list[FloatArray] = []
        rate, samples = 1, 0
        with closing(_sound_blocks(file, source)) as sound:
            for rate, block in sound:
                samples += len(block)
                blocks.append(block)
                if self.max_seconds is not None and samples > self.max_seconds * rate:
                    raise MediaError("too large", f"{source} is longer than {self.max_seconds:g} s; give it a part")
        if not samples and source.start:
            raise MediaError("outside", f"{source}: the recording ends before that part")
        if not samples:
            raise MediaError("empty", f"{source} holds no samples")
        if not 1 <= rate <= _MAX_RATE:
            raise MediaError("undecodable", f"{source} says it has {rate} samples a second")
        if samples < self.min_seconds * rate:
            raise MediaError("too short", f"{source} lasts {samples / rate:.3f} s, under {self.min_seconds:g} s")
        return resample(np.concatenate(blocks), rate, self.sample_rate)

    def _windows(self, wave: FloatArray) -> FloatArray:
        size = round((self.window or 0) * self.sample_rate)
        hop = round((self.hop or self.window or 0) * self.sample_rate)
        if len(wave) <= size:
            return wave[None]
        starts = [*range(0, len(wave) - size, hop), len(wave) - size]
        return np.stack([wave[start : start + size] for start in starts])


def resample(wave: FloatArray, rate: int, target: int) -> FloatArray:
    """(samples,) at ``rate`` to (ceil(samples * target / rate),) at ``target``, by scipy's polyphase filter."""
    from scipy.signal import resample_poly

    divisor = gcd(rate, target)
    if rate != target:
        wave = resample_poly(wave, target // divisor, rate // divisor)
    return np.asarray(wave, dtype=np.float32)


def _sound_blocks(file: BinaryIO, source: Source) -> Generator[tuple[int, FloatArray], None, None]:
    """Sample rate and mono samples of the source's part, block by block."""
    import soundfile

    try:
        sound = soundfile.SoundFile(file)
    except (soundfile.SoundFileError, TypeError):  # TypeError: a name in .raw, which asks for a rate
        yield from _container.sound_blocks(file, source)
        return
    with sound, decoding(source):
        yield from _libsndfile_blocks(sound, file, source)


def _libsndfile_blocks(sound: Any, file: BinaryIO, source: Source) -> Iterator[tuple[int, FloatArray]]:
    rate = sound.samplerate
    start = min(round((source.start or 0.0) * rate), sound.frames)
    stop = None if source.stop is None else round(source.stop * rate)
    at = 0 if sound.format in _INEXACT else start
    sound.seek(at)
    size = max(1, _BLOCK // sound.channels)
    while stop is None or at < stop:
        block = sound.read(size if stop is None else min(size, stop - at), dtype="float32", always_2d=True)
        if not len(block):
            break
        with np.errstate(invalid="ignore", over="ignore"):
            yield rate, block[max(start - at, 0) :].mean(axis=1)
        at += len(block)
    whole = stop is not None and at >= stop
    short = at < sound.frames - _SLACK * rate and not (sound.format == "MP3" and _length_is_a_guess(file))
    if not whole and (short or _is_cut_off(file)):
        raise MediaError("undecodable", f"{source} is cut off: it holds less than its header or its last page says")


def _length_is_a_guess(file: BinaryIO) -> bool:
    """Whether an mp3 does not say how long it is: libsndfile then guesses by the file's size, tags included."""
    file.seek(0)
    head = file.read(10)
    if head[:3] == b"ID3":  # its size is in the last four bytes, seven bits of each
        file.seek(10 + sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True)))
    else:
        file.seek(0)
    first_frame = file.read(1024)
    return b"Xing" not in first_frame and b"Info" not in first_frame


def _is_cut_off(file: BinaryIO) -> bool:
    """Whether a wav holds less than its header says or an ogg lacks its last page: libsndfile says neither."""
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    magic = file.read(12)
    if magic[:4] == b"OggS":
        file.seek(max(0, length - (1 << 16)))  # a page has under 64 KiB
        tail = file.read()
        page = tail[max(0, tail.rfind(b"OggS")) :]
        size = 27 + page[26] + sum(page[27 : 27 + page[26]]) if len(page) > 26 else 27
        return len(page) < size or not page[5] & _LAST_PAGE
    if magic[:4] == b"RIFF" and magic[8:] == b"WAVE":
        while len(head := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", head)
            if name == b"data":
                # What is written to a pipe claims the most there can be.
                return size < 0x7FFF_0000 and file.tell() + size > length
            file.seek(size + size % 2, io.SEEK_CUR)
    return False
