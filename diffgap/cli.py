"""The command line: ``diffgap demo | train | eval | diagnose | ablate | sample | embed | import | index | search |
train-generator | generate | generate-set | metrics | report | listen | doctor``.

Exit status: 0 done; 1 the machine failed (disk full, out of memory ...); 2 bad input; 3 a check of
``diagnose --strict`` is bad; 130 interrupted. An error is one line on standard error that names what is wrong and how
to put it right.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from diffgap.commands.ablate import ablate
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
    """A command that gives back its call instead of making it, so that parsing ends before work begins."""

    @functools.wraps(command)
    def defer(*args: Any, **kwargs: Any) -> Callable[[], None]:
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
        with contextlib.redirect_stderr(complaint):
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
        title, _, rest = complaint.getvalue().translate(drawn).strip().partition("\n")
        said = rest.partition("For full helptext")[0].replace("__tyro-dummy-inner__.", "")
        command = f"{arguments[0]} " if arguments[0] in commands else ""
        raise ValueError(f"{' '.join(said.split()) or title}; see diffgap {command}--help") from None
    return call


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``diffgap`` command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _parse(arguments or ["--help"])()
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, ModuleNotFoundError) as error:
        _fail(error, 2)
    except (OSError, RuntimeError, MemoryError) as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        resumable = arguments[:1] in (["train"], ["train-generator"], ["demo"], ["ablate"], ["embed"])
        resume = "; run the same command again to resume" if resumable else ""
        print(f"diffgap: interrupted{resume}", file=sys.stderr)
        sys.exit(130)


def _fail(error: BaseException, status: int) -> None:
    print(f"diffgap: {' '.join(str(error).split())[:600] or type(error).__name__}", file=sys.stderr)
    sys.exit(status)
