"""All that is to be known on a GPU, in one command: ``make gpu``.

Runs tests/gpu and all benchmarks against all peers that are installed, and writes
``benchmarks/results/<GPU>-<date>.json`` with its tables and picture. Beside it, ``-models.json`` and ``.md`` have the
measured time of every case that a model has a time for, and which of these were off by more than 25%;
``-kernels.json`` and ``.md`` have the same for the kernels of the proof, each alone (:mod:`benchmarks.kernel_times`).
Models are of one GPU of a chip, named in the table, and their times are lower bounds. The exit status is 1 if a test
failed, an implementation was wrong or a kernel could not be timed, not for what a model says.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.comparison import Comparison, furthest_first, to_json, to_markdown  # noqa: E402
from benchmarks.report import write  # noqa: E402
from benchmarks.runner import Row  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def rows_in(path: Path, kind: str) -> list[Row]:
    """The rows of a file of results that are of a kind.

    Raises:
        ValueError: the file is no file of results.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return [Row(**row) for row in rows if row["kind"] == kind]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a file of results of python -m benchmarks ({error})") from None


def compare(modelled: Sequence[Row], measured: Sequence[Row]) -> list[Comparison]:
    """Every case and implementation that has both times, the furthest off first."""
    times = {(row.case, row.impl): row.median_s for row in measured if row.kind == "measured" and row.device == "cuda"}
    return furthest_first(
        Comparison(row.case, row.impl, row.median_s, times[row.case, row.impl])
        for row in modelled
        if row.kind == "modelled" and (row.case, row.impl) in times
    )


def report(results: Path, chip: str, measured_on: str) -> Path:
    """Write and sum up the comparison of a file of results with the models of its chip; the path of the tables."""
    from benchmarks import modelled
    from benchmarks.gpus import OF_CHIP

    rows, without = modelled.rows(chip)
    compared = compare(rows, rows_in(results, "measured"))
    header: dict[str, Any] = {
        "gpu": OF_CHIP[chip].name,
        "chip": chip,
        "measured": measured_on,
        "date": date.today().isoformat(),
    }
    header["modelled"] = len(rows)
    path = results.with_name(f"{results.stem}-models.json")
    _, document = write(path, to_json(header, map(asdict, compared)), to_markdown(header, compared))
    for line in without:
        print(f"gpu: {line}")
    for entry in compared:
        if entry.off:
            print(f"gpu: {entry.line}")
    print(f"gpu: {len(compared)} modelled times measured, {sum(entry.off for entry in compared)} off; wrote {document}")
    return document


def file_name(gpu: str, day: str) -> str:
    """``nvidia-h100-80gb-hbm3-2026-01-31.json``."""
    return f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}-{day}.json"


def run(command: Sequence[str]) -> bool:
    """Run a command of this Python from the root of the sources; whether it succeeded."""
    print("gpu:", *command, flush=True)
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode == 0


def main(argv: Sequence[str]) -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.py", description="Tests and benchmarks on a GPU.")
    parser.add_argument("--size", choices=("ci", "full"), default="full", help="of the benchmarks (default: full)")
    args = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("gpu: needs a GPU, and no CUDA device is visible; nothing was run", file=sys.stderr)
        return 1
    from diffgap.kernels.configs import chip_of

    from benchmarks.__main__ import FAMILIES, ON_REQUEST

    chip, name = chip_of(torch.empty(1, device="cuda")), torch.cuda.get_device_name()
    path = RESULTS / file_name(name, date.today().isoformat())
    command = ["benchmarks", *FAMILIES, *ON_REQUEST, "--device", "cuda", "--size", args.size, "--json", str(path)]
    kernels = ["benchmarks.kernel_times", "--json", str(path.with_name(f"{path.stem}-kernels.json"))]
    passed = [run(["pytest", "tests/gpu", "-q"]), run(command), run(kernels)]
    if path.is_file():
        report(path, chip, name)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
