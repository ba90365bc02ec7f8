"""What is random in training, each number a function of its row's seed.

A row's seed and what the number is for decide it; the batch, the process and torch's generators do not. So a batch
gives the same losses whole, cut into micro-batches or spread over processes. The numbers come from
:func:`diffgap.ops.normal`, whose counter is (element, step, stream); no two purposes share a stream and step:

    stream   step    purpose
    0        0       noise on the clean embedding (``q_sample``); where a sample starts
    1        row     a solver's noise
    2        0       ``sample_seeds``
    3        0       the direction that a row is trained in
    4        0       the noise level (element 0), and whether the condition is hidden (element 1)
    5        head    dropout on a head's input
    6        branch  dropout on a branch of the denoiser
    7        0       where a sound that is too long is cut
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor, nn

from diffgap.ops import normal

STREAM_DIRECTION, STREAM_LEVEL, STREAM_HEADS, STREAM_BRANCHES, STREAM_CUT = 3, 4, 5, 6, 7

#: 2**64 over the golden ratio, as a signed number: spreads what it multiplies over all 64 bits.
_SPREAD = 0x9E3779B97F4A7C15 - 2**64


def draw_seeds(rows: int, device: torch.device) -> Tensor:
    """Seeds (rows,) int64 from torch's generator of the device."""
    return torch.randint(-(2**63), 2**63 - 1, (rows,), device=device)


def pass_seeds(seeds: Tensor, passes: int) -> Tensor:
    """Seeds (passes, B) for the ``passes`` times that each of B rows is denoised in one step; the first is its own."""
    return seeds + _SPREAD * torch.arange(passes, device=seeds.device)[:, None]


def uniform(seeds: Tensor, count: int, stream: int) -> Tensor:
    """(B, count) float64 in (0, 1), by the normal's distribution function; float32 would round some to 1."""
    return torch.special.ndtr(normal(seeds, (count,), dtype=torch.float64, stream=stream))


class Dropout(nn.Module):
    """``y = keep x / (1 - p)`` in training, with ``keep = [normal(seed, element) > Phi^-1(p)]`` for each element.

    Args:
        p: Share of the elements that is set to zero.
        stream: Of the random numbers, see the module's text.
        layer: Their step: tells the dropouts of one stream apart.
    """

    def __init__(self, p: float, stream: int, layer: int) -> None:
        super().__init__()
        self.p, self.stream, self.layer = p, stream, layer

    @property
    def p(self) -> float:
        """Rate."""
        return self._p

    @p.setter
    def p(self, rate: float) -> None:
        if not 0 <= rate < 1:
            raise ValueError(f"dropout is {rate}; use a value in [0, 1)")
        # Here and not in forward, which is to compile into one graph.
        self._p, self._least = rate, NormalDist().inv_cdf(rate) if rate else -math.inf

    def forward(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Drop out elements of x (B, ...), by ``seeds`` (B,) int64; drawn from torch's generator if not given."""
        if not self.training or self.p == 0:
            return x
        seeds = draw_seeds(len(x), x.device) if seeds is None else seeds
        keep = normal(seeds, x.shape[1:], self.layer, stream=self.stream) > self._least
        return x * keep.to(x.dtype).mul_(1 / (1 - self.p))

    def extra_repr(self) -> str:
        return f"{self.p}"
