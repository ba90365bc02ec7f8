"""Trains one run undisturbed and another that is killed again and again until it is done.

    python -m tests.training.kill_loop CONFIG REFERENCE KILLED LATEST

Every attempt is a fork of this process, so that it does not import torch anew. Two in three die by SIGKILL at a
random one of their own file operations, the third at a random time, which is at most LATEST of what the undisturbed
run took. Prints the number of attempts that died.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import diffgap.training.trainer  # noqa: F401 (imported before the forks)
from diffgap.cli import main
from diffgap.retrieval import evaluate  # noqa: F401 (likewise)

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "shutil.rmtree")


def attempt(arguments: list[str], folder: str, prepare: Callable[[], None], patience: float | None) -> bool:
    """Train in a fork; whether it came to its end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            prepare()
            main([*arguments, folder])
            status = 0
        finally:
            os._exit(status)
    if patience is not None:
        time.sleep(patience)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit(f"an attempt failed with status {os.WEXITSTATUS(status)}")
    return not os.WIFSIGNALED(status)


def at_operation(number: int, folder: str, act: Callable[[str], None]) -> None:
    """Call ``act`` with the name of this process's n-th change to files below ``folder``, before it is done."""
    seen = 0

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal seen
        flags = os.O_WRONLY | os.O_RDWR
        writes = event == "open" and str(details[0]).startswith(folder) and (details[2] or 0) & flags
        if event in CHANGES or writes:
            seen += 1
            if seen == number:
                act(event)

    sys.addaudithook(hook)


def die_at(operation: int, folder: str) -> None:
    """Kill this process at its n-th change to the file system below ``folder``."""
    at_operation(operation, folder, lambda _: os.kill(os.getpid(), signal.SIGKILL))


if __name__ == "__main__":
    torch.set_num_threads(1)
    config, reference, killed, latest = sys.argv[1:]
    command = ["train", "--config", config]
    start = time.monotonic()
    main([*command, reference])  # here, so that the forks find everything imported
    duration = time.monotonic() - start
    draw, deaths, done = random.Random(0), 0, False
    while not done and deaths < 20:
        # Late enough, on average, to get past a checkpoint; early enough to be killed several times.
        operation, by_time = draw.randint(3, 30), deaths % 3 == 2
        patience = draw.uniform(0.2, 1.0) * float(latest) * duration

        def prepare(operation: int = operation, armed: bool = not by_time) -> None:
            if armed:
                die_at(operation, killed)

        done = attempt(command, killed, prepare, patience if by_time else None)
        deaths += not done
    if not done and not attempt(command, killed, lambda: None, None):
        raise SystemExit("the last attempt was killed")
    print(deaths)
