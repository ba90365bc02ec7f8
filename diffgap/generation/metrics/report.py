"""The report of an evaluation: figures that say on which scale they are, and refuse to meet others."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffgap._files import atomic_file
from diffgap.generation.metrics.clips import Broken, some
from diffgap.retrieval.bootstrap import Interval, paired_bootstrap

__all__ = ["AudioReport", "Difference", "Figure", "IncompatibleScales", "compare", "side_by_side"]

_FORMAT = 1


class IncompatibleScales(ValueError):
    """Figures of different backbones, preparations, sample rates, N, references or settings were to be compared."""


@dataclass(frozen=True)
class Figure:
    """One metric of one set of clips, on one backbone.

    Attributes:
        metric, backbone, fingerprint, preparation, sample_rate: What was computed, by which network, on what input.
        generated: Clips evaluated. against: Recordings, or conditions, they were held against; 0 for none.
        reference: Digest of the names and contents of those; "" for none.
        settings: The metric's own (splits, bandwidth). details: What else is to be known of the figure.
        estimate, low, high: The figure and its interval; None for too few clips to have one.
        confidence, resamples, resampling: Of the interval, and what was resampled how.
        bias: By how much the figure is too large for so few clips, estimated; None for figures without bias.
        better: "higher" or "lower".
        values: The clips' own values where the figure is their mean, in the order of the report's ``names``.
    """

    metric: str
    backbone: str
    fingerprint: str
    preparation: str
    sample_rate: int
    generated: int
    against: int
    reference: str
    settings: Mapping[str, str | int | float]
    estimate: float
    low: float | None
    high: float | None
    confidence: float
    resamples: int
    resampling: str
    bias: float | None
    better: str
    details: Mapping[str, str | int | float] = field(default_factory=dict)
    values: tuple[float, ...] | None = None

    @property
    def scale(self) -> dict[str, object]:
        """Everything that must be equal before two figures of this metric may be compared."""
        names = ("fingerprint", "preparation", "sample_rate", "generated", "against", "reference", "settings")
        return {name: getattr(self, name) for name in names}

    @property
    def key(self) -> tuple[str, str]:
        """Metric and backbone."""
        return self.metric, self.backbone


@dataclass(frozen=True)
class AudioReport:
    """All figures of one set of generated clips.

    Attributes:
        figures: In the order of backbones and metrics.
        names: Clips that were evaluated.
        broken: Clips that were not, of both sets, and why.
        left_out: Clips left out because the other of their pair is broken, as "set/name".
        reused, computed: How many descriptions came from the cache, and how many did not.
        notes: What was not computed, and why.
    """

    figures: tuple[Figure, ...]
    names: tuple[str, ...]
    broken: tuple[Broken, ...] = ()
    left_out: tuple[str, ...] = ()
    reused: int = 0
    computed: int = 0
    notes: tuple[str, ...] = field(default=())

    def figure(self, metric: str, backbone: str | None = None) -> Figure:
        """The figure of that metric (and backbone). Raises KeyError if there is none, or several."""
        found = [f for f in self.figures if f.metric == metric and backbone in (None, f.backbone)]
        if len(found) != 1:
            raise KeyError(f"{len(found)} figures of {metric}; there are {', '.join(map(str, self._keys()))}")
        return found[0]

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes the whole report."""
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps({"format": _FORMAT, **asdict(self)}, indent=1, allow_nan=False) + "\n")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> AudioReport:
        """Reads what :meth:`to_json` wrote. Raises ValueError for any other file."""
        try:
            content = json.loads(Path(path).read_text())
            if content.pop("format") != _FORMAT:
                raise ValueError("another version wrote it")
            return cls.parse(content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no report of generated audio: {error}") from error

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> AudioReport:
        """The report that ``dataclasses.asdict`` made ``content`` of, perhaps by way of JSON."""
        figures = [
            Figure(**{**f, "values": None if f["values"] is None else tuple(f["values"])}) for f in content["figures"]
        ]
        rest = {name: tuple(content[name]) for name in ("names", "left_out", "notes")}
        broken = tuple(Broken(**one) for one in content["broken"])
        return cls(**{**content, **rest, "figures": tuple(figures), "broken": broken})

    def markdown(self) -> str:
        """A table with a row a figure, then what was resampled, left out and reused."""
        rows = [[f.metric, number(f.estimate), interval(f), _bias(f), f.better, *scale_cells(f)] for f in self.figures]
        head = ["metric", "estimate", "interval", "bias at this N", "better", *SCALE_HEAD]
        remarks = [*self.remarks(), f"descriptions of clips: {self.reused} from the cache, {self.computed} computed."]
        return "\n".join([table(head, rows), "", *(f"- {line}" for line in [*remarks, *self.notes])]) + "\n"

    def _keys(self) -> list[tuple[str, str]]:
        return [figure.key for figure in self.figures]

    def remarks(self) -> list[str]:
        """What was resampled how, what else is to be known of the figures, and which clips were left out."""
        ways: dict[str, list[str]] = {}
        for figure in self.figures:
            text = f"{figure.confidence:.0%} interval, {figure.resamples} replicates: {figure.resampling}"
            ways.setdefault(text if figure.low is not None else f"no interval: {figure.resampling}", []).append(
                figure.metric
            )
        lines = [f"{', '.join(dict.fromkeys(metrics))}: {way}." for way, metrics in ways.items()]
        lines += [
            f"{figure.metric} on {figure.backbone}: {name} {value if isinstance(value, str) else number(value)}."
            for figure in self.figures
            for name, value in figure.details.items()
        ]
        for key in ("generated", "reference"):
            bad = [f"{one.name} ({one.reason})" for one in self.broken if one.set == key]
            if bad:
                lines.append(f"{len(bad)} broken clips of the {key} set not evaluated: {some(bad, len(bad))}.")
        if self.left_out:
            lines.append(f"left out with the other of their pair: {some(self.left_out, len(self.left_out))}.")
        return lines


@dataclass(frozen=True)
class Difference:
    """``second - first`` of one figure; with an interval where both are means over the same clips."""

    metric: str
    backbone: str
    better: str
    estimate: float
    interval: Interval | None


def compare(
    first: AudioReport, second: AudioReport, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> list[Difference]:
    """Differences of all figures, second minus first.

    Raises:
        IncompatibleScales: The reports hold different figures, or figures on different scales.
    """
    _check_comparable({"first": first, "second": second})
    differences = []
    for a in first.figures:
        b = second.figure(*a.key)
        interval = None
        if a.values is not None and b.values is not None and first.names == second.names and a.low is not None:
            options = {"confidence": confidence, "resamples": resamples, "seed": seed}
            interval = paired_bootstrap(np.asarray(b.values), np.asarray(a.values), **options)  # type: ignore[arg-type]
        differences.append(Difference(a.metric, a.backbone, a.better, b.estimate - a.estimate, interval))
    return differences


def side_by_side(reports: Mapping[str, AudioReport]) -> str:
    """One markdown table of several systems' reports, a column each.

    Raises:
        IncompatibleScales: As :func:`compare`.
    """
    _check_comparable(reports)
    systems = list(reports)
    rows = []
    for figure in reports[systems[0]].figures:
        figures = [reports[system].figure(*figure.key) for system in systems]
        cells = [f"{number(f.estimate)} {interval(f)}".strip() for f in figures]
        rows.append([figure.metric, figure.better, *cells, *scale_cells(figure)])
    return table(["metric", "better", *systems, *SCALE_HEAD], rows) + "\n"


def _check_comparable(reports: Mapping[str, AudioReport]) -> None:
    if not reports:
        raise ValueError("reports are empty")
    (base, first), *others = reports.items()
    for name, other in others:
        if set(first._keys()) != set(other._keys()):
            lacking = sorted(f"{m} of {b}" for m, b in set(first._keys()) ^ set(other._keys()))
            raise IncompatibleScales(
                f"incompatible scales: {base} and {name} do not both have {some(lacking)}; evaluate both alike"
            )
    check_scales(reports)


def check_scales(reports: Mapping[str, AudioReport]) -> None:
    """Raises IncompatibleScales if a figure that two of the reports have is on two scales."""
    seen: dict[tuple[str, str], tuple[str, Figure]] = {}
    for name, report in reports.items():
        for figure in report.figures:
            base, first = seen.setdefault(figure.key, (name, figure))
            ours, theirs = first.scale, figure.scale
            differing = [f"{field} {ours[field]} and {theirs[field]}" for field in ours if ours[field] != theirs[field]]
            if differing:
                raise IncompatibleScales(
                    f"incompatible scales: {figure.metric} of {base} and of {name} differ in {'; '.join(differing)}; "
                    "evaluate both alike"
                )


SCALE_HEAD = ("N", "against", "backbone", "fingerprint", "Hz")


def scale_cells(figure: Figure) -> list[str]:
    """What stands under :data:`SCALE_HEAD`."""
    settings = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figure.settings.items())
    against = str(figure.against) if figure.against else "-"
    name = f"{figure.backbone} ({settings})" if settings else figure.backbone
    digests = " ".join(part.rpartition(":")[2][:8] for part in figure.fingerprint.split())
    return [str(figure.generated), against, name, digests, str(figure.sample_rate)]


def interval(figure: Figure) -> str:
    """``[low, high]``; "" where there is none."""
    return "" if figure.low is None or figure.high is None else f"[{number(figure.low)}, {number(figure.high)}]"


def _bias(figure: Figure) -> str:
    return "-" if figure.bias is None else f"{figure.bias:+.3g}"


def number(value: float) -> str:
    """Four significant digits, without an exponent where a table reads better so."""
    if value == 0 or not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3g}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
