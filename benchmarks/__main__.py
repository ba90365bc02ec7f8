"""``python -m benchmarks``: run the cases of some families and report them, or one of the :data:`COMMANDS`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.cases import Case
from benchmarks.machine import header
from benchmarks.memory import keep_freed_memory
from benchmarks.report import save, to_json, to_markdown, write
from benchmarks.runner import Result, in_one_line, run_case
from benchmarks.timing import Budget, Clock, CpuClock, CudaClock

#: One module of this package each, with a function ``cases(size)``.
FAMILIES = ("schedule", "sampler", "contrastive", "attention", "adaln", "denoiser", "training", "generator")

#: Families that run only where they are named.
ON_REQUEST = ("modelled",)

#: One module of this package each, with a function ``main(argv)`` that has options of its own.
COMMANDS = ("proof", "tune")

#: Seconds of timing per case, by size, and after how many the rounds end though there were fewer than five.
_SECONDS = {"ci": 0.3, "full": 2.0}
_LIMIT_SECONDS = {"ci": 5.0, "full": 60.0}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time diffgap's operations against the eager reference, torch.compile and other packages.",
        epilog="python -m benchmarks proof: compile every kernel for every chip. python -m benchmarks tune: find the "
        "launch configurations of this GPU. Either has --help.",
    )
    add = result.add_argument
    add(
        "family",
        nargs="*",
        help=f"families to run, of {', '.join(FAMILIES)}; none given: all; on a GPU also {', '.join(ON_REQUEST)}",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where the cases run (default: %(default)s)")
    add("--size", choices=tuple(_SECONDS), default="ci", help="ci: small and quick (default); full: the tables")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)")
    add("--seconds", type=float, help=f"timing per case (default: {_SECONDS['ci']} ci, {_SECONDS['full']} full)")
    add("--json", type=Path, metavar="FILE", help="write FILE, and .md and .png beside it")
    add("--list", action="store_true", help="print the names of the cases and stop")
    return result


def main(argv: Sequence[str]) -> int:
    """Run the command line ``argv``; 0 if every implementation was right, else 1."""
    if argv and argv[0] in COMMANDS:
        if find_spec("triton") is None:
            parser().error(f"{argv[0]}: compiles the Triton kernels, and triton is not installed; pip install triton")
        return int(import_module(f"benchmarks.{argv[0]}").main(argv[1:]))
    options = parser()
    args = options.parse_args(argv)
    unknown = sorted(set(args.family) - {*FAMILIES, *ON_REQUEST})
    if unknown:
        options.error(f"family: {', '.join(unknown)} does not exist; use {', '.join((*FAMILIES, *ON_REQUEST))}")
    if args.threads < 1:
        options.error(f"--threads: must be at least 1, got {args.threads}")
    if args.seconds is not None and not args.seconds > 0:
        options.error(f"--seconds: must be positive, got {args.seconds}")
    if args.json is not None and args.json.suffix != ".json":
        options.error(f"--json: expected a name that ends in .json, got {args.json.name}")
    families = args.family or FAMILIES
    cases = [case for family in families for case in import_module(f"benchmarks.{family}").cases(args.size)]
    if args.list:
        print("\n".join(case.name for case in cases))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        options.error("--device cuda: no CUDA device is visible; use --device cpu")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    clock = CudaClock() if device.type == "cuda" else CpuClock(args.threads)
    description = header(device, clock, argv, (peer.install for case in cases for peer in case.peers))
    budget = Budget(args.seconds or _SECONDS[args.size], limit_seconds=_LIMIT_SECONDS[args.size])

    def keep(result: Result) -> None:
        if args.json is not None:
            write(args.json, to_json(description, result), to_markdown(description, result))

    result = run(cases, device, clock, budget, keep)
    print(to_markdown(description, result))
    if args.json is not None:
        for path in save(args.json, description, result):
            print(f"wrote {path}", file=sys.stderr)
    return 1 if result.failures else 0


def run(
    cases: Sequence[Case],
    device: torch.device,
    clock: Clock,
    budget: Budget,
    keep: Callable[[Result], object] = lambda _: None,
) -> Result:
    """Run the cases one after another, with a line of progress for each on stderr.

    A case that cannot be run, for want of memory for its oracle perhaps, is a failure and ends no other. ``keep`` is
    given what is known after every case: nothing is lost if the command is stopped.
    """
    result = Result()
    for number, case in enumerate(cases, 1):
        start = time.perf_counter()
        try:
            outcome = run_case(case, device, clock, budget)
        except Exception as error:
            outcome = Result(failures=[f"{case.name}: {in_one_line(error)}"])
        if device.type == "cuda":
            torch.cuda.empty_cache()
        result.extend(outcome)
        keep(result)
        took = time.perf_counter() - start
        progress = f"[{number}/{len(cases)}] {case.name}: {took:.1f} s"
        print(progress, *outcome.failures, sep="\n  ", file=sys.stderr)
    return result


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main(sys.argv[1:]))
