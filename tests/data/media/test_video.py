"""FrameReader: the right frame at the right time, by frames that carry their number."""

from __future__ import annotations

import pickle
from math import ceil
from pathlib import Path

import av
import numpy as np
import pytest

from diffgap.data.media import MediaError, Source
from diffgap.data.media.audio import AudioReader
from diffgap.data.media.video import FrameReader
from tests.data.media.make import SIDE, number_of, png, rotate_track, stripes, tone, write_video

STEADY = [number / 25 for number in range(75)]
UNEVEN = [0.0, 0.1, 0.2, 0.9, 1.0, 1.05, 2.4, 2.5, 2.6, 3.0]


def numbers(path: Path, fps: float, max_frames: int | None = None, **part: float) -> list[int]:
    return [number_of(image) for image in FrameReader(fps, max_frames)(Source(path=path, **part))]


def shown_at(times: list[float], moments: list[float]) -> list[int]:
    """Number of the last frame that began by then."""
    return [max(np.searchsorted(times, moment + 1e-6, side="right") - 1, 0) for moment in moments]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
@pytest.mark.parametrize("fps", [1.0, 2.5, 12.5, 25.0, 50.0])
def test_every_frame_is_the_one_shown_then(tmp_path: Path, suffix: str, fps: float) -> None:
    path = write_video(tmp_path / f"a{suffix}", STEADY)
    assert numbers(path, fps) == shown_at(STEADY, [(i + 0.5) / fps for i in range(ceil(3 * fps - 0.5))])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("fps", [1.0, 4.0, 10.0])
def test_uneven_frames_go_by_their_time_stamps(tmp_path: Path, suffix: str, fps: float) -> None:
    path = write_video(tmp_path / f"a{suffix}", UNEVEN)
    expected = shown_at(UNEVEN, [(i + 0.5) / fps for i in range(ceil(3.0 * fps - 0.5))])
    assert numbers(path, fps)[: len(expected)] == expected


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
@pytest.mark.parametrize(
    ("start", "stop"), [(0.0, 1.0), (0.5, 1.5), (1.22, 2.02), (2.0, None), (None, 0.6), (2.5, 9.0), (1.0, 1.01)]
)
def test_parts(tmp_path: Path, codec: str, start: float | None, stop: float | None) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this build of av has no {codec}")
    path = write_video(tmp_path / "a.mp4", STEADY, codec=codec)
    first, last = start or 0.0, min(stop or 3.0, 3.0)
    fitting = ceil((last - first) * 5 - 0.5 - 1e-6)
    moments = [first + (i + 0.5) / 5 for i in range(fitting)] or [(first + last) / 2]
    assert numbers(path, 5.0, start=start, stop=stop) == shown_at(STEADY, moments)


def test_most_frames_are_spread_over_the_whole_part(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", STEADY)
    assert numbers(path, 25.0, 4) == shown_at(STEADY, [3 * (i + 0.5) / 4 for i in range(4)])
    assert numbers(path, 25.0, 3, start=1.0, stop=2.0) == shown_at(STEADY, [1 + (i + 0.5) / 3 for i in range(3)])
    assert numbers(path, 1.0, 3) == numbers(path, 1.0, 99) == numbers(path, 1.0)
    assert numbers(path, 0.01) == shown_at(STEADY, [1.5])


@pytest.mark.parametrize(
    ("matrix", "turns"), [((1, 0, 0, 1), 0), ((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)]
)
def test_rotation(tmp_path: Path, matrix: tuple[int, int, int, int], turns: int) -> None:
    """``numpy.rot90`` turns against the clock; the matrix (0, 1, -1, 0) takes the x axis to the y axis, down."""
    path = write_video(tmp_path / "a.mp4", STEADY[:10])
    plain = FrameReader(5.0)(Source(path=path))
    turned = FrameReader(5.0)(Source(data=rotate_track(path.read_bytes(), matrix)))
    for one, other in zip(plain, turned, strict=True):
        assert np.array_equal(np.rot90(np.asarray(one), turns), np.asarray(other))


def test_pictures_and_moving_pictures(tmp_path: Path) -> None:
    assert [number_of(image) for image in FrameReader(1.0)(Source(data=png(stripes(6))))] == [6]
    path = tmp_path / "a.gif"
    stripes(1).save(path, save_all=True, append_images=[stripes(2), stripes(3)], duration=500)
    assert numbers(path, 2.0) == [1, 2, 3] and numbers(path, 2.0, start=0.5) == [2, 3]


def test_a_container_without_a_length_is_measured(tmp_path: Path) -> None:
    """What a browser records: a live matroska has no length in its header."""
    path = write_video(tmp_path / "a.mkv", STEADY, options={"live": "1"})
    with av.open(str(path)) as container:
        assert container.duration is None
    assert numbers(path, 5.0) == shown_at(STEADY, [(i + 0.5) / 5 for i in range(15)])
    assert numbers(path, 5.0, 2) == shown_at(STEADY, [0.75, 2.25])


def test_frames_and_sound_of_one_source(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", STEADY, tone(3.0, 48_000))
    source = Source(path=path, start=1.0, stop=2.0)
    assert len(FrameReader(5.0)(source)) == 5 and len(AudioReader(16_000)(source)) == 16_000
    assert FrameReader(5.0)(source)[0].size == (SIDE, SIDE) and FrameReader(5.0)(source)[0].mode == "RGB"


def test_more_pixels_than_memory_holds_are_refused_before_decoding(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", STEADY)
    with pytest.raises(MediaError, match="give max_frames or a lower fps") as caught:
        FrameReader(1e6)(Source(path=path))
    assert caught.value.reason == "too large"


def test_bad_arguments() -> None:
    for fps in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="fps must be a positive number"):
            FrameReader(fps)
    with pytest.raises(ValueError, match="max_frames must be at least 1"):
        FrameReader(1.0, 0)


def test_readers_cross_processes_and_say_what_they_do() -> None:
    reader = FrameReader(2.0, 8)
    assert pickle.loads(pickle.dumps(reader)) == reader
    assert len({one.description for one in (reader, FrameReader(2.0), FrameReader(1.0, 8))}) == 3
