"""How benchmarks take time and memory: the order of turns, what counts, and the floors; never a duration."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks import floors, memory, timing
from benchmarks.gpus import OF_CHIP
from tests.benchmarks.toys import CPU


def test_time_interleaved_gives_every_function_a_turn_in_every_round() -> None:
    turns: list[str] = []

    def clock(function, calls: int) -> float:
        turns.append(function())
        return 1.0

    budget = timing.Budget(seconds=1e9, min_rounds=1, max_rounds=20, turn_seconds=0.0)
    result = timing.time_interleaved({name: lambda name=name: name for name in "abcd"}, clock, budget)
    warm_up, rounds = turns[:4], [turns[i : i + 4] for i in range(4, len(turns), 4)]
    assert sorted(warm_up) == list("abcd")
    assert len(rounds) == 20 and all(sorted(turn) == list("abcd") for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 5, "the order must change between rounds"
    assert all(result[name] == timing.Timing(1.0, 0.0, 20) for name in "abcd")


def test_time_interleaved_repeats_fast_functions_within_a_sample() -> None:
    seen: dict[str, set[int]] = {"fast": set(), "slow": set()}
    durations = {"fast": 1e-4, "slow": 1.0}

    def clock(function, calls: int) -> float:
        seen[function()].add(calls)
        return durations[function()]

    budget = timing.Budget(seconds=0.0, min_rounds=1, sample_seconds=1e-3, turn_seconds=0.0)
    timing.time_interleaved({"fast": lambda: "fast", "slow": lambda: "slow"}, clock, budget)
    assert max(seen["fast"]) == 16 and seen["slow"] == {1}


def test_time_interleaved_reports_median_and_quartiles() -> None:
    values = iter([1.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    budget = timing.Budget(seconds=0.0, min_rounds=5, max_rounds=5, turn_seconds=0.0)
    result = timing.time_interleaved({"f": lambda: None}, lambda function, calls: next(values), budget)
    assert result["f"] == timing.Timing(3.0, 2.0, 5)


def test_time_interleaved_ends_at_the_limit_with_two_samples_of_each() -> None:
    budget = timing.Budget(seconds=1e9, min_rounds=50, turn_seconds=0.0, limit_seconds=0.0, slow_seconds=2.0)
    durations = {"brief": 1.0, "slow": 3.0}
    result = timing.time_interleaved(
        {name: lambda name=name: name for name in durations}, lambda function, calls: durations[function()], budget
    )
    # The slow one's warm-up is a sample of its own.
    assert result == {"brief": timing.Timing(1.0, 0.0, 2), "slow": timing.Timing(3.0, 0.0, 3)}


@pytest.mark.parametrize("threads", [1, 2])
def test_cpu_clock_calls_as_often_as_told(threads: int) -> None:
    count: list[int] = []
    assert timing.CpuClock(threads)(lambda: count.append(1), 7) >= 0.0
    assert len(count) == 7


def test_cpu_clock_of_one_thread_does_not_count_time_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"process_time": 10.0, "perf_counter": 20.0}
    for name in seconds:
        monkeypatch.setattr(time, name, lambda name=name: seconds[name])

    def half_asleep() -> None:
        seconds["process_time"] += 1.0
        seconds["perf_counter"] += 2.0

    assert [timing.CpuClock(threads)(half_asleep, 3) for threads in (1, 2)] == [1.0, 2.0]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory on the CPU is read from Linux's /proc")
def test_peak_bytes_counts_temporaries_and_memory_torch_does_not_know() -> None:
    mib = 1 << 20

    def tensors() -> Tensor:
        a = torch.ones(16 * mib, dtype=torch.int8)
        return a + a

    peak = memory.peak_bytes(tensors, CPU)
    assert peak is not None and 31 * mib < peak < 36 * mib
    peak = memory.peak_bytes(lambda: b"\1" * (24 * mib), CPU)
    assert peak is not None and 23 * mib < peak < 28 * mib


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's malloc only")
def test_freed_memory_is_not_mapped_again() -> None:
    """In a process of its own, which then keeps it for good."""
    code = """
import resource, torch
from benchmarks.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(16 << 20).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
keep_freed_memory()
print(first, [faults() for _ in range(20)][-1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 100 * max(after, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory on the CPU is read from Linux's /proc")
@pytest.mark.parametrize(("enough", "calls"), [(1e9, 3), (0.0, 1)])
def test_peak_bytes_calls_a_slow_function_once(monkeypatch: pytest.MonkeyPatch, enough: float, calls: int) -> None:
    monkeypatch.setattr(memory, "_ENOUGH_SECONDS", enough)
    count: list[int] = []
    memory.peak_bytes(lambda: count.append(1), CPU)
    assert len(count) == calls


def test_traffic_bytes_counts_each_tensor_of_the_dtype_once() -> None:
    x, index = torch.zeros(10), torch.zeros(10, dtype=torch.int64)
    assert floors.traffic_bytes([x, index], [x, torch.zeros(4)], torch.float32) == 56


def test_probes_scale_to_the_case() -> None:
    assert floors.copy_probe(1000, CPU).units == 1.0
    assert floors.gemm_probe(2 * 1024**3 * 5, torch.float32, CPU).units == 5.0


@pytest.mark.parametrize("chip", OF_CHIP)
def test_what_flushes_the_last_cache_is_larger(monkeypatch: pytest.MonkeyPatch, chip: str) -> None:
    """On AMD's chips the driver tells L2's 4 MiB, and the cache behind it is what has to be flushed."""
    gpu, amd = OF_CHIP[chip], chip.startswith("gfx")
    properties = SimpleNamespace(L2_cache_size=4 << 20 if amd else gpu.l2_bytes)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", "6.4" if amd else None)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: empty(size, dtype=dtype, device="meta"))
    assert timing.flush_buffer().nbytes >= 2 * gpu.l2_bytes
