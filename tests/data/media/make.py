"""Small media of every kind, made here: tones, videos whose frames carry their number, files patched to be broken."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("soundfile", reason="needs soundfile: pip install 'diffgap[offline]'")
pytest.importorskip("av", reason="needs av: pip install 'diffgap[offline]'")
pytest.importorskip("PIL", reason="needs pillow: pip install 'diffgap[offline]'")
import av
import soundfile
from PIL import Image

SIDE = 64
SOUNDFILE = {".wav", ".flac", ".ogg", ".mp3"}
#: Video and audio codec by container.
CODECS = {".mp4": ("mpeg4", "aac"), ".mkv": ("mpeg4", "aac"), ".webm": ("libvpx", "libopus"), ".m4a": ("", "aac")}


def tone(seconds: float, rate: int, hertz: float = 440.0, amplitude: float = 0.5) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def chirp(seconds: float, rate: int) -> np.ndarray:
    """A tone whose pitch tells the time."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (200 * time + 150 * time * time))).astype(np.float32)


def stripes(number: int) -> Image.Image:
    """``number`` in eight vertical stripes, white for a bit that is set."""
    bits = np.array([255 * (number >> bit & 1) for bit in range(8)], dtype=np.uint8)
    return Image.fromarray(np.repeat(np.repeat(bits, SIDE // 8)[None], SIDE, axis=0)).convert("RGB")


def number_of(image: Image.Image) -> int:
    bits = np.asarray(image.convert("L"))[SIDE // 2, SIDE // 16 :: SIDE // 8] > 127
    return int((bits << np.arange(8)).sum())


def write_sound(path: Path, samples: np.ndarray, rate: int, **options: str) -> Path:
    """Samples (n,) or (n, 2) by what writes that suffix."""
    if path.suffix in SOUNDFILE:
        soundfile.write(path, samples, rate, **options)
    else:
        write_video(path, times=(), sound=samples, rate=rate)
    return path


def write_video(
    path: Path,
    times: Sequence[float],
    sound: np.ndarray | None = None,
    rate: int = 48_000,
    codec: str | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Frame i, which carries the number i, from ``times[i]`` on, and mono sound."""
    video_codec, audio_codec = CODECS[path.suffix]
    with av.open(str(path), "w", options=options or {}) as container:
        picture = voice = None
        if times:
            picture = container.add_stream(codec or video_codec, rate=25)
            picture.width = picture.height = SIDE
            picture.pix_fmt = "yuv420p"
            picture.bit_rate = 2_000_000
            picture.codec_context.time_base = Fraction(1, 1000)
            picture.codec_context.gop_size = 12
        if sound is not None:
            voice = container.add_stream(audio_codec, rate=rate, layout="mono")
        if picture is not None:
            for number, time in enumerate(times):
                frame = av.VideoFrame.from_image(stripes(number))
                frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
                container.mux(picture.encode(frame))
            container.mux(picture.encode(None))
        if voice is not None:
            frame = av.AudioFrame.from_ndarray(sound[None], "fltp", "mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            frames = av.AudioResampler(format=voice.format, layout="mono", rate=rate).resample(frame)
            for part in frames:
                container.mux(voice.encode(part))
            container.mux(voice.encode(None))
    return path


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A small png whose header gives another size."""
    content = bytearray(png(Image.new("RGB", (4, 4), "red")))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


def with_cover(mp3: bytes) -> bytes:
    """An mp3 with an ID3 tag that holds a picture."""
    body = b"\0image/png\0\3\0" + png(stripes(1))
    frame = b"APIC" + struct.pack(">IH", len(body), 0) + body
    size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3\3\0\0" + size + frame + mp3


def rotate_track(mp4: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """``mp4`` with a, b, c, d of x' = a x + c y, y' = b x + d y in the header of its first track."""
    a, b, c, d = (value << 16 for value in matrix)
    at = mp4.index(b"tkhd") + 4 + 40
    return mp4[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + mp4[at + 36 :]
