"""Reports: what they print, that they come back from JSON as they were, and which of them may meet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffgap.generation.metrics import (
    AudioReport,
    Conditions,
    IncompatibleScales,
    compare,
    evaluate_audio,
    side_by_side,
)
from diffgap.generation.metrics.report import number, table
from diffgap.retrieval.bootstrap import paired_bootstrap
from tests.generation.toy_backbone import RATE, Spectral, bands, tones

REAL = tones(12, seed=1)


def report(*, seed: int = 0, count: int = 12, splits: int = 2, **backbone) -> AudioReport:
    made = tones(count, seed=seed)
    own = Conditions({name: bands(REAL[name], 8) for name in made}, "toy", "captions:v1")
    return evaluate_audio(
        made,
        {name: REAL[name] for name in made},
        backbones=Spectral(space="toy", **backbone),
        conditions=own,
        sample_rate=RATE,
        splits=splits,
        resamples=20,
    )


def test_every_row_says_its_scale() -> None:
    page = report().markdown()
    head, _, *rows = page[: page.index("\n\n")].splitlines()
    columns = [cell.strip() for cell in head.strip("| ").split(" | ")]
    assert columns == [
        "metric", "estimate", "interval", "bias at this N", "better", "N", "against", "backbone", "fingerprint", "Hz",
    ]  # fmt: skip
    cells = [dict(zip(columns, (cell.strip() for cell in row.strip("| ").split(" | ")), strict=True)) for row in rows]
    assert [row["metric"] for row in cells] == [
        "inception_score", "kl_softmax", "kl_sigmoid", "frechet_distance", "kernel_distance", "clap_score",
        "R@1", "R@5", "R@10", "MRR", "recording_cosine",
        "recording_R@1", "recording_R@5", "recording_R@10", "recording_MRR",
    ]  # fmt: skip
    for row in cells:
        assert (row["N"], row["fingerprint"], row["Hz"]) == ("12", "v1", str(RATE))
        assert row["backbone"].startswith("toy")
    assert cells[0]["against"] == "-" and cells[1]["against"] == "12"
    assert cells[0]["backbone"] == "toy (splits 2)"
    assert "kernel gaussian, bandwidth" in cells[4]["backbone"]
    assert "20 replicates: bootstrap of the clips" in page
    assert "it covers the metric's expectation at this N, not its value for unlimited clips" in page
    assert "descriptions of clips: 0 from the cache, 24 computed." in page


def test_comes_back_from_json(tmp_path: Path) -> None:
    whole = report()
    whole.to_json(tmp_path / "report.json")
    assert AudioReport.from_json(tmp_path / "report.json") == whole
    few = evaluate_audio(
        {**tones(2, seed=0), "broken": np.zeros(9, dtype=np.float32)},
        backbones=Spectral(),
        sample_rate=RATE,
        splits=1,
        skip_broken=True,
    )
    few.to_json(tmp_path / "few.json")
    assert AudioReport.from_json(tmp_path / "few.json") == few
    assert few.broken[0].name == "broken"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "figures": [{}]}'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match="is no report of generated audio"):
        AudioReport.from_json(tmp_path / "report.json")


def test_differences_of_means_are_paired() -> None:
    first, second = report(), report(seed=5)
    differences = {one.metric: one for one in compare(first, second, resamples=300)}
    for metric in ("kl_softmax", "clap_score"):
        a, b = (np.asarray(one.figure(metric).values) for one in (first, second))
        assert differences[metric].interval == paired_bootstrap(b, a, resamples=300)
        assert differences[metric].estimate == pytest.approx(b.mean() - a.mean())
    distance = differences["frechet_distance"]
    expected = second.figure("frechet_distance").estimate - first.figure("frechet_distance").estimate
    assert (distance.estimate, distance.interval, distance.better) == (expected, None, "lower")


def test_side_by_side() -> None:
    page = side_by_side({"plain": report(), "bridged": report(seed=5)})
    assert page.splitlines()[0].startswith(
        "| metric | better | plain | bridged | N | against | backbone | fingerprint |"
    )
    assert len(page.splitlines()) == 2 + len(report().figures)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 11}, "differ in .*generated 12 and 11"),
        ({"splits": 3}, "inception_score of a and of b differ in settings"),
        ({"version": "v2"}, "fingerprint toy:v1 and toy:v2"),
        ({"description": "trimmed"}, "preparation toy wav and trimmed"),
        ({"name": "other"}, "do not both have MRR of other, MRR of toy"),
        ({"outputs": ["features"]}, "do not both have inception_score of toy"),
    ],
)
def test_incompatible_scales(changes: dict, message: str) -> None:
    first, second = report(), report(seed=5, **changes)
    with pytest.raises(IncompatibleScales, match=f"incompatible scales: .*{message}"):
        side_by_side({"a": first, "b": second})
    with pytest.raises(IncompatibleScales, match="incompatible scales"):
        compare(first, second)


def test_another_rate_or_reference_is_another_scale() -> None:
    first = report()
    for field, value in (("sample_rate", 16_000), ("reference", "0" * 64), ("against", 13)):
        changed = tuple(replace(figure, **{field: value}) for figure in first.figures)
        with pytest.raises(IncompatibleScales, match=field):
            compare(first, replace(first, figures=changed))
    other = tones(12, seed=9)
    own = Conditions({name: bands(REAL[name], 8) for name in REAL}, "toy", "captions:v1")
    second = evaluate_audio(
        tones(12, seed=0),
        other,
        backbones=Spectral(space="toy"),
        conditions=own,
        sample_rate=RATE,
        splits=2,
        resamples=20,
    )
    with pytest.raises(IncompatibleScales, match=r"kl_softmax .* differ in reference"):
        compare(first, second)


def test_numbers_and_tables() -> None:
    assert [number(x) for x in (0.0, 1.23456, 0.0123456, -12.3456, 98765.4, 1e-7)] == [
        "0", "1.235", "0.01235", "-12.35", "98765", "1e-07",
    ]  # fmt: skip
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
