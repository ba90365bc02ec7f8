from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console

from diffgap.retrieval import plots
from diffgap.retrieval.bootstrap import Interval
from diffgap.retrieval.diagnostics import ModalityGap
from diffgap.retrieval.evaluate import Direction, Report
from diffgap.retrieval.report import as_json, check_output, markdown, terminal_table, write_report


@pytest.fixture
def report() -> Report:
    cell = {name: Interval(0.5, 0.25, 0.75) for name in ("R@1", "R@5", "R@10", "mAP@10", "MRR")}
    cell["MedR"] = Interval(4.0, 4.0, 4.0)
    points = torch.randn(3, 12, 4, generator=torch.Generator().manual_seed(0))
    gap = ModalityGap(12, 0.9, 0.1, 0.0, 0.5, 0.75)
    names = ("text -> audio", "audio -> text")
    return Report(
        runs=["[run]", "b"],
        split="test",
        settings={"seed": 0},
        directions={name: Direction(*name.split(" -> "), [12, 14], [12, 12]) for name in names},
        metrics={"ridge": dict.fromkeys(names, cell), "bridge + cosine": dict.fromkeys(names, cell)},
        differences={
            "R@5": {"bridge - heads (cosine)": {names[0]: Interval(0.1, -0.1, 0.3), names[1]: Interval(0.2, 0.1, 0.3)}}
        },
        alphas=[0.5, 2.0],
        gaps={name: (gap, gap) for name in names},
        embeddings={name: (points[0], points[1], points[2]) for name in names},
        trajectory={name: [0.1, 0.4] for name in names},
    )


def test_as_json_round_trips(report: Report) -> None:
    content = json.loads(json.dumps(as_json(report)))
    assert content == as_json(report)
    assert content["metrics"]["ridge"]["text -> audio"]["R@5"] == [0.5, 0.25, 0.75]
    assert content["gaps"]["text -> audio"]["before"] == asdict(report.gaps["text -> audio"][0])
    assert content["directions"]["audio -> text"]["queries"] == [12, 14]


def test_markdown_says_what_is_noise(report: Report) -> None:
    text = markdown(report)
    assert "| ridge | 50.0 [25.0, 75.0] |" in text
    assert "12-14 queries, 12 in the gallery" in text
    assert "+10.0 [-10.0, +30.0] (within noise)" in text
    assert "+20.0 [+10.0, +30.0] |\n" in text
    assert "chosen on validation data for all directions together: 0.5, 2." in text
    assert "| text -> audio | bridged | 0.900 | 0.100 | 0.000 | 0.500 | 0.750 |" in text


def test_terminal_table(report: Report) -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table(report))
    text = console.export_text()
    assert "text -> audio (12-14 in 12)" in text
    assert "50.0 [25.0, 75.0]" in text


def test_write_report_replaces_its_own_kind_only(report: Report, tmp_path: Path) -> None:
    folder = tmp_path / "eval"
    for _ in range(2):
        write_report(report, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "gap.png", "recall.png", "report.json", "report.md", "trajectory.png",
    ]  # fmt: skip
    assert all(path.stat().st_size > 0 for path in folder.iterdir())
    (tmp_path / "mine").mkdir()
    for act in (lambda: check_output(tmp_path / "mine"), lambda: write_report(report, tmp_path / "mine")):
        with pytest.raises(FileExistsError, match="exists and is not a report; choose another"):
            act()


def test_a_failed_report_leaves_the_earlier_one(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(report, tmp_path / "eval")
    before = {path.name: path.read_bytes() for path in (tmp_path / "eval").iterdir()}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(plots, "trajectory", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(report, tmp_path / "eval")
    assert {path.name: path.read_bytes() for path in (tmp_path / "eval").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["eval"]
