"""The training loop: accelerate for processes and precision, an exact resume, and the best averaged model kept.

Nothing random carries state from one step to the next: the order of the rows follows from (seed, epoch), and all that
is drawn for a row from (seed, step, place in the batch). A run that is killed and started again therefore continues
from its last checkpoint as if nothing had happened, to the last bit on a CPU; and one of several processes is, but for
rounding, that of one process.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffgap._files import check_writable, remove_leftovers
from diffgap.training import checkpoint
from diffgap.training.config import TrainConfig, YamlConfig
from diffgap.training.folder import MetricsLog, exclusive, explained
from diffgap.training.plan import batch_rows, ema_decay, learning_rate_factor, row_seeds
from diffgap.training.watch import watched

Report = Callable[[int, dict[str, float]], None]


_OWN = ("metrics.jsonl", "checkpoints", "model")
"""What a run writes into its folder after config.yaml."""

Model = TypeVar("Model", bound=Any)
"""A module with ``parameter_groups(weight_decay)``, ``save_pretrained(folder)`` and ``from_pretrained(folder)``."""


@dataclass(frozen=True)
class TrainResult(Generic[Model]):
    """What :meth:`TrainingLoop.train` leaves behind."""

    model: Model
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


class TrainingLoop(ABC, Generic[Model]):
    """Trains a model into a run folder; run again on the same folder, it continues from the last checkpoint.

    A subclass says what a batch is, how good a model is, and what changes on the way.

    Args:
        config: The run's, written to ``folder/config.yaml``.
        train: Its part that is about the optimisation.
        folder: Run folder. One that holds a run of another configuration is refused.
        rows: Training rows that batches are taken from.
        report: Called with (step, logged values) after each step.
        find_unused: Whether a step may leave parameters without a gradient.

    Nothing is written before :meth:`train`.

    Raises:
        ValueError: There are fewer rows than a batch takes, or the folder belongs to another configuration.
    """

    #: Steps before the first validation, with a learning rate schedule of their own.
    head_steps = 0

    def __init__(
        self,
        config: YamlConfig,
        train: TrainConfig,
        folder: Path,
        rows: int,
        *,
        report: Report | None = None,
        find_unused: bool = False,
    ) -> None:
        self.run_config, self.optimisation, self.folder, self.rows, self.report = config, train, folder, rows, report
        if rows < train.batch_size:
            raise ValueError(
                f"train.batch_size is {train.batch_size} but the training split has {rows} rows; "
                f"use --train.batch-size {rows} or less"
            )
        self._check_folder()
        self.accelerator = _accelerator(train, folder, find_unused=find_unused)
        if train.batch_size % (self.accelerator.num_processes * train.gradient_accumulation):
            raise ValueError(
                f"train.batch_size {train.batch_size} does not divide over {self.accelerator.num_processes} processes "
                f"and {train.gradient_accumulation} micro-batches; choose a multiple of their product"
            )

    def prepare(self, model: Model) -> None:
        """Take the model, its statistics fitted, to the device with its optimizer and its average."""
        train = self.optimisation
        model.to(self.accelerator.device)
        optimizer = torch.optim.AdamW(
            model.parameter_groups(train.weight_decay), lr=train.learning_rate, betas=(0.9, 0.99)
        )
        self.own = model
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay(train)))
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    @property
    def averaged(self) -> Model:
        """The average of the weights, in evaluation mode."""
        module: nn.Module = self.ema.module
        return cast(Model, module.eval())

    @abstractmethod
    def batch(self, rows: Tensor, seeds: Tensor, step: int) -> dict[str, Any]:
        """What the model takes, besides ``seeds`` (B,), for training rows (B,), by keyword; it returns its losses."""

    @abstractmethod
    def score(self, model: Model) -> dict[str, float]:
        """ "score" of a model, higher is better, with what else to log; one process asks."""

    def before_step(self, step: int) -> None:
        """Whatever changes between steps."""

    def after_validation(self, step: int) -> dict[str, float]:
        """What else to log after a validation."""
        return {}

    def train(self) -> TrainResult[Model]:
        """Train to the last step, or to the early stop, and save the best averaged model to ``folder/model``.

        The process group that accelerate begins under a launcher stays, for what comes next:
        :func:`diffgap.training.group.ending_process_group` around the trainer ends it.

        Raises:
            ValueError: Another run trains into the folder, or its last checkpoint is damaged.
            RuntimeError: The loss or a gradient is no longer finite, or one of the run's processes is lost.
        """
        main = self.accelerator.is_main_process
        watch = watched(self.accelerator.process_index, self.accelerator.num_processes)
        with watch, exclusive(self.folder) if main else nullcontext():
            if main:
                with explained(self.folder):
                    self._claim_folder()
            self.accelerator.wait_for_everyone()
            progress = self._resume()
            self._log = MetricsLog(self.folder / "metrics.jsonl", progress.step) if main else None
            if self.optimisation.trackers:
                self.accelerator.init_trackers("diffgap")
            try:
                while progress.step < self.optimisation.steps and not self._stopped(progress):
                    self._advance(progress)
            finally:
                if self._log is not None:
                    with explained(self.folder):  # closing writes what could not be written
                        self._log.close()
                for tracker in self.accelerator.trackers:
                    tracker.finish()
        if not (self.folder / "model").is_dir():
            raise ValueError(
                f"{self.folder} has checkpoints of a finished run but no model; delete {self.folder / 'checkpoints'} "
                "to train it again"
            )
        best = type(self.own).from_pretrained(self.folder / "model")
        processes = self.accelerator.num_processes
        return TrainResult(best, progress.step, progress.best_step, progress.best_score, processes)

    def _check_folder(self) -> None:
        file = self.folder / "config.yaml"
        check_writable(self.folder, file)
        if file.exists():
            changes = type(self.run_config).load(file).changes_to(self.run_config)
            if changes and self._has_results():
                # A run of more steps has other learning rates from its first step on; so its start is another's too.
                fixed = "; steps cannot be added, for the learning rate falls to 0 over train.steps"
                raise ValueError(
                    f"{self.folder} holds a run with {changes}; choose another output folder, or repeat that run's "
                    f"settings to resume it{fixed if 'train.steps' in changes else ''}"
                )
        elif own := [name for name in _OWN if (self.folder / name).exists()]:
            raise ValueError(
                f"{self.folder} holds {own[0]}, but is no run folder (no config.yaml); choose another output folder, "
                "for a run would replace it"
            )

    def _has_results(self) -> bool:
        """Whether the folder's run came as far as a checkpoint or a model: without, its settings may be put right."""
        return checkpoint.latest(self.folder / "checkpoints") is not None or (self.folder / "model").exists()

    def _claim_folder(self) -> None:
        """Clear what a killed process left in a run's folder, and write the configuration if nothing depends on it."""
        file = self.folder / "config.yaml"
        new = not file.exists()
        if not self._has_results():
            self.run_config.save(file)
        if new:  # nothing else there is a run's
            return
        remove_leftovers(self.folder)
        checkpoint.prune(self.folder / "checkpoints")

    def _resume(self) -> _Progress:
        """Take up the last checkpoint, if there is one."""
        found = checkpoint.latest(self.folder / "checkpoints")
        if found is None:
            return _Progress()
        expected = asdict(_Progress()) | {"scaler": {}}
        state = checkpoint.load(found, model=self.own, ema=self.ema, optimizer=self.optimizer.optimizer, state=expected)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return _Progress(**{field.name: state[field.name] for field in fields(_Progress)})

    def _stopped(self, progress: _Progress) -> bool:
        patience = self.optimisation.patience
        return bool(patience) and progress.stale >= patience

    def _advance(self, progress: _Progress) -> None:
        """One optimizer step, and the validation and checkpoint that follow it."""
        train = self.optimisation
        self.before_step(progress.step)
        values = self._step(progress.step)
        progress.step += 1
        last = progress.step == train.steps
        if last or (progress.step % train.eval_every == 0 and progress.step > self.head_steps):
            values |= self._validate(progress) | self.after_validation(progress.step)
        if self._log is not None:
            with explained(self.folder):
                self._log.write(progress.step, values)
        self.accelerator.log(values, step=progress.step)
        if last or progress.step % train.checkpoint_every == 0 or self._stopped(progress):
            self._save(progress)
        if self.report is not None:
            self.report(progress.step, values)

    def _validate(self, progress: _Progress) -> dict[str, float]:
        """Score the averaged model and keep it if none before was better: of equal ones the one trained longest.

        The heads' score may be at its limit long before the diffusion has learned anything.
        """
        averaged = self.averaged
        # One process decides, lest rounding let them disagree on when to stop.
        found = [self.score(averaged) if self.accelerator.is_main_process else None]
        scores: dict[str, float] = broadcast_object_list(found)[0]
        progress.stale += 1
        if scores["score"] > progress.best_score:
            progress.stale = 0
        if scores["score"] >= progress.best_score:
            progress.best_step, progress.best_score = progress.step, scores["score"]
            if self.accelerator.is_main_process:
                with explained(self.folder):
                    averaged.save_pretrained(self.folder / "model")
        return {f"val/{name}": value for name, value in scores.items()}

    def _step(self, step: int) -> dict[str, float]:
        """One optimizer step over its micro-batches; returns the mean losses."""
        train, accelerator = self.optimisation, self.accelerator
        factor = learning_rate_factor(step, train, self.head_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate * factor * group.get("lr_scale", 1.0)
        self.model.train()
        rows = batch_rows(step, self.rows, train.batch_size, train.seed)
        seeds = row_seeds(step, train.batch_size, train.seed)
        # Processes take the rows of a micro-batch in turn: split="half" then gives a row the direction it has on one
        # process, if each has a multiple of the directions.
        shape = train.gradient_accumulation, -1, accelerator.num_processes
        rows, seeds = (x.view(shape)[..., accelerator.process_index] for x in (rows, seeds))
        total: dict[str, Tensor] = {}
        for micro in range(train.gradient_accumulation):
            batch = self.batch(rows[micro], seeds[micro], step)
            last = micro + 1 == train.gradient_accumulation
            # Processes exchange gradients once a step.
            with nullcontext() if last else accelerator.no_sync(self.model):
                losses = self.model(**batch, seeds=seeds[micro].to(accelerator.device))
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
        self.ema.update_parameters(self.own)
        return values

    def _save(self, progress: _Progress) -> None:
        if self._log is not None:
            scaler = self.accelerator.scaler
            with explained(self.folder):
                self._log.sync()
                checkpoint.save(
                    self.folder / "checkpoints",
                    progress.step,
                    model=self.own,
                    ema=self.ema,
                    optimizer=self.optimizer.optimizer,
                    state=asdict(progress) | {"scaler": {} if scaler is None else scaler.state_dict()},
                )
        self.accelerator.wait_for_everyone()


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
        raise ValueError(
            f"train.mixed_precision, train.trackers or a variable of a launcher (RANK, WORLD_SIZE ...) is refused "
            f"({error}); use another value, or unset the variable"
        ) from error
    if train.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("train.mixed_precision is 'fp16', which needs a GPU; use 'bf16' or 'no'")
    missing = set(train.trackers) - {str(name) for name in accelerator.log_with} - {"all"}
    if missing:
        raise ModuleNotFoundError(f"train.trackers names {min(missing)!r}, which is not installed; pip install it")
    return accelerator
