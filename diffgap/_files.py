"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _sync(path: Path) -> None:
    """Flush a file or folder to disk, so that a rename that follows cannot overtake its contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str], *, overwrite: bool = False, within: Path | None = None
) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its name when the block ends without an exception.

    With ``within``, a folder of the same file system, it is made there instead, so that what a killed process leaves
    behind can be told from anything else.

    With ``overwrite`` an existing folder is exchanged for the new one in one system call where the file system can,
    and deleted afterwards. If the block raises, nothing has changed and nothing is left behind.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is false.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another path or pass overwrite=True")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp", dir=within or path.parent))
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        _swap_in(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap_in(new: Path, path: Path) -> None:
    """Put the folder ``new`` at ``path``; what was there is at ``new`` or gone afterwards."""
    if not path.exists():
        os.replace(new, path)
        return
    if sys.platform == "linux":
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        at_cwd, exchange = -100, 2
        if rename is not None and rename(at_cwd, os.fsencode(new), at_cwd, os.fsencode(path), exchange) == 0:
            return
    # Without an atomic exchange there is a moment in which only the retired folder exists.
    retired = new.with_name(new.name + ".old")
    os.replace(path, retired)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(retired, path)
        raise
    shutil.rmtree(retired)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left of its temporary files and folders in ``folder``.

    A retired folder (".old") stays: its name may not have been taken over yet.
    """
    for leftover in folder.glob(".*.tmp*"):
        if leftover.name.endswith(".old"):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path`` that replaces it when the block ends without an exception."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}.tmp", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        os.chmod(temporary, 0o666 & ~_umask())
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
