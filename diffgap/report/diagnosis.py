"""What ``diffgap diagnose`` found."""

from __future__ import annotations

from pathlib import Path

from diffgap.diagnose import report as diagnose
from diffgap.report.html import Html, Section, element, joined, paragraph, table

__all__ = ["diagnosis"]


def diagnosis(run: Path) -> Section:
    """Every check with its verdict, from ``run/diagnose/report.json``."""
    file = run / "diagnose" / "report.json"
    if not file.is_file():
        body = paragraph(f"Not diagnosed yet. Run `diffgap diagnose {run}` and make this page again.")
        return Section("diagnosis", "Diagnosis", body)
    found = diagnose.from_json(file)
    rows = [
        [finding.check, finding.subject, finding.verdict, diagnose.values(finding)]
        for finding in diagnose.ordered(found)
    ]
    split = "all rows" if found.split == "all" else f"the {found.split} split"
    advice = [element("li", line) for line in diagnose.advice(found)]
    parts: list[Html] = [
        paragraph(f"Verdicts: {diagnose.summary(found)}. Data: all rows; bridge: {split}."),
        *([element("ul", *advice)] if advice else []),
        table("Checks", ["check", "of", "verdict", "found"], rows),
    ]
    return Section("diagnosis", "Diagnosis", joined(parts))
