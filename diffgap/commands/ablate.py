"""``diffgap ablate``."""

from __future__ import annotations

import math
import sys
from typing import Annotated, Literal

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tyro.conf import Positional, arg

from diffgap.commands.arguments import Bootstrap, Output, Steps
from diffgap.commands.console import open_console

__all__ = ["ablate"]


def ablate(
    grid: Annotated[Positional[str], arg(metavar="GRID")],
    output: Output,
    jobs: int = 1,
    steps: Steps = None,
    split: Literal["val", "test"] = "val",
    bootstrap: Bootstrap = 1000,
) -> None:
    """Train every variant of a declared grid under every seed, and compare them with intervals. Run again to resume.

    Args:
        grid: "paper" for the bundled ablation of the method, or a YAML file of four fields, the last required: base
            (settings of `diffgap train` that all variants have, as "bridge.depth: 4"), seeds (a list; 0 by default),
            reference (the variant that the others are held against; the first by default) and variants (a name each,
            with the settings that it changes, e.g. "deeper: {bridge.depth: 4}"; "{}" for none; "preset: paper" for
            another preset).
        output: Folder for ablation.md, .json and .png, with the run folders below.
        jobs: Runs at a time, each a process with one thread; no more than cores.
        steps: Training steps of every run, instead of the grid's.
        split: Rows to compare on. A variant that is chosen by its test score has no honest test score any more, so
            this is "val" unless the choice is made already.
        bootstrap: Bootstrap replicates for the intervals.
    """
    from diffgap.retrieval.ablation import run_grid
    from diffgap.retrieval.ablation_report import terminal_table, write_ablation
    from diffgap.training.grid import Grid

    if bootstrap < 1:
        raise ValueError(f"bootstrap is {bootstrap}; use 1 replicate or more, 1000 for intervals worth reading")
    console = open_console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # A run takes minutes: the time that remains is estimated from all of them, not from the last half minute.
    bar = Progress(*columns, console=console, disable=not sys.stderr.isatty(), speed_estimate_period=math.inf)
    with bar:
        task = bar.add_task("runs", total=None)

        def progress(done: int, total: int, name: str, failure: str | None) -> None:
            bar.update(task, completed=done, total=total)
            if name:
                outcome = "done" if failure is None else f"failed: {failure}"
                console.print(f"{done}/{total} {name}: {outcome}", markup=False)

        found = run_grid(
            Grid.load(grid, steps=steps), output, split=split, jobs=jobs, replicates=bootstrap, progress=progress
        )
    write_ablation(found, output)
    console.print(terminal_table(found))
    console.print(f"ablation.md, ablation.json and ablation.png in {output}", markup=False)
    if found.failures:
        name, reason = next(iter(found.failures.items()))
        raise RuntimeError(
            f"{len(found.failures)} runs failed, the first {name}: {reason}; run the same command again to retry them"
        )
