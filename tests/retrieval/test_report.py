from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from diffgap.retrieval import plots
from diffgap.retrieval.bootstrap import Interval
from diffgap.retrieval.diagnostics import ModalityGap
from diffgap.retrieval.report import as_json, check_output, from_json, markdown, terminal_table, write_report
from diffgap.retrieval.summary import ALL_DIRECTIONS, Direction, Report, ScoringCost, Setting


@pytest.fixture
def report() -> Report:
    cell = {name: Interval(0.5, 0.25, 0.75) for name in ("R@1", "R@5", "R@10", "mAP@10", "MRR")}
    cell["MedR"] = Interval(4.0, 4.0, 4.0)
    points = torch.randn(3, 12, 4, generator=torch.Generator().manual_seed(0))
    gap = ModalityGap(12, 0.9, 0.1, 0.0, 0.5, 0.75)
    names = ("text -> audio", "audio -> text")
    rows = (*names, ALL_DIRECTIONS)
    measures = {"paired_cosine": 0.75, "centroid_distance": 0.5, "linear_separability": 0.25}
    metrics = {name: dict.fromkeys(rows, cell) for name in ("bridge", "bridge + cosine")}
    return Report(
        runs=["[run]", "b"],
        split="test",
        settings={"seed": 0},
        directions={name: Direction(*name.split(" -> "), [12, 14], [12, 12]) for name in names},
        metrics={"ridge": dict.fromkeys(rows, cell), "bridge + cosine": dict.fromkeys(rows, cell)},
        differences={
            "bridge": {
                "heads (cosine)": {
                    names[0]: {"R@5": Interval(0.1, -0.1, 0.3), "MRR": Interval(-0.05, -0.1, 0.0)},
                    names[1]: {"R@5": Interval(0.2, 0.1, 0.3), "MRR": Interval(0.01, -0.1, 0.2)},
                }
            }
        },
        costs={"bridge + cosine": ScoringCost(261, 5, 12.34)},
        alphas=[0.5, 2.0],
        betas=[0.25, 1.0],
        gaps={name: (gap, gap) for name in names},
        embeddings={name: (points[0], points[1], points[2]) for name in names},
        trajectory={name: [0.1, 0.4] for name in names},
        few_steps=[
            Setting(steps, samples, "unipc", steps * samples, 0.5, metrics, measures)
            for samples in (1, 16)
            for steps in (1, 2)
        ],
    )


def test_as_json_round_trips(report: Report) -> None:
    content = json.loads(json.dumps(as_json(report)))
    assert content == as_json(report)
    assert content["metrics"]["ridge"]["text -> audio"]["R@5"] == [0.5, 0.25, 0.75]
    assert content["gaps"]["text -> audio"]["before"] == asdict(report.gaps["text -> audio"][0])
    assert content["directions"]["audio -> text"]["queries"] == [12, 14]
    assert content["differences"]["bridge"]["heads (cosine)"]["text -> audio"]["R@5"] == [0.1, -0.1, 0.3]
    assert content["costs"]["bridge + cosine"] == {"query_calls": 261, "item_calls": 5, "milliseconds": 12.34}
    assert content["few_steps"][3]["metrics"]["bridge"][ALL_DIRECTIONS]["MRR"] == [0.5, 0.25, 0.75]
    assert (content["few_steps"][3]["steps"], content["few_steps"][3]["calls"]) == (2, 32)


def test_markdown_says_what_is_noise(report: Report) -> None:
    text = markdown(report)
    assert "12-14 queries, 12 in the gallery" in text
    assert (
        "| bridge - heads (cosine) | +10.0 [-10.0, +30.0] (within noise) | -5.0 [-10.0, +0.0] (within noise) |" in text
    )
    assert "| bridge - heads (cosine) | +20.0 [+10.0, +30.0] | +1.0" in text
    assert "unless they were given: fusion 0.5, 2; likelihood ratio 0.25, 1." in text
    assert "| text -> audio | bridged | 0.900 | 0.100 | 0.000 | 0.500 | 0.750 |" in text


def test_markdown_has_costs_beside_the_recall_and_the_mean_first(report: Report) -> None:
    text = markdown(report)
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings[:3] == ["## All directions", "## text -> audio", "## audio -> text"]
    assert "| MRR | MedR | calls a query | calls an item | ms a query |" in text
    assert text.count("| bridge + cosine | 50.0 [25.0, 75.0] |") == 3 == text.count("| 4 | 261 | 5 | 12 |")
    assert text.count("| 4 |  |  |  |") == 3  # a baseline has no denoiser


def test_markdown_of_few_steps(report: Report) -> None:
    text = markdown(report)
    assert "| steps | K | solver | calls | ms | bridge R@5 | bridge MRR | bridge + cosine R@5 |" in text
    assert "| 2 | 16 | unipc | 32 | 0.5 | 50.0 [25.0, 75.0] |" in text and "| 0.250 |\n" in text
    report.few_steps = []
    assert "Few steps" not in markdown(report)


def test_terminal_table(report: Report) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table(report))
    lines = console.export_text().splitlines()
    assert any(line.split() == ["text", "->", "audio", "12-14", "in", "12"] for line in lines)
    own = [line.split() for line in lines if "bridge + cosine" in line]
    numbers = ["50.0", "50.0", "[25.0,", "75.0]", "50.0", "50.0", "4", "261", "12"]
    assert [line[3:] for line in own] == [numbers] * 3  # the mean and two directions


def test_write_report_replaces_its_own_kind_only(report: Report, tmp_path: Path) -> None:
    folder = tmp_path / "eval"
    for _ in range(2):
        write_report(report, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "few_steps.png", "gap.png", "recall.png", "report.json", "report.md", "trajectory.png",
    ]  # fmt: skip
    assert all(path.stat().st_size > 0 for path in folder.iterdir())
    report.few_steps = []
    write_report(report, folder)
    assert not (folder / "few_steps.png").exists()
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


def test_from_json_gives_the_report_back_but_for_its_embeddings(report: Report, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(as_json(report)))
    found = from_json(file)
    assert found == replace(report, embeddings={})
    assert markdown(found) == markdown(report)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"subject": "run"}', b"\xff\xfe"])
def test_from_json_refuses_other_files(content: str | bytes, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="is no report of `diffgap eval`"):
        from_json(file)
