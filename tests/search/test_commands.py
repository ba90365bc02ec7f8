"""``diffgap index`` and ``diffgap search``."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from diffgap.search.check import check_index
from diffgap.search.index import SearchIndex, build_index
from diffgap.search.results import results_table
from diffgap.search.vectors import FaissOptions
from tests.helpers import run
from tests.search.conftest import ENCODERS, Workshop, serving


def test_from_a_run_to_results(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = tmp_path / "index"
    encoders = [part for name, spec in ENCODERS.items() for part in (f"--{name}", spec)]
    arguments = ["index", workshop.run, index, "--modality", "audio", "--alpha", 0.5, "--media", workshop.media]
    assert run(*arguments, *encoders, "--check") == 0
    said = capsys.readouterr().out
    assert "72 audio items of width 16" in said and "a bridged query weighs 0.5" in said
    assert "rows of image and text, bridged" in said and "recall@10" in said
    sound = workshop.media / "sounds/04.wav"
    assert run("search", index, "a dog", sound, "--k", 3, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["query"] for line in lines] == ["a dog", str(sound)]
    assert [set(line) for line in lines] == [{"query", "before", "after"}, {"query", "before"}]
    assert [len(line["before"]) for line in lines] == [3, 3]
    for item in lines[0]["after"]:
        assert item["caption"].startswith("sound") and item["group"].startswith("g") and item["score"] <= 1.5
        assert all(Path(path).is_file() for path in item["media"].values())


def test_results_as_tables(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert run("search", workshop.index, "a [bold]dog", "--k", 2) == 0
    said = capsys.readouterr().out
    assert "a [bold]dog" in said and "before bridging" in said and "cos + 0.5 cos bridged" in said
    assert "clip" in said and "<b>number</b>" in said
    item = {"id": "clip", "group": "g", "score": 0.5, "media": {}}
    lists = {"before": [item], "after": [item]}
    for alpha, columns in ((0.5, 5), (0.0, 3)):  # at weight 0 both sides are the same
        table = results_table("", lists, alpha, None)
        assert len(table.columns) == columns and ("changes nothing" in str(table.caption)) == (alpha == 0)


def test_rows_of_a_file_and_of_a_store(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = workshop.open().store
    np.save(tmp_path / "rows.npy", store.embeddings("audio", [6, 11]).numpy())
    for rows, first in ((tmp_path / "rows.npy", [6, 11]), (workshop.store, list(range(72)))):
        assert run("search", workshop.index, "--rows", rows, "--rows-modality", "audio", "--json", "--k", 1) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["before"][0]["row"] for line in lines] == first
    assert lines[5]["query"] == "clip05"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give queries, or --rows, or --serve"),
        (["words", "--serve"], "give queries, or --rows, or --serve"),
        (["nowhere.wav"], "there is no such file"),
        (["  "], "query is empty"),
        (["words", "--k", "0"], "k is 0"),
        (["--rows", "nowhere.npy"], "nowhere.npy does not exist"),
        (["--rows", "nowhere"], "not an embedding store"),
        (["words", "--text", "tests.search.encoders:OtherWords"], "name the encoder that made them"),
        (["words", "--store", "nowhere"], "not an embedding store"),
        (["words", "--run", "nowhere"], "no run folder"),
    ],
)
def test_bad_input_is_one_line(
    workshop: Workshop, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("search", workshop.index, *arguments) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1


def test_an_index_without_an_encoder_names_the_flag(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_index(workshop.run, tmp_path / "index", modality="audio", alpha=1.0)
    assert run("search", tmp_path / "index", "words") == 2
    assert "name one by --text SPEC" in capsys.readouterr().err
    assert run("search", tmp_path / "index", "words", "--text", ENCODERS["text"]) == 0
    assert run("search", tmp_path, "words") == 2
    assert "is no search index" in capsys.readouterr().err


def test_the_page_is_served_until_interrupted(workshop: Workshop) -> None:
    command = [sys.executable, "-u", "-m", "diffgap", "search", str(workshop.index), "--serve"]
    # A shell's background job ignores interrupts, and so would its children.
    interruptible = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, preexec_fn=interruptible, **pipes) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:[0-9]+/", process.stdout.readline())
            assert found is not None
            with urllib.request.urlopen(found[0] + "about", timeout=30) as answer:
                assert json.load(answer)["count"] == 72
            os.kill(process.pid, signal.SIGINT)
            assert (process.wait(30), process.stderr.read() if process.stderr else "") == (0, "")
        finally:
            process.kill()


def test_a_port_in_use_is_named(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(workshop) as other:
        assert run("search", workshop.index, "--serve", "--port", other.server_port) == 1
    line = capsys.readouterr().err
    assert f"port {other.server_port} cannot be served: address already in use; use another" in line
    assert line.count("\n") == 1


@pytest.mark.parametrize("kind", ["exact", "ivf", "hnsw"])
def test_check_measures_recall(workshop: Workshop, tmp_path: Path, kind: str) -> None:
    if kind != "exact":
        pytest.importorskip("faiss")
    options = FaissOptions(nlist=12, nprobe=2, m=2, ef_construction=4, ef_search=1)
    build_index(workshop.store, tmp_path / "index", modality="audio", kind=kind, options=options)  # type: ignore[arg-type]
    index = SearchIndex.open(tmp_path / "index")
    what, found = check_index(index, queries=72)
    assert what == "72 of the audio items"
    assert found[0].name == "exact" and found[0].recall == 1 and all(one.queries_per_second > 0 for one in found)
    measured = {one.name: one.recall for one in found[1:]}
    if kind == "exact":
        assert not measured
        return
    recalls = list(measured.values())
    assert recalls == sorted(recalls) and recalls[0] < 1
    if kind == "ivf":
        assert measured["ivf, nprobe 12"] == 1
    # By hand, at the index's own setting, which the check has left as it was.
    queries = index.queries("audio", index.store.embeddings("audio")).plain
    pairs = zip(index.search(queries, 10).rows.tolist(), (queries @ queries.T).topk(10).indices.tolist(), strict=True)
    by_hand = np.mean([len(set(one) & set(best)) / 10 for one, best in pairs])
    assert measured["ivf, nprobe 2" if kind == "ivf" else "hnsw, efSearch 1"] == pytest.approx(by_hand)
