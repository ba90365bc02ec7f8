"""Interleaved timing of several functions in one process.

Two functions timed one after the other are compared across whatever the machine did meanwhile: frequency,
thermals, neighbours. So every round gives each function one turn, in an order shuffled anew, and slow
drifts meet all alike. A turn is a few samples, a sample as many calls as fill a millisecond, so that the
clock's resolution does not matter.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)

#: Behind the L2 of AMD's MI300 and MI350, and no part of what the driver says of L2.
_INFINITY_CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class Budget:
    """How long to measure one case.

    Attributes:
        seconds: Start no further round after this long.
        min_rounds: Rounds to run even so, within ``limit_seconds``.
        limit_seconds: Start no further round after this long, warm-up included, once all have two samples.
        max_rounds: Rounds after which the median does not get better.
        sample_seconds: Shortest sample; a faster function is called repeatedly.
        turn_seconds: A turn ends after this long, and holds at least one sample.
        slow_seconds: A call this long needs no warm-up of its own, and the first one counts as a sample.
    """

    seconds: float
    min_rounds: int = 5
    max_rounds: int = 200
    sample_seconds: float = 1e-3
    turn_seconds: float = 5e-3
    limit_seconds: float = math.inf
    slow_seconds: float = 2.0


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median and the interquartile range of the samples."""

    median_s: float
    iqr_s: float
    samples: int


class Clock(Protocol):
    """Times ``calls`` calls of a function in a row."""

    @property
    def name(self) -> str:
        """What it reads, for the header of the results."""

    def __call__(self, function: Callable[[], object], calls: int) -> float:
        """Seconds per call."""


@dataclass(frozen=True)
class CpuClock:
    """Seconds per call on the CPU; inputs are as warm as the caches allow, in every sample alike.

    With one thread this is the process's CPU time, so that a busy neighbour's time slices do not count (they would
    count against the longer samples most), and an implementation that starts threads of its own pays for them. With
    several it is wall-clock time.
    """

    threads: int

    @property
    def name(self) -> str:
        return "process CPU time" if self.threads == 1 else "wall clock"

    def __call__(self, function: Callable[[], object], calls: int) -> float:
        now = time.process_time if self.threads == 1 else time.perf_counter
        start = now()
        for _ in range(calls):
            function()
        return (now() - start) / calls


def flush_buffer() -> torch.Tensor:
    """Bytes on the current GPU, four times those of its last cache: writing them evicts what the cache holds."""
    cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    if torch.version.hip is not None:
        cache_bytes = max(cache_bytes, _INFINITY_CACHE_BYTES)
    return torch.empty(4 * cache_bytes, dtype=torch.int8, device="cuda")


class CudaClock:
    """Seconds per call on the GPU, between events, each call with a cold cache.

    Overwriting :func:`flush_buffer` evicts the inputs, and keeps the GPU busy while the CPU enqueues the call, so that
    launches are hidden as they are inside a training step.
    """

    name = "CUDA events, cold L2 cache"

    def __init__(self) -> None:
        self._flush = flush_buffer()

    def __call__(self, function: Callable[[], object], calls: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / calls * 1e-3


def time_interleaved(functions: Mapping[Key, Callable[[], object]], clock: Clock, budget: Budget) -> dict[Key, Timing]:
    """Time every function, interleaved, after warming each up.

    Args:
        functions: What to time, by any key.
        clock: A :class:`CpuClock` or a :class:`CudaClock`.
        budget: When to stop.

    Returns:
        One :class:`Timing` per key.
    """
    begin = time.perf_counter()
    warm = {key: _calls_per_sample(function, clock, budget) for key, function in functions.items()}
    calls = {key: count for key, (count, _) in warm.items()}
    samples = {key: [duration] if duration >= budget.slow_seconds else [] for key, (_, duration) in warm.items()}
    order, shuffle = list(functions), random.Random(0).shuffle
    start = time.perf_counter()
    for completed in range(budget.max_rounds):
        now = time.perf_counter()
        if completed >= budget.min_rounds and now - start > budget.seconds:
            break
        if now - begin > budget.limit_seconds and all(len(values) >= 2 for values in samples.values()):
            break
        shuffle(order)
        for key in order:
            turn = time.perf_counter()
            samples[key].append(clock(functions[key], calls[key]))
            while time.perf_counter() - turn < budget.turn_seconds:
                samples[key].append(clock(functions[key], calls[key]))
    return {key: _summary(values) for key, values in samples.items()}


def _calls_per_sample(function: Callable[[], object], clock: Clock, budget: Budget) -> tuple[int, float]:
    """Calls that fill a sample, by doubling, and what one took; the calls made on the way are the warm-up."""
    calls = 1
    while (duration := clock(function, calls)) * calls < budget.sample_seconds:
        calls *= 2
    return calls, duration


def _summary(samples: list[float]) -> Timing:
    if len(samples) == 1:
        return Timing(samples[0], 0.0, 1)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, high - low, len(samples))
