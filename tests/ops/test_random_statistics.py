"""Statistics of normal: it has the distribution it should, and no two counters or keys give related numbers.

Every check is a p-value that must exceed ``SIGNIFICANCE``. There are about 2000 of them, so that a perfect generator
fails one for one choice of seeds in 500; the seeds are fixed, and so are the results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from diffgap.ops import _dispatch, random
from diffgap.ops._native import CPU_MISSING

needs_native = pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))
SIGNIFICANCE = 1e-6


@pytest.fixture(params=["reference", pytest.param("native", marks=needs_native)])
def many(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many numbers to draw: what the route can do in a fraction of a second."""
    native = request.param == "native"
    with _dispatch.backend("native" if native else "eager"):
        yield 4_000_000 if native else 400_000


def seeds(n: int) -> Tensor:
    return random.sample_seeds(n, torch.Generator().manual_seed(0))


def passes(what: str, *pvalues: float) -> None:
    assert min(pvalues) > SIGNIFICANCE, f"{what}: p = {min(pvalues):.3g}"


def two_sided(z: float | Tensor) -> float:
    """p-value of a standard normal statistic."""
    return math.erfc(abs(float(z)) / math.sqrt(2))


def cells(x: Tensor, count: int) -> Tensor:
    """Of each number the index of its cell, out of cells of equal probability."""
    edges = torch.from_numpy(special.ndtri(np.arange(1, count) / count)).to(x.dtype)
    return torch.bucketize(x, edges)


def evenly_filled(index: Tensor, count: int) -> float:
    return float(stats.chisquare(torch.bincount(index.flatten(), minlength=count).numpy()).pvalue)


def independent(what: str, a: Tensor, b: Tensor) -> None:
    """Two runs of standard normals, element by element: their product, that of their squares, and 8 x 8 cells."""
    a, b = a.flatten().double(), b.flatten().double()
    root = math.sqrt(a.numel())
    passes(f"{what}, values", two_sided(a @ b / root))
    passes(f"{what}, squares", two_sided((a.square() - 1) @ (b.square() - 1) / (2 * root)))
    passes(f"{what}, cells", evenly_filled(8 * cells(a, 8) + cells(b, 8), 64))


def along_elements(n: int) -> Tensor:
    return random.normal(seeds(n // 10_000), (10_000,))


def along_seeds(n: int) -> Tensor:
    return random.normal(torch.arange(n // 4), (4,))


def along_steps(n: int) -> Tensor:
    return random.normal(torch.full((n // 4,), 12345), (4,), torch.arange(n // 4))


def along_streams(n: int) -> Tensor:
    return torch.stack([random.normal(torch.arange(10), (n // 5000,), stream=stream) for stream in range(500)])


@pytest.mark.parametrize("draw", [along_elements, along_seeds, along_steps, along_streams])
def test_draws_are_standard_normal(many: int, draw: Callable[[int], Tensor]) -> None:
    drawn = draw(many).flatten().double()
    n = drawn.numel()
    assert n == many

    double_factorials = [1, 1, 3, 15, 105]  # E x^(2k)
    for k in range(1, 5):
        mean = 0 if k % 2 else double_factorials[k // 2]
        deviation = math.sqrt(double_factorials[k] - mean**2)
        passes(f"moment {k}", two_sided((drawn.pow(k).mean() - mean) / deviation * math.sqrt(n)))

    passes("cells", evenly_filled(cells(drawn, 1000), 1000))
    for limit in (3.0, 4.0, 5.0):
        probability = float(special.ndtr(-limit))
        for name, outside in (("above", drawn > limit), ("below", drawn < -limit)):
            passes(f"{name} {limit}", stats.binomtest(int(outside.sum()), n, probability).pvalue)

    x = np.sort(drawn.numpy())
    passes("Kolmogorov-Smirnov", stats.kstest(x, "norm", method="asymp").pvalue)
    below, above = special.log_ndtr(x), special.log_ndtr(-x[::-1])
    a2 = -n - np.mean((2 * np.arange(1, n + 1) - 1) * (below + above))
    # The limit of A^2 is a sum of chi-squares of weights 1 / (j (j + 1)), whose tail is the first one's times
    # prod_{j > 1} (1 - 2 / (j (j + 1)))^(-1/2) = sqrt(3) (Zolotarev, 1961).
    passes("Anderson-Darling", math.sqrt(3) * math.erfc(math.sqrt(max(a2, 0.0))))


def test_lanes_of_a_block_are_independent(many: int) -> None:
    lanes = random.normal(seeds(many // 10_000), (10_000,)).reshape(-1, 4)
    for i in range(4):
        for j in range(i):
            independent(f"lanes {j} and {i}", lanes[:, j], lanes[:, i])
    quarters = cells(lanes.contiguous(), 4)
    passes("all four", evenly_filled(quarters @ torch.tensor([64, 16, 4, 1]), 256))
    passes("signs", evenly_filled((lanes > 0).long() @ torch.tensor([8, 4, 2, 1]), 16))


# Neighbours, neighbouring blocks, and the group of blocks and the tile that kernels draw together.
@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 7, 8, 16, 32, 64, 128, 256, 512, 1024, 4096])
def test_elements_are_independent(many: int, lag: int) -> None:
    x = random.normal(seeds(many // 10_000), (10_000,))
    independent(f"lag {lag}", x[:, lag:], x[:, :-lag])


def test_blocks_of_neighbouring_counters_are_independent(many: int) -> None:
    """The counter's low word with each of its bits turned."""
    count = 1 << (18 if many > 1_000_000 else 15)
    blocks = random.normal(seeds(2), (4 * count,)).reshape(2, count, 4)
    for bit in range(count.bit_length() - 1):
        apart = blocks.reshape(2, -1, 2, 1 << bit, 4)
        independent(f"bit {bit} of the block", apart[:, :, 0], apart[:, :, 1])


BASES = [(0, 0, 0), (6_364_136_223_846_793_005, 1000, 1)]


@pytest.mark.parametrize(("seed", "step", "stream"), BASES)
def test_neighbouring_seeds_are_independent(many: int, seed: int, step: int, stream: int) -> None:
    one = torch.tensor(1)
    flips = [one << bit for bit in range(64)]
    first = torch.tensor(seed)
    swapped = (first << 32) | ((first >> 32) & 0xFFFFFFFF)
    others = [first ^ flip for flip in flips] + [first + 1, first - 1, ~first]
    others += [swapped] if swapped != first else []
    drawn = random.normal(torch.stack([first, *others]), (many // 40,), step, stream=stream)
    for other, x in zip(others, drawn[1:], strict=True):
        independent(f"seeds {seed} and {int(other)}", drawn[0], x)


@pytest.mark.parametrize(("seed", "step", "stream"), BASES)
def test_neighbouring_steps_are_independent(many: int, seed: int, step: int, stream: int) -> None:
    others = [step ^ (1 << bit) for bit in range(32)] + [step + 1, step + 2, step ^ 0xFFFFFFFF]
    steps = torch.tensor([step, *others])
    drawn = random.normal(torch.full_like(steps, seed), (many // 40,), steps, stream=stream)
    for other, x in zip(others, drawn[1:], strict=True):
        independent(f"steps {step} and {other}", drawn[0], x)


@pytest.mark.parametrize(("seed", "step", "stream"), BASES)
def test_streams_are_independent(many: int, seed: int, step: int, stream: int) -> None:
    first, shape = torch.tensor([seed]), (many // 40,)
    drawn = random.normal(first, shape, step, stream=stream)
    for other in [stream ^ (1 << bit) for bit in range(32)] + [stream + 1, stream ^ 0xFFFFFFFF]:
        independent(f"streams {stream} and {other}", drawn, random.normal(first, shape, step, stream=other))
    if step != stream:
        independent("step and stream exchanged", drawn, random.normal(first, shape, stream, stream=step))


@needs_native
def test_no_stream_is_repeated_in_a_hundred_million_draws() -> None:
    """Blocks of four normals are 96 random bits; 64-bit hashes of 25 million agree by chance once in 6e4 times."""
    consecutive, flipped = torch.arange(40), torch.ones(40, dtype=torch.int64) << torch.arange(24, 64)
    seed = torch.cat([consecutive, flipped, seeds(20)])
    steps = [*range(8), 1 << 16, 1 << 31]
    keys = np.empty((len(steps), 2, len(seed), 12_500), np.uint64)
    for i, step in enumerate(steps):
        for stream in range(2):
            drawn = torch.ops.diffgap.normal(seed, 50_000, None, step, stream)
            low, high = drawn.view(torch.int64).numpy().view(np.uint64).reshape(len(seed), -1, 2).transpose(2, 0, 1)
            keys[i, stream] = low * np.uint64(0x9E3779B97F4A7C15) + high * np.uint64(0xC2B2AE3D27D4EB4F)
    assert 4 * keys.size == 100_000_000
    keys = np.sort(keys, axis=None)
    assert not (keys[1:] == keys[:-1]).any()


def test_seeds_of_many_generators_do_not_repeat() -> None:
    drawn = [random.sample_seeds(20_000, torch.Generator().manual_seed(i)) for i in range(50)]
    assert torch.cat(drawn).unique().numel() == 1_000_000
