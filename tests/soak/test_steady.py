"""Thousands of training steps and sampler calls leave nothing behind in memory."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from diffgap.models.bridge import DiffGAP
from diffgap.training.trainer import Trainer
from tests.soak.length import LONG, TURNS, found
from tests.synthetic import TINY, make_config, make_store

#: Bytes of resident memory that a turn may add, on average over the second half: 10 MB in 10,000 turns.
MOST_BYTES = 1000


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Steady:
    """Looks at memory and clock every twentieth of the turns."""

    def __init__(self, what: str) -> None:
        self.what, self.turn = what, 0
        self.memory: list[tuple[int, int]] = []
        self.tensors: list[int] = []
        self.times = [time.perf_counter()]

    def __call__(self) -> None:
        self.turn += 1
        if self.turn % (TURNS // 20) == 0:
            gc.collect()
            self.memory.append((self.turn, resident()))
            self.tensors.append(sum(isinstance(x, torch.Tensor) for x in gc.get_objects()))
            self.times.append(time.perf_counter())

    def check(self) -> None:
        """Assert flat memory over the second half, and note it and how time went."""
        assert self.turn == TURNS
        half = len(self.memory) // 2
        assert self.tensors[-1] <= self.tensors[half], f"tensors alive: {self.tensors}"
        turns, sizes = np.array(self.memory[half:], dtype=np.float64).T
        slope = np.polyfit(turns, sizes, 1)[0]
        blocks = np.diff(self.times) / (TURNS // 20) * 1e3
        found.append(
            f"{TURNS:,d} {self.what}: {sizes[-1] / 2**20:.1f} MB resident at the end, {slope:+.1f} bytes a turn over "
            f"the second half, {self.tensors[-1]} tensors alive; {np.median(blocks[:10]):.2f} ms a turn in the first "
            f"half, {np.median(blocks[10:]):.2f} ms in the second"
        )
        if LONG:
            assert slope < MOST_BYTES, found[-1]


def test_training_is_steady(tmp_path: Path, uncompiled: None) -> None:
    steady = Steady("training steps")
    every = TURNS // 4
    config = make_config("memory", steps=TURNS, eval_every=every, checkpoint_every=every)
    report: Callable[[int, dict[str, float]], None] = lambda step, values: steady()  # noqa: E731
    Trainer(config, make_store(), tmp_path / "run", validate=lambda *_: {"score": 0.5}, report=report).train()
    steady.check()


def test_sampling_is_steady(uncompiled: None) -> None:
    torch.manual_seed(0)
    bridge = DiffGAP({"audio": 12, "text": 10}, TINY).eval()
    text = torch.randn(4, 10)
    bridge.fit({"audio": torch.randn(32, 12), "text": torch.randn(32, 10)})
    steady = Steady("sampler calls")
    for turn in range(TURNS):
        bridge.translate("text", text, "audio", seed=turn)
        steady()
    steady.check()
