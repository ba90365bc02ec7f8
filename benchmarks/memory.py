"""Peak extra memory of one call: everything it allocates that was not there before, its results included.

On the CPU this is the growth of the process's resident memory to its high-water mark, which Linux resets on
request. It counts what torch's profiler cannot see (C++ scratch buffers, BLAS workspaces, numpy, faiss) as
well as tensors, in pages of 4 KiB. It does not count what an implementation keeps between calls. On a GPU
it is what torch's caching allocator had handed out at the peak.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_ENOUGH_SECONDS = 1.0
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def peak_bytes(function: Callable[[], object], device: torch.device, repeats: int = 3) -> int | None:
    """Peak extra memory of one call of ``function`` in bytes: the least of ``repeats`` calls.

    A call that lasts a second is not repeated: what it allocates dwarfs the noise that repeating removes. Returns
    ``None`` for a CPU whose operating system is not Linux. The function must have been called before, so that what
    is set up once is not counted.
    """
    if device.type != "cuda" and sys.platform != "linux":
        return None
    growth = _cuda_growth if device.type == "cuda" else _resident_growth
    gc.collect()
    peaks: list[int] = []
    start = time.perf_counter()
    while not peaks or (len(peaks) < repeats and time.perf_counter() - start < _ENOUGH_SECONDS):
        peaks.append(growth(function))
    return min(peaks)


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, for the process's lifetime, instead of handing it back to the system.

    Otherwise the pages of every result may have to be mapped again, at a microsecond or more each, or not, as the heap
    happens to lie: for the same 1 MiB results one process pays six times what the next pays. It takes about ten calls
    until what aligned allocations leave over is merged and used again. glibc only.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _cuda_growth(function: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _resident_growth(function: Callable[[], object]) -> int:
    # Freed memory that malloc still holds would be used again unseen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _CLEAR.write_text(_RESET_PEAK)
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no field {field}; peak memory cannot be measured on this kernel")
