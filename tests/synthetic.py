"""A small embedding store with something to learn, and settings of a bridge small enough to train in a test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffgap.data.store import EmbeddingStore, write_store
from diffgap.models.settings import BridgeSettings
from diffgap.training.config import DataConfig, RunConfig, TrainConfig

TINY = BridgeSettings(
    width=16, tokens=2, denoiser_width=16, depth=1, heads=2, sampling_steps=2, num_samples=2, head_dropout=0.1
)
DIMS = {"audio": 12, "text": 10, "image": 9}


def make_store(
    modalities: tuple[str, ...] = ("audio", "text"),
    groups: int = 36,
    per_group: int = 2,
    splits: tuple[str, ...] = ("train", "train", "val", "test"),
    seed: int = 0,
) -> EmbeddingStore:
    """Groups take the splits in turn; the rows of a group are noisy linear views of one latent vector."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(groups, 6, generator=generator).repeat_interleave(per_group, 0)
    arrays = {}
    for name in modalities:
        view = torch.randn(6, DIMS[name], generator=generator)
        arrays[name] = latent @ view + 0.3 * torch.randn(len(latent), DIMS[name], generator=generator)
    names = [f"g{i // per_group}" for i in range(len(latent))]
    parts = [splits[i // per_group % len(splits)] for i in range(len(latent))]
    return EmbeddingStore.from_arrays(arrays, {"group": names, "split": parts})


def make_config(path: Path | str, **train: Any) -> RunConfig:
    """A run of a few steps of eight rows on the store at ``path``."""
    options: dict[str, Any] = {"steps": 6, "batch_size": 8, "warmup_steps": 2, "eval_every": 2, "checkpoint_every": 2}
    return RunConfig(data=DataConfig(path=str(path)), bridge=TINY, train=TrainConfig(**{**options, **train}))


def saved_config(folder: Path, store: EmbeddingStore | None = None, **train: Any) -> Path:
    """``folder/store`` and ``folder/run.yaml``, a configuration that trains on it; returns the latter."""
    write_store(folder / "store", make_store() if store is None else store)
    make_config(folder / "store", **train).save(folder / "run.yaml")
    return folder / "run.yaml"


def with_bridge(config: RunConfig, **changes: Any) -> RunConfig:
    """The configuration with other settings of the bridge."""
    return replace(config, bridge=replace(config.bridge, **changes))
