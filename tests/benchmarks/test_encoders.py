"""The throughput table of encoders: what is timed, and what a row says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import encoders
from diffgap.data.media import Source


def test_a_row_divides_the_batch_by_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.cumsum([0.0, 0.5, 0.0, 0.25, 0.0, 4.0, 0.0, 0.5, 0.0, 0.5, 0.0, 2.0]).tolist())
    monkeypatch.setattr(encoders.time, "perf_counter", lambda: next(clock))
    seen: list[int] = []

    def encode(batch: list[Any]) -> None:
        seen.append(len(batch))

    encoder: Any = SimpleNamespace(modality="audio", dim=7, reader=lambda source: source.data, encode=encode)
    # Reading takes 0.5, 0.25 and 4 s an item; embedding 0.5, 0.5 and 2 s a batch of 8.
    assert encoders.row("name", encoder, Source(data=b"sound"), 8, 1e-9) == "| audio | name | 7 | 2.0 | 16.00 |"
    assert seen == [8] * 4, "once to warm up, three times timed"


def test_media_are_what_the_table_says(tmp_path: Path) -> None:
    for package in ("av", "soundfile", "PIL", "scipy"):
        pytest.importorskip(package)
    from diffgap.data.media.audio import AudioReader
    from diffgap.data.media.image import ImageReader
    from diffgap.data.media.text import TextReader
    from diffgap.data.media.video import FrameReader

    sources = encoders.media(tmp_path)
    assert AudioReader(48_000)(sources["audio"]).shape == (480_000,)
    assert ImageReader()(sources["image"]).size == (640, 480)
    frames = FrameReader(1.0)(sources["video"])
    assert len(frames) == 10 and frames[0].size == (320, 240)
    assert len(TextReader()(sources["text"]).split()) == 12


def test_unknown_encoders_and_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in ((["nonsense"], "use offline, clap, clip"), (["clip", "--batch", "0"], "must be positive")):
        with pytest.raises(SystemExit):
            encoders.main(arguments)
        assert said in capsys.readouterr().err
