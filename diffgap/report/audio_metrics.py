"""Metrics of a set of generated sounds, from the metrics.json in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffgap.generation.metrics.report import number
from diffgap.report.html import Section, joined, paragraph, table

__all__ = ["audio_metrics"]


def audio_metrics(folder: Path) -> Section:
    """A row for each metric and backbone, a column for each system.

    Raises:
        ValueError: metrics.json is damaged.
    """
    file = folder / "metrics.json"
    if not file.is_file():
        body = paragraph(f"Not measured yet. Run `diffgap metrics {folder}` and make this page again.")
        return Section("metrics", "Metrics of the sounds", body)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        systems = content["systems"]
        rows: dict[tuple[str, str], list[str]] = {}
        cells: dict[tuple[str, str], dict[str, str]] = {}
        for system, report in systems.items():
            for found in report["figures"]:
                key = found["metric"], found["backbone"]
                against = str(found["against"] or "-")
                rate = str(found["sample_rate"])
                rows.setdefault(key, [*key, str(found["generated"]), against, rate, found["better"]])
                cells.setdefault(key, {})[system] = _cell(found)
        differences = [
            [f"{one['second']} - {one['first']}", one["metric"], one["backbone"], one["better"], _cell(one)]
            for one in content.get("differences", ())
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is no file of `diffgap metrics` ({error!r}); measure again") from error
    headings = ["metric", "backbone", "N", "against", "Hz", "better", *systems]
    figures = ([*row, *(cells[key].get(name, "-") for name in systems)] for key, row in rows.items())
    parts = [
        paragraph("With intervals where there are any. N: sounds measured; against: what they were held against."),
        table("Metrics", headings, figures),
    ]
    if differences:
        parts.append(table("Differences", ["difference", "metric", "backbone", "better", "by how much"], differences))
    return Section("metrics", "Metrics of the sounds", joined(parts))


def _cell(found: Mapping[str, Any]) -> str:
    estimate, low, high = found["estimate"], found["low"], found["high"]
    return number(estimate) if low is None or high is None else f"{number(estimate)} [{number(low)}, {number(high)}]"
