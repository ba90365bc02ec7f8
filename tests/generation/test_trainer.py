"""Training of a mel generator: data, conditions, resuming, what it keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from diffgap import BridgeSettings, DiffGAP
from diffgap.commands import train_generator
from diffgap.data.store import EmbeddingStore, write_store
from diffgap.generation.mel import MelSettings
from diffgap.generation.space import AudioSpace
from diffgap.generation.trainer import (
    GeneratorData,
    GeneratorRunConfig,
    GeneratorSettings,
    GeneratorTrainer,
)
from diffgap.training.config import TrainConfig
from tests.helpers import run

MEL = MelSettings(sample_rate=8000, n_fft=256, hop=80, bands=8, high=4000)


def make_store(rows: int = 48, frames: int = 12, encoder: str = f"log-mel:{MEL.description}") -> EmbeddingStore:
    """Spectrograms that follow, but for a little noise, from their embeddings."""
    generator = torch.Generator().manual_seed(0)
    audio = torch.randn(rows, 6, generator=generator)
    lengths = torch.randint(3, frames + 1, (rows,), generator=generator)
    mel = F.normalize(audio, dim=1) @ torch.randn(6, 8 * frames, generator=generator)
    mel = mel.view(rows, frames, 8) + 0.1 * torch.randn(rows, frames, 8, generator=generator)
    splits = ["train"] * (rows - 16) + ["val"] * 16
    return EmbeddingStore.from_arrays(
        {"audio": audio, "mel": mel}, {"split": splits}, lengths={"mel": lengths}, encoders={"mel": encoder}
    )


def make_config(**train: object) -> GeneratorRunConfig:
    settings = {"steps": 6, "batch_size": 8, "eval_every": 3, "checkpoint_every": 2, "warmup_steps": 2, **train}
    return GeneratorRunConfig(data=GeneratorData("memory"), train=TrainConfig(**settings))  # type: ignore[arg-type]


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_log_need_not_wait_for_a_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_store(tmp_path / "store", make_store())
    config = make_config(eval_every=6)
    replace(config, data=GeneratorData(str(tmp_path / "store"))).save(tmp_path / "run.yaml")
    monkeypatch.setattr(train_generator, "_EVERY", 4)
    assert run("train-generator", tmp_path / "run", "--config", tmp_path / "run.yaml") == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said[:-1]] == ["step 1", "step 4", "step 6"]
    assert all(
        f"loss {lines(tmp_path / 'run')[step - 1]['loss']:.4f}" in said[row] for row, step in enumerate((1, 4, 6))
    )
    assert "validation" not in said[1] and "validation" in said[2] and said[3].startswith("trained 6 steps")


def test_a_run_leaves_its_best_average_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    config = make_config()
    result = GeneratorTrainer(config, make_store(), tmp_path / "whole").train()
    assert (result.step, result.model.config.mel) == (6, MEL.description)
    assert GeneratorRunConfig.load(tmp_path / "whole" / "config.yaml") == config
    logged = lines(tmp_path / "whole")
    assert [step for step, line in enumerate(logged, 1) if "val/loss" in line] == [3, 6]
    assert result.best_score == max(-line["val/loss"] for line in logged if "val/loss" in line)

    class Killed(Exception):
        pass

    def kill(step: int, _: dict[str, float]) -> None:
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        GeneratorTrainer(config, make_store(), tmp_path / "killed", report=kill).train()
    resumed = GeneratorTrainer(config, make_store(), tmp_path / "killed").train()
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
    assert lines(tmp_path / "killed") == logged


def test_the_condition_is_used_when_it_says_something(tmp_path: Path) -> None:
    config = make_config(steps=60, batch_size=32, eval_every=60, learning_rate=2e-3, ema_decay=0.9)
    GeneratorTrainer(config, make_store(256), tmp_path / "run").train()
    last = lines(tmp_path / "run")[-1]
    # The same noise in both, so a network that does not look at its condition has a ratio of exactly 1.
    assert last["val/shuffled"] > 1.01 * last["val/loss"]


def test_statistics_leave_out_padding(tmp_path: Path) -> None:
    store = make_store()
    trainer = GeneratorTrainer(make_config(), store, tmp_path / "run")
    train = store.split("train")
    mel, lengths = train.embeddings("mel"), train.lengths("mel")
    frames = torch.cat([mel[i, : lengths[i]] for i in range(len(mel))])
    torch.testing.assert_close(trainer.own.mean, frames.mean(0), rtol=1e-4, atol=1e-5)


def test_long_sounds_are_cut_at_a_place_that_their_seed_decides(tmp_path: Path) -> None:
    config = replace(make_config(), generator=GeneratorSettings(max_seconds=0.04))  # 5 frames
    trainer = GeneratorTrainer(config, make_store(), tmp_path / "run")
    rows, seeds = torch.arange(32), torch.arange(32) + 50
    whole, lengths = trainer.train_rows.embeddings("mel", rows), trainer.train_rows.lengths("mel", rows)
    batch = trainer.batch(rows, seeds, 0)
    assert batch["mel"].shape == (32, 5, 8)
    starts = []
    for row in range(32):
        count = min(int(lengths[row]), 5)
        assert batch["lengths"][row] == count
        at = [
            s
            for s in range(int(lengths[row]) - count + 1)
            if torch.equal(whole[row, s : s + count], batch["mel"][row, :count])
        ]
        assert len(at) == 1
        starts += at
    assert len(set(starts)) > 2
    assert torch.equal(trainer.batch(rows[:3], seeds[:3], 9)["mel"], batch["mel"][:3])
    assert not torch.equal(trainer.batch(rows, seeds + 1, 0)["mel"], batch["mel"])


def test_conditions_are_unit_vectors_or_what_a_bridge_projects_to(tmp_path: Path) -> None:
    store = make_store()
    plain = AudioSpace.load("", "audio", "").project(store.embeddings("audio"))
    torch.testing.assert_close(plain, F.normalize(store.embeddings("audio"), dim=1))
    torch.manual_seed(0)
    bridge = DiffGAP({"audio": 6, "text": 5}, BridgeSettings(width=8, tokens=2, denoiser_width=16, heads=2)).eval()
    bridge.save_pretrained(tmp_path / "bridge")
    through = AudioSpace.load(str(tmp_path / "bridge"), "audio", "").project(store.embeddings("audio"))
    torch.testing.assert_close(through, bridge.project("audio", store.embeddings("audio")).detach())
    with pytest.raises(ValueError, match=r"'mel' is unknown to bridge .*; it has audio, text"):
        AudioSpace.load(str(tmp_path / "bridge"), "mel", "")
    config = replace(make_config(steps=1), data=GeneratorData("memory", bridge=str(tmp_path / "bridge")))
    assert GeneratorTrainer(config, store, tmp_path / "run").train().model.config.condition_dim == 8


@pytest.mark.parametrize(
    ("store", "changes", "message"),
    [
        (make_store(encoder="whisper:1"), {}, "holds no spectrograms"),
        (make_store(), {"mel": "spectrogram"}, "the store has audio, mel"),
        (make_store(), {"mel": "audio"}, "holds no spectrograms"),
        (make_store(), {"condition": "text"}, "text"),
        (make_store(18), {}, "use --train.batch-size 2 or less"),
    ],
)
def test_data_without_what_is_needed_is_refused(tmp_path: Path, store, changes, message: str) -> None:
    config = replace(make_config(), data=replace(GeneratorData("memory"), **changes))
    with pytest.raises(ValueError, match=message):
        GeneratorTrainer(config, store, tmp_path / "run")
    assert not (tmp_path / "run").exists()
