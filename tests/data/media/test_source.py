"""Sources: bytes of a file, of a part of one, or given; errors that cross processes."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from diffgap.data.media import MediaError, Source


def test_bytes_of_a_file_of_a_part_of_one_and_given(tmp_path: Path) -> None:
    file = tmp_path / "a.TXT"
    file.write_bytes(b"0123456789")
    for source, expected in (
        (Source(path=file), b"0123456789"),
        (Source(path=file, offset=3, size=4), b"3456"),
        (Source(path=file, offset=7), b"789"),
        (Source(data=b"xyz"), b"xyz"),
    ):
        with source.open() as opened:
            assert opened.read() == expected and opened.seek(0) == 0
    assert (Source(path=file).suffix, Source(path=file, suffix=".ogg").suffix, Source(data=b"x").suffix) == (
        ".txt", ".ogg", "",
    )  # fmt: skip


def test_exactly_one_origin() -> None:
    for given in ({}, {"text": "a", "data": b"a"}, {"path": Path("a"), "data": b"a"}):
        with pytest.raises(ValueError, match="one of path, text and data"):
            Source(**given)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no bytes"):
        Source(text="a").open()


@pytest.mark.parametrize("name", ["nowhere", "zero\0byte"])
def test_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(MediaError, match="does not exist") as caught:
        Source(path=tmp_path / name).open()
    assert caught.value.reason == "missing"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MediaError, match="not a file") as caught:
        Source(path=tmp_path / "pipe").open()
    assert caught.value.reason == "undecodable"


def test_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(MediaError("silent", "a.wav is silent")))
    assert (error.reason, str(error)) == ("silent", "a.wav is silent")


def test_names() -> None:
    part = Source(path=Path("a.tar"), offset=512, size=9, start=1.5)
    assert str(part) == "a.tar at byte 512 (1.5 s to the end)"
    assert (
        str(Source(text="x" * 50)) == f"text {'x' * 40!r}" and str(Source(data=b"a", stop=2.0)) == "bytes (0 s to 2 s)"
    )
