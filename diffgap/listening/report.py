"""The result of a listening test on the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from diffgap._files import atomic_folder
from diffgap.listening.score import MOST_FAILED, Scores
from diffgap.listening.statistics import SignTest
from diffgap.retrieval.bootstrap import Interval

__all__ = ["as_json", "markdown", "summary", "tables", "write_scores"]

AB_NOTE = (
    "Share: of the answers, for the first of the two systems; a tie counts half. Interval: 95 %, the wider ends of "
    "Wilson's and of the bootstrap over participants and items. p: exact two-sided sign tests without ties; that of "
    "answers holds only if answers of one listener are independent. A chosen: the share for the sound called A, of "
    "either system; 50 % if order does not matter."
)
MUSHRA_NOTE = (
    "Scores from 0 to 100. Interval: 95 %, bootstrap over participants and items. Differences: by the same listener "
    "for the same item. p: exact two-sided sign tests without ties, not adjusted for the number of comparisons; that "
    "of answers holds only if answers of one listener are independent."
)


@dataclass(frozen=True)
class _Grid:
    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def summary(scores: Scores) -> str:
    """Who and how much is counted, in a line."""
    out = [one.participant for one in scores.listeners if one.excluded]
    rule = "checks with a known answer" if scores.method == "ab" else "hidden references rated below 90"
    excluded = f"; excluded, more than {MOST_FAILED:.0%} of {rule}: {', '.join(out)}" if out else ""
    listeners = "participant" if scores.participants == 1 else "participants"
    return f"{scores.participants} {listeners}, {scores.items} items, {scores.trials} trials{excluded}"


def tables(scores: Scores) -> list[Table]:
    """For the terminal."""
    drawn = []
    for grid in _grids(scores):
        table = Table(title=grid.title, title_justify="left")
        for number, name in enumerate(grid.head):
            table.add_column(name, justify="right" if number else "left")
        for row in grid.rows:
            table.add_row(*row)
        drawn.append(table)
    return drawn


def markdown(scores: Scores) -> str:
    """All of it, with how to read it."""
    lines = ["# Listening test", "", f"{summary(scores)}. Page {scores.digest[:8]}.", ""]
    for grid in _grids(scores):
        lines += [f"## {grid.title}", "", f"| {' | '.join(grid.head)} |", f"|{'---|' * len(grid.head)}"]
        lines += [f"| {' | '.join(row)} |" for row in grid.rows]
        lines.append("")
    return "\n".join([*lines, AB_NOTE if scores.method == "ab" else MUSHRA_NOTE, ""])


def as_json(scores: Scores) -> dict[str, Any]:
    """Plain values; null for an interval that a single answer does not have."""

    def plain(value: Any) -> Any:
        if hasattr(value, "_asdict"):
            return plain(value._asdict())
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    found: dict[str, Any] = plain(asdict(scores))
    return found


def write_scores(scores: Scores, folder: Path) -> None:
    """Write report.md and report.json to ``folder``, whole or not at all, replacing an earlier report there."""
    with atomic_folder(folder, overwrite=True) as temporary:
        (temporary / "report.md").write_text(markdown(scores), encoding="utf-8")
        (temporary / "report.json").write_text(json.dumps(as_json(scores), indent=1), encoding="utf-8")


def _grids(scores: Scores) -> Iterator[_Grid]:
    if scores.method == "ab":
        second, first = scores.preferences[0].systems[::-1]
        preferences = [
            (
                one.question, _share(one.share), f"{one.answers.above} : {one.answers.below}", str(one.answers.ties),
                f"{one.first_side:.0%}",
            )
            for one in scores.preferences
        ]  # fmt: skip
        head = ("question", "share", "for : against", "ties", "A chosen")
        yield _Grid(f"Preferences for {second} over {first}", head, preferences)
        tests = [(one.question, _p(one.answers, one.participants, one.items)) for one in scores.preferences]
    else:
        ratings = [(one.system, _points(one.mean), f"{one.median:.1f}") for one in scores.ratings]
        yield _Grid("Scores", ("system", "mean", "median"), ratings)
        differences = [(" - ".join(one.systems), _points(one.difference)) for one in scores.comparisons]
        yield _Grid("Differences", ("systems", "points"), differences)
        tests = [(" - ".join(one.systems), _p(one.answers, one.participants, one.items)) for one in scores.comparisons]
    yield _Grid("Sign tests", ("p of all", "answers", "participants", "items"), [(name, *p) for name, p in tests])
    form = "{:.0%}" if scores.method == "ab" else "{:.1f}"
    listeners = [
        (
            one.participant, f"{one.minutes:.1f}", str(one.plays), f"{one.failed} of {one.checks}",
            "–" if one.agreement is None else form.format(one.agreement),
            "excluded" if one.excluded else "yes",
        )
        for one in scores.listeners
    ]  # fmt: skip
    again = "repeats that agree" if scores.method == "ab" else "difference of repeats"
    yield _Grid("Participants", ("participant", "minutes", "plays", "checks failed", again, "counted"), listeners)


def _share(value: Interval) -> str:
    return f"{value.estimate:.1%} [{value.low:.1%}, {value.high:.1%}]"


def _points(value: Interval) -> str:
    between = "–" if math.isnan(value.low) else f"[{value.low:.1f}, {value.high:.1f}]"
    return f"{value.estimate:.1f} {between}"


def _p(*tests: SignTest) -> tuple[str, ...]:
    return tuple(f"{one.p:.3f}" if one.p >= 0.001 else f"{one.p:.1e}" for one in tests)
