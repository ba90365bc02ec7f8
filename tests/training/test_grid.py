"""The declared grid of an ablation: reading, refusing, and the order of its runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffgap.models.settings import BridgeSettings
from diffgap.training.config import BUNDLED, RunConfig
from diffgap.training.grid import Grid
from diffgap.training.runs import load_data

VARIANTS: dict[str, Any] = {"plain": {}, "deep": {"bridge.depth": 4}}


def load(folder: Path, content: Any, **options: Any) -> Grid:
    (folder / "grid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return Grid.load(str(folder / "grid.yaml"), **options)


def test_a_variant_is_preset_then_base_then_its_own_changes(tmp_path: Path) -> None:
    grid = load(
        tmp_path,
        {
            "base": {"bridge.depth": 3, "train": {"steps": 7, "batch_size": 4}, "train.seed": 5},
            "variants": {
                "plain": {},
                "paper": {"preset": "paper", "bridge.split": "half"},
                "both ways of writing": {"bridge": {"depth": 1}, "train.steps": 8},
            },
        },
    )
    plain = RunConfig(bridge=BridgeSettings(depth=3))
    plain = replace(plain, train=replace(plain.train, steps=7, batch_size=4, seed=5))
    paper = replace(plain, bridge=replace(BridgeSettings.preset("paper"), depth=3, split="half"))
    other = replace(plain, bridge=BridgeSettings(depth=1), train=replace(plain.train, steps=8))
    assert grid.variants == {"plain": plain, "paper": paper, "both ways of writing": other}
    assert (grid.reference, grid.seeds) == ("plain", (0,))
    assert grid.changes("both ways of writing") == {"bridge.depth": 1, "train.steps": 8}


def test_steps_win_everywhere(tmp_path: Path) -> None:
    grid = load(tmp_path, {"variants": {"a": {}, "b": {"train.steps": 9}}}, steps=3)
    assert [config.train.steps for config in grid.variants.values()] == [3, 3]


def test_runs_go_seed_by_seed_reference_first_and_equal_variants_once(tmp_path: Path) -> None:
    variants = {"deep": {"bridge.depth": 4}, "same": {"bridge.depth": 2}, "plain": {}, "also deep": {"bridge.depth": 4}}
    grid = load(tmp_path, {"reference": "plain", "seeds": [3, 1], "variants": variants})
    assert [str(run) for run in grid.runs()] == ["plain, seed 3", "deep, seed 3", "plain, seed 1", "deep, seed 1"]
    assert grid.twins() == {"deep": "deep", "same": "plain", "plain": "plain", "also deep": "deep"}
    assert len({run.folder(tmp_path) for run in grid.runs()}) == 4


@pytest.mark.parametrize("path", [*BUNDLED, "elsewhere"])
def test_a_seed_is_a_split_of_the_bundled_data_and_a_training_seed_elsewhere(tmp_path: Path, path: str) -> None:
    grid = load(tmp_path, {"base": {"data.path": path}, "seeds": [4], "variants": VARIANTS})
    (run, _) = grid.runs()
    assert (run.config.data.split_seed, run.config.train.seed) == ((4, 0) if path in BUNDLED else (0, 4))


def test_runs_of_another_configuration_are_refused_by_the_name_of_the_field(tmp_path: Path) -> None:
    grid = load(tmp_path, {"variants": VARIANTS})
    run = list(grid.runs())[1]
    run.folder(tmp_path / "out").mkdir(parents=True)
    run.config.save(run.folder(tmp_path / "out") / "config.yaml")
    grid.check_output(tmp_path / "out")
    load(tmp_path, {"variants": {"plain": {}, "new": {"bridge.width": 128}}}).check_output(tmp_path / "out")
    changed = load(tmp_path, {"variants": {"plain": {}, "deep": {"bridge.depth": 5}}})
    with pytest.raises(ValueError, match=r"deep/seed0 was trained with bridge\.depth 4 \(now 5\); delete"):
        changed.check_output(tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not YAML"),
        ([], "expected a mapping of names, got list"),
        ({"variants": {}}, "variants is empty"),
        ({}, "variants: expected a mapping of names, got NoneType"),
        ({"variants": VARIANTS, "seed": 1}, "unknown key 'seed'; known keys are base, seeds, reference, variants"),
        ({"variants": {"a": {"bridge.dept": 1}}}, "variant 'a': bridge: unknown field 'dept'"),
        ({"variants": {"a": {"bridge": 3}}}, "variant 'a': bridge: expected a mapping"),
        ({"variants": {"a": None}}, "variant 'a': expected a mapping of names, got NoneType"),
        ({"variants": {"a": {"train.steps": 0}}}, "variant 'a': train.steps is 0; use 1 or more"),
        ({"variants": {"a": {"bridge.split": "both"}}}, "variant 'a': bridge: split is 'both'; use one of alternate"),
        ({"variants": {"a": {"preset": "best"}}}, "variant 'a': preset 'best' does not exist"),
        ({"variants": {"a": {"bridge.directions": "text"}}}, "variant 'a': settings.directions is 'text'; write e.g."),
        ({"variants": {"../a": {}}}, "variant '../a': the name is also a folder"),
        ({"variants": {"a b": {}, "a-b": {}}}, "two variants differ in spaces and - alone"),
        ({"variants": VARIANTS, "reference": "none"}, "reference 'none' is no variant; use one of plain, deep"),
        ({"variants": VARIANTS, "seeds": 3}, "seeds is 3; give a list of whole numbers"),
        ({"variants": VARIANTS, "seeds": []}, r"seeds is \[\]; give a list"),
        ({"variants": VARIANTS, "seeds": [0, True]}, "give a list of whole numbers"),
        ({"variants": VARIANTS, "seeds": [1, 1]}, "repeats one"),
    ],
)
def test_a_wrong_grid_is_one_clear_error(tmp_path: Path, content: Any, message: str) -> None:
    text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Grid.load(str(tmp_path / "grid.yaml"))


def test_an_unknown_grid_names_the_bundled_ones() -> None:
    with pytest.raises(FileNotFoundError, match=r"grid papr is neither a file nor a bundled grid \(paper\)"):
        Grid.load("papr")


def test_the_bundled_grid_changes_one_thing_at_a_time() -> None:
    grid = Grid.load("paper")
    assert grid.variants[grid.reference].bridge == BridgeSettings()
    assert set(load_data(grid.variants[grid.reference].data).modalities) == {"audio", "image", "text"}
    sampling = {"bridge.translate_steps", "bridge.num_samples"}
    changed = {name: {*grid.changes(name)} - sampling for name in grid.variants if name != "paper preset"}
    # A flow has a prediction of its own.
    assert changed.pop("rectified flow 16 x 8") == {"bridge.schedule", "bridge.prediction"}
    assert all(len(fields) <= 1 for fields in changed.values())
    covered = {name for fields in changed.values() for name in fields}
    wanted = {"directions", "split", "prediction", "scaling", "depth", "diffusion_weight", "contrastive"}
    assert {f"bridge.{name}" for name in wanted} <= covered
    assert grid.variants["paper preset"].bridge == BridgeSettings.preset("paper")
