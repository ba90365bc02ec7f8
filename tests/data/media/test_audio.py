"""AudioReader: known tones through every format, parts of recordings, windows, bounds on memory."""

from __future__ import annotations

import io
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

from diffgap.data.media import MediaError, Source
from diffgap.data.media.audio import AudioReader
from tests.data.media.make import chirp, tone, with_cover, write_sound, write_video

FORMATS = (".wav", ".flac", ".ogg", ".mp3", ".m4a", ".mp4", ".mkv", ".webm")
LOSSLESS = (".wav", ".flac")


def fitted(wave: np.ndarray, rate: int, hertz: float) -> float:
    """Amplitude of the best-fitting tone of that pitch, by least squares."""
    angle = 2 * np.pi * hertz * np.arange(len(wave)) / rate
    parts, *_ = np.linalg.lstsq(np.stack([np.sin(angle), np.cos(angle)], axis=1), wave.astype(np.float64), rcond=None)
    return float(np.hypot(*parts))


def pitch(wave: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    return float(spectrum.argmax() * rate / len(wave))


def lag(wave: np.ndarray, other: np.ndarray, most: int) -> int:
    """Samples by which ``wave`` is later than ``other``."""
    core = slice(most, len(other) - most)
    scores = [wave[core] @ np.roll(other, shift)[core] for shift in range(-most, most + 1)]
    return int(np.argmax(scores)) - most


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("target", [16_000, 48_000])
def test_pitch_amplitude_and_length(tmp_path: Path, suffix: str, target: int) -> None:
    rate = 48_000 if suffix == ".webm" else 44_100
    path = write_sound(tmp_path / f"a{suffix}", tone(2.0, rate), rate)
    wave = AudioReader(target)(Source(path=path))
    assert wave.dtype == np.float32 and wave.ndim == 1
    assert 0 <= len(wave) - 2 * target <= 0.05 * target  # codecs fill their last packet
    core = wave[target // 4 : -target // 4]
    assert fitted(core, target, 440.0) == pytest.approx(0.5, rel=1e-3 if suffix in LOSSLESS else 0.03)
    assert pitch(core, target) == pytest.approx(440, abs=2)


def test_what_the_new_rate_cannot_hold_is_removed(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", tone(1.0, 44_100, 10_000), 44_100)
    wave = AudioReader(16_000)(Source(path=path))
    assert np.abs(wave[1000:-1000]).max() < 0.005


@pytest.mark.parametrize("suffix", [".wav", ".ogg"])
def test_channels_are_averaged(tmp_path: Path, suffix: str) -> None:
    left, right = tone(1.0, 16_000, 400, 0.6), tone(1.0, 16_000, 900, 0.2)
    path = write_sound(tmp_path / f"a{suffix}", np.stack([left, right], axis=1), 16_000)
    wave = AudioReader(16_000)(Source(path=path))[2000:-2000]
    assert fitted(wave, 16_000, 400) == pytest.approx(0.3, rel=0.02)
    assert fitted(wave, 16_000, 900) == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_part_is_what_the_whole_has_there(tmp_path: Path, suffix: str) -> None:
    rate = 48_000
    path = write_sound(tmp_path / f"a{suffix}", chirp(4.0, rate), rate)
    read = AudioReader(rate)
    whole = read(Source(path=path))
    for start, stop in ((0.0, 1.0), (0.7, 1.5), (2.1234, 3.9), (3.0, None), (None, 0.5), (3.5, 60.0)):
        part = read(Source(path=path, start=start, stop=stop))
        expected = whole[round((start or 0) * rate) : None if stop is None else round(stop * rate)]
        if suffix in (".mkv", ".webm"):  # whose time stamps are rounded to milliseconds
            assert abs(len(part) - len(expected)) <= 48
            shared = min(len(part), len(expected))
            assert abs(lag(part[:shared], expected[:shared], 100)) <= 48
        else:
            assert part.shape == expected.shape
            assert np.abs(part - expected).max() < 2e-3


def test_the_pitch_tells_that_the_part_is_the_right_one(tmp_path: Path) -> None:
    """A chirp of 200 + 300 t Hz, against its own formula."""
    for suffix in (".wav", ".ogg", ".mp4"):
        path = write_sound(tmp_path / f"a{suffix}", chirp(4.0, 48_000), 48_000)
        wave = AudioReader(16_000)(Source(path=path, start=2.9, stop=3.1))
        assert pitch(wave, 16_000) == pytest.approx(200 + 300 * 3.0, abs=15)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp4", ".webm"])
def test_a_part_of_a_long_file_is_sought_and_not_decoded_up_to(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).standard_normal(48_000 * 60).astype(np.float32) * 0.1
    path = write_sound(tmp_path / f"a{suffix}", noise, 48_000)
    read = 0

    class Counting(io.FileIO):
        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            nonlocal read
            got = super().readinto(buffer)
            read += got or 0
            return got or 0

    monkeypatch.setattr(Source, "open", lambda self: io.BufferedReader(Counting(self.path), 4096))
    wave = AudioReader(16_000)(Source(path=path, start=50.0, stop=51.0))
    assert len(wave) == 16_000
    assert read < 0.3 * path.stat().st_size


def test_bytes_and_members_of_archives_are_read_alike(tmp_path: Path) -> None:
    for suffix in (".wav", ".ogg", ".m4a"):
        path = write_sound(tmp_path / f"a{suffix}", tone(1.0, 48_000), 48_000)
        content = path.read_bytes()
        (tmp_path / "archive").write_bytes(b"x" * 777 + content + b"y" * 99)
        read = AudioReader(16_000)
        expected = read(Source(path=path))
        assert np.array_equal(read(Source(data=content)), expected)
        assert np.array_equal(read(Source(path=tmp_path / "archive", offset=777, size=len(content))), expected)


@pytest.mark.parametrize(("suffix", "name"), [(".ogg", "a.wav"), (".wav", "a.raw"), (".m4a", "a.mp3"), (".mp3", "a")])
def test_the_content_decides_and_not_the_name(tmp_path: Path, suffix: str, name: str) -> None:
    path = write_sound(tmp_path / f"right{suffix}", tone(1.0, 48_000), 48_000)
    expected = AudioReader(16_000)(Source(path=path))
    assert np.array_equal(AudioReader(16_000)(Source(path=path.rename(tmp_path / name))), expected)


def test_sound_track_of_a_video_and_mp3_with_a_cover(tmp_path: Path) -> None:
    times = [number / 25 for number in range(50)]
    path = write_video(tmp_path / "a.mp4", times, tone(2.0, 48_000))
    assert fitted(AudioReader(16_000)(Source(path=path))[4000:-4000], 16_000, 440) == pytest.approx(0.5, rel=0.03)
    mp3 = write_sound(tmp_path / "a.mp3", tone(2.0, 48_000), 48_000).read_bytes()
    wave = AudioReader(16_000)(Source(data=with_cover(mp3)))
    assert np.array_equal(wave, AudioReader(16_000)(Source(data=mp3)))


def test_a_wav_from_a_pipe_claims_no_length(tmp_path: Path) -> None:
    content = bytearray(write_sound(tmp_path / "a.wav", tone(1.0, 16_000), 16_000).read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = b"\xff\xff\xff\xff"
    assert len(AudioReader(16_000)(Source(data=bytes(content)))) == 16_000


class TestWindows:
    @staticmethod
    def starts(samples: int, window: float, hop: float | None) -> list[int]:
        """First samples of the windows of a ramp."""
        ramp = np.arange(1, samples + 1, dtype=np.float32) / 2**15
        file = io.BytesIO()
        soundfile.write(file, ramp, 100, format="WAV", subtype="FLOAT")
        rows = AudioReader(100, window=window, hop=hop)(Source(data=file.getvalue()))
        size = min(samples, round(window * 100))
        assert rows.ndim == 2 and rows.shape[1] == size and rows.dtype == np.float32
        firsts = np.rint(rows[:, 0] * 2**15).astype(int) - 1
        for first, row in zip(firsts, rows, strict=True):
            assert np.array_equal(row, ramp[first : first + size])
        return list(firsts)

    @pytest.mark.parametrize(
        ("samples", "window", "hop", "expected"),
        [
            (1000, 2.0, None, [0, 200, 400, 600, 800]),
            (1050, 2.0, None, [0, 200, 400, 600, 800, 850]),
            (1000, 4.0, 1.5, [0, 150, 300, 450, 600]),
            (1001, 4.0, 1.5, [0, 150, 300, 450, 600, 601]),
            (200, 2.0, None, [0]),
            (201, 2.0, 1.0, [0, 1]),
            (60, 2.0, 1.0, [0]),
        ],
    )
    def test_every_hop_and_to_the_end(
        self, samples: int, window: float, hop: float | None, expected: list[int]
    ) -> None:
        assert self.starts(samples, window, hop) == expected


def test_too_much_is_refused_before_it_is_in_memory(tmp_path: Path) -> None:
    """Two hours of silence in a sparse file."""
    path = tmp_path / "long.wav"
    size = 2 * 3600 * 44_100 * 2
    header = (
        b"RIFF" + struct.pack("<I", size + 36) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 44_100, 88_200, 2, 16)
    )
    with open(path, "wb") as file:
        file.write(header + b"data" + struct.pack("<I", size))
        file.truncate(44 + size)
    tracemalloc.start()
    with pytest.raises(MediaError, match="longer than 10 s") as caught:
        AudioReader(16_000, max_seconds=10)(Source(path=path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.reason == "too large" and peak < 20_000_000


def test_bounds_are_inclusive(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", tone(1.0, 16_000), 16_000)
    assert len(AudioReader(16_000, min_seconds=1.0, max_seconds=1.0)(Source(path=path))) == 16_000
    for bounds, reason in (({"min_seconds": 1.001}, "too short"), ({"max_seconds": 0.999}, "too large")):
        with pytest.raises(MediaError) as caught:
            AudioReader(16_000, **bounds)(Source(path=path))
        assert caught.value.reason == reason


def test_silence_is_what_16_bits_cannot_hold(tmp_path: Path) -> None:
    quiet = np.zeros(16_000, dtype=np.int16)
    quiet[8000] = 1
    assert np.abs(AudioReader(16_000)(Source(path=write_sound(tmp_path / "a.wav", quiet, 16_000)))).max() == 2.0**-15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample_rate": 0}, "sample_rate must be at least 1"),
        ({"hop": 1.0}, "hop needs a window"),
        ({"window": 0.0}, "window must hold at least one sample"),
        ({"window": 1.0, "hop": 2.0}, "hop must be at most the window of 1.0 s"),
        ({"window": 1.0, "hop": 0.0}, "hop must be at most the window"),
        ({"max_seconds": 0.01}, "max_seconds must be at least min_seconds"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AudioReader(**({"sample_rate": 16_000} | arguments))  # type: ignore[arg-type]


def test_readers_cross_processes_and_say_what_they_do() -> None:
    reader = AudioReader(16_000, window=2.0, hop=1.0)
    assert pickle.loads(pickle.dumps(reader)) == reader
    others = [AudioReader(48_000, window=2.0, hop=1.0), AudioReader(16_000), AudioReader(16_000, window=2.0)]
    assert len({one.description for one in [reader, *others]}) == 4
