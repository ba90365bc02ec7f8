"""Modelled times beside measured ones, and which of them are off."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report import seconds

#: A model is off whose time is not within this of the measured one, relative to the modelled one.
TOLERANCE = 0.25


@dataclass(frozen=True)
class Comparison:
    """One thing modelled and measured: an implementation of a case, or a kernel, whose ``impl`` is the pipe that limits
    it. ``ratio`` is measured over modelled."""

    case: str
    impl: str
    modelled_s: float
    measured_s: float

    @property
    def ratio(self) -> float:
        return self.measured_s / self.modelled_s

    @property
    def off(self) -> bool:
        return abs(self.ratio - 1) > TOLERANCE

    @property
    def line(self) -> str:
        """What is printed of one that is off."""
        times = f"modelled {seconds(self.modelled_s)}, measured {seconds(self.measured_s)}"
        return f"off by {self.ratio:.2f}x: {self.case} {self.impl}: {times}"


def furthest_first(compared: Iterable[Comparison]) -> list[Comparison]:
    """In the order of the tables."""
    return sorted(compared, key=lambda entry: max(entry.ratio, 1 / entry.ratio), reverse=True)


def tables(compared: Sequence[Comparison], case: str = "case", impl: str = "impl") -> list[str]:
    """What was off, then all, one line each, under the names of the first two columns."""
    lines = []
    off = [entry for entry in compared if entry.off]
    for title, entries in ((f"Off by more than {TOLERANCE:.0%}", off), ("All", compared)):
        if entries:
            lines += [f"## {title}", "", f"| {case} | {impl} | modelled | measured | measured / modelled |"]
            lines.append("|---|---|---:|---:|---:|")
            for entry in entries:
                times = f"{seconds(entry.modelled_s)} | {seconds(entry.measured_s)}"
                lines.append(f"| {entry.case} | {entry.impl} | {times} | {entry.ratio:.2f} |")
            lines.append("")
    return lines


def to_markdown(header: Mapping[str, Any], compared: Sequence[Comparison]) -> str:
    """The comparison of a run of the benchmarks with the models of its chip."""
    off = sum(entry.off for entry in compared)
    lines = [
        f"# Models beside measurements: {header['measured']}, {header['date']}",
        "",
        f"Modelled for {header['gpu']} ({header['chip']}), measured on {header['measured']}. A modelled time is a "
        f"lower bound at published rates. Of {header['modelled']} modelled rows {len(compared)} were measured, of "
        f"which {off} were off by more than {TOLERANCE:.0%}.",
        "",
        *tables(compared),
    ]
    return "\n".join(lines)


def to_json(header: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], **others: object) -> str:
    """One object of ``header``, ``others`` and ``rows``, one row a line."""
    first = "".join(f'  "{name}": {json.dumps(value)},\n' for name, value in {"header": header, **others}.items())
    lines = ",\n    ".join(map(json.dumps, rows))
    return f'{{\n{first}  "rows": [\n    {lines}\n  ]\n}}\n'
