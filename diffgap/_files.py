"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
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


#: What says that a path is wrong, and not that the machine has failed.
_WRONG_PATH = {
    errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip


class UnwritableError(OSError, ValueError):
    """An output's path that cannot be written to: bad input, found out from the operating system."""


def check_writable(folder: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Whether ``folder``, which need not exist yet, can be written to, found out by trying before the work is done.

    Args:
        folder: Where the temporary files of ``output`` go.
        output: What is to be written there, for its name and for the message.

    Raises:
        UnwritableError: It cannot, and another path is needed.
    """
    output, place = Path(output), Path(folder)
    try:
        while not place.exists():
            place = place.parent
        os.rmdir(tempfile.mkdtemp(prefix=f".{output.name}.tmp", dir=place))
    except OSError as error:
        if error.errno not in _WRONG_PATH:
            raise
        raise UnwritableError(
            f"output {_shortened(output)} cannot be written: {error.strerror}; choose another path"
        ) from error


def check_output_file(path: str | os.PathLike[str]) -> None:
    """Whether :func:`atomic_file` can write ``path``: its folder can be written to, and no folder or device is there.

    Raises:
        ValueError: Its folder cannot be written to.
        FileExistsError: What is there is not a file.
    """
    path = Path(path)
    check_writable(path.parent, path)
    _check_no_device(path)


def _check_no_device(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is a folder or a device; choose a path for a file")


def _shortened(path: Path) -> str:
    said = str(path)
    return said if len(said) <= 200 else f"{said[:100]}...{said[-50:]}"


def beside(path: Path, ending: str) -> Path:
    """The path beside ``path`` whose name has ``ending`` too; also of "." and "..", which are no names."""
    named = path.resolve() if path.name in ("", "..") else path
    return named.with_name(named.name + ending)


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
    """A temporary file beside ``path`` that replaces it when the block ends without an exception.

    Raises:
        FileExistsError: ``path`` is a folder or a device, which nothing may take the place of.
    """
    path = Path(path)
    _check_no_device(path)
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
