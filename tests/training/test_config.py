from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diffgap.models.settings import BridgeSettings
from diffgap.training.config import DataConfig, RunConfig, TrainConfig


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = RunConfig(
        data=DataConfig(path="somewhere", modalities=("audio", "text")),
        bridge=BridgeSettings.preset("paper"),
        train=TrainConfig(steps=3, learning_rate=3e-4),
    )
    config.save(tmp_path / "config.yaml")
    assert RunConfig.load(tmp_path / "config.yaml") == config


def test_fields_left_out_keep_their_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("train:\n  steps: 5\n")
    assert RunConfig.load(tmp_path / "c.yaml") == RunConfig(train=TrainConfig(steps=5))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian:\n  steps: 5\n", "unknown field 'trian'; known fields are data, bridge, train"),
        ("train:\n  step: 5\n", "unknown field 'step'"),
        ("train: 5\n", "expected a mapping"),
        ("train: [\n", "is not YAML"),
        ("train:\n  steps: 0\n", r"train\.steps is 0"),
        ("bridge:\n  split: both\n", r"bridge: split is 'both'; use one of alternate"),
        ("train:\n  steps: many\n", "train: steps is 'many'; use a whole number"),
        ("train:\n  steps: true\n", "train: steps is True; use a whole number"),
        ("train:\n  learning_rate: fast\n", "train: learning_rate is 'fast'; use a number"),
        ("train:\n  trackers: wandb\n", "train: trackers is 'wandb'; use a list of names"),
        ("bridge:\n  zero_terminal_snr: 1\n", "zero_terminal_snr is 1; use true or false"),
        ("train:\n  patience: -1\n", r"train\.patience is -1; use 0 or more"),
    ],
)
def test_bad_yaml_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        RunConfig.load(tmp_path / "c.yaml")


def test_what_yaml_makes_of_numbers_and_no_is_forgiven(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("train:\n  learning_rate: 1e-4\n  weight_decay: 0\n  mixed_precision: no\n")
    assert RunConfig.load(tmp_path / "c.yaml") == RunConfig(train=TrainConfig(learning_rate=1e-4, weight_decay=0.0))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nope\.yaml does not exist"):
        RunConfig.load(tmp_path / "nope.yaml")


def test_differences_name_the_fields() -> None:
    config = RunConfig()
    other = replace(config, train=replace(config.train, steps=1), data=replace(config.data, path="x"))
    assert config.differences(other) == ["data.path", "train.steps"]
    assert config.differences(config) == []
    assert config.changes_to(other) == "data.path 'stamps' (now 'x'), train.steps 3000 (now 1)"
    many = replace(other, train=replace(other.train, seed=1, patience=2, batch_size=8))
    assert config.changes_to(many).endswith("train.batch_size 256 (now 8) and 2 more")
    assert config.changes_to(config) == ""


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="preset 'best' does not exist; use one of paper, recommended"):
        BridgeSettings.preset("best")  # type: ignore[arg-type]
