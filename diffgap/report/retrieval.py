"""What ``diffgap eval`` found, as tables and charts."""

from __future__ import annotations

from pathlib import Path

from diffgap.report.charts import BASELINE, INK, chart
from diffgap.report.html import Html, Section, details, element, figure, grid, joined, paragraph, table
from diffgap.retrieval import report as evaluation
from diffgap.retrieval.plots import recall_axis
from diffgap.retrieval.summary import Report

__all__ = ["retrieval"]


def retrieval(run: Path) -> Section:
    """Recall in every direction beside the baselines, from ``run/eval/report.json``."""
    file = run / "eval" / "report.json"
    if not file.is_file():
        body = paragraph(f"Not evaluated yet. Run `diffgap eval {run}` and make this page again.")
        return Section("retrieval", "Retrieval", body)
    found = evaluation.from_json(file)
    settings = "; ".join(f"{name} {value}" for name, value in found.settings.items())
    intro = [paragraph(f"On the {found.split} split, runs {', '.join(found.runs)}. {settings}.")]
    weights = run / "model" / "model.safetensors"
    if weights.is_file() and file.stat().st_mtime < weights.stat().st_mtime:
        intro.append(
            paragraph(f"The evaluation is older than the model: run `diffgap eval {run}` and make this page again.")
        )
    intro += [paragraph(remark) for remark in evaluation.remarks(found)]
    figures = [figure(_recall(found, name), f"{name}. {evaluation.sizes(found, name)}") for name in found.directions]
    body = joined([*intro, grid(*figures), *(_direction(found, name) for name in evaluation.direction_names(found))])
    if found.few_steps:
        headings, rows = evaluation.few_steps_table(found)
        body = joined(
            [body, element("h3", "Few steps"), paragraph(evaluation.FEW_STEPS), table("Few steps", headings, rows)]
        )
    return Section("retrieval", "Retrieval", body)


def _direction(found: Report, name: str) -> Html:
    """Tables of one direction, or of the mean over all."""
    headings, rows = evaluation.recall_table(found, name)
    parts = [
        element("h3", f"{name[0].upper()}{name[1:]}"),
        paragraph(evaluation.sizes(found, name)),
        table(f"Retrieval, {name}", headings, rows),
    ]
    headings, rows = evaluation.difference_table(found, name)
    if rows:
        caption = f"Differences, {name}"
        parts.append(details("Differences between methods", table(caption, headings, rows)))
    return joined(parts)


def _recall(found: Report, name: str) -> Html:
    methods = sum(name in cells for cells in found.metrics.values())
    return chart(
        lambda axis: recall_axis(axis, found, name, BASELINE, INK),
        f"Recall at 5 of every method with its 95% interval, {name}",
        height=1.2 + 0.22 * methods,
    )
