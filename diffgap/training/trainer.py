"""The training loop: accelerate for processes and precision, an exact resume, and validation by recall.

Nothing random carries state from one step to the next: the order of the rows follows from (seed, epoch), and all that
is drawn for a row from (seed, step, place in the batch). A run that is killed and started again therefore continues
from its last checkpoint as if nothing had happened, to the last bit on a CPU; and one of several processes is, but for
rounding, that of one process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffgap._files import remove_leftovers
from diffgap.data.store import EmbeddingStore
from diffgap.models.bridge import DiffGAP
from diffgap.models.settings import BridgeSettings
from diffgap.training import checkpoint
from diffgap.training.batches import collate, fit_data
from diffgap.training.config import RunConfig, TrainConfig
from diffgap.training.folder import MetricsLog, exclusive
from diffgap.training.plan import batch_rows, derived_seed, learning_rate_factor, row_seeds
from diffgap.training.watch import watched

Report = Callable[[int, dict[str, float]], None]
ValidationCallback = Callable[[DiffGAP, EmbeddingStore, int], Mapping[str, float]]


@dataclass(frozen=True)
class TrainResult:
    """What :meth:`Trainer.train` leaves behind."""

    model: DiffGAP
    step: int
    best_step: int
    best_score: float
    processes: int


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
        callbacks: Called with (averaged model, validation rows, step) after each validation, in the first process; what
            they return is logged under the names that they give it.

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
        callbacks: Sequence[ValidationCallback] = (),
    ) -> None:
        self.config, self.folder, self.validate, self.report = config, folder, validate, report
        self.callbacks = tuple(callbacks)
        self.train_rows, self.val_rows = store.split("train"), store.split("val")
        train = config.train
        if len(self.train_rows) < train.batch_size:
            raise ValueError(
                f"train.batch_size is {train.batch_size} but the training split has {len(self.train_rows)} rows; "
                "use a smaller batch"
            )
        self._check_folder()
        modalities = config.data.modalities or store.modalities
        sequences = [name for name in modalities if store.num_frames(name) is not None]
        self.accelerator = _accelerator(train, folder, find_unused=leaves_out_parameters(config.bridge, sequences))
        if train.batch_size % (self.accelerator.num_processes * train.gradient_accumulation):
            raise ValueError(
                f"train.batch_size {train.batch_size} does not divide over {self.accelerator.num_processes} processes "
                f"and {train.gradient_accumulation} micro-batches; choose a multiple of their product"
            )

        torch.manual_seed(derived_seed(train.seed, -2))
        bridge = DiffGAP({name: store.dim(name) for name in modalities}, config.bridge, sequences)
        bridge.fit(**fit_data(self.train_rows, bridge))
        self.head_steps = config.bridge.head_steps(train.steps)
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
            ValueError: Another run trains into the folder, or its last checkpoint is damaged.
            RuntimeError: The loss or a gradient is no longer finite, or one of the run's processes is lost.
        """
        main = self.accelerator.is_main_process
        watch = watched(self.accelerator.process_index, self.accelerator.num_processes)
        with watch, exclusive(self.folder) if main else nullcontext():
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
        processes = self.accelerator.num_processes
        return TrainResult(best, progress.step, progress.best_step, progress.best_score, processes)

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
        self._set_stage(progress.step)
        values = self._step(progress.step)
        progress.step += 1
        last = progress.step == train.steps
        if last or (progress.step % train.eval_every == 0 and progress.step > self.head_steps):
            values |= self._validate(progress) | self._called_back(progress.step)
        if self._log is not None:
            self._log.write(progress.step, values)
        self.accelerator.log(values, step=progress.step)
        if last or progress.step % train.checkpoint_every == 0 or self._stopped(progress):
            self._save(progress)
        if self.report is not None:
            self.report(progress.step, values)

    def _set_stage(self, step: int) -> None:
        """Train the heads alone, or the diffusion, or both (``BridgeSettings.heads_first``)."""
        self.bridge.stage = "joint" if not self.head_steps else "heads" if step < self.head_steps else "diffusion"
        if self.head_steps and step == self.head_steps:
            # From here on the averaged heads are the heads.
            self.bridge.load_state_dict(self.ema.module.state_dict())
            data = fit_data(self.train_rows, self.bridge)
            device = self.accelerator.device
            self.bridge.fit_diffusion(**{k: {m: x.to(device) for m, x in v.items()} for k, v in data.items()})
            self.ema.module.load_state_dict(self.bridge.state_dict())

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

    def _called_back(self, step: int) -> dict[str, float]:
        """What the callbacks have to log; nothing but in the first process, which alone logs."""
        values: dict[str, float] = {}
        if self.accelerator.is_main_process:
            model = cast(DiffGAP, self.ema.module).eval()
            for callback in self.callbacks:
                values |= callback(model, self.val_rows, step)
        return values

    def _step(self, step: int) -> dict[str, float]:
        """One optimizer step over its micro-batches; returns the mean losses."""
        train, accelerator = self.config.train, self.accelerator
        factor = learning_rate_factor(step, train, self.head_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate * factor * group.get("lr_scale", 1.0)
        self.model.train()
        rows = batch_rows(step, len(self.train_rows), train.batch_size, train.seed)
        seeds = row_seeds(step, train.batch_size, train.seed)
        # Processes take the rows of a micro-batch in turn: split="half" then gives a row the direction it has on one
        # process, if each has a multiple of the directions.
        shape = train.gradient_accumulation, -1, accelerator.num_processes
        rows, seeds = (x.view(shape)[..., accelerator.process_index] for x in (rows, seeds))
        total: dict[str, Tensor] = {}
        for micro in range(train.gradient_accumulation):
            batch = collate(self.train_rows, self.bridge, rows[micro], accelerator.device)
            last = micro + 1 == train.gradient_accumulation
            # Processes exchange gradients once a step.
            with nullcontext() if last else accelerator.no_sync(self.model):
                losses = self.model(**batch, step=step, seeds=seeds[micro].to(accelerator.device))
                accelerator.backward(losses["loss"] / train.gradient_accumulation)
            for name, value in losses.items():
                share = value.detach().float() / train.gradient_accumulation
                total[name] = total.get(name, torch.zeros_like(share)) + share
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


def leaves_out_parameters(settings: BridgeSettings, sequences: Collection[str]) -> bool:
    """Whether a training step may leave parameters without a gradient, which the processes must then find out about.

    Otherwise all have one, whatever the rows have. Vectors and sequences have parameters of their own, which a step
    without such a direction does not need.
    """
    in_stages = settings.head_steps(2**20) > 0
    some_directions = settings.split == "alternate" or settings.directions != BridgeSettings.directions
    one_loss = settings.contrastive == "none" or not settings.diffusion_weight
    return in_stages or one_loss or (some_directions and bool(sequences))


def _accelerator(train: TrainConfig, folder: Path, *, find_unused: bool) -> Accelerator:
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
            # Unless it is told so, accelerate takes each process that torchrun starts on a CPU for the only one.
            cpu=not torch.accelerator.is_available(),
            log_with=list(train.trackers) or None,
            project_dir=os.fspath(folder),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=train.timeout_s)),
                DistributedDataParallelKwargs(find_unused_parameters=find_unused),
            ],
        )
    except ValueError as error:
        raise ValueError(f"train.mixed_precision or train.trackers is refused ({error}); use another value") from error
    if train.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("train.mixed_precision is 'fp16', which needs a GPU; use 'bf16' or 'no'")
    missing = set(train.trackers) - {str(name) for name in accelerator.log_with} - {"all"}
    if missing:
        raise ModuleNotFoundError(f"train.trackers names {min(missing)!r}, which is not installed; pip install it")
    return accelerator
