"""An :class:`Ablation` as Markdown, JSON and a plot."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from diffgap._files import atomic_file
from diffgap.retrieval.ablation import METRICS, SCORINGS, Ablation, Variant
from diffgap.retrieval.bootstrap import Interval

# Okabe and Ito's colours, told apart by colour-blind readers; the marker says the same once more.
_STYLES = {"worse": ("#D55E00", "<"), "within noise": ("#7f7f7f", "o"), "better": ("#0072B2", ">")}


def _percent(interval: Interval) -> str:
    return f"{100 * interval.estimate:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _difference(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    text = f"{100 * interval.estimate:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
    return f"**{text}**" if interval.excludes_zero else text


def _changes(row: Variant, reference: str) -> str:
    if row.name == reference:
        return "the reference"
    return ", ".join(f"`{name}: {value}`" for name, value in row.changes.items()) or f"nothing: the same as {row.twin}"


def _own(ablation: Ablation) -> list[Variant]:
    """The variants with finished runs of their own."""
    return [row for row in ablation.variants if row.twin is None and row.cells]


def markdown(ablation: Ablation) -> str:
    """Tables of what each variant changes and costs, and of the scorings, with the failures."""
    rows = _own(ablation)
    seeds, steps = (", ".join(map(str, values)) for values in (ablation.seeds, ablation.steps))
    chance = f"{(len(rows) - 1) / 20:.1f}"
    lines = [f"# Ablation on the {ablation.split} split", ""]
    lines += [
        f"Seeds {seeds}; {steps} steps. Percent, strict ranks: the mean over the directions "
        f"({', '.join(ablation.directions)}) of the mean over the queries of all seeds. The 95% intervals resample "
        f"concepts, in all directions and seeds at once. Differences are to {ablation.reference}, query by query; bold "
        f"where the interval excludes zero. If no variant changed anything, about {chance} in each column would be "
        "bold by chance. A direction that a variant does not train takes no part in its scores; where it trains "
        "neither direction of a pair, the cosine stands in.",
        "",
    ]
    if ablation.split == "val":
        lines += ["Step and fusion weight of each run were chosen on these same rows, in all variants alike.", ""]
    lines += ["| variant | what it changes | runs | seconds a run |", "|---|---|---|---|"]
    for row in ablation.variants:
        seconds = "-" if row.seconds is None else f"{row.seconds:.0f}"
        runs = f"{len(row.seeds)} of {len(ablation.seeds)}"
        lines.append(f"| {row.name} | {_changes(row, ablation.reference)} | {runs} | {seconds} |")
    for scoring in SCORINGS:
        lines += ["", f"## {scoring}", ""]
        lines.append("| variant | " + " | ".join(f"{metric} | difference" for metric in METRICS) + " |")
        lines.append("|---" * (1 + 2 * len(METRICS)) + "|")
        for row in rows:
            cells = [row.cells[scoring][metric] for metric in METRICS]
            values = " | ".join(
                f"{_percent(cell.mean)} | {'-' if row.name == ablation.reference else _difference(cell.difference)}"
                for cell in cells
            )
            lines.append(f"| {row.name} | {values} |")
    if ablation.failures:
        lines += ["", "## Runs that failed", ""]
        lines += [f"- {name}: {reason}" for name, reason in ablation.failures.items()]
    return "\n".join(lines) + "\n"


def terminal_table(ablation: Ablation) -> Table:
    """MRR of every scoring, and of the fused one the difference to the reference, bold outside of the noise."""
    table = Table(
        title=f"MRR on {ablation.split}, percent with 95% intervals; differences to {escape(ablation.reference)}, bold "
        "where the interval excludes zero",
        title_justify="left",
    )
    table.add_column("variant", overflow="fold")
    for heading in ("runs", *SCORINGS, "fusion, difference"):
        table.add_column(heading, justify="right")
    for row in _own(ablation):
        means = [escape(_percent(row.cells[scoring]["MRR"].mean)) for scoring in SCORINGS]
        found = None if row.name == ablation.reference else row.cells["fusion"]["MRR"].difference
        difference = escape(_difference(found).strip("*"))
        if found is not None and found.excludes_zero:
            difference = f"[bold]{difference}[/bold]"
        table.add_row(escape(row.name), f"{len(row.seeds)} of {len(ablation.seeds)}", *means, difference)
    return table


def as_json(ablation: Ablation) -> dict[str, Any]:
    """The whole finding; an interval is [estimate, low, high]."""
    return asdict(ablation)


def plot(ablation: Ablation, path: Path) -> None:
    """Paired differences in MRR to the reference with their intervals, one panel a scoring."""
    rows = [row for row in _own(ablation) if row.name != ablation.reference][::-1]
    figure = Figure(figsize=(4 + 3 * len(SCORINGS), 1.6 + 0.27 * len(rows)))
    axes = figure.subplots(1, len(SCORINGS), sharex=True, sharey=True, squeeze=False)[0]
    shown = {}
    for axis, scoring in zip(axes, SCORINGS, strict=True):
        axis.axvline(0, color="black", lw=1)
        for height, row in enumerate(rows):
            difference = row.cells[scoring]["MRR"].difference
            if difference is None:
                continue
            verdict = "within noise" if not difference.excludes_zero else "better" if difference.low > 0 else "worse"
            colour, marker = _STYLES[verdict]
            low, centre, high = (100 * x for x in (difference.low, difference.estimate, difference.high))
            shown[verdict] = axis.plot(centre, height, marker, color=colour, ms=6, ls="none")[0]
            axis.plot([low, high], [height, height], color=colour, lw=1.6)
        axis.set_title(scoring, fontsize=11)
        axis.set_yticks(np.arange(len(rows)), [row.name for row in rows], fontsize=9)
        axis.set_ylim(-0.7, len(rows) - 0.3)
        axis.grid(axis="x", color="#dddddd", lw=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"difference in MRR to {ablation.reference}, percentage points, 95% interval", fontsize=10)
    legend = [verdict for verdict in _STYLES if verdict in shown]
    if legend:
        figure.legend(
            [shown[verdict] for verdict in legend], legend, loc="upper right", ncols=3, fontsize=9, frameon=False
        )
    figure.suptitle(f"Ablation on {ablation.split}, {len(ablation.seeds)} seeds", x=0.02, ha="left", fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")


def write_ablation(ablation: Ablation, folder: Path) -> None:
    """Write ablation.md, ablation.json and ablation.png to ``folder``, each whole or not at all."""
    with atomic_file(folder / "ablation.md") as temporary:
        temporary.write_text(markdown(ablation), encoding="utf-8")
    with atomic_file(folder / "ablation.json") as temporary:
        temporary.write_text(json.dumps(as_json(ablation), indent=1), encoding="utf-8")
    with atomic_file(folder / "ablation.png") as temporary:
        plot(ablation, temporary)
