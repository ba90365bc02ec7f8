"""A :class:`Diagnosis` as a table for the terminal, Markdown, JSON and plots."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from diffgap._files import atomic_folder
from diffgap.diagnose import plots
from diffgap.diagnose.checks import Diagnosis
from diffgap.diagnose.finding import VERDICTS, Finding

_STYLES = {"good": "green", "warn": "yellow", "bad": "bold red"}


def summary(diagnosis: Diagnosis) -> str:
    """How many findings of each verdict there are."""
    return ", ".join(f"{diagnosis.count(verdict)} {verdict}" for verdict in VERDICTS)


def _value(value: float) -> str:
    return f"{value:.0f}" if value == int(value) and abs(value) >= 10 else f"{value:.3g}"


def values(finding: Finding, most: int | None = None) -> str:
    """The figures of a finding, or the first ``most``, in one line."""
    figures = list(finding.values.items())[:most]
    return ", ".join(f"{name.replace('_', ' ')} {_value(value)}" for name, value in figures)


def terminal_table(diagnosis: Diagnosis) -> Table:
    """Every check with its verdict and main figures."""
    table = Table(title=f"diagnosis of {escape(diagnosis.subject)}: {summary(diagnosis)}", title_justify="left")
    for heading in ("check", "subject", "verdict", "found"):
        table.add_column(heading, no_wrap=heading in ("check", "verdict"))
    for check, findings in groupby(ordered(diagnosis), key=lambda finding: finding.check):
        table.add_section()
        for finding in findings:
            style = _STYLES[finding.verdict]
            verdict = f"[{style}]{finding.verdict}[/{style}]"
            table.add_row(check, escape(finding.subject), verdict, escape(values(finding, 3)))
    return table


def advice(diagnosis: Diagnosis) -> list[str]:
    """A line for each thing that is wrong: which check, of what, when it says so, and what to try."""
    subjects: dict[tuple[str, str, str], list[str]] = {}
    for finding in ordered(diagnosis):
        if finding.fix:
            key = (finding.check, finding.threshold, finding.fix)
            subjects.setdefault(key, []).append(f"{finding.subject} ({finding.verdict})")
    return [
        f"{check} of {', '.join(names)}. {threshold[0].upper()}{threshold[1:]}. To try: {fix}."
        for (check, threshold, fix), names in subjects.items()
    ]


def markdown(diagnosis: Diagnosis) -> str:
    """The whole diagnosis as Markdown: each check with its threshold and reason, each finding with all figures."""
    rows = "All rows" if diagnosis.split == "all" else f"Data: all rows; bridge: the {diagnosis.split} split"
    lines = [f"# Diagnosis of {diagnosis.subject}", "", f"{rows}. Verdicts: {summary(diagnosis)}.", ""]
    for (check, threshold), group in groupby(ordered(diagnosis), key=lambda f: (f.check, f.threshold)):
        findings = list(group)
        lines += [f"## {check}", "", f"{threshold[0].upper()}{threshold[1:]}. Why: {findings[0].reason}.", ""]
        lines += ["| subject | verdict | found | to try |", "|---|---|---|---|"]
        lines += [
            f"| {finding.subject} | {finding.verdict} | {values(finding)} | {finding.fix} |" for finding in findings
        ]
        for finding in findings:
            if finding.examples:
                lines += ["", f"Look at, in {finding.subject}: {', '.join(finding.examples)}"]
        lines.append("")
    return "\n".join(lines)


def ordered(diagnosis: Diagnosis) -> Iterator[Finding]:
    """Findings of one check together, checks in the order in which they first appear."""
    order = list(dict.fromkeys(finding.check for finding in diagnosis.findings))
    return iter(sorted(diagnosis.findings, key=lambda finding: order.index(finding.check)))


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Plain values, with the series behind the plots."""
    counts = {verdict: diagnosis.count(verdict) for verdict in VERDICTS}
    return {"counts": counts, **asdict(diagnosis)}


def from_json(path: Path) -> Diagnosis:
    """The diagnosis behind a report.json.

    Raises:
        ValueError: Another file, or one of another version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        findings = (Finding(**{**one, "examples": tuple(one["examples"])}) for one in content["findings"])
        return Diagnosis(content["subject"], content["split"], tuple(findings))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no report of `diffgap diagnose` ({error!r}); diagnose again") from error


def write_report(diagnosis: Diagnosis, folder: Path) -> None:
    """Write report.md, report.json and the plots to ``folder``, whole or not at all, replacing an earlier report there.

    See :func:`diffgap.retrieval.report.check_output` for what may be replaced.
    """
    with atomic_folder(folder, overwrite=True) as temporary:
        (temporary / "report.md").write_text(markdown(diagnosis), encoding="utf-8")
        (temporary / "report.json").write_text(json.dumps(as_json(diagnosis), indent=1), encoding="utf-8")
        plots.draw(diagnosis, temporary)
