"""A run folder while it is trained into: one process at a time, and a log that agrees with the checkpoints."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make ``folder`` and keep other processes from training into it; the lock ends with this process, however it ends.

    Raises:
        ValueError: Another process is training into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is training into {folder}; wait for it to end, or choose another output folder"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Says of what cannot be written where it was to go, and how to go on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(
            f"{folder} cannot be written: {reason}. Its last checkpoint is kept: make room or give access, and run the "
            "same command again to resume"
        ) from error


class MetricsLog:
    """``metrics.jsonl``: one JSON object a step, on its way to the disk as soon as it is written.

    Args:
        path: The file.
        step: Lines after this step are dropped: a killed run logged them after its last checkpoint, and they are about
            to be repeated.
    """

    def __init__(self, path: Path, step: int) -> None:
        if path.exists():
            os.truncate(path, _end_of_step(path, step))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def sync(self) -> None:
        """Return once all lines are on the disk; called before a checkpoint, which they must not fall behind."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _end_of_step(path: Path, step: int) -> int:
    """Length in bytes of the whole lines up to ``step``; the last line may have been cut off by a kill."""
    end = 0
    with path.open("rb") as log:
        for line in log:
            try:
                logged = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n") or logged > step:
                break
            end += len(line)
    return end
