"""The training loop: accelerate for processes and precision, an exact resume, and validation by recall.

Nothing random carries state from one step to the next: the order of the rows follows from (seed, epoch), and all that
is drawn in a step from (seed, step, process). A run that is killed and started again therefore continues from its last
checkpoint as if nothing had happened, to the last bit on a CPU.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffgap._files import remove_leftovers
from diffgap.data.store import EmbeddingStore
from diffgap.models.bridge import DiffGAP
from diffgap.training import checkpoint
from diffgap.training.batches import collate, paired_embeddings
from diffgap.training.config import RunConfig, TrainConfig

Report = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class TrainResult:
    """What :func:`train` leaves behind."""

    model: DiffGAP
    step: int
    best_step: int
    best_score: float


def _seed(*parts: int) -> int:
    """A 63-bit seed from a run's seed and what it is for."""
    state = 0xCBF29CE484222325  # FNV-1a: any well-mixed hash that never changes between versions of Python would do
    for part in parts:
        for byte in part.to_bytes(8, "little", signed=True):
            state = ((state ^ byte) * 0x100000001B3) % 2**64
    return state >> 1


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up to 1, then cosine decay to 0 at ``config.steps``."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def epoch_order(rows: int, seed: int, epoch: int) -> Tensor:
    """The order of the training rows in one epoch."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(_seed(seed, epoch, -1)))


def batch_rows(step: int, rows: int, batch_size: int, seed: int) -> Tensor:
    """Training rows of one optimizer step; the last incomplete batch of an epoch is left out."""
    per_epoch = rows // batch_size
    start = step % per_epoch * batch_size
    return epoch_order(rows, seed, step // per_epoch)[start : start + batch_size]


class Trainer:
    """Trains a bridge on the ``train`` rows of a store into a run folder, validating on its ``val`` rows.

    Running it again on the same folder continues from the last checkpoint.

    Args:
        config: The run; written to ``folder/config.yaml``.
        store: Embeddings, with a train and a validation split.
        folder: Run folder. One that holds a run of another configuration is refused.
        validate: Score of a model on validation rows, higher is better, with what else to log.
        report: Called with (step, logged values) after each step.

    Raises:
        ValueError: The folder belongs to another configuration, or the training split is smaller than a batch.
    """

    def __init__(
        self,
        config: RunConfig,
        store: EmbeddingStore,
        folder: Path,
        *,
        validate: Callable[[DiffGAP, EmbeddingStore], dict[str, float]],
        report: Report | None = None,
    ) -> None:
        self.config, self.folder, self.validate, self.report = config, folder, validate, report
        self.train_rows, self.val_rows = store.split("train"), store.split("val")
        train = config.train
        if len(self.train_rows) < train.batch_size:
            raise ValueError(
                f"train.batch_size is {train.batch_size} but the training split has {len(self.train_rows)} rows; "
                "use a smaller batch"
            )
        self._claim_folder()
        self.accelerator = Accelerator(
            mixed_precision=train.mixed_precision,
            gradient_accumulation_steps=train.gradient_accumulation,
            log_with=list(train.trackers) or None,
            project_dir=os.fspath(folder),
            # A direction or a pair that a step leaves out gives its parameters no gradient.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        if train.batch_size % (self.accelerator.num_processes * train.gradient_accumulation):
            raise ValueError(
                f"train.batch_size {train.batch_size} does not divide over {self.accelerator.num_processes} processes "
                f"and {train.gradient_accumulation} micro-batches; choose a multiple of their product"
            )
        if train.trackers:
            self.accelerator.init_trackers("diffgap")

        torch.manual_seed(_seed(train.seed, -2))
        modalities = config.data.modalities or store.modalities
        bridge = DiffGAP({name: store.dim(name) for name in modalities}, config.bridge)
        bridge.fit(paired_embeddings(self.train_rows, bridge))
        bridge.to(self.accelerator.device)
        self.optimizer = torch.optim.AdamW(
            bridge.parameter_groups(train.weight_decay), lr=train.learning_rate, betas=(0.9, 0.99)
        )
        self.bridge = bridge
        self.ema = AveragedModel(bridge, multi_avg_fn=get_ema_multi_avg_fn(train.ema_decay))  # type: ignore[no-untyped-call]
        self.model, self.optimizer = self.accelerator.prepare(bridge, self.optimizer)

    def _claim_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, self.folder / "checkpoints"):
            remove_leftovers(folder)
        file = self.folder / "config.yaml"
        if file.exists():
            differences = RunConfig.load(file).differences(self.config)
            if differences:
                raise ValueError(
                    f"{self.folder} holds a run with another {', '.join(differences[:3])}; choose another output "
                    "folder, or repeat that run's settings to resume it"
                )
        else:
            self.config.save(file)

    def train(self) -> TrainResult:
        """Train to the last step, or to the early stop, and save the best averaged model to ``folder/model``."""
        train = self.config.train
        state: dict[str, Any] = {"step": 0, "best_step": 0, "best_score": -math.inf, "stale": 0, "scaler": {}}
        found = checkpoint.latest(self.folder / "checkpoints")
        if found is not None:
            state |= checkpoint.load(
                found, model=self.bridge, ema=self.ema, optimizer=self.optimizer.optimizer
            )
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        self._truncate_log(state["step"])
        while state["step"] < train.steps and not self._stopped(state):
            self._advance(state)
        best = DiffGAP.from_pretrained(self.folder / "model")
        return TrainResult(best, state["step"], state["best_step"], state["best_score"])

    def _stopped(self, state: dict[str, Any]) -> bool:
        patience = self.config.train.patience
        return bool(patience) and state["stale"] >= patience

    def _advance(self, state: dict[str, Any]) -> None:
        """One optimizer step, and the validation and checkpoint that follow it."""
        train = self.config.train
        logged = self._step(state["step"])
        state["step"] += 1
        step = state["step"]
        if step % train.eval_every == 0 or step == train.steps:
            ema: DiffGAP = self.ema.module
            ema.eval()
            scores = self.validate(ema, self.val_rows)
            logged |= {f"val/{name}": value for name, value in scores.items()}
            improved = scores["score"] > state["best_score"]
            state["stale"] = 0 if improved else state["stale"] + 1
            if improved:
                state["best_step"], state["best_score"] = step, scores["score"]
                if self.accelerator.is_main_process:
                    ema.save_pretrained(self.folder / "model")
        self._log(step, logged)
        if step % train.checkpoint_every == 0 or step == train.steps or self._stopped(state):
            self._save(state)

    def _step(self, step: int) -> dict[str, float]:
        """One optimizer step over its micro-batches; returns the mean losses."""
        train, accelerator = self.config.train, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate * learning_rate_factor(step, train)
        self.model.train()
        rows = batch_rows(step, len(self.train_rows), train.batch_size, train.seed)
        share = rows.view(train.gradient_accumulation, accelerator.num_processes, -1)[:, accelerator.process_index]
        total: dict[str, float] = {}
        for micro, part in enumerate(share):
            torch.manual_seed(_seed(train.seed, step, accelerator.process_index, micro))
            with accelerator.accumulate(self.model):
                batch = collate(self.train_rows, self.bridge, part, accelerator.device)
                with accelerator.autocast():
                    losses = self.model(**batch, step=step)
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), train.max_grad_norm)
                    losses["grad_norm"] = norm if isinstance(norm, Tensor) else torch.tensor(float(norm or 0.0))
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, value in losses.items():
                weight = 1.0 if name == "grad_norm" else 1 / train.gradient_accumulation
                total[name] = total.get(name, 0.0) + weight * float(value.detach())
        self.ema.update_parameters(self.bridge)
        return total

    def _save(self, state: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            checkpoint.save(
                self.folder / "checkpoints",
                state["step"],
                model=self.bridge,
                ema=self.ema,
                optimizer=self.optimizer.optimizer,
                state=state | {"scaler": {} if scaler is None else scaler.state_dict()},
            )
        self.accelerator.wait_for_everyone()

    @property
    def _log_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def _truncate_log(self, step: int) -> None:
        """Drop what a killed run logged after its last checkpoint; those steps are about to be repeated."""
        if self._log_file.exists() and self.accelerator.is_main_process:
            kept = [line for line in _complete_lines(self._log_file) if json.loads(line)["step"] <= step]
            self._log_file.write_text("".join(line + "\n" for line in kept))

    def _log(self, step: int, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with self._log_file.open("a") as log:
                log.write(json.dumps({"step": step} | values) + "\n")
        self.accelerator.log(values, step=step)
        if self.report is not None:
            self.report(step, values)


def _complete_lines(path: Path) -> Iterator[str]:
    """Lines of a log whose last one may have been cut off by a kill."""
    for line in path.read_text().split("\n")[:-1]:
        yield line
