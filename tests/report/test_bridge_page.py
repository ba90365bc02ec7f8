"""The page of a bridge: what stands on it is what the run's files and its model say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from diffgap.ops.solver_step import StepOutput
from diffgap.report import ReportOptions, write_report
from diffgap.report.training import read_metrics
from diffgap.retrieval.diagnostics import modality_gap
from diffgap.training.runs import load_run
from tests.helpers import run
from tests.report.conftest import HOSTILE, Workshop
from tests.report.parsed import Element, parsed

SECTIONS = ["run", "training", "retrieval", "gap", "trajectories", "diagnosis", "sounds"]


@pytest.fixture(scope="module")
def page(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Element:
    file = tmp_path_factory.mktemp("page") / "page.html"
    assert run("report", workshop.run, "-o", file) == 0
    return parsed(file)


def test_every_section_is_there_and_linked(page: Element) -> None:
    assert [section.attributes["id"] for section in page.all("section")] == SECTIONS
    assert [link.attributes["href"] for link in page.all("a")] == [f"#{name}" for name in SECTIONS]
    ids = [one.attributes["id"] for tag in ("section", "h2", "path", "clipPath", "g") for one in page.all(tag)
           if "id" in one.attributes]  # fmt: skip
    assert len(set(ids)) == len(ids)
    for section in page.all("section"):
        assert section.attributes["aria-labelledby"] in ids


def test_retrieval_is_that_of_the_evaluation(page: Element, workshop: Workshop) -> None:
    found = json.loads((workshop.run / "eval" / "report.json").read_text())
    section = page.section("retrieval")
    for direction in ("all directions", "audio -> text", "text -> audio"):
        head, *rows = section.table(f"Retrieval, {direction}")
        assert [row[0] for row in rows] == list(found["metrics"]) and len(rows) > 5
        for row in rows:
            cells = found["metrics"][row[0]][direction]
            for metric in ("R@1", "R@5", "R@10", "mAP@10", "MRR"):
                estimate, low, high = (100 * value for value in cells[metric])
                assert row[head.index(metric)] == f"{estimate:.1f} [{low:.1f}, {high:.1f}]"
            if "MedR" in cells:
                assert row[head.index("MedR")] == f"{cells['MedR'][0]:.0f}"
    head, *rows = section.table("Differences, text -> audio")
    given = [(one, other) for one, rivals in found["differences"].items() for other in rivals]
    assert [row[0] for row in rows] == [f"{one} - {other}" for one, other in given]
    for row, (one, other) in zip(rows, given, strict=True):
        estimate, low, high = (100 * value for value in found["differences"][one][other]["text -> audio"]["MRR"])
        assert row[head.index("MRR")].startswith(f"{estimate:+.1f} [{low:+.1f}, {high:+.1f}]")
        assert row[head.index("MRR")].endswith("(within noise)") == (low <= 0 <= high)
    assert len(section.all("svg")) == 2


def _pairs(workshop: Workshop) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Embeddings of the first row of every group of the test split, and the groups."""
    store = workshop.store().split("test")
    rows = np.sort(np.unique(store.column("group"), return_index=True)[1])
    return {name: store.embeddings(name, rows) for name in store.modalities}, store.column("group")[rows]


def test_the_gap_is_that_of_the_model_on_the_pairs(page: Element, workshop: Workshop) -> None:
    bridge, (x, groups) = load_run(workshop.run)[0], _pairs(workshop)
    evaluated = json.loads((workshop.run / "eval" / "report.json").read_text())["gaps"]
    head, *rows = page.section("gap").table("The gap between queries and their partners")
    assert [row[:2] for row in rows] == [
        [direction, queries]
        for direction in ("audio -> text", "text -> audio")
        for queries in ("as they are", "bridged")
    ]
    for source, target, (before, after) in (("audio", "text", rows[:2]), ("text", "audio", rows[2:])):
        own, partner = bridge.project(source, x[source]), bridge.project(target, x[target])
        bridged = bridge.translate(target, seed=0, **{source: x[source]})
        for row, queries in ((before, own), (after, bridged)):
            expected = asdict(modality_gap(queries.detach(), partner.detach(), groups))
            for name in head[2:]:
                assert row[head.index(name)] == f"{expected[name.replace(' ', '_')]:.3f}"
        # As `diffgap eval` has it, to the separability, whose folds follow from the groups.
        expected = evaluated[f"{source} -> {target}"]["before"]
        assert before[2:] == [f"{expected[name.replace(' ', '_')]:.3f}" for name in head[2:]]
    assert len(page.section("gap").all("svg")) == 4


def test_a_trajectory_begins_and_ends_where_the_sample_does(page: Element, workshop: Workshop) -> None:
    bridge, x = load_run(workshop.run)[0], _pairs(workshop)[0]
    captions = [caption.text for caption in page.section("trajectories").all("figcaption")]
    for source, target, caption in (("audio", "text", captions[0]), ("text", "audio", captions[1])):
        partner = bridge.project(target, x[target]).detach()
        noisy: list[float] = []

        def follow(_: int, step: StepOutput, target: str = target, partner: torch.Tensor = partner) -> None:
            sample = bridge.diffusion.scaler(target).unscale(step.sample).view(len(partner), 4, -1)
            noisy.append(float(torch.cosine_similarity(sample, partner[:, None], dim=-1).mean()))  # noqa: B023

        drawn = bridge.sample(target, num_samples=4, seed=0, callback=follow, **{source: x[source]})
        bridged = bridge.translate(target, seed=0, **{source: x[source]})
        own = bridge.project(source, x[source]).detach()
        last, after, before = (float((y * partner).sum(-1).mean())
                               for y in (drawn.transpose(0, 1), bridged, own))  # fmt: skip
        assert f"{source} -> {target}, {len(partner)} pairs:" in caption
        assert f"the sample {noisy[0]:.3f} after the first" in caption
        assert f"of 4 steps, {last:.3f} after the last; bridged {after:.3f}, as they are {before:.3f}." in caption


def test_training_says_which_model_was_kept(page: Element, workshop: Workshop) -> None:
    lines = [json.loads(line) for line in (workshop.run / "metrics.jsonl").read_text().splitlines()]
    best = max((line for line in lines if "val/score" in line), key=lambda line: line["val/score"])
    first, *others = (caption.text for caption in page.section("training").all("figcaption"))
    kept = f"bridge + cosine {best['val/score']:.3f}, heads (cosine) {best['val/cosine']:.3f}"
    assert f"step {best['step']}: {kept}." in first
    assert f"Loss: {lines[-1]['loss']:.4g} at step {lines[-1]['step']}." in others
    logged = {name for line in lines for name in line if "/" not in name} - {"step"}
    assert len(page.section("training").all("svg")) == 1 + len(logged)


def test_settings_and_diagnosis(page: Element, workshop: Workshop) -> None:
    changed = {row[0]: row[1:] for row in page.section("run").table("Settings other than the defaults")}
    assert changed["train.steps"] == ["8", "3000"] and "train.seed" not in changed
    everything = {row[0]: row[1] for row in page.section("run").table("All settings")}
    config: Mapping[str, Mapping[str, Any]] = yaml.safe_load((workshop.run / "config.yaml").read_text())
    assert set(everything) - {"setting"} == {f"{group}.{name}" for group in config for name in config[group]}
    found = json.loads((workshop.run / "diagnose" / "report.json").read_text())
    rows = page.section("diagnosis").table("Checks")[1:]
    assert sorted(row[:3] for row in rows) == sorted(
        [f["check"], f["subject"], f["verdict"]] for f in found["findings"]
    )


def test_charts_and_pictures_have_words(page: Element) -> None:
    labels = [chart.attributes["aria-label"] for chart in page.all("svg")]
    assert len(set(labels)) == len(labels) > 8
    assert all(chart.attributes["role"] == "img" for chart in page.all("svg"))
    for figure in page.all("figure"):
        assert figure.all("figcaption")[0].text
    for table in page.all("table"):
        assert table.all("caption")[0].text and all("scope" in heading.attributes for heading in table.all("th"))


def test_what_has_not_been_run_is_said_with_its_command(workshop: Workshop, tmp_path: Path) -> None:
    write_report(workshop.plain, tmp_path / "page.html")
    page = parsed(tmp_path / "page.html")
    commands = [code.text for name in ("retrieval", "diagnosis", "sounds") for code in page.section(name).all("code")]
    assert commands == [
        f"diffgap eval {workshop.plain}", f"diffgap diagnose {workshop.plain}",
        "diffgap generate-set --generator GENERATOR -o SET", "--generated SET",
    ]  # fmt: skip
    assert not page.section("retrieval").all("table") and len(page.section("gap").all("svg")) == 4


def test_an_evaluation_older_than_the_model_is_said(workshop: Workshop, tmp_path: Path) -> None:
    shutil.copytree(workshop.run, tmp_path / "run")
    write_report(tmp_path / "run", tmp_path / "page.html")
    said = "The evaluation is older than the model"
    assert said not in parsed(tmp_path / "page.html").section("retrieval").text
    (tmp_path / "run" / "model" / "model.safetensors").touch()
    write_report(tmp_path / "run", tmp_path / "page.html")
    assert said in parsed(tmp_path / "page.html").section("retrieval").text


def test_without_its_data_or_its_model_a_run_has_the_rest(workshop: Workshop, tmp_path: Path) -> None:
    shutil.copytree(workshop.run, tmp_path / "run")
    content = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    content["data"]["path"] = f"/gone/{HOSTILE}"
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(content))
    write_report(tmp_path / "run", tmp_path / "page.html")
    page = parsed(tmp_path / "page.html")
    for name in ("gap", "trajectories"):
        assert page.section(name).text.split("Not computed: ")[1].startswith(f"/gone/{HOSTILE}")
    assert page.section("retrieval").all("table") and not page.all("script")
    shutil.rmtree(tmp_path / "run" / "model")
    write_report(tmp_path / "run", tmp_path / "page.html")
    assert "holds no model yet" in parsed(tmp_path / "page.html").section("gap").text


def test_the_page_follows_from_the_run_alone(workshop: Workshop, tmp_path: Path) -> None:
    texts = []
    for name in ("one", "other"):
        torch.manual_seed(len(texts))
        write_report(workshop.run, tmp_path / name, generated=workshop.set, options=ReportOptions(items=2))
        texts.append([line for line in (tmp_path / name).read_text().split("<tr>") if "page made" not in line])
    assert texts[0] == texts[1]


def test_a_log_may_end_in_half_a_line_but_not_hold_one(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path)["loss"][1].tolist() == [2.0]
    log.write_text('{"step": 1, "lo\n{"step": 2, "loss": 2.0}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 1 is damaged"):
        read_metrics(tmp_path)
