"""Runs of several processes, as users start them, beside runs of one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffgap.data.store import EmbeddingStore, write_store
from diffgap.generation.trainer import GeneratorData, GeneratorTrainer
from diffgap.models.bridge import DiffGAP
from diffgap.retrieval.evaluate import validation_scores
from diffgap.training.config import RunConfig
from diffgap.training.plan import batch_rows, row_seeds
from diffgap.training.trainer import Trainer, leaves_out_parameters
from tests.generation.test_trainer import make_config as make_generator_config
from tests.generation.test_trainer import make_store as make_mel_store
from tests.synthetic import DIMS, TINY, make_config, make_store, with_bridge

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
PROCESSES = 2
NO_THREADS = "threads of gloo: 0"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
# With --cpu it starts one process, whatever their number: it leaves several to mpirun.
ACCELERATE = ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", str(PROCESSES)]


def sparse_store() -> EmbeddingStore:
    """Two rows a group; every modality is absent from a third of the rows, two of them from a few."""
    whole = make_store(("audio", "image", "text"))
    arrays = {name: whole.embeddings(name, torch.arange(len(whole))) for name in whole.modalities}
    index = {name: whole.column(name) for name in ("group", "split")}
    absent = np.random.default_rng(0).random((len(whole), 3)) < 1 / 3
    absent[absent.all(1)] = False
    rows = np.where(absent, -1, np.arange(len(whole))[:, None])
    for column, (name, x) in enumerate(arrays.items()):
        kept = rows[:, column] >= 0
        arrays[name] = x[torch.from_numpy(kept)]
        index[f"row_{name}"] = np.where(kept, kept.cumsum() - 1, -1)
    return EmbeddingStore.from_arrays(arrays, index)


def run_config(folder: Path, **changes: object) -> RunConfig:
    """20 steps with every kind of dropout on, learning fast enough for a wrong gradient to show."""
    write_store(folder / "store", sparse_store())
    config = make_config(
        folder / "store", steps=STEPS, batch_size=16, eval_every=10, checkpoint_every=4, learning_rate=3e-3
    )
    config = with_bridge(config, **{"dropout": 0.2, "condition_dropout": 0.3, "heads_first": 0.0, **changes})
    assert config.bridge.head_dropout > 0
    return config


def command(config: RunConfig, folder: Path) -> list[str]:
    """Arguments of ``diffgap`` for a run into ``folder``."""
    config.save(folder.with_suffix(".yaml"))
    return ["train", str(folder), "--config", str(folder.with_suffix(".yaml"))]


def launch(launcher: list[str], module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m module arguments`` in two processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", *launcher, "-m", module, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def assert_trained_together(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"trained {STEPS} steps in {PROCESSES} processes") == 1, "the first process says so"


def train_alone(config: RunConfig, folder: Path) -> None:
    Trainer(config, EmbeddingStore.open(config.data.path), folder, validate=validation_scores).train()


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_losses(one: Path, two: Path) -> None:
    logs = log(one), log(two)
    assert [entry["step"] for entry in logs[0]] == list(range(1, STEPS + 1))
    for name in ("loss", "contrastive", "diffusion"):
        expected, actual = ({entry["step"]: entry[name] for entry in entries if name in entry} for entries in logs)
        assert expected and actual == pytest.approx(expected, rel=1e-5), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A run of two processes under torchrun, its micro-batches two, and its configuration."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = run_config(folder, heads_first=0.4)
    config = replace(config, train=replace(config.train, gradient_accumulation=2))
    done = launch(TORCHRUN, "diffgap", *command(config, folder / "run"))
    assert_trained_together(done)
    return config, folder / "run"


def test_torchrun_trains_to_the_losses_of_one_process(undisturbed: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, folder = undisturbed
    train_alone(config, tmp_path / "alone")
    assert_same_losses(tmp_path / "alone", folder)


def test_accelerate_trains_to_the_losses_of_one_process(tmp_path: Path) -> None:
    config = run_config(tmp_path, contrastive="siglip", init_logit_scale=10.0, split="half")
    config = replace(config, train=replace(config.train, batch_size=24))  # 12 rows a process, of 6 directions
    done = launch(ACCELERATE, "tests.training.ending_worker", *command(config, tmp_path / "together"))
    assert_trained_together(done)
    assert done.stdout.count(NO_THREADS) == PROCESSES, "one that is at work while Python ends may abort the process"
    train_alone(config, tmp_path / "alone")
    assert_same_losses(tmp_path / "alone", tmp_path / "together")


def test_a_generator_is_trained_in_two_processes_as_in_one_and_ends_their_group(tmp_path: Path) -> None:
    write_store(tmp_path / "store", make_mel_store())
    config = replace(make_generator_config(batch_size=16), data=GeneratorData(str(tmp_path / "store")))
    config.save(tmp_path / "run.yaml")
    arguments = ["train-generator", str(tmp_path / "together"), "--config", str(tmp_path / "run.yaml")]
    done = launch(TORCHRUN, "tests.training.ending_worker", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(NO_THREADS) == PROCESSES, done.stdout
    GeneratorTrainer(config, EmbeddingStore.open(tmp_path / "store"), tmp_path / "alone").train()
    losses = [[entry["loss"] for entry in log(tmp_path / folder)] for folder in ("together", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_compared_runs_are_those_that_are_hard_to_get_right(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    store = EmbeddingStore.open(config.data.path).split("train")
    shared = uneven = 0
    for step in range(STEPS):
        processes = batch_rows(step, len(store), 16, 0).view(-1, PROCESSES).unbind(1)
        groups = [set(store.group_ids(rows).tolist()) for rows in processes]
        shared += bool(groups[0] & groups[1])
        for name in store.modalities:
            counts = [int((store.rows(name)[rows] >= 0).sum()) for rows in processes]
            uneven += counts[0] != counts[1]
    assert shared > STEPS / 2, "positives on two processes"
    assert uneven > STEPS / 2, "processes with different numbers of embeddings"


def test_a_killed_worker_fails_the_job_and_the_job_resumes(undisturbed: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, expected = undisturbed
    arguments = command(config, tmp_path / "run")
    failed = launch(TORCHRUN, "tests.training.lossy_worker", "SIGKILL", "1", "6", *arguments)
    assert failed.returncode != 0
    message = "diffgap: process 1 of 2 (counted from 0) has died or hangs; run the same command again to resume"
    assert message in failed.stderr
    assert len(log(tmp_path / "run")) == 6, "lost at the seventh step"
    done = launch(TORCHRUN, "diffgap", *arguments)
    assert_trained_together(done)
    assert_same_losses(expected, tmp_path / "run")
    for file in sorted((expected / "checkpoints").rglob("*.safetensors")):
        own = load_file(tmp_path / "run" / file.relative_to(expected))
        assert all(torch.equal(value, own[name]) for name, value in load_file(file).items()), file


def test_a_hanging_worker_fails_the_job_within_its_timeout(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    config = replace(config, train=replace(config.train, timeout_s=4.0))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = ["-m", "tests.training.lossy_worker", "SIGSTOP", "1", "2", *command(config, tmp_path / "run")]
    shared = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2"}
    address = {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=os.environ | shared | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(PROCESSES)
    ]  # fmt: skip
    try:
        _, said = processes[0].communicate(timeout=120)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    assert processes[0].returncode == 1
    assert "process 1 of 2 (counted from 0) has died or hangs" in said
    assert len(log(tmp_path / "run")) == 2


def test_row_seeds_follow_from_run_step_and_place() -> None:
    seeds = row_seeds(3, 64, seed=0)
    assert torch.equal(row_seeds(3, 8, seed=0), seeds[:8])
    assert len(torch.cat([seeds, row_seeds(4, 64, seed=0), row_seeds(3, 64, seed=1)]).unique()) == 192


def test_another_timeout_resumes_a_run() -> None:
    config = make_config("memory")
    assert config.differences(replace(config, train=replace(config.train, timeout_s=5.0))) == []
    with pytest.raises(ValueError, match=r"train\.timeout_s is 0.*positive"):
        make_config("memory", timeout_s=0.0)


@pytest.mark.parametrize(
    ("changes", "sequences", "expected"),
    [
        ({}, (), False),
        ({}, ("audio",), False),
        ({}, ("audio", "image", "text"), False),
        ({"split": "alternate"}, (), False),
        ({"split": "alternate"}, ("audio",), True),
        ({"directions": "audio -> text"}, (), False),
        ({"directions": "audio -> text"}, ("audio",), True),
        ({"split": "joint", "sources": "any"}, ("audio",), False),
        ({"contrastive": "siglip", "condition_dropout": 0.0, "dropout": 0.0, "head_dropout": 0.0}, (), False),
        ({"head": "mlp", "split": "half"}, (), False),
        ({"heads_first": 0.3}, (), True),
        ({"heads_first": 0.3, "diffusion_trains_heads": True}, (), False),
        ({"contrastive": "none"}, (), True),
        ({"diffusion_weight": 0.0}, (), True),
    ],
)
def test_it_is_known_whether_a_step_leaves_out_parameters(
    changes: dict[str, Any], sequences: tuple[str, ...], expected: bool
) -> None:
    settings = replace(TINY, **{"heads_first": 0.0, **changes})
    bridge = DiffGAP(DIMS, settings, sequences)
    left_out = False
    for step in range(7):
        bridge.stage = "diffusion" if settings.head_steps(7) else "joint"
        bridge.zero_grad()
        x = {name: torch.randn(4, *((3,) if name in sequences else ()), dim) for name, dim in DIMS.items()}
        # Some process may have rows without any partner.
        present = {name: torch.full((4,), name == "audio" or step % 2 == 0) for name in DIMS}
        bridge(x, present=present, step=step)["loss"].backward()
        left_out |= any(p.grad is None for p in bridge.parameters() if p.requires_grad)
    assert left_out == leaves_out_parameters(settings, sequences) == expected
