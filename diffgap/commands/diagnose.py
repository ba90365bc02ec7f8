"""``diffgap diagnose``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from diffgap.commands.arguments import Seed
from diffgap.commands.console import open_console

__all__ = ["diagnose"]


def diagnose(
    path: Annotated[Positional[Path], arg(metavar="RUN|STORE")],
    output: Path | None = None,
    split: Literal["train", "val", "test"] = "val",
    seed: Seed = 0,
    strict: bool = False,
) -> None:
    """Check a run, or an embedding store alone: are pairs pairs, is the condition used, do samples collapse or drift?

    Each check gives a verdict (good, warn, bad), its threshold with the reason, and what to try.

    Args:
        path: Run folder of `diffgap train`, folder of an embedding store, or the name of a bundled set.
        output: Folder for report.md, report.json and the plots; by default "diagnose" in the run's folder, or beside
            the store's with "-diagnose" at the end of its name.
        split: Rows that the bridge is checked on. The data are checked whole.
        seed: Seed of samples, halves and shuffles.
        strict: Exit with status 3 if a verdict is bad. Without, the status is 0 whatever the verdicts are.
    """
    from diffgap._files import beside
    from diffgap.diagnose.checks import diagnose
    from diffgap.diagnose.report import advice, terminal_table, write_report
    from diffgap.retrieval.report import check_output
    from diffgap.training.runs import is_run

    folder = output or (path / "diagnose" if is_run(path) else beside(path, "-diagnose"))
    check_output(folder)
    found = diagnose(path, split=split, seed=seed)
    write_report(found, folder)
    console = open_console()
    console.print(terminal_table(found))
    for line in advice(found):
        console.print(f"- {line}", markup=False)
    console.print(f"report and plots in {folder}", markup=False)
    if strict and found.count("bad"):
        sys.exit(3)
