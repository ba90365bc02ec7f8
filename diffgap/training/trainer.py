"""The training loop: accelerate for processes and precision, an exact resume, and validation by recall.

Nothing random carries state from one step to the next: the order of the rows follows from (seed, epoch), and all that
is drawn in a step from (seed, step, process). A run that is killed and started again therefore continues from its last
checkpoint as if nothing had happened, to the last bit on a CPU.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffgap._files import remove_leftovers
from diffgap.data.store import EmbeddingStore
from diffgap.models.bridge import DiffGAP
from diffgap.training import checkpoint
from diffgap.training.batches import collate, paired_embeddings
from diffgap.training.config import RunConfig, TrainConfig
from diffgap.training.folder import MetricsLog, exclusive
from diffgap.training.plan import batch_rows, derived_seed, learning_rate_factor

Report = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class TrainResult:
    """What :meth:`Trainer.train` leaves behind."""

    model: DiffGAP
    step: int
    best_step: int
    best_score: float


@dataclass
class _Progress:
    """Where a run stands: what a checkpoint keeps besides tensors."""

    step: int = 0
    best_step: int = 0
    best_score: float = -math.inf
    stale: int = 0
    """Validations since the best one."""


class Trainer:
    """Trains a bridge on the ``train`` rows of a store into a run folder, validating on its ``val`` rows.

    Running it again on the same folder continues from the last checkpoint.

    Args:
        config: The run; written to ``folder/config.yaml``.
        store: Embeddings, with a train and a validation split.
        folder: Run folder. One that holds a run of another configuration is refused.
        validate: Score of a model on validation rows, higher is better, with what else to log.
        report: Called with (step, logged values) after each step.

    Nothing is written before :meth:`train`.

    Raises:
        ValueError: A split is empty, the training split is smaller than a batch, or the folder belongs to another
            configuration.
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
        self._check_folder()
        self.accelerator = _accelerator(train, folder)
        if train.batch_size % (self.accelerator.num_processes * train.gradient_accumulation):
            raise ValueError(
                f"train.batch_size {train.batch_size} does not divide over {self.accelerator.num_processes} processes "
                f"and {train.gradient_accumulation} micro-batches; choose a multiple of their product"
            )

        torch.manual_seed(derived_seed(train.seed, -2))
        modalities = config.data.modalities or store.modalities
        sequences = [name for name in modalities if store.num_frames(name) is not None]
        bridge = DiffGAP({name: store.dim(name) for name in modalities}, config.bridge, sequences)
        bridge.fit(paired_embeddings(self.train_rows, bridge))
        bridge.to(self.accelerator.device)
        optimizer = torch.optim.AdamW(
            bridge.parameter_groups(train.weight_decay), lr=train.learning_rate, betas=(0.9, 0.99)
        )
        self.bridge = bridge
        self.ema = AveragedModel(bridge, multi_avg_fn=get_ema_multi_avg_fn(train.ema_decay))
        self.model, self.optimizer = self.accelerator.prepare(bridge, optimizer)

    def train(self) -> TrainResult:
        """Train to the last step, or to the early stop, and save the best averaged model to ``folder/model``.

        Raises:
            ValueError: Another process trains into the folder, or its last checkpoint is damaged.
            RuntimeError: The loss or a gradient is no longer finite.
        """
        main = self.accelerator.is_main_process
        with exclusive(self.folder) if main else nullcontext():
            if main:
                self._claim_folder()
            self.accelerator.wait_for_everyone()
            progress = self._resume()
            self._log = MetricsLog(self.folder / "metrics.jsonl", progress.step) if main else None
            if self.config.train.trackers:
                self.accelerator.init_trackers("diffgap")
            try:
                while progress.step < self.config.train.steps and not self._stopped(progress):
                    self._advance(progress)
            finally:
                if self._log is not None:
                    self._log.close()
                for tracker in self.accelerator.trackers:
                    tracker.finish()
        if not (self.folder / "model").is_dir():
            raise ValueError(
                f"{self.folder} has checkpoints of a finished run but no model; delete {self.folder / 'checkpoints'} "
                "to train it again"
            )
        best = DiffGAP.from_pretrained(self.folder / "model")
        return TrainResult(best, progress.step, progress.best_step, progress.best_score)

    def _check_folder(self) -> None:
        file = self.folder / "config.yaml"
        if file.exists():
            differences = RunConfig.load(file).differences(self.config)
            if differences:
                raise ValueError(
                    f"{self.folder} holds a run with another {', '.join(differences[:3])}; choose another output "
                    "folder, or repeat that run's settings to resume it"
                )

    def _claim_folder(self) -> None:
        """Clear what a killed process left, and write the configuration into a new folder."""
        remove_leftovers(self.folder)
        checkpoint.prune(self.folder / "checkpoints")
        file = self.folder / "config.yaml"
        if not file.exists():
            self.config.save(file)

    def _resume(self) -> _Progress:
        """Take up the last checkpoint, if there is one."""
        found = checkpoint.latest(self.folder / "checkpoints")
        if found is None:
            return _Progress()
        state = checkpoint.load(found, model=self.bridge, ema=self.ema, optimizer=self.optimizer.optimizer)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return _Progress(**{field.name: state[field.name] for field in fields(_Progress)})

    def _stopped(self, progress: _Progress) -> bool:
        patience = self.config.train.patience
        return bool(patience) and progress.stale >= patience

    def _advance(self, progress: _Progress) -> None:
        """One optimizer step, and the validation and checkpoint that follow it."""
        train = self.config.train
        values = self._step(progress.step)
        progress.step += 1
        last = progress.step == train.steps
        if last or progress.step % train.eval_every == 0:
            values |= self._validate(progress)
        if self._log is not None:
            self._log.write(progress.step, values)
        self.accelerator.log(values, step=progress.step)
        if last or progress.step % train.checkpoint_every == 0 or self._stopped(progress):
            self._save(progress)
        if self.report is not None:
            self.report(progress.step, values)

    def _validate(self, progress: _Progress) -> dict[str, float]:
        """Score the averaged model and keep it if it is the best so far."""
        ema = cast(DiffGAP, self.ema.module).eval()
        # One process decides, lest rounding let them disagree on when to stop.
        found = [self.validate(ema, self.val_rows) if self.accelerator.is_main_process else None]
        scores: dict[str, float] = broadcast_object_list(found)[0]
        progress.stale += 1
        if scores["score"] > progress.best_score:
            progress.best_step, progress.best_score, progress.stale = progress.step, scores["score"], 0
            if self.accelerator.is_main_process:
                ema.save_pretrained(self.folder / "model")
        return {f"val/{name}": value for name, value in scores.items()}

    def _step(self, step: int) -> dict[str, float]:
        """One optimizer step over its micro-batches; returns the mean losses."""
        train, accelerator = self.config.train, self.accelerator
        factor = learning_rate_factor(step, train)
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate * factor * group.get("lr_scale", 1.0)
        self.model.train()
        rows = batch_rows(step, len(self.train_rows), train.batch_size, train.seed)
        parts = rows.view(train.gradient_accumulation, accelerator.num_processes, -1)[:, accelerator.process_index]
        total: dict[str, Tensor] = {}
        for micro, part in enumerate(parts):
            torch.manual_seed(derived_seed(train.seed, step, accelerator.process_index, micro))
            batch = collate(self.train_rows, self.bridge, part, accelerator.device)
            # Processes exchange gradients once a step.
            with accelerator.no_sync(self.model) if micro + 1 < len(parts) else nullcontext():
                losses = self.model(**batch, step=step)
                accelerator.backward(losses["loss"] / len(parts))
            for name, value in losses.items():
                total[name] = total.get(name, torch.zeros_like(value)) + value.detach().float() / len(parts)
        total["grad_norm"] = accelerator.clip_grad_norm_(self.model.parameters(), train.max_grad_norm).float()
        # One transfer from the device for all values.
        values = dict(zip(total, accelerator.reduce(torch.stack(list(total.values())), "mean").tolist(), strict=True))
        # Under fp16 a gradient may overflow: its loss scale then falls and the step is left out.
        for name in ("loss", "grad_norm") if accelerator.scaler is None else ("loss",):
            if not math.isfinite(values[name]):
                raise RuntimeError(
                    f"{name} is {values[name]} at step {step + 1}; choose another output folder and a lower "
                    "train.learning_rate or train.max_grad_norm"
                )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update_parameters(self.bridge)
        return values

    def _save(self, progress: _Progress) -> None:
        if self._log is not None:
            self._log.sync()
            scaler = self.accelerator.scaler
            checkpoint.save(
                self.folder / "checkpoints",
                progress.step,
                model=self.bridge,
                ema=self.ema,
                optimizer=self.optimizer.optimizer,
                state=asdict(progress) | {"scaler": {} if scaler is None else scaler.state_dict()},
            )
        self.accelerator.wait_for_everyone()


def _accelerator(train: TrainConfig, folder: Path) -> Accelerator:
    """An Accelerator for one run.

    Raises:
        ValueError: fp16 without a GPU, or an unknown tracker.
        ModuleNotFoundError: A tracker that is not installed.
    """
    # accelerate holds a process to the precision of its first Accelerator, even when that one is gone.
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision=train.mixed_precision,
            log_with=list(train.trackers) or None,
            project_dir=os.fspath(folder),
            # A direction or a pair that a step leaves out gives its parameters no gradient.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except ValueError as error:
        raise ValueError(f"train.mixed_precision or train.trackers is refused ({error}); use another value") from error
    if train.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("train.mixed_precision is 'fp16', which needs a GPU; use 'bf16' or 'no'")
    missing = set(train.trackers) - {str(name) for name in accelerator.log_with} - {"all"}
    if missing:
        raise ModuleNotFoundError(f"train.trackers names {min(missing)!r}, which is not installed; pip install it")
    return accelerator
