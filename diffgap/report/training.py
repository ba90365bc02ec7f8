"""Training curves of ``metrics.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffgap.report.charts import SERIES, chart
from diffgap.report.html import Html, Section, figure, grid, joined, paragraph

__all__ = ["read_metrics", "training"]

#: What `diffgap train` and `diffgap train-generator` log after a validation, and in which words a reader knows it.
_VALIDATED = {
    "bridge": ("R@5 on validation rows", {"val/score": "bridge + cosine", "val/cosine": "heads (cosine)"}),
    "generator": ("loss on validation rows", {"val/loss": "own condition", "val/shuffled": "another's condition"}),
}
_POINTS = 300

Curve = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]


def read_metrics(run: Path) -> dict[str, Curve]:
    """By name, the steps and values of what was logged; a last line that a kill cut off does not count.

    Raises:
        ValueError: Another line is damaged.
    """
    file = run / "metrics.jsonl"
    found: dict[str, list[tuple[int, float]]] = {}
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
            for name, value in values.items():
                found.setdefault(name, []).append((step, float(value)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"{file}: line {number} is damaged ({error!r}); delete it from there on") from error
    return {name: (np.array([s for s, _ in pairs]), np.array([v for _, v in pairs])) for name, pairs in found.items()}


def training(run: Path, kind: str) -> Section:
    """Losses, gradient norm and validation over the steps.

    Args:
        kind: "bridge" or "generator".
    """
    curves = read_metrics(run)
    if not curves:
        again = "train" if kind == "bridge" else "train-generator"
        return Section("training", "Training", paragraph(f"Nothing is logged yet: `diffgap {again} {run}` goes on."))
    figures = []
    title, labels = _VALIDATED[kind]
    known = {label: curves[name] for name, label in labels.items() if name in curves}
    if known:
        steps, scores = curves["val/score"]
        best = int(steps[scores.argmax()])
        each = ", ".join(f"{label} {values[steps == best][0]:.3f}" for label, (steps, values) in known.items())
        caption = f"{title[0].upper()}{title[1:]}. The model kept is that of step {best}: {each}."
        figures.append(figure(_lines(known, title, best), caption))
    for name, (steps, values) in curves.items():
        if "/" not in name:
            words = name.replace("_", " ")
            caption = f"{words[0].upper()}{words[1:]}: {values[-1]:.4g} at step {steps[-1]}."
            if len(steps) > _POINTS:
                caption += f" Means of {-(-len(steps) // _POINTS)} steps; the band is from the least to the greatest."
            figures.append(figure(_band(steps, values, words), caption))
    return Section("training", "Training", joined([grid(*figures)]))


def _lines(curves: dict[str, Curve], title: str, best: int) -> Html:
    def draw(axis: Any) -> None:
        for (label, (steps, values)), colour in zip(curves.items(), SERIES, strict=False):
            axis.plot(steps, values, marker="o", ms=3, color=colour, label=label)
        axis.axvline(best, color=SERIES[-1], lw=1, ls="--", label="kept")
        axis.set_xlabel("step")
        axis.set_ylabel(title)
        axis.legend()

    return chart(draw, f"{title} over the training steps: {', '.join(curves)}")


def _band(steps: npt.NDArray[np.int64], values: npt.NDArray[np.float64], name: str) -> Html:
    """Means of neighbouring steps, and between which values they lie."""
    parts = np.array_split(np.arange(len(steps)), min(_POINTS, len(steps)))

    def draw(axis: Any) -> None:
        x = [steps[part].mean() for part in parts]
        axis.fill_between(
            x, [values[part].min() for part in parts], [values[part].max() for part in parts],
            color=SERIES[0], alpha=0.25, lw=0,
        )  # fmt: skip
        axis.plot(x, [values[part].mean() for part in parts], color=SERIES[0], lw=1.2)
        axis.set_xlabel("step")
        axis.set_ylabel(name)

    return chart(draw, f"{name} over the training steps")
