"""The command line that the models of one GPU share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpus import GPUS, OF_CHIP, Gpu


class Options(NamedTuple):
    """The GPUs to make the model for, the file to write, and the command for the header, without that file."""

    gpus: list[Gpu]
    json: Path | None
    command: str


def parse(module: str, argv: Sequence[str], chips: Sequence[str]) -> Options:
    """``--chip`` and ``--json`` of ``python -m MODULE``, which can be made for some chips."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description="Modelled times for named GPUs.")
    default = [gpu.chip for gpu in GPUS]
    parser.add_argument(
        "--chip", nargs="+", choices=chips, default=default, help="one GPU of each (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write FILE, and what goes beside it")
    args = parser.parse_args(argv)
    if args.json is not None and args.json.suffix != ".json":
        parser.error(f"--json: expected a name that ends in .json, got {args.json.name}")
    given = [] if args.chip == default else ["--chip", *args.chip]
    return Options([OF_CHIP[chip] for chip in args.chip], args.json, " ".join([parser.prog, *given]))
