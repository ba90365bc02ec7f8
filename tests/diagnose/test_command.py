"""`diffgap diagnose`, its report, and the same checks during training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffgap.data.store import EmbeddingStore, write_store
from diffgap.diagnose import Diagnosis, DiagnosticsCallback, Finding, plots
from diffgap.diagnose.report import advice, as_json, from_json, markdown, write_report
from diffgap.models.bridge import DiffGAP
from diffgap.training.config import DataConfig, RunConfig, TrainConfig
from diffgap.training.trainer import Trainer
from tests.diagnose.bridges import SETTINGS, as_store, gapped_arrays
from tests.helpers import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with store/, run.yaml, and run/, trained with diagnostics after both validations."""
    folder = tmp_path_factory.mktemp("diagnosed")
    write_store(folder / "store", as_store(gapped_arrays()))
    train = TrainConfig(steps=8, batch_size=32, warmup_steps=2, eval_every=4, checkpoint_every=4)
    bridge = replace(SETTINGS, sampling_steps=2)
    RunConfig(DataConfig(str(folder / "store")), bridge, train).save(folder / "run.yaml")
    assert run("train", folder / "run", "--config", folder / "run.yaml", "--train.diagnose") == 0
    return folder


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("diagnose", "--help") == 0
    text = capsys.readouterr().out
    for expected in ("RUN|STORE", "--output", "--split {train,val,test}", "--seed", "--strict", "status 3"):
        assert expected in text


def test_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("diagnose", trained / "run") == 0
    said = capsys.readouterr().out
    assert "diagnosis of run run" in said and "text -> audio" in said and "report and plots in" in said
    folder = trained / "run" / "diagnose"
    plots = {"pairing.png", "trajectory.png", "condition.png", "collapse.png"}
    assert {file.name for file in folder.iterdir()} == plots | {"report.md", "report.json"}
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in plots)
    report = json.loads((folder / "report.json").read_text())
    assert report["split"] == "val" and report["counts"]["bad"] == 0
    assert {finding["check"] for finding in report["findings"]} == {
        "groups", "rows", "duplicates", "spread", "pairing", "trajectory", "condition", "collapse", "gap",
    }  # fmt: skip
    text = (folder / "report.md").read_text()
    for finding in report["findings"]:
        assert finding["threshold"][1:] in text and finding["reason"] in text
    assert run("diagnose", trained / "run", "--split", "test") == 0  # an earlier report is replaced
    assert json.loads((folder / "report.json").read_text())["split"] == "test"


def test_every_axis_of_a_picture_has_a_name(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("diagnose", trained / "run", "--output", tmp_path / "report") == 0
    found, pages = from_json(tmp_path / "report" / "report.json"), []
    monkeypatch.setattr(plots.Figure, "savefig", lambda page, *_, **__: pages.append(page))
    plots.draw(found, tmp_path)
    assert len(pages) == 4
    for axis in (axis for page in pages for axis in page.axes if axis.get_visible()):
        # The right scale of a panel shares the steps below with the left one.
        assert axis.get_ylabel() and (axis.get_xlabel() or axis.yaxis.get_ticks_position() == "right")


def test_a_store_alone_and_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(tmp_path / "store", as_store(gapped_arrays()))
    assert run("diagnose", tmp_path / "store", "--strict") == 0
    assert {file.name for file in (tmp_path / "store-diagnose").iterdir()} == {
        "report.md", "report.json", "pairing.png",
    }  # fmt: skip
    alike = torch.ones(240, 16) + 0.01 * gapped_arrays()["text"]  # a store that would not be opened for training
    alike[5] = torch.nan
    save_file({"embeddings": alike}, tmp_path / "store" / "text.safetensors", {"format_version": "1"})
    capsys.readouterr()
    output = tmp_path / "report"
    assert run("diagnose", tmp_path / "store", "--output", output) == 0  # whatever the verdicts are
    said = " ".join(capsys.readouterr().out.split())
    assert "check the encoder's tokenizer" in said and "drop these rows" in said
    assert run("diagnose", tmp_path / "store", "--output", output, "--strict") == 3
    verdicts = {
        (f["check"], f["subject"]): f["verdict"] for f in json.loads((output / "report.json").read_text())["findings"]
    }
    assert verdicts["rows", "text"] == verdicts["spread", "text"] == "bad"
    assert verdicts["rows", "audio"] == verdicts["spread", "audio"] == "good"


def test_bad_input_is_one_line_and_leaves_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for arguments, expected in (
        ((tmp_path / "nothing",), "neither a run folder of `diffgap train` nor an embedding store"),
        ((tmp_path / "other",), "neither a run folder"),
        ((trained / "run", "--output", tmp_path), "exists and is not a report"),
        ((trained / "run", "--split", "all"), "--split"),
    ):
        assert run("diagnose", *arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("diffgap: ") and said.count("\n") == 1 and expected in said
        assert sorted(tmp_path.rglob("*")) == before


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Diagnosis("store s", "all", (Finding("rows", "text", "good", {"rows": 3.0}, "bad: x", "y"),))
    write_report(found, tmp_path / "report")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("diffgap.diagnose.plots.draw", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(replace(found, split="val"), tmp_path / "report")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["split"] == "all"
    assert [file.name for file in tmp_path.iterdir()] == ["report"]


def test_advice_and_markdown_name_what_is_wrong() -> None:
    findings = (
        Finding(
            "rows", "text", "bad", {"rows": 3.0, "zero": 1.0}, "bad: any zero row", "no direction", "drop it", ("r7",)
        ),
        Finding("spread", "text", "good", {"mean_cosine": 0.25}, "bad: above 0.99", "too alike"),
        Finding("rows", "audio", "bad", {"rows": 3.0, "zero": 2.0}, "bad: any zero row", "no direction", "drop it"),
    )
    found = Diagnosis("store s", "all", findings)
    assert advice(found) == ["rows of text (bad), audio (bad). Bad: any zero row. To try: drop it."]
    text = markdown(found)
    assert "1 good, 0 warn, 2 bad" in text and text.count("## rows") == 1
    assert "Bad: any zero row. Why: no direction." in text
    assert "| text | bad | rows 3, zero 1 | drop it |" in text and "Look at, in text: r7" in text


def test_diagnostics_are_logged_after_each_validation(trained: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [{name for name in line if name.startswith("diagnose/")} for line in lines]
    assert (
        [bool(names) for names in logged] == ["val/score" in line for line in lines] == [False, False, False, True] * 2
    )
    assert {"diagnose/warn", "diagnose/bad", "diagnose/condition/text -> audio/gain_over_none"} <= logged[-1]
    assert all(isinstance(lines[-1][name], float) for name in logged[-1])
    # Nothing of the training changes, and a run is resumed with or without them.
    assert run("train", tmp_path / "plain", "--config", trained / "run.yaml") == 0
    plain = DiffGAP.from_pretrained(tmp_path / "plain" / "model").state_dict()
    for name, value in DiffGAP.from_pretrained(trained / "run" / "model").state_dict().items():
        assert torch.equal(value, plain[name])
    assert run("train", trained / "run", "--config", trained / "run.yaml") == 0


def test_callbacks_get_the_averaged_model_the_validation_rows_and_the_step(trained: Path, tmp_path: Path) -> None:
    seen = []

    def callback(model: DiffGAP, store: EmbeddingStore, step: int) -> dict[str, float]:
        seen.append((model.training, len(store), step))
        assert model is trainer.ema.module
        return {"mine/step": float(step)}

    config = RunConfig.load(trained / "run.yaml")
    store = EmbeddingStore.open(trained / "store")
    callbacks = [callback, DiagnosticsCallback(max_pairs=20, num_samples=2)]
    trainer = Trainer(config, store, tmp_path / "run", validate=lambda model, rows: {"score": 0.0}, callbacks=callbacks)
    trainer.train()
    assert seen == [(False, 60, 4), (False, 60, 8)]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["mine/step"] == 8 and "diagnose/collapse/audio -> text/spread_of_real" in last


def test_a_broken_bridge_is_counted() -> None:
    arrays = gapped_arrays()
    bridge = DiffGAP({"audio": 16, "text": 16}, SETTINGS)  # not fitted: it knows of no pair
    logged = DiagnosticsCallback()(bridge.eval(), as_store(arrays).split("val"), 1)
    assert logged["diagnose/bad"] >= 2
    assert logged["diagnose/condition/audio -> text/gain_over_shuffled"] == pytest.approx(0, abs=0.02)


def test_a_report_is_read_back(tmp_path: Path) -> None:
    finding = Finding("gap", "text -> audio", "warn", {"gain": 0.5}, "t", "r", "f", ("a", "b"), {"cosine": [0.1, 0.2]})
    found = Diagnosis("run x", "val", (finding,))
    file = tmp_path / "report.json"
    file.write_text(json.dumps(as_json(found)))
    assert from_json(file) == found
    file.write_text('{"findings": [{"check": "gap"}]}')
    with pytest.raises(ValueError, match="is no report of `diffgap diagnose`"):
        from_json(file)
