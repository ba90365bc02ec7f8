"""Tasks in processes of their own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from diffgap.training.workers import run_apart


def work(task: str, folder: Path) -> None:
    if task == "refuses":
        raise ValueError("settings.x is 3;\nuse 4")
    if task == "breaks":
        raise KeyError("x")
    if task == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "leaves":
        os._exit(7)
    (folder / task).write_text(f"{torch.get_num_threads()} {os.getpid()}")


def meet(task: str, folder: Path) -> None:
    """Ends well only if the other task runs at the same time."""
    (folder / task).touch()
    other = folder / {"a": "b", "b": "a"}[task]
    for _ in range(3000):
        if other.exists():
            return
        time.sleep(0.01)
    raise RuntimeError(f"{other.name} never came")


def outcomes(function: object, tasks: list[str], folder: Path, jobs: int) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    run_apart(function, tasks, folder, jobs=jobs, finished=found.__setitem__)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("jobs", [1, 3])
def test_one_that_fails_takes_no_other_along(tmp_path: Path, jobs: int) -> None:
    tasks = ["first", "refuses", "dies", "breaks", "leaves", "last"]
    found = outcomes(work, tasks, tmp_path, jobs)
    assert found == {
        "first": None,
        "refuses": "settings.x is 3; use 4",
        "dies": "its process was killed by SIGKILL; it may have run out of memory",
        "breaks": "KeyError: 'x'",
        "leaves": "its process ended with status 7",
        "last": None,
    }
    first, last = ((tmp_path / name).read_text().split() for name in ("first", "last"))
    assert first[0] == last[0] == "1"  # thread
    assert len({first[1], last[1], str(os.getpid())}) == 3


def test_jobs_run_at_the_same_time(tmp_path: Path) -> None:
    assert outcomes(meet, ["a", "b"], tmp_path, 2) == {"a": None, "b": None}


def test_the_others_end_when_the_caller_gives_up(tmp_path: Path) -> None:
    def give_up(task: str, reason: str | None) -> None:
        raise InterruptedError(f"{task} {reason}")

    with pytest.raises(InterruptedError, match="refuses"):
        run_apart(_refuse_or_wait, ["waits", "refuses"], tmp_path, jobs=2, finished=give_up)
    pid = int((tmp_path / "waits").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def _refuse_or_wait(task: str, folder: Path) -> None:
    if task == "waits":
        (folder / "pid").write_text(str(os.getpid()))
        (folder / "pid").rename(folder / "waits")
        signal.pause()
    while not (folder / "waits").exists():
        time.sleep(0.01)
    raise ValueError("no")


def test_jobs_below_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="jobs is 0; use 1 or more"):
        run_apart(work, ["first"], tmp_path, jobs=0, finished=lambda *_: None)
    assert not list(tmp_path.iterdir())
