from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, on_main_process
from safetensors.torch import load_file
from torch import Tensor

from diffgap.data.store import EmbeddingStore, write_store
from diffgap.models.bridge import DiffGAP
from diffgap.training.config import RunConfig, TrainConfig
from diffgap.training.folder import MetricsLog, exclusive
from diffgap.training.plan import batch_rows, ema_decay, epoch_order, learning_rate_factor
from diffgap.training.trainer import Trainer, TrainResult
from tests.helpers import relative_l2
from tests.synthetic import make_config, make_store, saved_config, with_bridge
from tests.training import ddp_worker

ROOT = Path(__file__).resolve().parents[2]


def rising(scores: list[float]) -> Any:
    """A validation that gives the scores in turn."""
    left = iter(scores)
    return lambda model, store: {"score": next(left)}


def constant(model: DiffGAP, store: EmbeddingStore) -> dict[str, float]:
    return {"score": 0.5}


def train(config: RunConfig, folder: Path, store: EmbeddingStore | None = None, **options: Any) -> TrainResult:
    options.setdefault("validate", constant)
    return Trainer(config, store or make_store(), folder, **options).train()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_killed_run_ends_bit_identical(tmp_path: Path) -> None:
    config = saved_config(tmp_path, steps=6, eval_every=2, checkpoint_every=1)
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "diffgap", "train", str(killed), "--config", str(config)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:  # one death of the command
        deadline = time.monotonic() + 60
        while not (killed / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.03)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    loop = [sys.executable, "-m", "tests.training.kill_loop", str(config), str(reference), str(killed), "0.3"]
    done = subprocess.run(loop, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 2, "the first two die at a file operation, on a machine of any speed"
    expected, actual = tree(reference), tree(killed)
    assert actual.keys() == expected.keys()
    assert [name for name in expected if actual[name] != expected[name]] == []
    assert [path.name for path in killed.rglob(".*")] == []
    assert [entry["step"] for entry in log(killed)] == list(range(1, 7))


def test_ctrl_c_leaves_a_resumable_run(tmp_path: Path) -> None:
    config = make_config("memory", steps=5, checkpoint_every=2, eval_every=5)

    def interrupt(step: int, values: dict[str, float]) -> None:
        if step == 3:
            raise KeyboardInterrupt

    train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "cut", report=interrupt)
    assert len(log(tmp_path / "cut")) == 3
    result = train(config, tmp_path / "cut")
    assert result.step == 5
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    config = make_config("memory")
    first = train(config, tmp_path / "run")
    before = tree(tmp_path / "run")
    again = train(config, tmp_path / "run", report=lambda *_: pytest.fail("trained a step"))
    assert (again.step, again.best_step, again.best_score) == (first.step, first.best_step, first.best_score)
    assert tree(tmp_path / "run") == before


def test_early_stop_and_best_model(tmp_path: Path) -> None:
    config = make_config("memory", steps=20, eval_every=1, checkpoint_every=20, patience=2)
    config = with_bridge(config, heads_first=0.0)
    result = train(config, tmp_path / "run", validate=rising([0.1, 0.3, 0.2, 0.25, 9.0]))
    assert (result.step, result.best_step, result.best_score) == (4, 2, 0.3)
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    newest = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "ema.safetensors")
    assert any(not torch.equal(saved[name], newest[f"module.{name}"]) for name in saved)
    assert train(config, tmp_path / "run", validate=rising([])).step == 4


def test_of_equal_scores_the_model_trained_longest_is_kept(tmp_path: Path) -> None:
    """But equal is not better: patience runs out as it would have."""
    config = make_config("memory", steps=20, eval_every=1, checkpoint_every=20, patience=2)
    config = with_bridge(config, heads_first=0.0)
    result = train(config, tmp_path / "run", validate=rising([0.1, 0.3, 0.3, 0.3, 9.0]))
    assert (result.step, result.best_step, result.best_score) == (4, 4, 0.3)
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    newest = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "ema.safetensors")
    assert all(torch.equal(saved[name], newest[f"module.{name}"]) for name in saved)


def test_heads_first_then_the_diffusion_of_frozen_heads(tmp_path: Path) -> None:
    config = make_config("memory", steps=6, eval_every=1, checkpoint_every=1)
    run = tmp_path / "run"
    seen: list[dict[str, Tensor]] = []

    def watch(model: DiffGAP, _: EmbeddingStore) -> dict[str, float]:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"score": 0.0}

    train(with_bridge(config, heads_first=0.5, precondition="gaussian"), run, validate=watch)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [("contrastive" in line, "diffusion" in line) for line in lines] == [(True, False)] * 3 + [(False, True)] * 3
    assert len(seen) == 3  # before that there is no bridge to validate
    heads_alone = load_file(run / "checkpoints" / "step-00000005" / "ema.safetensors")
    for name, value in seen[-1].items():
        if name.startswith("heads.") or "linear_gaussian" in name:
            assert torch.equal(value, seen[0][name])
            assert torch.equal(value, heads_alone[f"module.{name}"])
    assert any(not torch.equal(value, seen[0][name]) for name, value in seen[-1].items())
    # The moments are those of the heads as trained, not as they started.
    start = Trainer(
        with_bridge(config, heads_first=0.5, precondition="gaussian"), make_store(), tmp_path / "new", validate=constant
    ).bridge
    moments = "diffusion.denoiser.condition.linear_gaussian.maps"
    assert not torch.equal(start.state_dict()[moments], seen[-1][moments])


def test_gradient_accumulation_averages_the_micro_batches(tmp_path: Path) -> None:
    # With nothing random, the mean over two micro-batches is the gradient of each on its own, averaged.
    write_store(tmp_path / "store", make_store())
    plain = with_bridge(make_config(tmp_path / "store", steps=1), head_dropout=0.0, diffusion_weight=0.0)
    half = replace(plain, train=replace(plain.train, gradient_accumulation=2))
    accumulated = ddp_worker.train_and_record(half, tmp_path / "half")[0]

    bridge_folder = tmp_path / "manual"
    trainer = Trainer(plain, EmbeddingStore.open(tmp_path / "store"), bridge_folder, validate=constant)
    from diffgap.training.batches import collate

    rows = batch_rows(0, len(trainer.train_rows), 8, 0)
    for part in rows.split(4):
        (trainer.bridge(**collate(trainer.train_rows, trainer.bridge, part))["loss"] / 2).backward()
    torch.nn.utils.clip_grad_norm_(trainer.bridge.parameters(), plain.train.max_grad_norm)
    for name, parameter in trainer.bridge.named_parameters():
        if parameter.grad is not None:
            assert relative_l2(accumulated[name], parameter.grad) < 1e-5


def test_two_processes_equal_one(tmp_path: Path) -> None:
    write_store(tmp_path / "store", make_store())
    config = with_bridge(make_config(tmp_path / "store", steps=2), head_dropout=0.0, diffusion_weight=0.0)
    alone = ddp_worker.train_and_record(config, tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torch.multiprocessing.spawn(ddp_worker.work, args=(2, config, tmp_path / "two", port), nprocs=2)
    together = torch.load(tmp_path / "two.gradients", weights_only=True)
    for name, gradient in alone[0].items():
        assert relative_l2(together[0][name], gradient) < 1e-4, name
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-3)
    assert DiffGAP.from_pretrained(tmp_path / "two" / "model").modalities == ("audio", "text")


def test_trainers_of_different_precision_in_one_process(tmp_path: Path) -> None:
    config = make_config("memory", steps=2)
    half = replace(config, train=replace(config.train, mixed_precision="bf16"))
    losses = []
    for number, one in enumerate((config, half, config)):
        train(one, tmp_path / str(number))
        losses.append(log(tmp_path / str(number))[-1]["loss"])
    assert losses[2] == losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)


class Recorder(GeneralTracker):
    name = "recorder"
    requires_logging_directory = False
    logged: list[tuple[int, dict[str, float]]]
    created: list[Recorder]

    def __init__(self, run_name: str, **_: Any) -> None:
        super().__init__()
        self.logged = []
        Recorder.created.append(self)

    @property
    def tracker(self) -> Recorder:
        return self

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    @on_main_process
    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.logged.append((step, values))


def test_trackers_get_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder.created = []
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    train(make_config("memory", steps=2, trackers=("recorder",)), tmp_path / "run")
    (tracker,) = Recorder.created
    assert [step for step, _ in tracker.logged] == [1, 2]
    assert tracker.logged[1][1]["val/score"] == 0.5


def test_learning_rate_scale_of_a_group(tmp_path: Path) -> None:
    config = with_bridge(make_config("memory", steps=1, warmup_steps=4, learning_rate=0.01), head_learning_rate=0.1)
    trainer = Trainer(config, make_store(), tmp_path / "run", validate=constant)
    trainer.train()
    rates = {group["lr_scale"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == pytest.approx({1.0: 0.01 / 4, 0.1: 0.001 / 4})


def test_sequences_are_trained_as_sequences(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    arrays = {"audio": torch.randn(24, 12, generator=generator), "video": torch.randn(24, 3, 5, generator=generator)}
    splits = ["train"] * 16 + ["val"] * 8
    store = EmbeddingStore.from_arrays(arrays, {"split": splits}, lengths={"video": [1 + i % 3 for i in range(24)]})
    assert train(make_config("memory", steps=2), tmp_path / "run", store).model.sequences == ("video",)


def test_learning_rate_factor() -> None:
    config = TrainConfig(steps=10, warmup_steps=4)
    factors = [learning_rate_factor(step, config) for step in range(11)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0 and factors[7] == pytest.approx(0.5) and factors[10] == pytest.approx(0.0)
    assert learning_rate_factor(0, TrainConfig(steps=1, warmup_steps=0)) == 1.0


def test_the_average_forgets_its_first_weights(tmp_path: Path) -> None:
    assert ema_decay(TrainConfig()) == ema_decay(TrainConfig(steps=600)) == 0.995
    short = TrainConfig(steps=40)
    assert ema_decay(short) ** 40 == pytest.approx(math.exp(-3)) and ema_decay(short) < 0.995

    trainer = Trainer(make_config("memory"), make_store(), tmp_path / "run", validate=constant)
    weight, average = trainer.own.logit_scale, trainer.ema.module.logit_scale
    expected = 0.0
    for update in range(30):
        with torch.no_grad():
            weight.fill_(update)
        trainer.ema.update_parameters(trainer.own)
        decay = ema_decay(trainer.config.train) if update else 0.0  # the first weights are copied
        expected = decay * expected + (1 - decay) * update
        assert average.item() == pytest.approx(expected, rel=1e-5)


def test_batch_rows_take_every_row_once_an_epoch() -> None:
    batches = [batch_rows(step, 11, 3, seed=5) for step in range(6)]
    first, second = (torch.cat(batches[start : start + 3]) for start in (0, 3))
    assert len(first.unique()) == len(second.unique()) == 9
    assert not torch.equal(first, second)
    assert torch.equal(first, epoch_order(11, 5, 0)[:9])
    assert not torch.equal(epoch_order(11, 5, 0), epoch_order(11, 6, 0))


def test_metrics_log_drops_what_is_repeated(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    for step, kept in ((5, 2), (1, 1)):
        MetricsLog(path, step).close()
        assert len(path.read_text().splitlines()) == kept
    journal = MetricsLog(path, 1)
    journal.write(2, {"loss": 0.1})
    assert path.read_text().splitlines()[-1] == '{"step": 2, "loss": 0.1}'  # before it is closed
    journal.close()


@pytest.mark.parametrize(
    ("config", "store", "message"),
    [
        (make_config("m", batch_size=64), make_store(), "train.batch_size is 64 but the training split has 36 rows"),
        (make_config("m"), make_store(splits=("val", "test")), "split 'train' is empty"),
        (make_config("m"), make_store(splits=("train", "test")), "split 'val' is empty"),
        (with_bridge(make_config("m"), head="identity"), make_store(), "head 'identity' needs width 16"),
        (make_config("m", mixed_precision="fp16"), make_store(), "mixed_precision is 'fp16', which needs a GPU"),
        (make_config("m", trackers=("nope",)), make_store(), "train.trackers.*nope"),
    ],
)
def test_refusals_write_nothing(tmp_path: Path, config: RunConfig, store: EmbeddingStore, message: str) -> None:
    if config.train.mixed_precision == "fp16" and torch.cuda.is_available():
        pytest.skip("fp16 works on a GPU")
    with pytest.raises(ValueError, match=message) as error:
        train(config, tmp_path / "run", store)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*no supported trackers")
def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path) -> None:
    try:
        import swanlab  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        with pytest.raises(ModuleNotFoundError, match=r"train.trackers names 'swanlab', which is not installed"):
            train(make_config("memory", trackers=("swanlab",)), tmp_path / "run")
    else:
        pytest.skip("swanlab is installed")


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    config = make_config("memory", steps=2)
    train(config, tmp_path / "run")
    before = tree(tmp_path / "run")
    other = with_bridge(make_config("memory", steps=3), depth=2)
    message = r"run with bridge\.depth 1 \(now 2\), train\.steps 2 \(now 3\); choose .*steps cannot be added, for the"
    with pytest.raises(ValueError, match=message):
        train(other, tmp_path / "run")
    with pytest.raises(ValueError, match=r"run with bridge\.depth 1 \(now 2\); choose .* to resume it$"):
        train(with_bridge(config, depth=2), tmp_path / "run")
    assert tree(tmp_path / "run") == before


def test_a_damaged_checkpoint_is_named_and_can_be_deleted(tmp_path: Path) -> None:
    config = make_config("memory", steps=4)
    train(config, tmp_path / "run")
    before = tree(tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "step-00000004"
    (last / "optimizer.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"step-00000004 cannot be restored .*; delete that folder to resume"):
        train(config, tmp_path / "run")
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    train(config, tmp_path / "run")
    assert tree(tmp_path / "run") == before


def test_a_checkpoint_with_a_damaged_name_is_refused_before_the_next_step(tmp_path: Path) -> None:
    config = make_config("memory", steps=2)
    train(config, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-00000002" / "optimizer.safetensors"
    content = file.read_bytes()
    assert b'"3.exp_avg_sq"' in content
    file.write_bytes(content.replace(b'"3.exp_avg_sq"', b'"3.exp_avg_su"'))
    with pytest.raises(ValueError, match=r"optimizer.safetensors has .*exp_avg_su.* of a parameter"):
        train(config, tmp_path / "run")


def test_a_lost_model_is_one_clear_error(tmp_path: Path) -> None:
    config = make_config("memory", steps=2)
    train(config, tmp_path / "run")
    for file in (tmp_path / "run" / "model").iterdir():
        file.unlink()
    (tmp_path / "run" / "model").rmdir()
    with pytest.raises(ValueError, match=r"no model; delete .*checkpoints to train it again"):
        train(config, tmp_path / "run")


def test_a_diverging_run_stops_with_its_last_good_checkpoint(tmp_path: Path) -> None:
    config = make_config("memory", steps=4, checkpoint_every=1)
    trainer = Trainer(config, make_store(), tmp_path / "run", validate=constant)

    def poison(*_: object) -> None:
        if len(log(tmp_path / "run")) == 2:
            with torch.no_grad():
                next(trainer.bridge.heads.parameters()).fill_(torch.nan)

    trainer.model.register_forward_pre_hook(poison)
    with pytest.raises(RuntimeError, match=r"loss is nan at step 3; .*lower train.learning_rate"):
        trainer.train()
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())][-1] == "step-00000002"


def test_two_processes_cannot_train_into_one_folder(tmp_path: Path) -> None:
    with exclusive(tmp_path / "run"), pytest.raises(ValueError, match=r"another process is training into .*; wait"):
        train(make_config("memory"), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
