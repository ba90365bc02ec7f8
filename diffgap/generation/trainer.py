"""Training of a mel generator on an embedding store that holds spectrograms beside embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffgap.data.store import EmbeddingStore
from diffgap.generation.latents import LatentSettings, parse_settings
from diffgap.generation.mel import MelSettings
from diffgap.generation.space import AudioSpace
from diffgap.models.mel_generator import MelGenerator, MelGeneratorConfig
from diffgap.models.randomness import STREAM_CUT, uniform
from diffgap.ops import sample_seeds
from diffgap.training.config import TrainConfig, YamlConfig
from diffgap.training.loop import Report, TrainingLoop
from diffgap.training.plan import derived_seed

__all__ = ["GeneratorData", "GeneratorRunConfig", "GeneratorSettings", "GeneratorTrainer", "spectrogram_settings"]


@dataclass(frozen=True)
class GeneratorData:
    """What to generate, and from what."""

    path: str = ""
    """Folder of an embedding store with spectrograms, as `diffgap embed ... --mel ...` makes one."""
    mel: str = "mel"
    """Modality of the spectrograms."""
    condition: str = "audio"
    """Modality whose embeddings are the condition: those of the sounds themselves."""
    bridge: str = ""
    """Run folder or saved model of a bridge: the condition is then its projection of the embeddings, so that what the
    bridge makes of a text or a picture can take its place. Empty: the embeddings as they are, with norm 1."""


@dataclass(frozen=True)
class GeneratorSettings:
    """The model; what is not here follows from the data."""

    size: Literal["tiny", "small", "base"] = "tiny"
    """4, 29 or 115 million parameters."""
    patch_frames: int = 4
    """Frames of a patch."""
    patch_bands: int = 0
    """Bands of a patch; 0 for all."""
    dropout: float = 0.0
    """On the output of every attention and MLP."""
    condition_dropout: float = 0.1
    """Probability that training hides the condition."""
    prediction: Literal["epsilon", "sample", "v_prediction"] = "sample"
    """What the network predicts. v and epsilon hold noise, for which a patch must not have more values than the network
    has features."""
    guidance_scale: float = 2.0
    """Default guidance of sampling; 1 is none."""
    sampling_steps: int = 25
    """Default steps of sampling."""
    max_seconds: float = 10.0
    """Longer sounds are cut to this in training, at a random place."""

    def __post_init__(self) -> None:
        if not 0 < self.max_seconds <= _LONGEST:
            raise ValueError(
                f"generator.max_seconds is {self.max_seconds}; use a positive number, {_LONGEST:g} or less"
            )
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"generator.guidance_scale is {self.guidance_scale}; use a finite number, 0 or more")


def _training() -> TrainConfig:
    return TrainConfig(
        steps=20_000, batch_size=32, learning_rate=5e-4, weight_decay=0.01, warmup_steps=500, ema_decay=0.999,
        eval_every=1_000, checkpoint_every=1_000,
    )  # fmt: skip


@dataclass(frozen=True)
class GeneratorRunConfig(YamlConfig):
    """Everything that decides the result of ``diffgap train-generator``."""

    data: GeneratorData = field(default_factory=GeneratorData)
    generator: GeneratorSettings = field(default_factory=GeneratorSettings)
    train: TrainConfig = field(default_factory=_training)


class GeneratorTrainer(TrainingLoop[MelGenerator]):
    """Trains a generator on the ``train`` rows of a store, validating on its ``val`` rows.

    The score is minus the loss of the validation rows at fixed noise; "val/shuffled" is the loss with one another's
    conditions, above it as far as the condition is used.

    Args:
        config: The run.
        store: Spectrograms and embeddings of ``config.data``.
        folder: Run folder.
        report: Called with (step, logged values) after each step.

    Raises:
        ValueError: A modality is missing or of the wrong kind, a split is empty, or the folder belongs to another run.
    """

    def __init__(
        self, config: GeneratorRunConfig, store: EmbeddingStore, folder: Path, *, report: Report | None = None
    ) -> None:
        self.config, data, settings = config, config.data, config.generator
        mel = spectrogram_settings(store, data.mel)
        store = store.select(store.present(data.mel, data.condition))
        self.train_rows, self.val_rows = store.split("train"), store.split("val")
        super().__init__(config, config.train, folder, len(self.train_rows), report=report)
        space = AudioSpace.load(data.bridge, data.condition, store.encoder(data.condition))
        self.conditions, self.val_conditions = (
            space.project(rows.embeddings(data.condition), rows.lengths(data.condition))
            for rows in (self.train_rows, self.val_rows)
        )
        self.max_frames = mel.frames(settings.max_seconds)
        fitted = self.train_rows.unique_rows(data.mel)[:_FIT_ROWS]
        lengths = self.train_rows.lengths(data.mel, fitted)
        assert lengths is not None
        torch.manual_seed(derived_seed(config.train.seed, -2))
        generator = MelGenerator(
            MelGeneratorConfig.of_size(
                settings.size,
                self.conditions.shape[1],
                bands=mel.bands,
                mel=mel.description,
                space=space.fingerprint,
                typical_frames=int(lengths.median()),
                patch_frames=settings.patch_frames,
                patch_bands=settings.patch_bands or mel.bands,
                dropout=settings.dropout,
                condition_dropout=settings.condition_dropout,
                prediction=settings.prediction,
                guidance_scale=settings.guidance_scale,
                sampling_steps=settings.sampling_steps,
            )
        )
        generator.fit(self.train_rows.embeddings(data.mel, fitted), lengths)
        self.prepare(generator)

    def batch(self, rows: Tensor, seeds: Tensor, step: int) -> dict[str, Any]:
        mel, lengths = self._spectrograms(self.train_rows, rows, seeds)
        device = self.accelerator.device
        return {"mel": mel.to(device), "lengths": lengths.to(device), "condition": self.conditions[rows].to(device)}

    def _spectrograms(self, store: EmbeddingStore, rows: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F, M) and frames (B,): sounds longer than ``max_frames`` begin at a random place; F is the longest."""
        name = self.config.data.mel
        mel, lengths = store.embeddings(name, rows), store.lengths(name, rows)
        assert lengths is not None
        start = (uniform(seeds, 1, STREAM_CUT)[:, 0] * (lengths - self.max_frames + 1).clamp_min(1)).long()
        lengths = lengths.clamp_max(self.max_frames)
        index = start[:, None] + torch.arange(int(lengths.max()))
        index = index.clamp_max(mel.shape[1] - 1)[..., None].expand(-1, -1, mel.shape[2])
        return mel.gather(1, index), lengths

    @torch.no_grad()
    def score(self, model: MelGenerator) -> dict[str, float]:
        device = self.accelerator.device
        rows = torch.arange(len(self.val_rows))[:_SCORED_ROWS]
        seeds = sample_seeds(len(rows), torch.Generator().manual_seed(0))
        sums = {"loss": 0.0, "shuffled": 0.0}
        for part in rows.split(self.config.train.batch_size):
            mel, lengths = self._spectrograms(self.val_rows, part, seeds[part])
            own = self.val_conditions[part]
            for name, condition in (("loss", own), ("shuffled", own.roll(1, 0))):
                loss = model(
                    mel.to(device), condition.to(device), lengths=lengths.to(device), seeds=seeds[part].to(device)
                )["loss"]
                sums[name] += float(loss) * len(part)
        values = {name: total / len(rows) for name, total in sums.items()}
        return {"score": -values["loss"], **values}


_LONGEST = 3600.0
"""Seconds, far beyond use."""
_FIT_ROWS = 2_000
"""Spectrograms that the bands' statistics and the typical length are taken from."""
_SCORED_ROWS = 512
"""Validation rows that decide which model is kept."""


def spectrogram_settings(store: EmbeddingStore, modality: str) -> MelSettings | LatentSettings:
    """What a store's spectrograms, or latents of them, are, from their encoder's fingerprint.

    Raises ValueError for a modality that the store does not have, or that holds something else.
    """
    if modality not in store.modalities:
        raise ValueError(f"data.mel is {modality!r}; the store has {', '.join(store.modalities)}: embed with --mel")
    kind, _, description = store.encoder(modality).partition(":")
    if kind not in ("log-mel", "latent-mel") or store.num_frames(modality) is None:
        raise ValueError(f"data.mel is {modality!r}, which holds no spectrograms; make them with `diffgap embed --mel`")
    return parse_settings(description)
