"""One process of a two-process run: trains and saves the gradients of every step."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from diffgap.data.store import EmbeddingStore
from diffgap.training.config import RunConfig
from diffgap.training.trainer import Trainer


def train_and_record(config: RunConfig, folder: Path) -> list[dict[str, torch.Tensor]]:
    """Train without validation; the gradients of every step, by parameter, as the optimizer gets them."""
    store = EmbeddingStore.open(config.data.path)
    trainer = Trainer(config, store, folder, validate=lambda model, rows: {"score": 0.0})
    gradients: list[dict[str, torch.Tensor]] = []

    def record(*_: object) -> None:
        named = trainer.bridge.named_parameters()
        gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    trainer.optimizer.optimizer.register_step_pre_hook(record)
    trainer.train()
    return gradients


def work(rank: int, world: int, config: RunConfig, folder: Path, store: str) -> None:
    """Entry point of ``torch.multiprocessing.spawn``; rank 0 saves the gradients beside the run folder."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=store, ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.set_num_threads(1)
    gradients = train_and_record(config, folder)
    if rank == 0:
        torch.save(gradients, folder.with_suffix(".gradients"))
    torch.distributed.destroy_process_group()
