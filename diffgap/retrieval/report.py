"""A :class:`Report` as a table for the terminal, Markdown, JSON and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from diffgap._files import atomic_folder, check_writable
from diffgap.retrieval.bootstrap import Interval
from diffgap.retrieval.diagnostics import ModalityGap
from diffgap.retrieval.summary import ALL_DIRECTIONS, COMPARED, Direction, Report, ScoringCost, Setting, overall

COLUMNS = ("R@1", "R@5", "R@10", "mAP@10", "MRR", "MedR")
COSTS = ("calls a query", "calls an item", "ms a query")
FEW_STEPS = (
    "Means over directions, percent; the gap is that between bridged queries and gallery, a mean over runs too. "
    "Calls and milliseconds are of one embedding. Where the denoiser predicts x0, one step from pure noise gives "
    "the conditional mean, whatever the seed if the schedule ends in noise alone; more steps draw a sample, and K "
    "of them average back to it."
)
_GAP = ("centroid distance", "paired cosine", "unpaired cosine", "relative gap", "linear separability")

#: Headings and rows of a table.
Cells: TypeAlias = tuple[list[str], list[list[str]]]


def _sizes(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)}-{max(values)}"


def cell(cells: Mapping[str, Interval], metric: str) -> str:
    """Percent with the interval, or the median rank; nothing where the metric is not there."""
    if metric not in cells:
        return ""
    interval = cells[metric]
    if metric == "MedR":
        return f"{interval.estimate:.0f}"
    return f"{100 * interval.estimate:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _difference(interval: Interval) -> str:
    verdict = "" if interval.excludes_zero else " (within noise)"
    return f"{100 * interval.estimate:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]{verdict}"


def _cost(report: Report, method: str) -> list[str]:
    """Of a method, by :data:`COSTS`; nothing for a baseline, which has no denoiser."""
    if method not in report.costs:
        return ["", "", ""]
    cost = report.costs[method]
    return [str(cost.query_calls), str(cost.item_calls), f"{cost.milliseconds:.2g}"]


def direction_names(report: Report) -> list[str]:
    """The mean over directions if any method has it, and each direction."""
    overall = [ALL_DIRECTIONS] if any(ALL_DIRECTIONS in found for found in report.metrics.values()) else []
    return [*overall, *report.directions]


def terminal_table(report: Report) -> Table:
    """Recall, MRR, median rank and cost of every method and direction, with the interval of R@5; 80 columns wide."""
    table = Table(
        title=f"retrieval on {report.split}, {len(report.runs)} run(s): percent, R@5 with its 95% interval; denoiser "
        "calls and ms for a query; queries in gallery beside each direction",
        title_justify="left",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("query -> gallery", no_wrap=True)
    for heading in ("R@1", "R@5", "R@10", "MRR", "MedR", "calls", "ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in direction_names(report):
        direction = report.directions.get(name)
        sizes = f"{_sizes(direction.queries)} in {_sizes(direction.gallery_sizes)}" if direction else ""
        table.add_section()
        table.add_row(f"[bold]{name}[/bold]", "", sizes)
        for method, by_direction in report.metrics.items():
            if name in by_direction:
                found = by_direction[name]
                low, high, mrr = (f"{100 * found[metric].estimate:.1f}" for metric in ("R@1", "R@10", "MRR"))
                calls, _, milliseconds = _cost(report, method)
                recall = escape(cell(found, "R@5"))
                table.add_row(f"  {method}", low, recall, high, mrr, cell(found, "MedR"), calls, milliseconds)
    return table


def markdown(report: Report) -> str:
    """The whole report as Markdown."""
    lines = [f"# Retrieval on the {report.split} split", ""]
    lines += [f"Runs: {', '.join(report.runs)}. " + "; ".join(f"{k} {v}" for k, v in report.settings.items()) + ".", ""]
    for remark in remarks(report):
        lines += [remark, ""]
    for name in direction_names(report):
        lines += [f"## {name[0].upper()}{name[1:]}" if name == ALL_DIRECTIONS else f"## {name}", ""]
        lines += [sizes(report, name), ""]
        lines += markdown_table(*recall_table(report, name))
        lines += markdown_table(*difference_table(report, name))
    lines += ["## The modality gap (first run)", "", *markdown_table(*gap_table(report.gaps))]
    if report.few_steps:
        lines += ["## Few steps", "", FEW_STEPS, "", *markdown_table(*few_steps_table(report))]
    return "\n".join(lines).rstrip() + "\n"


def remarks(report: Report) -> list[str]:
    """What there is to know before reading the tables."""
    chosen = " Choices were made on this very split, which flatters what was chosen." if report.split == "val" else ""
    return [
        "Percent with 95% intervals (bootstrap over concepts, queries of all runs pooled). Strict ranks: a tie counts "
        f"against the method.{chosen}",
        "Weights of each run, for all directions together, chosen on validation data unless they were given: "
        f"fusion {_weights(report.alphas)}"
        + (f"; likelihood ratio {_weights(report.betas)}" if report.betas else "")
        + ".",
        "A call is one embedding through the denoiser once: for a query, and beforehand for a gallery item. "
        "Milliseconds are a query's share of all queries of a direction in one batch, from their embeddings to their "
        "best items: median over runs and directions.",
    ]


def _weights(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def sizes(report: Report, name: str) -> str:
    """What the numbers of one direction, or of all, are means over."""
    if name not in report.directions:
        return "The mean over them, each counting the same; one draw of concepts for all."
    direction = report.directions[name]
    return f"{_sizes(direction.queries)} queries, {_sizes(direction.gallery_sizes)} in the gallery."


def recall_table(report: Report, name: str) -> Cells:
    """Every method's recall and cost in one direction, or in all."""
    return ["method", *COLUMNS, *COSTS], [
        [method, *(cell(by_direction[name], metric) for metric in COLUMNS), *_cost(report, method)]
        for method, by_direction in report.metrics.items()
        if name in by_direction
    ]


def difference_table(report: Report, name: str) -> Cells:
    """Each scoring less the heads alone and less each baseline."""
    return ["difference", *COMPARED], [
        [f"{one} - {other}", *(_difference(by_direction[name][metric]) for metric in COMPARED)]
        for one, rivals in report.differences.items()
        for other, by_direction in rivals.items()
        if name in by_direction
    ]


def markdown_table(headings: Sequence[str], rows: Any) -> list[str]:
    """A Markdown table, or nothing without rows."""
    found = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|", *found, ""] if found else []


def gap_table(gaps: Mapping[str, tuple[ModalityGap, ModalityGap]]) -> Cells:
    """Of each direction, the gap before and after bridging its queries."""
    return ["direction", "queries", *_GAP], [
        [name, label, *(f"{asdict(gap)[heading.replace(' ', '_')]:.3f}" for heading in _GAP)]
        for name, both in gaps.items()
        for label, gap in zip(("as they are", "bridged"), both, strict=True)
    ]


def few_steps_table(report: Report) -> Cells:
    """Recall, cost and gap at every number of steps and samples."""
    methods = list(report.few_steps[0].metrics)
    gap = list(report.few_steps[0].gap)
    headings = [
        "steps", "K", "solver", "calls", "ms",
        *(f"{method} {metric}" for method in methods for metric in COMPARED),
        *(name.replace("_", " ") for name in gap),
    ]  # fmt: skip
    return headings, [
        [
            str(tried.steps), str(tried.num_samples), tried.solver, str(tried.calls), f"{tried.milliseconds:.2g}",
            *(cell(overall(tried.metrics[method]), metric) for method in methods for metric in COMPARED),
            *(f"{tried.gap[name]:.3f}" for name in gap),
        ]
        for tried in report.few_steps
    ]  # fmt: skip


def as_json(report: Report) -> dict[str, Any]:
    """The report without the embeddings of the plots; an interval is [estimate, low, high]."""
    return {
        "runs": report.runs,
        "split": report.split,
        "settings": report.settings,
        "directions": {name: asdict(direction) for name, direction in report.directions.items()},
        "metrics": plain(report.metrics),
        "differences": plain(report.differences),
        "costs": {method: asdict(cost) for method, cost in report.costs.items()},
        "alphas": report.alphas,
        "betas": report.betas,
        "gaps": {
            name: {"before": asdict(before), "after": asdict(after)} for name, (before, after) in report.gaps.items()
        },
        "trajectory": report.trajectory,
        "few_steps": [{**vars(tried), "metrics": plain(tried.metrics)} for tried in report.few_steps],
    }


def from_json(path: Path) -> Report:
    """The report behind a report.json, without the embeddings.

    Raises:
        ValueError: Another file, or one of another version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Report(
            **{
                **content,
                "directions": {name: Direction(**one) for name, one in content["directions"].items()},
                "metrics": _intervals(content["metrics"]),
                "differences": _intervals(content["differences"]),
                "costs": {name: ScoringCost(**cost) for name, cost in content["costs"].items()},
                "gaps": {
                    name: (ModalityGap(**both["before"]), ModalityGap(**both["after"]))
                    for name, both in content["gaps"].items()
                },
                "few_steps": [
                    Setting(**{**tried, "metrics": _intervals(tried["metrics"])}) for tried in content["few_steps"]
                ],
            }
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no report of `diffgap eval` ({error!r}); evaluate again") from error


def _intervals(found: Any) -> Any:
    """The inverse of :func:`plain`."""
    if isinstance(found, Mapping):
        return {name: _intervals(value) for name, value in found.items()}
    return Interval(*found)


def plain(found: Any) -> Any:
    """Intervals below any depth of mappings as lists, for JSON."""
    return {name: plain(value) for name, value in found.items()} if isinstance(found, Mapping) else list(found)


def check_output(folder: Path, file: str = "report.json") -> None:
    """Whether a report may go to ``folder``: nothing is there, or an earlier report, which is known by ``file``.

    Raises:
        FileExistsError: Something else is there.
        ValueError: Nothing can be written there.
    """
    check_writable(folder.parent, folder)
    if folder.exists() and not (folder / file).is_file():
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
        if report.few_steps:
            plots.few_steps(report, temporary / "few_steps.png")
