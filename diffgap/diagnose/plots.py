"""Pictures of a diagnosis; each check that has series gets one, in colours that colour-blind readers can tell apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from diffgap.diagnose.checks import Diagnosis
from diffgap.diagnose.finding import Finding

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw(diagnosis: Diagnosis, folder: Path) -> None:
    """Write <check>.png for every check that has series."""
    panels: dict[str, tuple[str, Callable[[Any, Finding], None]]] = {
        "pairing": ("Similarity of groups that the map has not seen", _pairing),
        "trajectory": ("From noise to sample; norms over what they should be", _trajectory),
        "condition": ("Denoising error under the true, another, and no condition", _condition),
        "collapse": ("Singular values of samples and of as many real embeddings", _spectra),
    }
    for check, (title, panel) in panels.items():
        findings = [finding for finding in diagnosis.findings if finding.check == check and finding.curves]
        if findings:
            _page(title, findings, panel).savefig(folder / f"{check}.png", dpi=130, bbox_inches="tight")


def _page(title: str, findings: list[Finding], panel: Callable[[Any, Finding], None]) -> Figure:
    """One panel a finding, at most three in a row."""
    columns = min(3, len(findings))
    rows = -(-len(findings) // columns)
    # A figure without pyplot: no window, and the caller's own choice of backend stays.
    figure = Figure(figsize=(3.9 * columns, 2.9 * rows + 0.4))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, finding in zip(axes.flat, findings, strict=False):
        panel(axis, finding)
        axis.set_title(f"{finding.subject}: {finding.verdict}", fontsize=9)
        axis.tick_params(which="both", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
    for axis in axes.flat[len(findings) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    return figure


def _pairing(axis: Any, finding: Finding) -> None:
    bins = np.histogram_bin_edges(np.concatenate([*finding.curves.values()]), 40)
    for (name, values), colour in zip(finding.curves.items(), _COLOURS, strict=False):
        axis.hist(values, bins, density=True, alpha=0.55, color=colour, label=name)
    axis.set_xlabel("mean cosine of two groups", fontsize=8)
    axis.set_ylabel("density", fontsize=8)


def _trajectory(axis: Any, finding: Finding) -> None:
    norms = axis.twinx()
    for (name, values), colour in zip(finding.curves.items(), _COLOURS, strict=False):
        steps = range(1, len(values) + 1)
        if name == "cosine":
            axis.plot(steps, values, marker="o", ms=3, color=colour, label="cosine with the target")
        else:
            norms.plot(steps, values, "--", lw=1, color=colour)
            axis.plot([], [], "--", lw=1, color=colour, label=f"{name} (right)")
    norms.set_ylim(0.0, 1.5 * max(1.0, *finding.curves["norm of x"]))
    norms.tick_params(labelsize=7)
    norms.spines["top"].set_visible(False)
    axis.set_xlabel("sampling step", fontsize=8)
    axis.set_ylabel("cosine of the estimate", fontsize=8)
    norms.set_ylabel("norm, over what it should be", fontsize=8)


def _condition(axis: Any, finding: Finding) -> None:
    for (name, values), colour in zip(finding.curves.items(), _COLOURS, strict=False):
        levels = (np.arange(len(values)) + 0.5) / len(values)
        axis.plot(levels, values, marker="o", ms=3, color=colour, label=name)
    axis.set_xlabel("timestep, as a share of the schedule", fontsize=8)
    axis.set_ylabel("mean squared error", fontsize=8)


def _spectra(axis: Any, finding: Finding) -> None:
    for (name, values), colour in zip(finding.curves.items(), _COLOURS, strict=False):
        kept = np.maximum(values, 1e-6)
        axis.semilogy(range(1, len(kept) + 1), kept, color=colour, label=name)
    axis.set_xlabel("number of the singular value", fontsize=8)
    axis.set_ylabel("singular value, over their sum", fontsize=8)
