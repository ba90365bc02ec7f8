"""The command line: ``diffgap demo | train | eval | diagnose | ablate | sample | embed | import | index | search |
train-generator | generate | generate-set | metrics | report | listen | doctor``.

Exit status: 0 done; 1 the machine failed (disk full, out of memory ...); 2 bad input; 3 a check of
``diagnose --strict`` is bad; 130 interrupted (SIGINT), 143 terminated (SIGTERM). An error is one line on standard error
that names what is wrong and how to put it right.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tyro

from diffgap.commands.ablate import ablate
from diffgap.commands.arguments import check_values, constructors
from diffgap.commands.demo import demo
from diffgap.commands.diagnose import diagnose
from diffgap.commands.doctor import doctor
from diffgap.commands.embed import embed
from diffgap.commands.evaluate import evaluate
from diffgap.commands.generate import generate
from diffgap.commands.generate_set import generate_set
from diffgap.commands.import_embeddings import import_embeddings
from diffgap.commands.index import index
from diffgap.commands.listen import listen
from diffgap.commands.metrics import metrics
from diffgap.commands.report import report
from diffgap.commands.sample import sample
from diffgap.commands.search import search
from diffgap.commands.train import requested_defaults, train_command
from diffgap.commands.train_generator import requested_generator, train_generator_command
from diffgap.generation.trainer import GeneratorRunConfig
from diffgap.training.config import RunConfig


def _deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """A command that gives back its call instead of making it, so that parsing ends before work begins.

    Raises:
        ValueError: A value that the command's annotations rule out.
    """

    @functools.wraps(command)
    def defer(*args: Any, **kwargs: Any) -> Callable[[], None]:
        check_values(command, inspect.signature(command).bind(*args, **kwargs).arguments)
        return functools.partial(command, *args, **kwargs)

    return defer


def _parse(arguments: Sequence[str]) -> Callable[[], None]:
    """The call that the arguments ask for.

    Raises:
        ValueError: Arguments that are wrong, in one line where tyro draws a box of several.
        SystemExit: Help was asked for, and shown.
    """
    asked = "" if {"-h", "--help"} & set(arguments) else next(iter(arguments), "")
    commands: dict[str, Callable[..., None]] = {
        "demo": demo,
        "train": train_command(requested_defaults(arguments) if asked == "train" else RunConfig()),
        "eval": evaluate,
        "diagnose": diagnose,
        "ablate": ablate,
        "sample": sample,
        "embed": embed,
        "import": import_embeddings,
        "index": index,
        "search": search,
        "report": report,
        "train-generator": train_generator_command(
            requested_generator(arguments) if asked == "train-generator" else GeneratorRunConfig()
        ),
        "generate": generate,
        "generate-set": generate_set,
        "listen": listen,
        "metrics": metrics,
        "doctor": doctor,
    }
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), constructors:
            call: Callable[[], None] = tyro.extras.subcommand_cli_from_dict(
                {name: _deferred(command) for name, command in commands.items()},
                prog="diffgap",
                description="Bridge text, video and audio embeddings: train, evaluate, sample.",
                args=arguments,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        drawn = str.maketrans(dict.fromkeys("\u2500\u2502\u256d\u256e\u2570\u256f", " "))
        # Where the output is ASCII, lines are drawn with hyphens.
        title, _, rest = _RULES.sub("", complaint.getvalue().translate(drawn)).strip().partition("\n")
        said = " ".join(rest.partition("For full helptext")[0].replace("__tyro-dummy-inner__.", "").split())
        said = _CHOICES.sub(r"\2 is not \1", said.partition(" Argument helptext:")[0])
        command = f"{arguments[0]} " if arguments[0] in commands else ""
        raise ValueError(f"{said.rstrip('.') or title}; see diffgap {command}--help") from None
    return call


_RULES = re.compile(r"^ *-{4,} *$", re.MULTILINE)
#: What tyro says of a value that is neither None nor a number, with the complaint of either.
_CHOICES = re.compile(r"no type matching (\S+) could be instantiated from \[(.*?)\]\. Got errors: .*")


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: what is half written goes, and resumable work is kept."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Within, SIGTERM raises; not outside of the main thread, or where somebody else has a handler for it."""

    def handle(number: int, frame: object) -> None:
        raise _Terminated

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``diffgap`` command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that has no letter for a caption ends no work
            stream.reconfigure(errors="backslashreplace")
    try:
        with _terminable():
            _parse(arguments or ["--help"])()
            sys.stdout.flush()
    except BrokenPipeError as error:
        if not _is_closed(sys.stdout):
            _fail(error, 1)
        sys.exit(1)  # as rich does; whoever closed the pipe has seen what he wanted
    except (ValueError, TypeError, OverflowError, FileNotFoundError, FileExistsError, ModuleNotFoundError) as error:
        _fail(error, 2)
    except (OSError, RuntimeError, MemoryError) as error:
        _fail(error, 1)
    except KeyboardInterrupt as error:
        resumable = arguments[:1] in (["train"], ["train-generator"], ["demo"], ["ablate"], ["embed"])
        resume = "; run the same command again to resume" if resumable else ""
        said, status = ("terminated", 143) if isinstance(error, _Terminated) else ("interrupted", 130)
        print(f"diffgap: {said}{resume}", file=sys.stderr)
        sys.exit(status)


def _is_closed(stream: Any) -> bool:
    """Whether nobody reads what is written to a stream; if so, the rest goes nowhere."""
    try:
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    return False


def _fail(error: BaseException, status: int) -> None:
    print(f"diffgap: {' '.join(str(error).split())[:600] or type(error).__name__}", file=sys.stderr)
    sys.exit(status)
