"""What the machine needs at least for a case's memory traffic and arithmetic, probed while the case is timed.

The probes are a copy and a matrix product. They take part in the case's rounds like any implementation, so
the floor is of the same minute, thread count and cache level as the times it stands beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Traffic above this is extrapolated from a copy of this size, far beyond any cache.
_LARGEST_COPY_BYTES = 512 << 20
_GEMM_SIZE = 1024


@dataclass(frozen=True)
class Probe:
    """``units`` times the duration of ``call`` is a lower bound of the case."""

    name: str
    call: Callable[[], object]
    units: float


def traffic_bytes(inputs: Iterable[Tensor], outputs: Iterable[Tensor], dtype: torch.dtype) -> int:
    """Bytes of all distinct tensors of ``dtype``: each input read once, each output written once.

    Tensors of other dtypes (indices, seeds, coefficient tables) are small and left out. An output that is an
    input costs nothing.
    """
    distinct = {x.data_ptr(): x.numel() * x.element_size() for x in (*inputs, *outputs) if x.dtype == dtype}
    return sum(distinct.values())


def copy_probe(traffic: int, device: torch.device) -> Probe:
    """A copy into an existing buffer that moves ``traffic`` bytes, half of them read and half written."""
    moved = min(max(traffic, 2), _LARGEST_COPY_BYTES)
    source = torch.ones(moved // 2, dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    return Probe("copy", lambda: target.copy_(source), traffic / moved)


def gemm_probe(flops: float, dtype: torch.dtype, device: torch.device) -> Probe:
    """A square matrix product of ``dtype``; ``flops`` counts a multiplication and an addition as two."""
    a = torch.full((_GEMM_SIZE, _GEMM_SIZE), 0.5, dtype=dtype, device=device)
    out = torch.empty_like(a)
    return Probe("gemm", lambda: torch.mm(a, a, out=out), flops / (2 * _GEMM_SIZE**3))
