"""Runs of ``embed_items`` in processes of their own, which a test may kill: forks of one that has imported it all."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.embed.fakes import BytesReader, encoders, make_items


def embed(folder: str, output: str, *, count: int = 20, seconds: float = 0.0, **options: Any) -> None:
    """Embeds ``make_items(folder, count, 2)``; every medium takes ``seconds`` to read."""
    from diffgap.embed import embed_items

    embed_items(
        make_items(Path(folder), count, 2), encoders(reader=BytesReader(seconds=seconds)), Path(output),
        **{"workers": 0, "batch_size": 4, "chunk": 7, **options},
    )  # fmt: skip


def signalled(name: str, call: int, after: bool, kind: signal.Signals) -> None:
    """Sends this process a signal at the ``call``-th call of ``os.<name>``, before or after it is done."""
    original, calls = getattr(os, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            os.kill(os.getpid(), kind)
        done = original(*args, **kwargs)
        if calls == call and after:
            os.kill(os.getpid(), kind)
        return done

    setattr(os, name, counted)


class Apart:
    """Starts runs and says how they ended."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.embed.apart"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(
        self,
        *args: Any,
        environment: dict[str, str] | None = None,
        kill: tuple[str, int, bool] | None = None,
        stop: tuple[str, int] | None = None,
        most_bytes: int | None = None,
        said: Path | None = None,
        **kwargs: Any,
    ) -> int:
        """The id of a process that calls ``embed``, its error in the file ``said``.

        It is killed (``kill``) or stopped (``stop``) at a call of a function of ``os``: name, number, whether after it.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        run = {
            "args": [str(a) for a in args], "kwargs": kwargs, "environment": environment or {}, "kill": kill,
            "stop": stop, "most_bytes": most_bytes, "said": None if said is None else str(said),
        }  # fmt: skip
        self._server.stdin.write(json.dumps(run) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def wait(self, process: int) -> int:
        """Exit status, or minus the signal that ended it."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps({"wait": process}) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


def _child(run: dict[str, Any]) -> int:
    os.environ.update(run["environment"])
    if run["kill"]:
        signalled(*run["kill"], signal.SIGKILL)
    if run["stop"]:
        signalled(*run["stop"], True, signal.SIGSTOP)
    if run["most_bytes"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (run["most_bytes"], run["most_bytes"]))
    try:
        embed(*run["args"], **run["kwargs"])
    except Exception as error:
        if run["said"] is None:
            traceback.print_exc()
        else:
            Path(run["said"]).write_text(f"{type(error).__name__}: {error}")
        return 1
    return 0


def _serve() -> None:
    import pyarrow.dataset  # what the first run would import

    import diffgap.embed

    assert diffgap.embed.embed_items and pyarrow.dataset
    with suppress(ImportError):
        import pandas  # noqa: F401
    for line in sys.stdin:
        run = json.loads(line)
        if "wait" in run:
            print(os.waitstatus_to_exitcode(os.waitpid(run["wait"], 0)[1]), flush=True)
            continue
        process = os.fork()
        if not process:
            os._exit(_child(run))
        print(process, flush=True)


if __name__ == "__main__":
    _serve()
