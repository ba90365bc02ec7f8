"""Independent tasks, each in a process of its own: one that dies, or takes all memory, takes no other along."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import TypeVar

import torch

T = TypeVar("T")


def run_apart(
    work: Callable[..., None],
    tasks: Iterable[T],
    *shared: object,
    jobs: int = 1,
    finished: Callable[[T, str | None], None],
) -> None:
    """Call ``work(task, *shared)`` for every task, ``jobs`` at a time, one thread each.

    The processes end with this one, however it ends. Without a GPU they are forks of a server that has imported torch
    but computed nothing: quick to start, and without the locks that a fork of a busy process may inherit.

    Args:
        work: A function of a module; safe to be killed at any moment.
        tasks: In order of their start; picklable, and so is ``shared``.
        finished: Called in this process as each ends, with ``None`` or the reason of its failure in one line.

    Raises:
        ValueError: ``jobs`` is below 1.
    """
    check_jobs(jobs)
    context = _context(work.__module__)
    waiting = deque(tasks)
    running: dict[int, tuple[BaseProcess, Connection, T]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.popleft()
                receiver, sender = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(target=_call, args=(sender, work, task, *shared), daemon=True)
                process.start()
                sender.close()
                running[process.sentinel] = process, receiver, task
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                process, receiver, task = running.pop(sentinel)
                process.join()
                finished(task, _failure(process.exitcode, receiver))
                receiver.close()
    finally:
        for process, receiver, _ in running.values():
            process.kill()
            process.join()
            receiver.close()


def _context(module: str) -> SpawnContext | ForkServerContext:
    if torch.cuda.is_available():  # importing diffgap asks CUDA, which then refuses to work in a fork
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The first optimizer of a process imports torch._dynamo, which takes as long as torch itself.
    context.set_forkserver_preload([module, "torch._dynamo"])
    return context


def check_jobs(jobs: int) -> None:
    """Raises ValueError for less than one job at a time."""
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; use 1 or more, at most the number of cores")


def _failure(exitcode: int | None, receiver: Connection) -> str | None:
    if exitcode == 0:
        return None
    try:
        return str(receiver.recv())
    except EOFError:  # it had no time to say why
        if exitcode is not None and exitcode < 0:
            return f"its process was killed by {signal.Signals(-exitcode).name}; it may have run out of memory"
        return f"its process ended with status {exitcode}"


def _call(sender: Connection, work: Callable[..., None], *arguments: object) -> None:
    """The life of one process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        work(*arguments)
    except (ValueError, OSError, RuntimeError, MemoryError, ModuleNotFoundError) as error:
        sender.send(" ".join(str(error).split()) or type(error).__name__)
        sys.exit(1)
    except Exception as error:  # not a message meant for users
        traceback.print_exc()
        sender.send(f"{type(error).__name__}: {' '.join(str(error).split())}")
        sys.exit(1)


def end_with_parent() -> None:
    """Waits for the parent's end, however it comes, and ends this process; for a thread."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
