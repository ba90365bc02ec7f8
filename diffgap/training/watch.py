"""The loss of one of a run's processes: found out by the others, named, and made the end of the run.

A collective that fails says that a connection broke or a wait was too long, not whose fault it was. So every process
counts up in the job's store twice a second, and one whose count stands still is lost.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

#: A pulse that 1,024 processes may send to one store, and a message that comes long before a launcher, which gives 30 s
#: to end in, kills the process that is about to write it.
_PULSE_SECONDS = 0.5
#: A process may miss some of its turns on a busy machine.
_PULSES_MISSED = 4


class _Terminated(BaseException):
    """The launcher ends this process, as it does when another has died."""


@contextmanager
def watched(rank: int, world: int) -> Iterator[None]:
    """Inside the block the loss of another process is one error that names it; SIGTERM is an interrupt.

    Args:
        rank: This process's, in the default process group.
        world: Number of processes; with 1 nothing is done.

    Raises:
        RuntimeError: A process was killed, or has hung for longer than the process group's timeout.
    """
    if world == 1:
        yield
        return
    pulse = _Pulse(rank, world)
    own_signals = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _terminate) if own_signals else None
    try:
        yield
    except (RuntimeError, _Terminated) as error:
        if own_signals:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process ends anyway, and first says why
        lost = pulse.lost()
        if lost:
            raise RuntimeError(
                f"process {lost} of {world} (counted from 0) has died or hangs; run the same command again to resume "
                "from the last checkpoint"
            ) from error
        if isinstance(error, _Terminated):
            raise KeyboardInterrupt from None
        raise
    finally:
        if own_signals:
            signal.signal(signal.SIGTERM, previous)
        pulse.stop()


def _terminate(*_: Any) -> None:
    raise _Terminated


class _Pulse:
    """A thread that counts up in the job's store for as long as this process lives."""

    def __init__(self, rank: int, world: int) -> None:
        self._others = [other for other in range(world) if other != rank]
        self._key = str(rank)
        # A connection of its own: the main thread may be inside a call of the other.
        self._store = PrefixStore("diffgap", _get_default_store().clone())
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the store ends with the process that holds it
            while not self._end.wait(_PULSE_SECONDS):
                self._store.add(self._key, 1)

    def _counts(self) -> list[int]:
        return [self._store.add(str(other), 0) for other in self._others]

    def lost(self) -> str:
        """The processes whose count stands still, "1" or "1, 3"; empty if there are none."""
        try:
            before = self._counts()
            time.sleep(_PULSE_SECONDS * _PULSES_MISSED)
            counts = zip(self._others, before, self._counts(), strict=True)
            still = ", ".join(str(other) for other, old, new in counts if old == new)
            # The first to look decides: those that look later also miss the ones that have ended because of it.
            return self._store.compare_set("lost", "", still).decode() if still else ""
        except RuntimeError:
            return "0"  # without a launcher that holds it, the store was process 0's

    def stop(self) -> None:
        """Let the count stand still."""
        self._end.set()
        self._thread.join()
