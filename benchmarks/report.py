"""Results as JSON, as Markdown tables and, through :mod:`benchmarks.plots`, as a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.runner import OURS, Result, Row, Skipped
from diffgap._files import atomic_file


def save(path: Path, header: dict[str, Any], result: Result) -> list[Path]:
    """Write ``path`` and the same name with ``.md`` and ``.png``; each file appears whole or not at all."""
    from benchmarks.plots import draw

    written = write(path, to_json(header, result), to_markdown(header, result))
    if result.rows:
        written.append(path.with_suffix(".png"))
        with atomic_file(written[-1]) as temporary:
            draw(temporary, header, result.rows)
    return written


def write(path: Path, data: str, document: str) -> list[Path]:
    """Write ``data`` to ``path`` and ``document`` to the same name with ``.md``, each whole or not at all."""
    written = [path, path.with_suffix(".md")]
    for target, text in zip(written, (data, document), strict=True):
        with atomic_file(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return written


def to_json(header: dict[str, Any], result: Result) -> str:
    """One object of ``header``, ``rows``, ``failures``, ``missing`` and ``skipped``, one row a line."""
    rows = ",\n    ".join(json.dumps(asdict(row)) for row in result.rows)
    parts = {
        "header": json.dumps(header, indent=2).replace("\n", "\n  "),
        "rows": f"[\n    {rows}\n  ]" if rows else "[]",
        "failures": json.dumps(result.failures),
        "missing": json.dumps(result.missing),
        "skipped": json.dumps([asdict(skipped) for skipped in result.skipped]),
    }
    return "{\n" + ",\n".join(f'  "{name}": {text}' for name, text in parts.items()) + "\n}\n"


def to_markdown(header: dict[str, Any], result: Result) -> str:
    """The tables, one section per kind and operation."""
    machine = header["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in header["versions"].items())
    lines = [
        f"# Benchmarks, {header['date']}",
        "",
        f"`{header['command']}`",
        "",
        f"{machine.get('gpu', processor(machine))} ({machine['isa']}, {machine['cores']} cores), "
        f"{plural(header['threads'], 'CPU thread')}, {header['clock']}; {versions}.",
        "",
        "Times are medians ± interquartile range; (2.00x) is the time relative to diffgap's, above 1 where "
        "diffgap is faster. The floor is what the machine needs at least to move the bytes and multiply the "
        "matrices, measured in the same rounds. Memory is the peak extra of one call, results included.",
        "",
    ]
    for kind in ("measured", "modelled"):
        rows = [row for row in result.rows if row.kind == kind]
        for op in operations(rows):
            backend = header["backends"].get(op)
            note = f"diffgap here is {backend}." if backend and kind == "measured" else ""
            lines += section(f"{op} ({kind})", [row for row in rows if operation(row) == op], result.skipped, note)
    if result.missing:
        lines += ["## Missing peers", ""]
        lines += [f"- {name}: `{command}`" for name, command in result.missing.items()] + [""]
    if result.failures:
        lines += ["## Failures (not timed)", "", *(f"- {failure}" for failure in result.failures), ""]
    return "\n".join(lines)


def processor(machine: Mapping[str, Any]) -> str:
    """The CPU's name, with its family and model where they were recorded."""
    family = f", family {machine['cpu_family']} model {machine['cpu_model']}" if "cpu_family" in machine else ""
    return f"{machine['cpu']}{family}"


def operation(row: Row) -> str:
    """The op a row is about."""
    return row.case.partition("/")[0]


def operations(rows: Sequence[Row]) -> list[str]:
    """The ops of the rows, in order."""
    return list(dict.fromkeys(operation(row) for row in rows))


def implementations(rows: Sequence[Row]) -> list[str]:
    """The implementations of the rows, in order."""
    return list(dict.fromkeys(row.impl for row in rows))


def section(title: str, rows: Sequence[Row], skipped: Sequence[Skipped], note: str = "") -> list[str]:
    """A heading and the tables of one operation on one device."""
    lines = [f"## {title}", "", *([note, ""] if note else [])]
    lines += table(rows, _time_cell, skipped, floor=True)
    if any(row.peak_bytes is not None for row in rows):
        lines += ["Peak extra memory:", "", *table(rows, _memory_cell, floor=False)]
    return lines


def table(
    rows: Sequence[Row], cell: Callable[[Row, Row], str], skipped: Sequence[Skipped] = (), *, floor: bool
) -> list[str]:
    """One line per case and one column per implementation; the others are relative to diffgap's.

    What was ``skipped`` in one of the cases has its reason in place of a value.
    """
    reasons = {(entry.case, entry.impl): f"not run: {entry.reason}" for entry in skipped}
    shown = {row.case for row in rows}
    names = list(dict.fromkeys([*implementations(rows), *(impl for case, impl in reasons if case in shown)]))
    head = ["case", *(["floor"] if floor else []), *names]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for case in dict.fromkeys(row.case for row in rows):
        of_case = {row.impl: row for row in rows if row.case == case}
        ours = of_case[OURS]
        cells = [cell(of_case[name], ours) if name in of_case else reasons.get((case, name), "") for name in names]
        label = case.partition("/")[2]
        lines.append("| " + " | ".join([label, *([seconds(ours.floor_s)] if floor else []), *cells]) + " |")
    return [*lines, ""]


def _time_cell(row: Row, ours: Row) -> str:
    ratio = f"{row.median_s / ours.median_s:.2f}x"
    relative = f"{row.floor_s / row.median_s:.0%} of floor" if row is ours else ratio
    spread = f" ± {seconds(row.iqr_s)}" if row.kind == "measured" else ""
    return f"{seconds(row.median_s)}{spread} ({relative})"


def _memory_cell(row: Row, ours: Row) -> str:
    if row.peak_bytes is None:
        return ""
    text = f"{row.peak_bytes / 2**20:.1f} MiB"
    return text if row is ours or not ours.peak_bytes else f"{text} ({row.peak_bytes / ours.peak_bytes:.2f}x)"


def plural(count: int, noun: str) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def seconds(value: float) -> str:
    """A duration with three digits and its unit."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= unit:
            return f"{_three_digits(value / unit)} {name}"
    return f"{_three_digits(value / 1e-9)} ns"


def _three_digits(value: float) -> str:
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"
