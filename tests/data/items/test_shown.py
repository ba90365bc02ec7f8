"""What a person is shown of items: captions and paths."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffgap.data.items import Item
from diffgap.data.items.listing import list_items
from diffgap.data.items.shown import ShownItems
from diffgap.data.media import Source
from tests.embed.fakes import Listed


def test_captions_and_paths_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dogs").mkdir()
    (tmp_path / "dogs" / "bark.wav").write_bytes(b"sound")
    (tmp_path / "dogs" / "bark.txt").write_text("A dog barks.\n")
    (tmp_path / "rain.wav").write_bytes(b"sound")
    (tmp_path / "rain.1.txt").write_text("Rain.")
    (tmp_path / "rain.2.txt").write_bytes(b"\xff\xfe\x00")  # no text
    monkeypatch.chdir(tmp_path.parent)
    for folder in (tmp_path, Path(os.path.relpath(tmp_path))):
        items = ShownItems(list_items(folder), folder)
        assert len(items) == 3
        assert {item.id: dict(item.columns) for item in items} == {
            "dogs/bark": {"caption": "A dog barks.", "path_audio": "dogs/bark.wav"},
            "rain#1": {"caption": "Rain.", "path_audio": "rain.wav"},
            "rain#2": {"path_audio": "rain.wav"},
        }


def test_what_is_known_stays_and_what_has_no_path_gets_none(tmp_path: Path) -> None:
    media = {
        "audio": Source(path=tmp_path / "shard.tar", offset=512, size=100),
        "image": Source(path=tmp_path.parent / "elsewhere.png"),
        "video": Source(path=tmp_path / "a.mp4", start=1.0),
        "text": Source(text="inline"),
    }
    known = {"caption": "given", "path_video": "given.mp4", "label": 3}
    (shown,) = ShownItems(Listed([Item("0", "0", "train", media, known)]), tmp_path)
    assert shown.columns == known
    (shown,) = ShownItems(Listed([Item("0", "0", "train", media)]), tmp_path)
    assert shown.columns == {"caption": "inline", "path_video": "a.mp4"}
    assert (shown.id, shown.media) == ("0", media)


def test_notes_and_description_are_the_list_s(tmp_path: Path) -> None:
    listed = Listed([], "a list", ["two are missing"])
    shown = ShownItems(listed, tmp_path)
    assert (shown.description, shown.notes, list(shown)) == ("a list", ["two are missing"], [])
