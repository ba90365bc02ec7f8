"""``diffgap report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from diffgap.commands.arguments import Run, Seed, Within
from diffgap.commands.console import open_console

__all__ = ["report"]


def report(
    run: Run,
    output: Annotated[Path | None, arg(aliases=["-o"])] = None,
    generated: Path | None = None,
    split: Literal["train", "val", "test"] = "test",
    pairs: int = 256,
    items: int = 12,
    systems: tuple[str, ...] = (),
    megabytes: Annotated[float, Within(0)] = 8.0,
    seed: Seed = 0,
    overwrite: bool = False,
) -> None:
    """One HTML page of a run, to be opened in any browser: settings, training curves, retrieval, the gap before and
    after bridging, sampling trajectories, diagnosis, and generated sounds side by side.

    Retrieval and diagnosis are shown where `diffgap eval` and `diffgap diagnose` have been run; what is missing is
    said. Nothing but the file is needed to read it.

    Args:
        run: Run folder of `diffgap train` or `diffgap train-generator`.
        output: The page; report.html in the run's folder by default. An earlier page is replaced.
        generated: Folder of `diffgap generate-set`.
        split: Rows for the gap and the trajectories.
        pairs: Pairs of each direction for them, at most.
        items: Generated sounds to hear, at most; which of the set, the seed decides.
        systems: Which of the set's sounds, e.g. reference raw bridged; all by default.
        megabytes: Size of all sounds and spectrograms, at most; items beyond are left out.
        seed: Of the samples, and of the items that are drawn.
        overwrite: Replace the file even if it is no such page.
    """
    from diffgap.report import ReportOptions, write_report

    file = run / "report.html" if output is None else output
    options = ReportOptions(split, pairs, items, systems, megabytes, seed)
    sections = write_report(run, file, generated=generated, options=options, overwrite=overwrite)
    size = file.stat().st_size / 1e6
    open_console().print(
        f"{file}: {', '.join(section.title for section in sections)}; {size:.1f} MB", markup=False, highlight=False
    )
