"""Charts as inline SVG in the page's own colours, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from diffgap.report.html import Html, element

__all__ = ["BASELINE", "INK", "SERIES", "chart"]

# Matplotlib knows no CSS variables: these stand for them until the chart is drawn.
INK, _GRID, BASELINE = "#010100", "#010101", "#010102"
SERIES = tuple(f"#01011{i}" for i in range(4))
_VARIABLES = {INK: "var(--ink)", _GRID: "var(--line)", BASELINE: "var(--baseline)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)
}

_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True, "axes.edgecolor": INK, "axes.facecolor": "none", "axes.grid": True, "axes.labelcolor": INK,
    "axes.spines.right": False, "axes.spines.top": False, "figure.facecolor": "none", "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "grid.color": _GRID, "grid.linewidth": 0.6,
    "legend.fontsize": 8, "legend.frameon": False, "savefig.facecolor": "none", "svg.fonttype": "none",
    "text.color": INK, "xtick.color": INK, "ytick.color": INK,
}  # fmt: skip


def chart(draw: Callable[[Any], None], label: str, *, width: float = 4.2, height: float = 2.8) -> Html:
    """What ``draw`` draws on matplotlib axes, as ``<svg>``.

    Args:
        label: What is to be seen, for those who cannot; unique in the page.
        width, height: Inches; the chart is scaled to the place it is given.
    """
    file = io.StringIO()
    # The salt makes ids equal from run to run, and different from chart to chart.
    with rc_context({**_STYLE, "svg.hashsalt": label}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = file.getvalue()
    box = re.search(r'viewBox="[^"]*"', drawn)
    assert box is not None
    inside = drawn[drawn.index(">", box.end()) + 1 : drawn.rindex("</svg>")]
    # Ids that nothing refers to are the same in every chart.
    inside = re.sub(r'<g id="[^"]*"', "<g", inside)
    inside = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", inside, flags=re.DOTALL)
    inside = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 system-ui, sans-serif", inside)
    inside = re.sub(r"#0101[0-9a-f]{2}", lambda colour: _VARIABLES[colour[0]], inside)
    return Html(element("svg", Html(inside), role="img", aria_label=label).replace("<svg", f"<svg {box[0]}", 1))
