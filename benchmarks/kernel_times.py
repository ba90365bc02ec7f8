"""The kernels of the proof on the GPU that is here: the time of each beside the one that is modelled for its chip.

    python -m benchmarks.kernel_times --json benchmarks/results/GPU-DATE-kernels.json

The modelled times are those of the newest ``proof-*.json`` in ``benchmarks/results``. Of the sizes that share a
configuration one is launched (``--size ci`` of the proof), at the shapes that the times are modelled for
(:mod:`benchmarks.work`), with its configuration. Of the schedule's CUDA kernels those are launched that the benchmarks'
calls take in float32 and bfloat16. torch's profiler tells how long each kernel ran; the last cache is flushed before
every call, as the models have it. Kernels whose model is nothing but a launch are left out: the launch is no part of
the time that the profiler sees.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffgap.kernels import similarity
from diffgap.kernels.configs import CONFIGS, adaln_config, attention_config, chip_of

from benchmarks import schedule
from benchmarks.aot import (
    PASSES,
    PRODUCTS,
    TORCH,
    Launches,
    Make,
    adaln_launches,
    attention_launches,
    contrastive_launches,
    multiplied_as,
)
from benchmarks.cases import DTYPES, differentiated
from benchmarks.comparison import TOLERANCE, Comparison, furthest_first, tables, to_json
from benchmarks.compiled import Case, cases
from benchmarks.nvcc import plain_name
from benchmarks.report import write
from benchmarks.runner import in_one_line
from benchmarks.timing import flush_buffer
from benchmarks.work import BATCH, GALLERY, QUERIES, loss_rows
from diffgap.ops.random import normal

RESULTS = Path(__file__).resolve().parent / "results"
#: Calls that are profiled, after one that compiles; a kernel's time is the median.
CALLS = 20


@dataclass(frozen=True)
class Modelled:
    """A kernel of the proof with its call; fields as in :class:`benchmarks.proof.Row`."""

    family: str
    kernel: str
    dtype: str
    size: str
    shape: str
    pipe: str
    modelled_s: float

    @property
    def name(self) -> str:
        """Of the kernel itself, without its op and variant."""
        return self.kernel.rpartition("/")[2]


@dataclass(frozen=True)
class Call:
    """A function that launches the kernels of some rows."""

    rows: Mapping[str, Modelled]
    run: Callable[[], object]


@dataclass(frozen=True)
class Measured:
    """A kernel with both times, in seconds: all launches of a call."""

    model: Modelled
    measured_s: float

    @property
    def comparison(self) -> Comparison:
        row = self.model
        case = "/".join(part for part in (row.kernel, row.dtype, row.size, row.shape) if part)
        return Comparison(case, row.pipe, row.modelled_s, self.measured_s)


def modelled(folder: Path, chip: str) -> list[Modelled]:
    """The rows of the newest proof for a chip, but for those that are modelled as a launch.

    Raises:
        ValueError: there is none, or the newest is no result of the proof.
    """
    files = sorted(folder.glob("proof-*.json"), key=lambda path: path.stem[-10:])
    fix = f"run: python -m benchmarks proof --chip {chip} --json {folder.name}/proof-YYYY-MM-DD.json"
    if not files:
        raise ValueError(f"{folder} has no proof-*.json; {fix}")
    try:
        rows = [row for row in json.loads(files[-1].read_text(encoding="utf-8"))["rows"] if row["chip"] == chip]
        found = [Modelled(**{name: row[name] for name in Modelled.__dataclass_fields__}) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{files[-1]}: expected results of python -m benchmarks proof ({error}); {fix}") from None
    if not found:
        raise ValueError(f"{files[-1].name} has no row for {chip}; {fix}")
    return [row for row in found if row.pipe != "launch"]


def launches_of(case: Case, make: Make) -> tuple[Launches, AbstractContextManager[None]]:
    """The launch functions of a case of the proof at its modelled shapes, by what stands before a kernel's name in the
    proof, and what they must run within."""
    product, dtype = PRODUCTS[case.dtype], TORCH[case.dtype]
    if case.family == "adaln":
        (width,) = case.size
        return adaln_launches(adaln_config(case.chip, width), dtype, width, make), nullcontext()
    if case.family == "attention":
        n_q, n_k, d = case.size
        forward, backward = (attention_config(case.chip, product, n_q, n_k, d, which) for which in PASSES)
        launches = attention_launches(forward, backward, dtype, (n_q, n_k, d), BATCH, make)
        return {f"{name}/all": run for name, run in launches.items()}, multiplied_as(product)
    (_, width), tile = case.size, CONFIGS[case.chip].contrastive[product]
    launches = contrastive_launches(tile, dtype, width, loss_rows(case), make)
    queries, gallery = make(QUERIES, width, dtype=dtype), make(GALLERY, width, dtype=dtype)
    # A positive for each query.
    ids = torch.arange(GALLERY, device=gallery.device)
    launches["similarity_ranks/ids"] = partial(similarity.ranks, queries, gallery, ids[:QUERIES], ids, tile)
    launches["similarity_topk/k=10"] = partial(similarity.topk, queries, gallery, 10, tile)
    return launches, multiplied_as(product)


def triton_calls(chip: str, rows: Sequence[Modelled], make: Make) -> Iterator[Call]:
    """A call for every launch function that a row is about; each must run before the next is asked for."""
    for case in cases("ci", chips=[chip]):
        of_case = [row for row in rows if (row.family, row.dtype, row.size) == (case.family, case.dtype, case.label)]
        if of_case:
            yield from _calls_of(case, of_case, make)  # whose tensors end with it


def _calls_of(case: Case, rows: Sequence[Modelled], make: Make) -> Iterator[Call]:
    launches, context = launches_of(case, make)
    with context:
        for name, run in launches.items():
            if of_launch := {row.name: row for row in rows if row.kernel == f"{name}/{row.name}"}:
                yield Call(of_launch, run)


def schedule_calls(rows: Sequence[Modelled], device: torch.device) -> Iterator[Call]:
    """Noising and its gradient, guided steps, and plain noise, in the dtypes that the benchmarks have."""
    solvers = {solver.name: solver for solver in schedule.SOLVERS}
    for shape in dict.fromkeys(row.shape for row in rows if row.family == "schedule"):
        call, _, sizes = shape.rpartition("/")
        samples, width = map(int, sizes.split("x"))
        op, _, solver = call.partition("/")
        for dtype in DTYPES:
            of_call = {row.name: row for row in rows if row.shape == shape and row.dtype == dtype}
            if not of_call:
                continue
            if op == "normal":
                yield Call(of_call, partial(normal, torch.arange(samples, device=device), (width,)))
                continue
            case = (
                schedule.step_case(solvers[solver], samples, width, dtype)
                if op == "solver_step"
                else schedule.noising_case(samples, width, dtype)
            )
            inputs = case.inputs(device)
            if op == "q_sample_backward":
                inputs["x0"].requires_grad_()
                inputs["target"] = "v_prediction"  # which has a gradient too
            yield Call(of_call, differentiated(partial(case.call, **inputs), inputs))


def kernel_seconds(run: Callable[[], object], calls: int = CALLS) -> dict[str, float]:
    """Seconds on the GPU of each kernel in one call, all its launches together, by its name as compiled.

    The median over ``calls`` calls that follow one without a profiler, each with a cold cache.
    """
    run()
    flush = flush_buffer()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        for _ in range(calls):
            flush.zero_()
            run()
        torch.cuda.synchronize()
    launches = [
        (event.name, event.time_range.start, event.time_range.elapsed_us() * 1e-6)
        for event in profiled.events()
        if event.device_type.name == "CUDA"  # the others are calls of the driver
    ]
    return by_call(launches, calls)


def by_call(launches: Sequence[tuple[str, float, float]], calls: int) -> dict[str, float]:
    """From (name, start, seconds) of every launch in ``calls`` equal calls: median seconds of a call by kernel.

    What was not launched equally often in every call (the flush counts as often as the calls) has no time.
    """
    of_kernel: dict[str, list[float]] = defaultdict(list)
    for name, _, duration in sorted(launches, key=lambda launch: launch[1]):
        of_kernel[kernel_name(name)].append(duration)
    found = {}
    for name, durations in of_kernel.items():
        each, rest = divmod(len(durations), calls)
        if not rest:
            sums = (sum(durations[i * each : (i + 1) * each]) for i in range(calls))
            found[name] = statistics.median(sums)
    return found


def kernel_name(name: str) -> str:
    """A kernel's name in the proof, of the name that a profiler has for it."""
    if "<" in name or "(" in name:
        return plain_name(name).replace(" ", "")
    return name.removesuffix(".kd").strip("_").removesuffix("_kernel")


def measure(
    calls: Iterator[Call], time: Callable[[Callable[[], object]], Mapping[str, float]]
) -> tuple[list[Measured], list[str]]:
    """The kernels that were launched, and one line for every call that could not be made."""
    found: list[Measured] = []
    failures: list[str] = []
    for call in calls:
        row = next(iter(call.rows.values()))
        label = f"{row.kernel.rpartition('/')[0]} {row.dtype} {row.size or row.shape}"
        try:
            times = time(call.run)
        except Exception as error:  # for want of memory perhaps; the other kernels are left to be measured
            failures.append(f"{label}: {in_one_line(error)}")
            continue
        launched = [Measured(row, times[name]) for name, row in call.rows.items() if name in times]
        if not launched:
            failures.append(f"{label}: the profiler saw none of its kernels, {', '.join(call.rows)}")
        print(f"{label}: {len(launched)} of {len(call.rows)} kernels", file=sys.stderr)
        found += launched
    return found, failures


def to_markdown(header: Mapping[str, Any], measured: Sequence[Measured], failures: Sequence[str]) -> str:
    """What was off, then all, then what could not be launched."""
    compared = furthest_first(entry.comparison for entry in measured)
    off = sum(entry.off for entry in compared)
    lines = [
        f"# Kernels: modelled beside measured, {header['gpu']}, {header['date']}",
        "",
        f"`{header['command']}`",
        "",
        f"Measured by torch's profiler, {header['calls']} calls each. Of {header['modelled']} kernels and "
        f"configurations whose modelled time on {header['chip']} is more than a launch, {len(compared)} were measured, "
        f"of which {off} were off by more than {TOLERANCE:.0%}. A kernel is "
        "`op/variant/kernel/dtype/size/shape`, and a pipe what limits it in the model, whose times are meant as lower "
        "bounds.",
        "",
        *tables(compared, "kernel", "pipe"),
    ]
    if failures:
        lines += ["## Not measured", "", *(f"- {line}" for line in failures), ""]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Print what is off, and write everything with ``--json``; 1 if a kernel could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_times", description="The kernels of the proof.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write FILE, and .md beside it")
    path = parser.parse_args(argv).json
    if path is not None and path.suffix != ".json":
        parser.error(f"--json: expected a name that ends in .json, got {path.name}")
    if not torch.cuda.is_available():
        parser.error("kernels are timed on a GPU, and no CUDA device is visible; run it on a machine with one")
    device = torch.device("cuda")
    chip = chip_of(torch.empty(1, device=device))
    try:
        rows = modelled(RESULTS, chip)
    except ValueError as error:
        parser.error(str(error))
    calls = chain(triton_calls(chip, rows, partial(torch.randn, device=device)), schedule_calls(rows, device))
    measured, failures = measure(calls, kernel_seconds)
    compared = furthest_first(entry.comparison for entry in measured)
    header = {
        "date": date.today().isoformat(),
        "command": "python -m benchmarks.kernel_times",
        "chip": chip,
        "gpu": torch.cuda.get_device_name(),
        "calls": CALLS,
        "modelled": len(rows),
        "versions": {"torch": torch.__version__},
    }
    for line in (*(entry.line for entry in compared if entry.off), *failures):
        print(f"kernels: {line}")
    print(f"kernels: {len(compared)} of {len(rows)} measured, {sum(entry.off for entry in compared)} off")
    if path is not None:
        data = to_json(header, (asdict(x.model) | {"measured_s": x.measured_s} for x in measured), failures=failures)
        for target in write(path, data, to_markdown(header, measured, failures)):
            print(f"wrote {target}", file=sys.stderr)
    return 1 if failures or not measured else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
