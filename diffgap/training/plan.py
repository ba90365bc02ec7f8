"""What every step of a run does, as functions of the run's seed and the step: rows, learning rate, decay, seeds.

Nothing here carries state from one step to the next, which is what makes a resumed run equal to an uninterrupted one.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from diffgap.ops import sample_seeds
from diffgap.training.config import TrainConfig


def derived_seed(*parts: int) -> int:
    """A 63-bit seed from a run's seed and what it is for (64-bit FNV-1a, which no version of Python changes)."""
    state = 0xCBF29CE484222325
    for part in parts:
        for byte in part.to_bytes(8, "little", signed=True):
            state = ((state ^ byte) * 0x100000001B3) % 2**64
    return state >> 1


def learning_rate_factor(step: int, config: TrainConfig, head_steps: int = 0) -> float:
    """Linear warm-up to 1, then cosine decay to 0; once up to step ``head_steps``, and again to ``config.steps``."""
    start, end = (0, head_steps) if step < head_steps else (head_steps, config.steps)
    step, steps = step - start, end - start
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def ema_decay(config: TrainConfig) -> float:
    """Decay of the average of the weights, a step: min(``config.ema_decay``, exp(-3 / ``config.steps``)).

    An average of decay d still holds a share d^steps of the weights that the run began with, which is at most exp(-3) =
    5% so. Only runs that are shorter than 3 / (1 - d) steps, about, have another decay than asked for.
    """
    return min(config.ema_decay, math.exp(-3 / config.steps))


@lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int) -> Tensor:
    """The order (rows,) of the training rows in one epoch; kept, because every step of the epoch asks for it."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(derived_seed(seed, epoch, -1)))


def batch_rows(step: int, rows: int, batch_size: int, seed: int) -> Tensor:
    """Training rows (batch_size,) of one optimizer step; the last incomplete batch of an epoch is left out."""
    per_epoch = rows // batch_size
    start = step % per_epoch * batch_size
    return epoch_order(rows, seed, step // per_epoch)[start : start + batch_size]


def row_seeds(step: int, batch_size: int, seed: int) -> Tensor:
    """Seeds (batch_size,) int64 of all that is drawn for the rows of one step, by their place in the batch."""
    return sample_seeds(batch_size, torch.Generator().manual_seed(derived_seed(seed, step)))
