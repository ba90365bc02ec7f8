"""A :class:`ProtocolReport` as a table for the terminal, Markdown and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from diffgap._files import atomic_folder
from diffgap.retrieval.protocol_evaluate import RAW, ProtocolReport
from diffgap.retrieval.published import Published
from diffgap.retrieval.report import cell, check_output, markdown_table, plain

COLUMNS = ("R@1", "R@5", "R@10", "mAP@10")
FILE = "protocol.json"


def headline(report: ProtocolReport) -> str:
    """Which protocol, of what, on how much."""
    sizes = ", ".join(f"{count:,} {modality}" for modality, count in report.items.items())
    subjects = ", ".join(report.subjects)
    return f"{report.protocol} of {subjects} on {report.split}: N = {report.clips:,} ({sizes})"


def notes(report: ProtocolReport) -> list[str]:
    """What there is to know about the numbers, a line each; where published ones were read comes last."""
    sources: dict[str, list[str]] = {}
    for row in report.published:
        sources.setdefault(row.source, []).append(row.system)
    read = [f"published, not measured here: {', '.join(systems)} ({source})" for source, systems in sources.items()]
    return [*report.notes, *read]


def _directions(report: ProtocolReport) -> list[str]:
    return list(next(iter(report.metrics.values())))


def _published(report: ProtocolReport, direction: str) -> list[tuple[str, list[str]]]:
    """Name and cells of the published rows of a direction."""

    def cells(row: Published) -> list[str]:
        return [*(f"{value:.1f}" for value in row.recalls), ""]

    return [(f"{row.system} (published)", cells(row)) for row in report.published if row.direction == direction]


def terminal_table(report: ProtocolReport) -> Table:
    """Recall and mAP@10 of every method and direction, with the interval of R@1, published numbers below; 80 wide."""
    table = Table(
        title=f"{escape(headline(report))}; percent, R@1 with its 95% interval",
        title_justify="left",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("query -> gallery", no_wrap=True)
    for heading in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for direction in _directions(report):
        table.add_section()
        table.add_row(f"[bold]{direction}[/bold]")
        for method, by_direction in report.metrics.items():
            found = by_direction[direction]
            rest = (f"{100 * found[metric].estimate:.1f}" for metric in COLUMNS[1:])
            table.add_row(f"  {method}", escape(cell(found, "R@1")), *rest)
        for name, cells in _published(report, direction):
            table.add_row(f"  {name}", *cells, style="dim")
    return table


def markdown(report: ProtocolReport) -> str:
    """The whole report as Markdown."""
    lines = [f"# {headline(report)}", "", *(f"- {note}" for note in notes(report)), ""]
    lines += [
        f"Percent with 95% intervals (bootstrap over clips); {RAW} is the cosine of the embeddings as they are. A tie "
        "counts against the method. Of several right answers R@k takes the best rank, mAP@10 all, in the order of "
        "their ranks."
        + (" Choices were made on this very split, which flatters what was chosen." if report.split == "val" else ""),
        "",
    ]
    if report.settings:
        lines += ["; ".join(f"{name} {value}" for name, value in report.settings.items()) + ".", ""]
    if report.alphas:
        weights = {"fusion": report.alphas, "likelihood ratio": report.betas}
        told = (f"{name} {', '.join(f'{one:g}' for one in values)}" for name, values in weights.items() if values)
        lines += [f"Weights of each run: {'; '.join(told)}.", ""]
    for direction in _directions(report):
        measured = (
            [method, *(cell(by_direction[direction], metric) for metric in COLUMNS)]
            for method, by_direction in report.metrics.items()
        )
        beside = ([name, *cells] for name, cells in _published(report, direction))
        lines += [f"## {direction}", "", *markdown_table(["method", *COLUMNS], (*measured, *beside))]
    return "\n".join(lines).rstrip() + "\n"


def as_json(report: ProtocolReport) -> dict[str, Any]:
    """The report; an interval is [estimate, low, high] in 0..1, a published number in percent."""
    return {
        **vars(report),
        "metrics": plain(report.metrics),
        "published": [asdict(row) for row in report.published],
    }


def write_report(report: ProtocolReport, folder: Path) -> None:
    """Write protocol.md and protocol.json to ``folder``, whole or not at all, replacing an earlier such report.

    Raises:
        FileExistsError: ``folder`` exists and is not such a report.
    """
    check_output(folder, FILE)
    with atomic_folder(folder, overwrite=True) as temporary:
        (temporary / "protocol.md").write_text(markdown(report), encoding="utf-8")
        (temporary / FILE).write_text(json.dumps(as_json(report), indent=1), encoding="utf-8")
