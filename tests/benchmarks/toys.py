"""What the tests of benchmarks share: a small case, a clock, and a budget of the fewest samples there can be."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import cases, timing
from benchmarks.cases import Case, Peer

CPU = torch.device("cpu")
CLOCK = timing.CpuClock(threads=2)
QUICK = timing.Budget(seconds=0.0, min_rounds=2, max_rounds=3, sample_seconds=1e-5, turn_seconds=0.0)


def twice(x: Tensor) -> tuple[Tensor]:
    return (2 * x,)


def toy_case(call=twice, peers: tuple[Peer, ...] = (), *, learn: bool = False, flops: float = 0.0) -> Case:
    def inputs(device: torch.device) -> cases.Inputs:
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(device)
        return {"x": x.requires_grad_(learn)}

    return Case("double/fwd/64x32/fp32", torch.float32, inputs, call, peers, flops)


def wrong_peer(x: Tensor) -> cases.Run:
    return lambda: (2.01 * x,)


def noisy_peer(x: Tensor) -> cases.Run:
    return lambda: (2 * x + torch.randn_like(x),)


def noisy_oracle(x: Tensor, draw_dtype: torch.dtype) -> tuple[Tensor]:
    return (2 * x + torch.randn(x.shape, dtype=draw_dtype).double(),)
