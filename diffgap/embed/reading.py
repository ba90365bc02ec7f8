"""Media read by worker processes: one that dies costs the medium it was reading, and no more."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from diffgap.data.media import MediaError, Reader, Source
from diffgap.training.workers import end_with_parent

#: A medium that takes longer has hung its decoder.
READ_SECONDS = 600.0
_START_SECONDS = 300.0


class MediaPool:
    """Reads media in ``workers`` processes, or in the calling one if there are none.

    A thread for each process hands it one medium at a time and waits, so that it is known which medium a process died
    of. The processes are forks of a server that has imported the readers and computed nothing.
    """

    def __init__(self, readers: Mapping[str, Reader], workers: int) -> None:
        self._readers = dict(readers)
        self._context = multiprocessing.get_context("forkserver")
        modules = {type(reader).__module__ for reader in readers.values()} - {"__main__"}
        self._context.set_forkserver_preload([__name__, *sorted(modules)])
        self._threads = ThreadPoolExecutor(workers, "read") if workers else None
        self._own = threading.local()
        self._processes: list[_Process] = []
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, modality: str, source: Source) -> Future[Any]:
        """What the modality's reader makes of the source. The future raises MediaError for a medium that is wrong."""
        if self._threads is not None and source.text is None:
            return self._threads.submit(self._read_apart, modality, source)
        done: Future[Any] = Future()
        try:
            done.set_result(read(self._readers[modality], source))
        except MediaError as error:
            done.set_exception(error)
        return done

    def _read_apart(self, modality: str, source: Source) -> Any:
        process = getattr(self._own, "process", None)
        if process is None:
            process = self._own.process = self._start()
        try:
            return process.read(modality, source)
        except _Died as death:
            self._own.process = None
            with self._lock:
                self._processes.remove(process)
            if self._closed:
                raise
            raise MediaError("undecodable", f"{source}: {death}") from None

    def _start(self) -> _Process:
        with self._lock:
            if self._closed:
                raise _Died("the pool is closed")
            process = _Process(self._context, self._readers)
            self._processes.append(process)
        process.wait_for_start()
        return process

    def __enter__(self) -> MediaPool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._threads is None:
            return
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
        self._threads.shutdown(cancel_futures=True)


def read(reader: Reader, source: Source) -> Any:
    """What ``reader`` makes of ``source``; whatever it raises about the medium is a MediaError."""
    try:
        return reader(source)
    except (MediaError, ImportError):
        raise
    except MemoryError:
        raise MediaError("too large", f"{source} does not fit into memory") from None
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise MediaError("undecodable", f"{source} cannot be read: {type(error).__name__}: {said}") from error


class _Died(RuntimeError):
    """The process ended while it was reading."""


class _Process:
    def __init__(self, context: multiprocessing.context.ForkServerContext, readers: Mapping[str, Reader]) -> None:
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, readers), daemon=True)
        self._process.start()
        other.close()

    def wait_for_start(self) -> None:
        try:
            if self._pipe.poll(_START_SECONDS):
                self._pipe.recv_bytes()
                return
        except EOFError:
            pass
        self.kill()
        self._process.join()
        raise RuntimeError(
            f"a process that reads media did not start (status {self._process.exitcode}): a script that embeds needs "
            "its calls below `if __name__ == '__main__':`; readers must be picklable; workers=0 does without"
        )

    def read(self, modality: str, source: Source) -> Any:
        try:
            self._pipe.send_bytes(pickle.dumps((modality, source)))
            if not self._pipe.poll(READ_SECONDS):
                self.kill()
                self._process.join()
                raise _Died(f"it was not read in {READ_SECONDS:g} s")
            result, error = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            raise _Died(f"the process that read it {how}") from None
        if error is not None:
            raise error
        return result

    def kill(self) -> None:
        self._process.kill()


def _serve(pipe: Connection, readers: Mapping[str, Reader]) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
    threading.Thread(target=end_with_parent, daemon=True).start()
    pipe.send_bytes(b"")
    while True:
        try:
            modality, source = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        answer: tuple[Any, Exception | None]
        try:
            answer = read(readers[modality], source), None
        except Exception as error:
            answer = None, error
        try:
            # Not pipe.send, which would hand torch tensors over as open files.
            content = pickle.dumps(answer, protocol=5)
        except Exception as error:
            content = pickle.dumps((None, TypeError(f"the {modality} reader gives what cannot be pickled: {error}")))
        pipe.send_bytes(content)
