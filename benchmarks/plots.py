"""The picture beside the tables: every implementation's time and memory, one line per case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.report import implementations, operation, operations, plural, processor
from benchmarks.runner import OURS, Row

# Okabe and Ito's palette, told apart by colour-blind readers too, and three darker ones; shapes repeat the distinction.
# Their numbers have no common factor, so that a colour comes back with another shape.
_COLOURS = (
    *("#D55E00", "#000000", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"),
    *("#882255", "#777777", "#332288"),
)
_MARKERS = "osD^vPX*<>"
_LEGEND_COLUMNS = 6
_LINE_INCHES = 0.24
# Ratio of the ends of a scale above which only powers of ten have room.
_CROWDED = 5000


def draw(path: Path, header: dict[str, Any], rows: Sequence[Row]) -> None:
    """Draw the measured rows to ``path``: a row of panels per operation, time over floor and peak memory."""
    rows = [row for row in rows if row.kind == "measured"]
    names = [OURS, *(name for name in implementations(rows) if name != OURS)]
    ops = operations(rows)
    counts = [len({row.case for row in rows if operation(row) == op}) for op in ops]
    height = _LINE_INCHES * sum(counts) + 1.0 * len(ops) + 0.9
    figure = Figure(figsize=(11, height), layout="constrained")
    grid = figure.subplots(len(ops), 2, squeeze=False, sharey="row", height_ratios=counts)
    for op, (time_axes, memory_axes) in zip(ops, grid, strict=True):
        of_op = [row for row in rows if operation(row) == op]
        _dots(time_axes, of_op, names, lambda row: row.median_s / row.floor_s)
        time_axes.axvline(1.0, color="0.4", linestyle="--", linewidth=1)
        time_axes.set_title(f"{op}: time / floor of the machine", fontsize=9)
        _dots(memory_axes, of_op, names, lambda row: (row.peak_bytes or 0) / 2**20)
        memory_axes.set_title(f"{op}: peak extra memory, MiB", fontsize=9)
    machine = header["machine"]
    place = f"{machine.get('gpu', processor(machine))}, {plural(header['threads'], 'CPU thread')}"
    figure.suptitle(f"{place}, {header['date']}; left is better", fontsize=10)
    handles = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    shown = [name for name in names if name in handles]
    lines = [handles[name] for name in shown]
    figure.legend(lines, shown, loc="outside lower center", ncols=min(len(shown), _LEGEND_COLUMNS), frameon=False)
    figure.savefig(path, dpi=110)


def _dots(axes: Axes, rows: Sequence[Row], names: Sequence[str], value: Callable[[Row], float]) -> None:
    """One line per case from the top, one marker per implementation; diffgap's lies above the others."""
    cases = list(dict.fromkeys(row.case for row in rows))
    for index, name in enumerate(names):
        points = [(value(row), cases.index(row.case)) for row in rows if row.impl == name]
        points = [(x, y) for x, y in points if x > 0]
        if points:
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                linestyle="",
                marker=_MARKERS[index % len(_MARKERS)],
                color=_COLOURS[index % len(_COLOURS)],
                markersize=6,
                alpha=0.9,
                label=name,
                zorder=4 if name == OURS else 3,
            )
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < _CROWDED else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(cases)), [case.partition("/")[2] for case in cases], fontsize=8)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.grid(axis="both", color="0.9")
    axes.tick_params(axis="x", labelsize=8)
