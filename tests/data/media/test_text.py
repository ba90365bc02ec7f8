"""TextReader: texts and files of them."""

from __future__ import annotations

from pathlib import Path

from diffgap.data.media import Source
from diffgap.data.media.text import TextReader


def test_texts_and_files(tmp_path: Path) -> None:
    read = TextReader()
    assert read(Source(text="  A lion. \n")) == "A lion."
    for content in ("Ein Löwe.\nДва льва.\r\n", "\ufeffEin Löwe.\nДва льва."):
        (tmp_path / "a.txt").write_bytes(content.encode())
        text = read(Source(path=tmp_path / "a.txt"))
        assert text.splitlines() == ["Ein Löwe.", "Два льва."]
    assert read(Source(path=tmp_path / "a.txt", offset=3, size=10)) == "Ein Löwe."


def test_a_megabyte_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" * 1_000_000)
    assert len(TextReader()(Source(path=tmp_path / "a.txt"))) == 1_000_000
