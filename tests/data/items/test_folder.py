from __future__ import annotations

import os
import random
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffgap.data.importers import assign_splits
from diffgap.data.items.listing import list_items
from tests.data.items.listed import by_id, files, items, touch


def test_files_of_one_name_are_one_item(tmp_path: Path) -> None:
    touch(tmp_path, "dog/bark.wav", "dog/bark.txt", "dog/bark.PNG", "dog/meow.ogg", "rain.flac")
    found = by_id(tmp_path)
    assert list(found) == ["rain", "dog/bark", "dog/meow"]
    assert files(found["dog/bark"], tmp_path) == {
        "audio": "dog/bark.wav", "image": "dog/bark.PNG", "text": "dog/bark.txt"
    }  # fmt: skip
    assert found["dog/bark"].media["image"].suffix == ".png"
    assert all(item.group == item.id and item.split for item in found.values())


def test_a_video_is_audio_too_unless_there_is_one(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4", "b.mp3")
    found = by_id(tmp_path)
    assert files(found["a"], tmp_path) == {"video": "a.mp4", "audio": "a.mp4"}
    assert files(found["b"], tmp_path) == {"video": "b.mp4", "audio": "b.mp3"}


def test_several_captions_are_items_of_one_group_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    touch(tmp_path, "rain.wav", "rain.txt", "rain.2.txt", "rain.10.txt")
    found = items(tmp_path)
    assert [(item.id, files(item, tmp_path)["text"]) for item in found] == [
        ("rain#1", "rain.txt"), ("rain#2", "rain.2.txt"), ("rain#3", "rain.10.txt")
    ]  # fmt: skip
    assert {(item.group, item.split, item.media["audio"].path) for item in found} == {
        ("rain", found[0].split, tmp_path / "rain.wav")
    }


def test_a_numbered_text_is_a_caption_only_of_a_medium(tmp_path: Path) -> None:
    touch(tmp_path, "take.1.wav", "take.1.txt", "take.wav", "note.1.txt", "note.txt", "dog.wav", "dog.1.2.txt")
    found = by_id(tmp_path)
    assert files(found["take.1"], tmp_path) == {"audio": "take.1.wav", "text": "take.1.txt"}
    assert "text" not in found["take"].media
    assert found.keys() == {"take", "take.1", "note", "note.1", "dog", "dog.1.2"}


def test_of_two_of_a_kind_one_is_taken_and_the_other_noted(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp3", "a.wav", "a.svg", "a.png", "a.WAV")
    listed = list_items(tmp_path)
    assert files(next(iter(listed)), tmp_path) == {"audio": "a.WAV", "image": "a.png"}
    assert listed.notes == ["files beside a better one of their kind and name: 3 (first: 'a.mp3')"]


def test_top_folders_give_the_split_and_the_group_the_others(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.wav", "Valid/a.wav", "eval/b/train/a.wav", *(f"other/{i}.wav" for i in range(40)))
    splits = {item.id: item.split for item in items(tmp_path, split_seed=3)}
    assert (splits["train/a"], splits["Valid/a"], splits["eval/b/train/a"]) == ("train", "val", "test")
    others = [f"other/{i}" for i in range(40)]
    assert [splits[name] for name in others] == assign_splits(others, seed=3)
    assert {i.split for i in items(tmp_path / "other", split=(0, 0, 1))} == {"test"}


def test_hidden_and_unknown_files_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", ".b.wav", "._a.wav", ".git/c.wav", ".DS_Store", "list.csv", "d/.wav")
    listed = list_items(tmp_path)
    assert [item.id for item in listed] == ["a"]
    assert listed.notes == ["files of no known kind: 1 (first: 'list.csv')"]


def test_links(tmp_path: Path) -> None:
    outside = touch(tmp_path / "outside", "secret.wav", "deep/more.wav")
    root = touch(tmp_path / "media", "a.wav", "b/c.wav")
    (root / "copy.wav").symlink_to(root / "b" / "c.wav")
    (root / "relative.wav").symlink_to("b/c.wav")
    (root / "secret.wav").symlink_to(outside / "secret.wav")
    (root / "up.wav").symlink_to("../outside/secret.wav")
    (root / "deep").symlink_to(outside / "deep")
    (root / "b" / "again").symlink_to(root)
    (root / "loop.wav").symlink_to("loop.wav")
    (root / "broken.wav").symlink_to("nothing.wav")
    listed = list_items(root)
    assert [item.id for item in listed] == ["a", "copy", "relative", "b/c"]
    notes = "\n".join(listed.notes)
    assert "lead out of the folder, which are not followed (copy the files, or list their folder): 2" in notes
    assert "links to folders, which are not followed (name the folder itself as the source): 2" in notes
    (tmp_path / "alias").symlink_to(root)
    assert [item.id for item in list_items(tmp_path / "alias")] == ["a", "copy", "relative", "b/c"]


def test_what_is_no_file_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "folder.wav").mkdir()
    touch(tmp_path / "folder.wav", "inside.wav")
    listed = list_items(tmp_path)
    assert [item.id for item in listed] == ["a", "folder.wav/inside"]
    assert listed.notes == ["neither files nor folders: 1 (first: 'pipe.wav')"]


@pytest.mark.parametrize(
    "name", ["two words", "new\nline", "tab\t'quote\"", "雨の音", "a,b;c|d", "-rf", "100%", "%s{0}"]
)
def test_unusual_names(tmp_path: Path, name: str) -> None:
    touch(tmp_path, f"{name}.wav", f"{name}.txt", f"{name}/{name}.wav")
    found = by_id(tmp_path)
    assert found.keys() == {name, f"{name}/{name}"}
    assert found[name].media["text"].path == tmp_path / f"{name}.txt"


def test_names_that_are_no_text_or_composed_otherwise(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    touch(tmp_path, f"{composed}.wav", f"{apart}.txt")
    with open(os.fsencode(tmp_path) + b"/b\xe9b\xe9.wav", "wb"):
        pass
    found = by_id(tmp_path)
    assert found.keys() == {composed, "b\\xe9b\\xe9"}
    assert files(found[composed], tmp_path) == {"audio": f"{composed}.wav", "text": f"{apart}.txt"}
    path = found["b\\xe9b\\xe9"].media["audio"].path
    assert path is not None and path.exists()


def test_a_folder_that_cannot_be_listed_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.wav", "lost+found/b.wav")
    scandir = os.scandir

    def refuse(path: object) -> object:
        if os.fspath(path).endswith("lost+found"):  # type: ignore[call-overload]
            raise PermissionError(13, "Permission denied")
        return scandir(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", refuse)
    listed = list_items(tmp_path)
    assert [item.id for item in listed] == ["a"]
    assert listed.notes == ["folders that cannot be listed: 1 (first: 'lost+found': Permission denied)"]


class Shuffled:
    """os.scandir in another order."""

    def __init__(self, entries: list[os.DirEntry[str]]) -> None:
        self.entries = entries

    def __enter__(self) -> list[os.DirEntry[str]]:
        return self.entries

    def __exit__(self, *_: object) -> None: ...

    def __iter__(self) -> object:
        return iter(self.entries)


def test_the_order_is_that_of_the_names_whatever_the_file_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["Z.wav", "a.wav", "a b.wav", "ä.wav", "雨.wav", "a.1.txt", "a.2.txt", "b/x.mp4", "B/x.wav", "a.d/x.wav"]
    touch(tmp_path, *names)
    listed = list_items(tmp_path)
    expected = list(listed)
    assert [i.id for i in expected] == ["Z", "a b", "a#1", "a#2", "ä", "雨", "B/x", "a.d/x", "b/x"]
    scandir, shuffle = os.scandir, random.Random(0)
    for _ in range(5):

        def shuffled(path: object) -> Shuffled:
            with scandir(path) as found:  # type: ignore[call-overload]
                entries = list(found)
            shuffle.shuffle(entries)
            return Shuffled(entries)

        monkeypatch.setattr(os, "scandir", shuffled)
        again = list_items(tmp_path)
        assert list(again) == expected and again.description == listed.description
        assert list(again) == list(again)


STEMS = st.text(st.sampled_from("ab1. é\n"), min_size=1, max_size=4).filter(lambda s: s.strip(".") and s[0] != ".")
SUFFIXES = st.sampled_from([".wav", ".mp3", ".WAV", ".png", ".jpg", ".mp4", ".txt", ".1.txt", ".2.txt", ".doc", ""])


@settings(max_examples=60, deadline=None)
@given(st.sets(st.tuples(st.sampled_from(["", "c/", "c/d/"]), STEMS, SUFFIXES), min_size=1, max_size=12))
def test_every_file_is_listed_once_or_noted(names: set[tuple[str, str, str]]) -> None:
    """No medium is lost, none is in two groups, and media of a group share folder and first letters."""
    with tempfile.TemporaryDirectory() as folder:
        root = touch(Path(folder), *{"".join(name) for name in names}, "sure.wav")
        present = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
        listed = list_items(root)
        groups: dict[Path, set[str]] = {}
        for item in listed:
            for source in item.media.values():
                assert source.path is not None
                groups.setdefault(source.path.relative_to(root), set()).add(item.group)
                assert str(source.path.relative_to(root)).startswith(item.group)
        assert all(len(found) == 1 for found in groups.values())
        noted = sum(int(line.rsplit(": ", 2)[-2].split(" ")[0]) for line in listed.notes)
        assert len(groups) + noted == len(present) and groups.keys() <= present
        assert Counter(item.id for item in listed).most_common(1)[0][1] == 1
