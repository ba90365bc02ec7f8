"""Broken media: each kind has its reason, none ends the process, none keeps its file open."""

from __future__ import annotations

import base64
import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from diffgap.data.media import MediaError, Reader, Source
from diffgap.data.media.audio import AudioReader
from diffgap.data.media.image import ImageReader
from diffgap.data.media.text import TextReader
from diffgap.data.media.video import FrameReader
from tests.data.media.make import (
    png,
    png_that_claims,
    stripes,
    tone,
    with_cover,
    write_sound,
    write_video,
)

RATE = 16_000
AUDIO, IMAGE, VIDEO, TEXT = AudioReader(RATE, max_seconds=5), ImageReader(), FrameReader(2.0), TextReader()
STEADY = [number / 25 for number in range(50)]
SPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
SVG = f'<svg {SPACES} width="{{0}}" height="{{0}}">{{1}}</svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"


def file(folder: Path, name: str, content: bytes) -> Source:
    (folder / name).write_bytes(content)
    return Source(path=folder / name)


def sound(folder: Path, suffix: str, samples: np.ndarray | None = None, **options: str) -> bytes:
    samples = tone(2.0, RATE) if samples is None else samples
    return write_sound(folder / f"whole{suffix}", samples, RATE, **options).read_bytes()


def video(folder: Path, suffix: str = ".mp4", **options: str) -> bytes:
    return write_video(folder / f"whole{suffix}", STEADY, tone(2.0, 48_000), options=options).read_bytes()


def cut(content: bytes, share: float) -> bytes:
    return content[: int(len(content) * share)]


def header(**fields: int) -> bytes:
    """A wav of 1 s whose fmt chunk says something else."""
    content = {"channels": 1, "rate": RATE, "bits": 16, "size": 2 * RATE} | fields
    align = content["channels"] * content["bits"] // 8
    kind = struct.pack(
        "<IHHIIHH", 16, 1, content["channels"], content["rate"], align * content["rate"] % 2**32, align, content["bits"]
    )
    samples = (tone(1.0, RATE) * 32_767).astype("<i2").tobytes()
    size = content["size"]
    return b"RIFF" + struct.pack("<I", size + 36) + b"WAVEfmt " + kind + b"data" + struct.pack("<I", size) + samples


def dangling(folder: Path) -> Source:
    (folder / "link.wav").symlink_to(folder / "nowhere.wav")
    return Source(path=folder / "link.wav")


def unreadable(folder: Path) -> Source:
    source = file(folder, "locked.wav", sound(folder, ".wav"))
    (folder / "locked.wav").chmod(0)
    if os.access(folder / "locked.wav", os.R_OK):
        pytest.skip("root may read everything")
    return source


def playlist(folder: Path) -> Source:
    """Text that names another file, which ffmpeg would read."""
    import av

    with av.open(str(folder / "secret.ts"), "w", format="mpegts") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 64
        for number in range(25):
            container.mux(stream.encode(av.VideoFrame.from_image(stripes(number))))
        container.mux(stream.encode(None))
    lines = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:{folder / 'secret.ts'}\n#EXT-X-ENDLIST\n"
    return file(folder, "a.m3u8", lines.encode())


def drawing(body: str = "", side: int = 8, before: str = "") -> bytes:
    return (before + SVG.format(side, body)).encode()


def inside(content: bytes, kind: str) -> bytes:
    return drawing(
        f'<image xlink:href="data:{kind};base64,{base64.b64encode(content).decode()}" width="8" height="8"/>'
    )


ENTITY = '<!DOCTYPE svg [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
LAUGHS = '<!DOCTYPE svg [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;">]>'
NAN = np.where(np.arange(RATE) == 500, np.nan, 0.1).astype(np.float32)
INF = np.where(np.arange(RATE) == 500, np.inf, 0.1).astype(np.float32)
Case = tuple[str, Reader, str, Callable[[Path], Source]]
CASES: list[Case] = [
    # files
    ("no such file", AUDIO, "missing", lambda f: Source(path=f / "no.wav")),
    ("dangling link", AUDIO, "missing", dangling),
    ("folder", AUDIO, "undecodable", lambda f: Source(path=f)),
    ("file taken for a folder", TEXT, "undecodable", lambda f: Source(path=file(f, "a", b"x").path / "b.txt")),  # type: ignore[operator]
    ("not allowed", AUDIO, "undecodable", unreadable),
    ("no bytes, sound", AUDIO, "empty", lambda f: file(f, "a.wav", b"")),
    ("no bytes, picture", IMAGE, "empty", lambda f: file(f, "a.png", b"")),
    ("no bytes, video", VIDEO, "empty", lambda f: file(f, "a.mp4", b"")),
    ("no bytes, text", TEXT, "empty", lambda f: file(f, "a.txt", b"")),
    ("beyond the end of an archive", TEXT, "empty", lambda f: Source(path=file(f, "a", b"x").path, offset=9, size=4)),
    # sound
    ("text named wav", AUDIO, "undecodable", lambda f: file(f, "a.wav", b"A lion.\n" * 99)),
    ("noise named ogg", AUDIO, "undecodable", lambda f: file(f, "a.ogg", np.random.default_rng(0).bytes(5000))),
    ("zero bytes named mp3", AUDIO, "undecodable", lambda f: file(f, "a.mp3", bytes(5000))),
    ("first bytes only", AUDIO, "undecodable", lambda f: file(f, "a.wav", sound(f, ".wav")[:20])),
    ("wav cut off", AUDIO, "undecodable", lambda f: file(f, "a.wav", cut(sound(f, ".wav"), 0.7))),
    ("header claims more", AUDIO, "undecodable", lambda f: file(f, "a.wav", header(size=4 * RATE))),
    ("no channels", AUDIO, "undecodable", lambda f: file(f, "a.wav", header(channels=0))),
    ("no rate", AUDIO, "undecodable", lambda f: file(f, "a.wav", header(rate=0))),
    ("impossible rate", AUDIO, "undecodable", lambda f: file(f, "a.wav", header(rate=2**31 - 1))),
    ("impossible bits", AUDIO, "undecodable", lambda f: file(f, "a.wav", header(bits=7777))),
    ("flac cut off", AUDIO, "undecodable", lambda f: file(f, "a.flac", cut(sound(f, ".flac"), 0.7))),
    ("ogg cut off", AUDIO, "undecodable", lambda f: file(f, "a.ogg", cut(sound(f, ".ogg"), 0.7))),
    ("ogg cut off in its last page", AUDIO, "undecodable", lambda f: file(f, "a.ogg", sound(f, ".ogg")[:-9])),
    ("mp3 cut off", AUDIO, "undecodable", lambda f: file(f, "a.mp3", cut(sound(f, ".mp3"), 0.6))),
    ("m4a cut off", AUDIO, "undecodable", lambda f: file(f, "a.m4a", cut(sound(f, ".m4a"), 0.7))),
    ("webm cut off", AUDIO, "undecodable", lambda f: file(f, "a.webm", cut(video(f, ".webm"), 0.5))),
    ("no samples", AUDIO, "empty", lambda f: file(f, "a.wav", sound(f, ".wav", np.zeros(0, np.float32)))),
    ("too short", AUDIO, "too short", lambda f: file(f, "a.wav", sound(f, ".wav", tone(0.02, RATE)))),
    ("too long", AUDIO, "too large", lambda f: file(f, "a.wav", sound(f, ".wav", tone(5.1, RATE)))),
    ("too long, container", AUDIO, "too large", lambda f: file(f, "a.m4a", sound(f, ".m4a", tone(6.0, RATE)))),
    ("silent wav", AUDIO, "silent", lambda f: file(f, "a.wav", sound(f, ".wav", np.zeros(RATE, np.float32)))),
    ("silent ogg", AUDIO, "silent", lambda f: file(f, "a.ogg", sound(f, ".ogg", np.zeros(RATE, np.float32)))),
    ("silent m4a", AUDIO, "silent", lambda f: file(f, "a.m4a", sound(f, ".m4a", np.zeros(RATE, np.float32)))),
    ("NaN", AUDIO, "not finite", lambda f: file(f, "a.wav", sound(f, ".wav", NAN, subtype="FLOAT"))),
    ("infinite", AUDIO, "not finite", lambda f: file(f, "a.wav", sound(f, ".wav", INF, subtype="FLOAT"))),
    ("picture for sound", AUDIO, "no audio", lambda f: file(f, "a.ogg", png(stripes(1)))),
    ("video without sound", AUDIO, "no audio", lambda f: Source(path=write_video(f / "a.mp4", STEADY))),
    ("part beyond the end", AUDIO, "outside", lambda f: Source(data=sound(f, ".wav"), start=2.5)),
    ("part beyond the end, ogg", AUDIO, "outside", lambda f: Source(data=sound(f, ".ogg"), start=2.5, stop=9.0)),
    ("part beyond the end, mp4", AUDIO, "outside", lambda f: Source(data=video(f), start=7.0)),
    ("part before the beginning", AUDIO, "outside", lambda f: Source(data=sound(f, ".wav"), start=-1.0)),
    ("part that ends first", VIDEO, "outside", lambda f: Source(data=video(f), start=1.0, stop=0.5)),
    ("short part", AUDIO, "too short", lambda f: Source(data=sound(f, ".wav"), start=1.99)),
    # video
    ("mp4 cut off", VIDEO, "undecodable", lambda f: file(f, "a.mp4", cut(video(f), 0.7))),
    ("mp4 with its index first, cut off", VIDEO, "undecodable",
     lambda f: file(f, "a.mp4", cut(video(f, movflags="faststart"), 0.7))),
    ("mkv cut off", VIDEO, "undecodable", lambda f: file(f, "a.mkv", cut(video(f, ".mkv"), 0.5))),
    ("sound without pictures", VIDEO, "no picture", lambda f: Source(data=sound(f, ".m4a"))),
    ("mp3 with a cover", VIDEO, "no picture", lambda f: Source(data=with_cover(sound(f, ".mp3")))),
    ("text named mp4", VIDEO, "undecodable", lambda f: file(f, "a.mp4", b"A lion.\n" * 99)),
    ("playlist of another file", VIDEO, "undecodable", playlist),
    ("video beyond its end", VIDEO, "outside", lambda f: Source(data=video(f), start=2.5)),
    # pictures
    ("png cut off", IMAGE, "undecodable", lambda f: file(f, "a.png", cut(png(Image.effect_noise((64, 64), 50)), 0.5))),
    ("png of wrong check sums", IMAGE, "undecodable",
     lambda f: file(f, "a.png", png(stripes(1)).replace(b"IDAT", b"IDAU"))),
    ("text named png", IMAGE, "undecodable", lambda f: file(f, "a.png", b"A lion.\n" * 99)),
    ("sound named png", IMAGE, "undecodable", lambda f: file(f, "a.png", sound(f, ".wav"))),
    ("png of too many pixels", IMAGE, "too large", lambda f: file(f, "a.png", png_that_claims(20_000, 20_000))),
    ("png of somewhat too many", IMAGE, "too large", lambda f: file(f, "a.png", png_that_claims(10_000, 10_000))),
    ("postscript", IMAGE, "undecodable", lambda f: file(f, "a.eps", EPS)),
    ("svg malformed", IMAGE, "undecodable", lambda f: file(f, "a.svg", drawing("<rect>"))),
    ("text named svg", IMAGE, "undecodable", lambda f: file(f, "a.svg", b"A lion.")),
    ("svg without a size", IMAGE, "undecodable", lambda f: file(f, "a.svg", drawing(side=0))),
    ("svg of too many pixels", IMAGE, "too large", lambda f: file(f, "a.svg", drawing(side=30_000))),
    ("svg that names a file", IMAGE, "undecodable", lambda f: file(f, "a.svg", drawing("<text>&a;</text>", 8, ENTITY))),
    ("svg that multiplies", IMAGE, "undecodable", lambda f: file(f, "a.svg", drawing("<text>&c;</text>", 8, LAUGHS))),
    ("svg nested too deep", IMAGE, "undecodable", lambda f: file(f, "a.svg", drawing("<g>" * 5000 + "</g>" * 5000))),
    ("svg compressed", IMAGE, "too large", lambda f: file(f, "a.svg", gzip.compress(drawing(), mtime=0))),
    ("svg with a bomb", IMAGE, "too large",
     lambda f: Source(data=inside(png_that_claims(20_000, 20_000), "image/png"))),
    ("svg with a compressed svg", IMAGE, "too large",
     lambda f: Source(data=inside(gzip.compress(drawing(), mtime=0), "image/svg+xml"))),
    # text
    ("blank", TEXT, "no text", lambda f: file(f, "a.txt", b" \n\t\r\n")),
    ("blank text", TEXT, "no text", lambda f: Source(text="  ")),
    ("only a byte order mark", TEXT, "no text", lambda f: file(f, "a.txt", b"\xef\xbb\xbf")),
    ("not UTF-8", TEXT, "undecodable", lambda f: file(f, "a.txt", "Löwe".encode("latin-1"))),
    ("UTF-16", TEXT, "undecodable", lambda f: file(f, "a.txt", "A lion.".encode("utf-16"))),
    ("zero bytes", TEXT, "undecodable", lambda f: file(f, "a.txt", bytes(99))),
    ("too much text", TEXT, "too large", lambda f: file(f, "a.txt", b"a" * 1_000_001)),
]  # fmt: skip


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@pytest.mark.parametrize(("reader", "reason", "make"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_reason(tmp_path: Path, reader: Reader, reason: str, make: Callable[[Path], Source]) -> None:
    if reader is IMAGE:
        pytest.importorskip("cairosvg", reason="needs cairosvg: pip install 'diffgap[offline]'")
    source = make(tmp_path)
    before = open_files()
    with pytest.raises(MediaError) as caught:
        reader(source)
    assert caught.value.reason == reason, str(caught.value)
    assert str(source)[:20] in str(caught.value)
    # While the error, and the frames it passed through, are still held.
    assert open_files() == before


def test_whole_parts_of_what_is_cut_off_are_read(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).standard_normal(10 * RATE).astype(np.float32) / 10
    for suffix in (".wav", ".ogg", ".mp3"):
        content = sound(tmp_path, suffix, noise)
        part = AUDIO(Source(data=cut(content, 0.7), start=0.5, stop=1.0))
        assert np.array_equal(part, AUDIO(Source(data=content, start=0.5, stop=1.0)))


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3", ".m4a", ".mp4", ".webm", ".png", ".jpg", ".gif"])
def test_damaged_bytes_give_a_medium_or_a_reason(tmp_path: Path, suffix: str) -> None:
    """Random bytes overwritten, with fixed seeds, headers above all; nothing else may be raised."""
    if suffix in (".png", ".jpg", ".gif"):
        stripes(77).save(tmp_path / f"whole{suffix}")
        content, readers = (tmp_path / f"whole{suffix}").read_bytes(), (IMAGE, VIDEO)
    elif suffix in (".mp4", ".webm"):
        content, readers = video(tmp_path, suffix), (AUDIO, VIDEO)
    else:
        content, readers = sound(tmp_path, suffix), (AUDIO,)
    before, read = open_files(), 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        damaged = bytearray(content)
        reach = len(damaged) if seed % 2 else min(400, len(damaged))
        for at in generator.integers(0, reach, 1 + seed // 4):
            damaged[at] = generator.integers(256)
        for reader in readers:
            try:
                reader(Source(data=bytes(damaged)))
                read += 1
            except MediaError:
                pass
    assert open_files() == before
    assert read < 40 * len(readers), "no damage was noticed"


def test_wrong_names_for_the_right_kind_are_read(tmp_path: Path) -> None:
    assert len(AUDIO(file(tmp_path, "a.png", sound(tmp_path, ".flac")))) == 2 * RATE
    assert IMAGE(file(tmp_path, "a.ogg", png(stripes(1)))).size == (64, 64)
    assert len(VIDEO(file(tmp_path, "a.wav", video(tmp_path)))) == 4
    assert soundfile.info(tmp_path / "a.png").format == "FLAC"
