"""``diffgap eval --protocol`` end to end: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffgap.data.store import EmbeddingStore, write_store
from diffgap.retrieval.protocol_evaluate import ProtocolReport, evaluate_protocol
from diffgap.retrieval.protocol_report import as_json, markdown, write_report
from diffgap.retrieval.published import PUBLISHED
from tests.helpers import run
from tests.retrieval.test_protocols import clip_store
from tests.synthetic import make_store, saved_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """store/ and run/ of two modalities of different widths, clips/ of one width with five captions each."""
    folder = tmp_path_factory.mktemp("protocol")
    config = saved_config(folder, make_store(groups=24), steps=2)
    assert run("train", folder / "run", "--config", config) == 0
    write_store(folder / "clips", clip_store([5] * 9))
    return folder


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail as bad input, in one line, and must leave no file behind; returns the line."""

    def act(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        status = run("eval", *arguments, "--bootstrap", 2)
        said = capsys.readouterr().err
        assert (status, said.count("\n")) == (2, 1), said
        assert sorted(tmp_path.rglob("*")) == before
        return said

    return act


def test_store_by_a_protocol(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for earlier in (0, 1):  # an earlier report is replaced, and that is said
        assert run("eval", folder / "clips", "--protocol", "audiocaps", "--bootstrap", 20) == 0
        said = capsys.readouterr().out
        assert said.count("clips-eval-audiocaps holds an earlier report, which is replaced; --output FOLDER") == earlier
    said = " ".join(said.split())
    assert "audiocaps of clips on test: N = 9 (9 audio, 45 text)" in said
    assert "N = 9 of 975: not comparable with published numbers" in said and "(published)" not in said
    written = folder / "clips-eval-audiocaps"
    assert sorted(file.name for file in written.iterdir()) == ["protocol.json", "protocol.md"]
    content = json.loads((written / "protocol.json").read_text())
    report = evaluate_protocol("audiocaps", [folder / "clips"], replicates=20)
    assert content == json.loads(json.dumps(as_json(report)))
    assert (content["protocol"], content["clips"], content["items"]) == ("audiocaps", 9, {"audio": 9, "text": 45})
    cell = content["metrics"]["raw"]["audio -> text"]["R@5"]
    assert cell[1] <= cell[0] <= cell[2]
    shown = f"| raw | {100 * content['metrics']['raw']['text -> audio']['R@1'][0]:.1f} ["
    assert shown in (written / "protocol.md").read_text()
    assert EmbeddingStore.open(folder / "clips").modalities == ("audio", "text")  # nothing was put into the store


def test_published_rows_are_printed_written_and_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(tmp_path / "store", clip_store([5] * 1045))
    assert run("eval", tmp_path / "store", "--protocol", "clotho", "--bootstrap", 2) == 0
    said = capsys.readouterr().out
    assert said.count("(published)") == len(PUBLISHED["clotho"])
    assert "ONE-PEACE (published)" in said and "published, not measured here" in " ".join(said.split())
    text = (tmp_path / "store-eval-clotho" / "protocol.md").read_text()
    to_text, _, to_audio = text.partition("## text -> audio")
    assert "| ONE-PEACE (published) | 22.4 | 49.0 | 62.7 |  |" in to_audio and "(published)" not in to_text
    content = json.loads((tmp_path / "store-eval-clotho" / "protocol.json").read_text())
    assert {row["system"] for row in content["published"]} == {row.system for row in PUBLISHED["clotho"]}
    assert all(row["source"].startswith("https://") and row["clips"] == 1045 for row in content["published"])


def test_run_by_a_protocol_leaves_the_plain_report_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = ["eval", folder / "run", "--no-baselines", "--bootstrap", 2]
    capsys.readouterr()
    assert run(*plain) == 0
    said = capsys.readouterr().out
    assert "earlier report" not in said and "\u2026" not in said  # into a pipe nothing is cut off
    rows = [line for line in said.splitlines() if "bridge + cosine" in line]
    assert len(rows) > 2 and len({len(line) for line in rows}) == 1
    assert f"report and plots in {folder / 'run' / 'eval'}\n" in said
    before = (folder / "run" / "eval" / "report.json").read_bytes()
    arguments = ["eval", folder / "run", "--protocol", "pairs", "--bootstrap", 20, "--scoring", "cosine", "fusion"]
    assert run(*arguments, "--alpha", 0.5, "--steps", 2, "--split", "val") == 0
    assert "bridge + cosine" in capsys.readouterr().out
    assert (folder / "run" / "eval" / "report.json").read_bytes() == before
    content = json.loads((folder / "run" / "eval-pairs" / "protocol.json").read_text())
    assert content["metrics"].keys() == {"heads (cosine)", "bridge + cosine"}  # of different widths: no raw cosine
    assert (content["alphas"], content["settings"]["scoring steps"], content["split"]) == ([0.5], 2, "val")
    text = (folder / "run" / "eval-pairs" / "protocol.md").read_text()
    assert "Weights of each run: fusion 0.5." in text and "flatters what was chosen" in text
    capsys.readouterr()
    assert run(*plain) == 0
    assert "eval holds an earlier report, which is replaced" in capsys.readouterr().out


def test_pairs_of_three_modalities_are_named(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    generator = torch.Generator().manual_seed(0)
    arrays = {name: torch.randn(8, 4, generator=generator) for name in ("audio", "image", "text")}
    write_store(tmp_path / "store", EmbeddingStore.from_arrays(arrays, {"split": ["test"] * 8}))
    said = refused(tmp_path / "store", "--protocol", "pairs")
    assert "takes two modalities; got audio, image, text: name two with --modalities" in said
    arguments = ["--protocol", "pairs", "--modalities", "image", "text", "--bootstrap", 2, "--output", tmp_path / "out"]
    assert run("eval", tmp_path / "store", *arguments) == 0
    content = json.loads((tmp_path / "out" / "protocol.json").read_text())
    assert list(content["metrics"]["raw"]) == ["image -> text", "text -> image"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{clips}", "--protocol", "flickr"], "invalid choice 'flickr'"),
        (["nowhere", "--protocol", "pairs"], "nowhere is not an embedding store"),
        (["{clips}", "{clips}", "--protocol", "pairs"], "takes one embedding store, or run folders; got 2 paths"),
        (
            ["{clips}", "--protocol", "vggsound"],
            "protocol 'vggsound' needs modality 'video'; the store has audio, text",
        ),
        (
            ["{clips}", "--protocol", "audiocaps", "--modalities", "audio", "text"],
            "modalities belongs to protocol 'pairs'",
        ),
        (["{clips}", "--protocol", "pairs", "--modalities", "text"], "takes two modalities; got text"),
        (["{clips}", "--protocol", "pairs", "--modalities", "text", "text"], "takes two modalities; got text, text"),
        (["{clips}", "--protocol", "pairs", "--split", "val"], "split 'val' is empty: the store has test"),
        (["{clips}", "--protocol", "audiocaps", "--alpha", "1"], "scored by cosine; leave scoring options out"),
        (
            ["{clips}", "--protocol", "audiocaps", "--data", "{clips}"],
            "is no run folder; name a run, or give the store",
        ),
        (["{clips}", "--protocol", "audiocaps", "--few-steps"], "few_steps and protocol were both given"),
        (["{store}", "--protocol", "pairs"], "widths 12 (audio) and 10 (text), which have no cosine; train a bridge"),
        (["{run}", "--data", "{clips}"], "data belongs to --protocol"),
        (["{run}", "--modalities", "audio", "text"], "modalities belongs to --protocol"),
        (["{run}", "--protocol", "audiocaps"], "has several different audio embeddings"),
        (["{run}", "--protocol", "vggsound"], "needs modality 'video'"),
        (["{run}", "--protocol", "audiocaps", "--data", "nowhere"], "nowhere is not an embedding store"),
        (
            ["{run}", "--protocol", "audiocaps", "--data", "{clips}"],
            "text has shape (45, 12); this bridge takes (B, D)",
        ),
    ],
)
def test_wrong_arguments(
    folder: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {name: folder / name for name in ("clips", "store", "run")}
    assert message in refused(*(one.format(**places) for one in arguments), "--output", tmp_path / "out")


def test_bridge_without_the_modality(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    generator = torch.Generator().manual_seed(0)
    arrays = {name: torch.randn(6, 12, generator=generator) for name in ("audio", "video")}
    write_store(tmp_path / "store", EmbeddingStore.from_arrays(arrays, {"split": ["test"] * 6}))
    said = refused(folder / "run", "--protocol", "vggsound", "--data", tmp_path / "store")
    assert "needs 'video', which is unknown to the bridge" in said and "it has audio, text" in said


@pytest.mark.parametrize("kind", ["groups apart", "one group"])
def test_nothing_to_retrieve(tmp_path: Path, refused: Callable[..., str], kind: str) -> None:
    store = clip_store([5] * 4)
    rows = np.arange(len(store))
    index: dict[str, Any] = {"group": store.column("group").tolist(), "split": ["test"] * len(store)}
    if kind == "groups apart":
        index["group"] = [f"a{i}" if i % 2 else f"t{i}" for i in rows]
        index |= {"row_audio": np.where(rows % 2, rows, -1), "row_text": np.where(rows % 2, -1, rows)}
    else:
        index["group"] = ["c"] * len(store)
    arrays = {"audio": store.embeddings("audio"), "text": store.embeddings("text")}
    write_store(tmp_path / "store", EmbeddingStore.from_arrays(arrays, index))
    said = refused(tmp_path / "store", "--protocol", "pairs")
    assert "groups of split 'test' have both audio and text" in said and "must have the same group" in said


def test_foreign_output_is_refused_before_any_work(
    folder: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffgap.retrieval.protocol_evaluate.load_data", lambda _: pytest.fail("work was done"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.json").write_text("{}")  # a report of another kind is not to be lost either
    said = refused(folder / "clips", "--protocol", "audiocaps", "--output", tmp_path / "mine")
    assert "mine exists and is not a report" in said


def test_a_failed_write_leaves_the_earlier_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "clips", clip_store([5] * 9))
    report: ProtocolReport = evaluate_protocol("audiocaps", [tmp_path / "clips"], replicates=2)
    write_report(report, tmp_path / "out")
    before = (tmp_path / "out" / "protocol.json").read_bytes()
    assert markdown(report) == (tmp_path / "out" / "protocol.md").read_text()
    monkeypatch.setattr("diffgap.retrieval.protocol_report.as_json", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(report, tmp_path / "out")
    assert (tmp_path / "out" / "protocol.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "out"]
