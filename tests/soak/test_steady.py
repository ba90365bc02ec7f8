"""Thousands of training steps and sampler calls leave nothing behind in memory, and take as long as the first."""

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
from tests.synthetic import TINY, make_config, make_store, with_bridge

#: Looks at memory and clock, at equal distances. Each goes through all objects there are.
LOOKS = 20 if LONG else 4

#: Blocks of turns whose time is taken, each beside that of work that is always the same.
BLOCKS = 200 if LONG else 4

#: How much more time, in that of the same work, the median block of the last fifth may take than that of the first.
MOST_TIME = 1.1

#: Bytes of resident memory that a turn may add, on average over the second half: 10 MB in 10,000 turns.
MOST_BYTES = 1000


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make_bridge() -> DiffGAP:
    torch.manual_seed(0)
    bridge = DiffGAP({"audio": 12, "text": 10}, TINY).eval()
    bridge.fit({"audio": torch.randn(32, 12), "text": torch.randn(32, 10)})
    return bridge


class SameWork:
    """A few calls of a bridge of its own, always the same: what a machine that is slower now is slower at too.

    Products alone would not do: what other processes take from the caches they hardly notice.
    """

    def __init__(self) -> None:
        self.bridge, self.text = make_bridge(), torch.randn(4, 10)

    def __call__(self) -> None:
        for _ in range(10):
            self.bridge.sample("audio", text=self.text, seed=0)


def processor_seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


class Steady:
    """Looks at memory and at this process's time on the processor, which others' work does not count in."""

    def __init__(self, what: str) -> None:
        self.what, self.turn = what, 0
        self.memory: list[tuple[int, int]] = []
        self.tensors: list[int] = []
        self.blocks: list[float] = []
        self.same_work = SameWork()
        self.same_work()
        self.same = [processor_seconds(self.same_work)]
        self.start = time.process_time()

    def __call__(self) -> None:
        self.turn += 1
        if self.turn % (TURNS // BLOCKS) == 0:
            self.blocks.append(time.process_time() - self.start)
            self.same.append(processor_seconds(self.same_work))
            if self.turn % (TURNS // LOOKS) == 0:
                gc.collect()
                self.memory.append((self.turn, resident()))
                self.tensors.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
            self.start = time.process_time()

    def check(self) -> None:
        """Assert flat memory over the second half and flat time over all, and note both."""
        assert self.turn == TURNS
        half = len(self.memory) // 2
        assert self.tensors[-1] <= self.tensors[half], f"tensors alive: {self.tensors}"
        turns, sizes = np.array(self.memory[half:], dtype=np.float64).T
        slope = np.polyfit(turns, sizes, 1)[0]
        # A block beside what the same work took before and after it.
        relative = np.array(self.blocks) / (np.array(self.same[:-1]) + self.same[1:])
        fifth = max(BLOCKS // 5, 1)
        slower = float(np.median(relative[-fifth:]) / np.median(relative[:fifth]))
        first, last = (
            np.median(part) / (TURNS // BLOCKS) * 1e3 for part in (self.blocks[:fifth], self.blocks[-fifth:])
        )
        found.append(
            f"{TURNS:,d} {self.what}: {sizes[-1] / 2**20:.1f} MB resident at the end, {slope:+.1f} bytes a turn over "
            f"the second half, {self.tensors[-1]} tensors alive; {first:.2f} ms of the processor a turn in the first "
            f"fifth, {last:.2f} ms in the last, {slower - 1:+.1%} beside the same work"
        )
        if LONG:
            assert slope < MOST_BYTES, found[-1]
            assert slower < MOST_TIME, found[-1]


def test_training_is_steady(tmp_path: Path, uncompiled: None) -> None:
    steady = Steady("training steps")
    every = TURNS // 4
    config = make_config("memory", steps=TURNS, eval_every=every, checkpoint_every=every)
    # In one stage: steps that train the heads alone take half as long as those of the diffusion.
    config = with_bridge(config, heads_first=0.0)
    report: Callable[[int, dict[str, float]], None] = lambda step, values: steady()  # noqa: E731
    Trainer(config, make_store(), tmp_path / "run", validate=lambda *_: {"score": 0.5}, report=report).train()
    steady.check()


def test_sampling_is_steady(uncompiled: None) -> None:
    bridge, text = make_bridge(), torch.randn(4, 10)
    steady = Steady("sampler calls")
    for turn in range(TURNS):
        bridge.sample("audio", text=text, seed=turn)
        steady()
    steady.check()
