from __future__ import annotations

from pathlib import Path

import pytest

from diffgap._files import atomic_file, atomic_folder, remove_leftovers


def write(path: Path, text: str, **options: bool) -> None:
    with atomic_folder(path, **options) as folder:
        (folder / "a").write_text(text)


def test_atomic_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("x")
        assert not target.exists()
    assert (target / "a").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_atomic_folder_refuses_to_overwrite(tmp_path: Path) -> None:
    write(tmp_path / "out", "x")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write(tmp_path / "out", "y")


def test_atomic_folder_overwrites(tmp_path: Path) -> None:
    write(tmp_path / "out", "x")
    write(tmp_path / "out", "y", overwrite=True)
    assert (tmp_path / "out" / "a").read_text() == "y"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def interrupted_folder(path: Path) -> None:
    with atomic_folder(path, overwrite=True) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError("stop")


def interrupted_file(path: Path) -> None:
    with atomic_file(path) as file:
        file.write_text("half")
        raise RuntimeError("stop")


@pytest.mark.parametrize("exists", [False, True])
def test_exception_changes_nothing(tmp_path: Path, exists: bool) -> None:
    if exists:
        write(tmp_path / "out", "x")
    with pytest.raises(RuntimeError, match="stop"):
        interrupted_folder(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if exists else [])
    if exists:
        assert (tmp_path / "out" / "a").read_text() == "x"


def test_atomic_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="stop"):
        interrupted_file(target)
    assert target.read_text() == "old"
    with atomic_file(target) as file:
        file.write_text("new")
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    write(tmp_path / "out", "x")
    killed = atomic_folder(tmp_path / "out", overwrite=True)
    killed.__enter__()
    assert len(list(tmp_path.iterdir())) == 2
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
