"""Training of a bridge: heads first or with the diffusion, and validation by recall."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffgap.data.store import EmbeddingStore
from diffgap.diffusion.solvers import build_solver
from diffgap.models.bridge import DiffGAP
from diffgap.models.settings import BridgeSettings
from diffgap.training.batches import collate, fit_data
from diffgap.training.config import RunConfig
from diffgap.training.loop import Report, TrainingLoop, TrainResult
from diffgap.training.plan import derived_seed

__all__ = ["TrainResult", "Trainer", "leaves_out_parameters"]

ValidationCallback = Callable[[DiffGAP, EmbeddingStore, int], Mapping[str, float]]


class Trainer(TrainingLoop[DiffGAP]):
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
        self.config, self.validate, self.callbacks = config, validate, tuple(callbacks)
        self.train_rows, self.val_rows = store.split("train"), store.split("val")
        modalities = config.data.modalities or store.modalities
        sequences = [name for name in modalities if store.num_frames(name) is not None]
        super().__init__(
            config, config.train, folder, len(self.train_rows),
            report=report, find_unused=leaves_out_parameters(config.bridge, sequences),
        )  # fmt: skip
        torch.manual_seed(derived_seed(config.train.seed, -2))
        self.bridge = DiffGAP({name: store.dim(name) for name in modalities}, config.bridge, sequences)
        for steps in (config.bridge.sampling_steps, config.bridge.translate_steps):
            # Refused now, and not by the first validation after much training.
            build_solver(config.bridge.solver, self.bridge.diffusion.schedule, steps)
        self.bridge.fit(**fit_data(self.train_rows, self.bridge))
        self.head_steps = config.bridge.head_steps(config.train.steps)
        self.prepare(self.bridge)

    def batch(self, rows: Tensor, seeds: Tensor, step: int) -> dict[str, Any]:
        return {**collate(self.train_rows, self.bridge, rows, self.accelerator.device), "step": step}

    def score(self, model: DiffGAP) -> dict[str, float]:
        return self.validate(model, self.val_rows)

    def before_step(self, step: int) -> None:
        """Train the heads alone, or the diffusion, or both (``BridgeSettings.heads_first``)."""
        self.bridge.stage = "joint" if not self.head_steps else "heads" if step < self.head_steps else "diffusion"
        if self.head_steps and step == self.head_steps:
            # From here on the averaged heads are the heads.
            self.bridge.load_state_dict(self.ema.module.state_dict())
            data = fit_data(self.train_rows, self.bridge)
            device = self.accelerator.device
            self.bridge.fit_diffusion(**{k: {m: x.to(device) for m, x in v.items()} for k, v in data.items()})
            self.ema.module.load_state_dict(self.bridge.state_dict())

    def after_validation(self, step: int) -> dict[str, float]:
        """What the callbacks have to log; nothing but in the first process, which alone logs."""
        values: dict[str, float] = {}
        if self.accelerator.is_main_process:
            for callback in self.callbacks:
                values |= callback(self.averaged, self.val_rows, step)
        return values


def leaves_out_parameters(settings: BridgeSettings, sequences: Collection[str]) -> bool:
    """Whether a training step may leave parameters without a gradient, which the processes must then find out about.

    Otherwise all have one, whatever the rows have. Vectors and sequences have parameters of their own, which a step
    without such a direction does not need.
    """
    in_stages = settings.head_steps(2**20) > 0
    some_directions = settings.split == "alternate" or settings.directions != BridgeSettings.directions
    one_loss = settings.contrastive == "none" or not settings.diffusion_weight
    return in_stages or one_loss or (some_directions and bool(sequences))
