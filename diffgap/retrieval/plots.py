"""Pictures of a report: recall with intervals, the gap in two dimensions, and the denoising trajectory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from diffgap.retrieval.summary import Report, overall

# Figures without pyplot: no window, and the caller's own choice of backend stays.
_BASELINE = "#9aa5b1"
_COLOURS = {
    "heads (cosine)": "#4c78a8",
    "bridge": "#f2a154",
    "bridge + cosine": "#d1495b",
    "re-ranked": "#7b3294",
}


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight")


def _grid(count: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    columns = min(3, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def recall(report: Report, path: Path) -> None:
    """R@5 of every method with its 95% interval, one panel a direction."""
    figure, axes = _grid(len(report.directions), 4.2, 2.9)
    for axis, name in zip(axes, report.directions, strict=True):
        recall_axis(axis, report, name)
        axis.set_title(name, fontsize=10)
    figure.suptitle(f"Recall at 5 on {report.split}, {len(report.runs)} run(s), 95% intervals", fontsize=11)
    figure.tight_layout()
    _save(figure, path)


def recall_axis(axis: Any, report: Report, name: str, baseline: str = _BASELINE, ink: str = "#333333") -> None:
    """R@5 of every method in one direction with its 95% interval, as bars."""
    methods = [method for method, cells in report.metrics.items() if name in cells][::-1]
    cells = [report.metrics[method][name]["R@5"] for method in methods]
    centre = 100 * np.array([cell.estimate for cell in cells])
    spread = 100 * np.array([[c.estimate - c.low for c in cells], [c.high - c.estimate for c in cells]])
    colours = [_COLOURS.get(method, baseline) for method in methods]
    axis.barh(methods, centre, xerr=spread.clip(min=0), color=colours, error_kw={"lw": 1, "ecolor": ink})
    axis.set_xlabel("R@5, percent")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def gap(report: Report, path: Path) -> None:
    """Queries before and after bridging beside their gallery, on the two leading principal axes of all three."""
    figure, axes = _grid(len(report.embeddings), 4.2, 3.8)
    for axis, (name, sets) in zip(axes, report.embeddings.items(), strict=True):
        points = torch.cat(sets).double()
        basis = torch.linalg.svd(points - points.mean(0), full_matrices=False).Vh[:2].T
        query, gallery = report.directions[name].query, report.directions[name].gallery
        labels = (f"{query}", f"{query}, bridged", f"{gallery}")
        colours = (_COLOURS["heads (cosine)"], _COLOURS["bridge + cosine"], _BASELINE)
        for values, label, colour, marker in zip(sets, labels, colours, "oxs", strict=True):
            x, y = ((values.double() - points.mean(0)) @ basis).T.numpy()
            axis.scatter(x, y, s=12, c=colour, marker=marker, label=label, alpha=0.75, linewidths=0.8)
        before, after = report.gaps[name]
        axis.set_title(
            f"{name}\npaired cosine {before.paired_cosine:.2f} to {after.paired_cosine:.2f}, "
            f"separability {before.linear_separability:.2f} to {after.linear_separability:.2f}",
            fontsize=9,
        )
        axis.set_xticks([])
        axis.set_yticks([])
        axis.legend(fontsize=7, loc="best", frameon=False)
    figure.suptitle(f"The gap before and after bridging ({report.split} pairs, principal axes)", fontsize=11)
    figure.tight_layout()
    _save(figure, path)


def trajectory(report: Report, path: Path) -> None:
    """Mean cosine of the denoised estimate with its true pair after each sampling step."""
    figure = Figure(figsize=(5.6, 3.6))
    axis = figure.subplots()
    for name, cosines in report.trajectory.items():
        axis.plot(range(1, len(cosines) + 1), cosines, marker="o", ms=3.5, lw=1.4, label=name)
    axis.set_xlabel("sampling step")
    axis.set_ylabel("cosine of the estimate with the true pair")
    axis.set_title("One sample on its way from noise to the other modality", fontsize=10)
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def few_steps(report: Report, path: Path) -> None:
    """Recall, time and gap of the bridged embedding over the steps, one colour a number of samples."""
    figure = Figure(figsize=(12.6, 6.4))
    axes = figure.subplots(2, 3)
    steps = sorted({tried.steps for tried in report.few_steps})
    colours = (_COLOURS["heads (cosine)"], _COLOURS["bridge + cosine"])
    for samples, colour in zip(sorted({tried.num_samples for tried in report.few_steps}), colours, strict=True):
        tried = [one for one in report.few_steps if one.num_samples == samples]
        x = [one.steps for one in tried]
        style: dict[str, Any] = {"marker": "o", "ms": 3.5, "c": colour}
        for axis, metric in zip(axes[0], ("R@5", "MRR"), strict=False):
            for method, line in (("bridge", "-"), ("bridge + cosine", ":")):
                cells = [overall(one.metrics[method])[metric] for one in tried]
                axis.plot(x, [100 * c.estimate for c in cells], line, label=f"{method}, K = {samples}", **style)
                if method == "bridge":
                    low, high = ([100 * c.low for c in cells], [100 * c.high for c in cells])
                    axis.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
        axes[0, 2].plot(x, [one.milliseconds for one in tried], label=f"K = {samples}", **style)
        for axis, name in zip(axes[1], ("paired_cosine", "centroid_distance", "linear_separability"), strict=True):
            axis.plot(x, [one.gap[name] for one in tried], label=f"K = {samples}", **style)
    axes[0, 2].set_yscale("log")
    labels = (
        "R@5, percent (band: 95%, bridge)", "MRR, percent (band: 95%, bridge)", "ms an embedding",
        "cosine with the true pair", "distance of the centroids", "separability from the gallery",
    )  # fmt: skip
    for axis, label in zip(axes.flat, labels, strict=True):
        axis.set_xscale("log")
        axis.set_xticks(steps, [str(step) for step in steps])
        axis.minorticks_off()
        axis.set_xlabel("sampling steps")
        axis.set_ylabel(label)
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    solver = report.few_steps[0].solver
    figure.suptitle(f"Few steps on {report.split}, solver {solver}, mean over directions", fontsize=11)
    figure.tight_layout()
    _save(figure, path)
