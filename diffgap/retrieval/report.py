"""A :class:`Report` as a table for the terminal, Markdown, JSON and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from diffgap._files import atomic_folder
from diffgap.retrieval.bootstrap import Interval
from diffgap.retrieval.evaluate import ALL_DIRECTIONS, Report

COLUMNS = ("R@1", "R@5", "R@10", "mAP@10", "MRR", "MedR")


def _sizes(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)}-{max(values)}"


def _cell(metric: str, interval: Interval) -> str:
    if metric == "MedR":
        return f"{interval.estimate:.0f}"
    return f"{100 * interval.estimate:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _difference(interval: Interval) -> str:
    verdict = "" if interval.excludes_zero else " (within noise)"
    return f"{100 * interval.estimate:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]{verdict}"


def terminal_table(report: Report) -> Table:
    """Recall and median rank of every method and direction, with the interval of R@5."""
    table = Table(
        title=f"retrieval on {report.split}, {len(report.runs)} run(s): percent, R@5 with its 95% interval",
        title_justify="left",
    )
    table.add_column("query -> gallery", no_wrap=True)
    for heading in ("R@1", "R@5", "R@10", "MedR"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, direction in report.directions.items():
        sizes = f"{_sizes(direction.queries)} in {_sizes(direction.gallery_sizes)}"
        table.add_section()
        table.add_row(f"[bold]{name}[/bold] ({sizes})", "", "", "", "")
        for method, by_direction in report.metrics.items():
            if name in by_direction:
                cell = by_direction[name]
                outer = [f"{100 * cell[metric].estimate:.1f}" for metric in ("R@1", "R@10")]
                table.add_row(
                    f"  {method}", outer[0], escape(_cell("R@5", cell["R@5"])), outer[1], _cell("MedR", cell["MedR"])
                )
    return table


def _direction(report: Report, name: str) -> list[str]:
    """The table of one direction, and its differences."""
    found = {method: cells[name] for method, cells in report.metrics.items() if name in cells}
    columns = [column for column in COLUMNS if all(column in cells for cells in found.values())]
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method, cells in found.items():
        lines.append(f"| {method} | " + " | ".join(_cell(column, cells[column]) for column in columns) + " |")
    lines += [
        "",
        "| difference | " + " | ".join(report.differences) + " |",
        "|---" * (len(report.differences) + 1) + "|",
    ]
    for comparison, directions in next(iter(report.differences.values()), {}).items():
        if name in directions:
            cells_ = " | ".join(_difference(by_metric[comparison][name]) for by_metric in report.differences.values())
            lines.append(f"| {comparison} | {cells_} |")
    return [*lines, ""]


def markdown(report: Report) -> str:
    """The whole report as Markdown."""
    lines = [f"# Retrieval on the {report.split} split", ""]
    lines += [f"Runs: {', '.join(report.runs)}. " + "; ".join(f"{k} {v}" for k, v in report.settings.items()) + ".", ""]
    lines += [
        "Percent with 95% intervals (bootstrap over concepts, queries of all runs pooled). Strict ranks: a tie counts "
        "against the method.",
        "",
    ]
    weights = ", ".join(f"{weight:g}" for weight in report.alphas)
    lines += [f"Fusion weight of each run, chosen on validation data for all directions together: {weights}.", ""]
    lines += [
        f"## {ALL_DIRECTIONS[0].upper()}{ALL_DIRECTIONS[1:]}",
        "",
        "Their mean; one draw of concepts for all.",
        "",
    ]
    lines += _direction(report, ALL_DIRECTIONS)
    for name, direction in report.directions.items():
        lines += [f"## {name}", ""]
        lines += [f"{_sizes(direction.queries)} queries, {_sizes(direction.gallery_sizes)} in the gallery.", ""]
        lines += _direction(report, name)
    lines += ["## The modality gap (first run)", ""]
    headings = ("centroid distance", "paired cosine", "unpaired cosine", "relative gap", "linear separability")
    lines += ["| direction | queries | " + " | ".join(headings) + " |", "|---" * (len(headings) + 2) + "|"]
    for name, gaps in report.gaps.items():
        for label, gap in zip(("as they are", "bridged"), gaps, strict=True):
            values = asdict(gap)
            cells = " | ".join(f"{values[heading.replace(' ', '_')]:.3f}" for heading in headings)
            lines.append(f"| {name} | {label} | {cells} |")
    return "\n".join(lines) + "\n"


def as_json(report: Report) -> dict[str, Any]:
    """The report without the embeddings of the plots."""

    def plain(cells: Mapping[str, Interval]) -> dict[str, list[float]]:
        return {name: list(interval) for name, interval in cells.items()}

    return {
        "runs": report.runs,
        "split": report.split,
        "settings": report.settings,
        "directions": {name: asdict(direction) for name, direction in report.directions.items()},
        "metrics": {
            method: {name: plain(cells) for name, cells in by_direction.items()}
            for method, by_direction in report.metrics.items()
        },
        "differences": {
            metric: {comparison: plain(cells) for comparison, cells in by_comparison.items()}
            for metric, by_comparison in report.differences.items()
        },
        "alphas": report.alphas,
        "gaps": {
            name: {"before": asdict(before), "after": asdict(after)} for name, (before, after) in report.gaps.items()
        },
        "trajectory": report.trajectory,
    }


def check_output(folder: Path) -> None:
    """Whether a report may go to ``folder``: nothing is there, or an earlier report.

    Raises:
        FileExistsError: Something else is there.
    """
    if folder.exists() and not (folder / "report.json").is_file():
        raise FileExistsError(f"{folder} exists and is not a report; choose another output folder")


def write_report(report: Report, folder: Path) -> None:
    """Write report.md, report.json and the plots to ``folder``, whole or not at all, replacing an earlier report there.

    Raises:
        FileExistsError: ``folder`` exists and is not a report.
    """
    from diffgap.retrieval import plots

    check_output(folder)
    with atomic_folder(folder, overwrite=True) as temporary:
        (temporary / "report.md").write_text(markdown(report), encoding="utf-8")
        (temporary / "report.json").write_text(json.dumps(as_json(report), indent=1), encoding="utf-8")
        plots.recall(report, temporary / "recall.png")
        plots.gap(report, temporary / "gap.png")
        plots.trajectory(report, temporary / "trajectory.png")
