"""Several systems' clips of the same items, measured alike, and their differences: ``metrics.json``.

::

    {"format": "diffgap-metrics/1",
     "about": {...},                          what was measured, by which command line
     "systems": {"bridged": {"figures": [...], "names": [...], ...}, ...},      each an AudioReport
     "differences": [{"first": "raw", "second": "bridged", "metric": "mel_distance", "backbone": "mel",
                      "better": "lower", "estimate": -1.2, "low": -1.9, "high": -0.6}, ...],
     "left_out": ["name", ...]}               items of which some system's clip is broken

A difference is second minus first; it has an interval, of a bootstrap of the pairs, where the metric is a mean over
clips. The recordings themselves ("reference") have the figures that need no recording to be held against.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from diffgap._files import atomic_file, check_writable
from diffgap.generation.metrics.backbone import Backbone, classes_of
from diffgap.generation.metrics.clips import some
from diffgap.generation.metrics.conditions import Conditions
from diffgap.generation.metrics.evaluate import evaluate_audio
from diffgap.generation.metrics.report import (
    SCALE_HEAD,
    AudioReport,
    Difference,
    Figure,
    check_scales,
    compare,
    interval,
    number,
    scale_cells,
    table,
)

__all__ = ["COMPARED", "REFERENCE", "Compared", "SystemsReport", "check_output", "evaluate_systems"]

FORMAT = "diffgap-metrics/1"
REFERENCE = "reference"
#: The pairs of systems, first and second, whose differences are taken where both are there.
COMPARED = (("raw", "bridged"), ("none", "bridged"), ("bridged", "sampled"), ("none", "audio"))

Files = Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Compared:
    """A difference, and the systems that it is of."""

    first: str
    second: str
    difference: Difference

    @property
    def verdict(self) -> str:
        """Whether the second is better or worse, as far as the interval says."""
        found = self.difference.interval
        if found is None:
            return ""
        if not found.excludes_zero:
            return "within noise"
        return "better" if (found.estimate > 0) == (self.difference.better == "higher") else "worse"


@dataclass(frozen=True)
class SystemsReport:
    """A report for each system.

    Attributes:
        systems: By name, the recordings' own first if there is one.
        differences: Of the pairs that were to be compared.
        left_out: Items that no system was measured on, because a clip of one is broken.
        about: What was measured.
    """

    systems: Mapping[str, AudioReport]
    differences: tuple[Compared, ...]
    left_out: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes metrics.json and metrics.md, over earlier ones. Raises FileExistsError as :func:`check_output`."""
        check_output(folder)
        for name, text in (("metrics.md", self.markdown()), ("metrics.json", self._json())):
            with atomic_file(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def _json(self) -> str:
        differences = []
        for one in self.differences:
            found = asdict(one.difference)
            own = found.pop("interval")
            low, high = (None, None) if own is None else own[1:]
            differences.append({"first": one.first, "second": one.second, **found, "low": low, "high": high})
        content = {
            "format": FORMAT,
            "about": dict(self.about),
            "systems": {name: asdict(report) for name, report in self.systems.items()},
            "differences": differences,
            "left_out": self.left_out,
        }
        return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def rows(self) -> list[tuple[Figure, list[Figure | None]]]:
        """For each metric and backbone a figure that says its scale, and the systems' own, None where one has none."""
        found: dict[tuple[str, str], dict[str, Figure]] = {}
        for name, report in self.systems.items():
            for figure in report.figures:
                found.setdefault(figure.key, {})[name] = figure
        # The recordings have fewer figures than the others, so their order is not everyone's.
        order = [figure.key for figure in list(self.systems.values())[-1].figures]
        return [(next(iter(found[key].values())), [found[key].get(name) for name in self.systems]) for key in order]

    def markdown(self) -> str:
        """Figures with their intervals, differences, and what is to be known of both."""
        rows = [
            [scale.metric, scale.better, *(_cell(f) for f in figures), *scale_cells(scale)]
            for scale, figures in self.rows()
        ]
        lines = [
            "# Metrics of generated sound",
            "",
            *(f"- {name}: {value}" for name, value in self.about.items()),
            "",
            table(["metric", "better", *self.systems, *SCALE_HEAD], rows),
            "",
        ]
        if self.differences:
            cells = [
                [f"{one.second} - {one.first}", *_difference_cells(one), one.verdict or "no interval"]
                for one in self.differences
            ]
            lines += [table(["", "metric", "backbone", "better", "difference", "interval", "verdict"], cells), ""]
        if self.left_out:
            lines.append(f"- {len(self.left_out)} items left out, as a clip is broken: {some(self.left_out)}.")
        reports = [report for name, report in self.systems.items() if name != REFERENCE or len(self.systems) == 1]
        remarks = [line for report in reports for line in (*report.remarks(), *report.notes)]
        return "\n".join([*lines, *(f"- {line}" for line in dict.fromkeys(remarks))]) + "\n"

    def tables(self) -> list[Table]:
        """For a terminal: of each backbone the figures without intervals, and the differences with theirs."""
        tables = []
        for backbone in dict.fromkeys(scale.backbone for scale, _ in self.rows()):
            rows = [row for row in self.rows() if row[0].backbone == backbone]
            scale = rows[0][0]
            title = f"{backbone}, {scale.generated} sounds, {scale.sample_rate} Hz"
            figures = _empty(title, *self.systems, "better")
            for scale, own in rows:
                figures.add_row(scale.metric, *("-" if f is None else number(f.estimate) for f in own), scale.better)
            tables.append(figures)
            found = {
                (one.difference.metric, f"{one.second} - {one.first}"): one
                for one in self.differences
                if one.difference.backbone == backbone and one.verdict
            }
            pairs = dict.fromkeys(pair for _, pair in found)
            if not found:
                continue
            confidence = f"{scale.confidence:.0%}"
            differences = _empty(f"{backbone}, paired differences with {confidence} intervals", *pairs)
            for metric in dict.fromkeys(metric for metric, _ in found):
                differences.add_row(metric, *(_told(found[metric, pair]) for pair in pairs))
            tables.append(differences)
        return tables


def _empty(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left", box=SIMPLE)
    made.add_column("metric", no_wrap=True)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def evaluate_systems(
    systems: Mapping[str, Files],
    reference: Files | None,
    *,
    backbones: Sequence[Backbone],
    conditions: Conditions | None = None,
    labels: Mapping[str, str] | None = None,
    compared: Sequence[tuple[str, str]] = COMPARED,
    splits: int = 10,
    skip_broken: bool = False,
    cache: str | os.PathLike[str] | None = None,
    confidence: float = 0.95,
    resamples: int = 500,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> SystemsReport:
    """:func:`evaluate_audio` of each system against ``reference``, on the same items, and the differences.

    Args:
        systems: Files by system; those of equal name, without suffix, belong to one item.
        reference: The recordings, or None.
        backbones, conditions, labels, splits, confidence, resamples, seed: As of :func:`evaluate_audio`.
        compared: Pairs of systems, first and second.
        skip_broken: Leave an item out of all systems if one's clip, or the recording, is broken.
        cache: Folder for features, as of :func:`evaluate_audio`; None keeps them only while this call lasts.
        about: For the report.

    Raises:
        ValueError, FileNotFoundError: As :func:`evaluate_audio`, the message beginning with the system's name.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if cache is None else cache
        options: dict[str, Any] = {
            "backbones": backbones, "splits": splits, "cache": folder, "confidence": confidence,
            "resamples": resamples, "seed": seed,
        }  # fmt: skip

        def measured(gone: set[str], skip: bool) -> dict[str, AudioReport]:
            def kept(files: Files) -> Files:
                return [file for file in files if Path(file).stem not in gone]

            own = conditions and replace(conditions, vectors=_without(conditions.vectors, gone))
            given = {"conditions": own, "labels": labels and _without(labels, gone), "skip_broken": skip, **options}
            reports = {}
            if reference is not None and _alone(backbones, own, labels, len(kept(reference)) >= splits):
                reports[REFERENCE] = _named(REFERENCE, kept(reference), None, given)
            for name, files in systems.items():
                reports[name] = _named(name, kept(files), None if reference is None else kept(reference), given)
            return reports

        reports = measured(set(), skip_broken)
        gone = {one.name for report in reports.values() for one in report.broken}
        if gone:
            reports = measured(gone, False)
    check_scales(reports)
    differences = [
        Compared(first, second, found)
        for first, second in compared
        if first in reports and second in reports
        for found in compare(reports[first], reports[second], confidence=confidence, resamples=resamples, seed=seed)
    ]
    return SystemsReport(reports, tuple(differences), tuple(sorted(gone)), dict(about or {}))


def check_output(folder: Path) -> None:
    """Raises FileExistsError if ``folder`` has a metrics.json, or a metrics.md, that is not of this module's making.

    Raises ValueError if nothing can be written there.
    """
    file = folder / "metrics.json"
    check_writable(folder, file)
    try:
        ours = file.is_file() and json.loads(file.read_text(encoding="utf-8"))["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        ours = False
    if not ours and (taken := [name for name in ("metrics.json", "metrics.md") if (folder / name).exists()]):
        raise FileExistsError(f"{folder / taken[0]} exists and is not of `diffgap metrics`; choose another --output")


def _alone(
    backbones: Sequence[Backbone], conditions: Conditions | None, labels: Mapping[str, str] | None, many: bool
) -> bool:
    """Whether anything is to be said of recordings by themselves; ``many``: enough for an Inception score."""
    return any(
        ("logits" in network.outputs and (many or (labels is not None and bool(classes_of(network)))))
        or (conditions is not None and conditions.space == network.space)
        for network in backbones
    )


def _named(system: str, generated: Files, reference: Files | None, options: Mapping[str, Any]) -> AudioReport:
    try:
        return evaluate_audio(generated, reference, **options)
    except ValueError as error:
        raise ValueError(f"{system}: {error}") from error


def _without(values: Mapping[str, Any], gone: set[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in gone}


def _cell(figure: Figure | None) -> str:
    return "-" if figure is None else f"{number(figure.estimate)} {interval(figure)}".strip()


def _told(one: Compared) -> str:
    *_, estimate, low_high = _difference_cells(one)
    return f"{estimate} {low_high} {one.verdict}"


def _difference_cells(one: Compared) -> list[str]:
    found = one.difference
    low_high = "" if found.interval is None else f"[{number(found.interval.low)}, {number(found.interval.high)}]"
    return [found.metric, found.backbone, found.better, number(found.estimate), low_high]
