"""Trains runs that are disturbed half way, and then run again undisturbed.

    python -m tests.soak.disturbances CONFIG FOLDER

FOLDER/whole is never disturbed. FOLDER/<disturbance> is, in a fork of this process. Prints as JSON, by disturbance, the
exit status of the disturbed command, what it said on stderr, and the status of the same command run again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import diffgap.training.trainer  # noqa: F401 (imported before the forks)
from diffgap.cli import main
from diffgap.retrieval import evaluate  # noqa: F401 (likewise)
from tests.training.kill_loop import CHANGES, at_operation

#: Changes to the run folder before the disturbance: some checkpoints are there by then.
LATER = 40


def fill_disk(folder: str) -> None:
    """From then on no file may grow."""

    def full(_: str) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    at_operation(LATER, folder, full)


def forbid_writing(folder: str) -> None:
    """From then on the file system is read-only. Root may write to any folder, so the calls themselves are refused."""
    refused = False

    def refuse(_: str) -> None:
        nonlocal refused
        refused = True

    def hook(event: str, details: tuple[Any, ...]) -> None:
        writes = (
            event == "open" and (details[2] or 0) & (os.O_WRONLY | os.O_RDWR) and str(details[0]).startswith(folder)
        )
        if refused and (writes or event in CHANGES):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(details[0]))

    at_operation(LATER, folder, refuse)
    sys.addaudithook(hook)


def turn_clock(folder: str) -> None:
    """The clock goes back ten years, and forth, at every second look at it."""
    looks, clock, clock_ns = 0, time.time, time.time_ns

    def shift() -> int:
        nonlocal looks
        looks += 1
        return -(looks % 2) * 315_000_000

    time.time = lambda: clock() + shift()
    time.time_ns = lambda: clock_ns() + shift() * 10**9


DISTURBANCES: dict[str, Callable[[str], None]] = {
    "full": fill_disk,
    "read-only": forbid_writing,
    "clock": turn_clock,
}


def attempt(command: list[str], said: Path, prepare: Callable[[], None]) -> int:
    """Exit status of the command in a fork."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(descriptor, 2)
            os.dup2(descriptor, 1)
            prepare()
            main(command)
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    config, folder = sys.argv[1], Path(sys.argv[2])
    with contextlib.redirect_stdout(sys.stderr):
        main(["train", "--config", config, str(folder / "whole")])  # here, so that the forks find everything imported
    ends = {}
    for name, disturb in DISTURBANCES.items():
        command = ["train", "--config", config, str(folder / name)]
        said = folder / f"{name}.txt"
        status = attempt(command, said, lambda: disturb(str(folder / name)))  # noqa: B023 (called at once)
        text = said.read_text()
        ends[name] = (status, text, attempt(command, said, lambda: None))
    print(json.dumps(ends))
