"""normal, sample_seeds and Philox: published vectors, statistics, and independence of everything but the counter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from diffgap.ops import _dispatch, random
from diffgap.ops._native import CPU_MISSING

needs_native = pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))
ROUTES = ["reference", pytest.param("native", marks=needs_native)]


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> Iterator[str]:
    with _dispatch.backend("eager" if request.param == "reference" else "native"):
        yield request.param


def seeds(n: int) -> Tensor:
    return random.sample_seeds(n, torch.Generator().manual_seed(0))


def words(text: str) -> list[Tensor]:
    return [torch.tensor(int(word, 16)) for word in text.split()]


# kat_vectors of the Random123 distribution, philox4x32 with 10 rounds: counter, key, result.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox4x32_gives_the_published_words(counter: str, key: str, expected: str) -> None:
    c0, c1, c2, c3 = words(counter)
    k0, k1 = words(key)
    assert random.philox4x32((c0, c1, c2, c3), (k0, k1)) == tuple(words(expected))


def test_normal_turns_the_published_words_into_normals(route: str) -> None:
    """Counter and key of seed 0, block 0, step 0 and stream 0 are zero: the first of the vectors."""
    w0, w1, w2, w3 = 0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8
    expected = []
    for radius_word, angle_word in ((w0, w1), (w2, w3)):
        u = np.float32(np.float32(radius_word) * np.float32(2**-32) + np.float32(2**-33))
        radius, angle = math.sqrt(-2 * math.log(u)), 2 * math.pi * (2 * (angle_word >> 8) + 1) / 2**25
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    actual = random.normal(torch.zeros(1, dtype=torch.int64), (4,))[0].double()
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=2e-7, atol=0)


def scalar_normals(seed: int, element: int, step: int, stream: int) -> float:
    """One element by its definition, in Python's own integers and floats."""
    block = element // 4
    counter = [torch.tensor(w) for w in (block & 0xFFFFFFFF, block >> 32, step, stream)]
    key = [torch.tensor(seed & 0xFFFFFFFF), torch.tensor((seed >> 32) & 0xFFFFFFFF)]
    w = [int(x) for x in random.philox4x32((counter[0], counter[1], counter[2], counter[3]), (key[0], key[1]))]
    lane = element % 4
    radius_word, angle_word = (w[0], w[1]) if lane < 2 else (w[2], w[3])
    u = float((torch.tensor(radius_word).float() * 2.0**-32 + 2.0**-33).item())
    angle = 2 * math.pi * (2 * (angle_word >> 8) + 1) / 2**25
    return math.sqrt(-2 * math.log(u)) * (math.cos(angle) if lane % 2 == 0 else math.sin(angle))


def test_normal_follows_its_definition(route: str) -> None:
    seed = torch.tensor([5, -3, 2**62 + 12345])
    actual = random.normal(seed, (2, 11), step=7, stream=9)
    expected = [[scalar_normals(int(s), e, 7, 9) for e in range(22)] for s in seed]
    torch.testing.assert_close(
        actual.reshape(3, 22).double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-7, atol=0
    )


def in_order(x: Tensor) -> Tensor:
    """Integers in the order of the floats: neighbours differ by one."""
    bits = x.view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@needs_native
@pytest.mark.parametrize("count", [1, 7, 63, 100, 256, 1000, 20_000])
def test_native_normal_is_within_two_ulp(count: int) -> None:
    seed = seeds(50)
    actual = torch.ops.diffgap.normal(seed, count, None, 3, 1)
    expected = random.normal_reference(seed, count, None, 3, 1)
    assert (in_order(actual) - in_order(expected)).abs().max() <= 2


def test_normal_depends_on_the_sample_alone(route: str) -> None:
    seed = seeds(9)
    steps = torch.arange(9) * 1000
    whole = random.normal(seed, (3, 37), steps)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(random.normal(seed[order], (3, 37), steps[order]), whole[order])
    for i in range(9):
        alone = random.normal(seed[i : i + 1], (37 * 3,), int(steps[i]))
        assert torch.equal(alone.reshape(3, 37), whole[i])
    # A longer sample begins with the shorter one.
    assert torch.equal(random.normal(seed, (500,), steps)[:, :111], whole.reshape(9, 111))


@needs_native
@pytest.mark.parametrize(("batch", "count"), [(3, 70_001), (20_003, 5), (517, 259)])
def test_normal_does_not_depend_on_the_number_of_threads(batch: int, count: int) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(torch.ops.diffgap.normal(seeds(batch), count, torch.arange(batch), 0, 0))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_native
def test_native_words_of_a_counter_beyond_32_bits() -> None:
    """Steps and streams are whole 32-bit words, and seeds whole 64-bit ones."""
    seed = torch.tensor([-(1 << 63), (1 << 63) - 1, -1, 1 << 32, 0x80000000])
    steps = torch.tensor([0xFFFFFFFF, 0x80000000, 0, 1, 0x7FFFFFFF])
    for stream in (0, 1, 0x80000000, 0xFFFFFFFF):
        actual = torch.ops.diffgap.normal(seed, 300, steps, 0, stream)
        assert (in_order(actual) - in_order(random.normal_reference(seed, 300, steps, 0, stream))).abs().max() <= 2
        for i in range(5):
            alone = torch.ops.diffgap.normal(seed[i : i + 1], 300, None, int(steps[i]), stream)
            assert torch.equal(alone[0], actual[i])


def test_normal_is_normal(route: str) -> None:
    x = random.normal(seeds(500), (600,)).double()
    n = x.numel()
    flat = x.flatten()
    assert abs(flat.mean()) < 5 / math.sqrt(n)
    assert abs(flat.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((flat**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((flat**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert stats.kstest(flat.numpy(), "norm").pvalue > 1e-3
    # Neither elements of one sample nor samples of neighbouring seeds are correlated.
    for lag in (1, 2, 3, 4):
        assert abs((x[:, lag:] * x[:, :-lag]).mean()) < 5 / math.sqrt(n)
    neighbours = random.normal(torch.arange(500), (600,)).double()
    assert abs((neighbours[1:] * neighbours[:-1]).mean()) < 5 / math.sqrt(n)


def test_normal_draws_differ_by_step_stream_and_seed(route: str) -> None:
    seed = torch.tensor([1, 1 << 32, -1, 2])
    draws = [random.normal(seed, (64,), step, stream=stream) for step in (0, 1, 2**31) for stream in (0, 1)]
    values = torch.cat(draws).flatten()
    # Repeats of single float32 values are rare; a repeated stream would bring 64.
    assert values.unique().numel() > values.numel() - 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_normal_holds_the_same_numbers_in_every_dtype(route: str, dtype: torch.dtype) -> None:
    seed = seeds(4)
    assert torch.equal(random.normal(seed, (33,), dtype=dtype), random.normal(seed, (33,)).to(dtype))


@pytest.mark.parametrize(("batch", "shape"), [(0, (5,)), (3, (0,)), (3, (2, 0)), (2, ())])
def test_normal_takes_empty_shapes(route: str, batch: int, shape: tuple[int, ...]) -> None:
    assert random.normal(seeds(batch), shape).shape == (batch, *shape)


def test_normal_takes_strided_seeds(route: str) -> None:
    wide = torch.stack([seeds(6), torch.zeros(6, dtype=torch.int64)], dim=1)
    assert torch.equal(random.normal(wide[:, 0], (5,)), random.normal(seeds(6), (5,)))


def test_normal_compiles(route: str) -> None:
    compiled: Callable[..., Tensor] = torch.compile(random.normal, fullgraph=True, backend="aot_eager")
    steps = torch.arange(3)
    torch.testing.assert_close(compiled(seeds(3), (10,), steps), random.normal(seeds(3), (10,), steps))


def test_normal_registration() -> None:
    samples = [(seeds(3), 10, None, 1, 0), (seeds(2), 7, torch.tensor([3, 4]), 0, 1)]
    for arguments in samples:
        torch.library.opcheck(torch.ops.diffgap.normal.default, arguments)


ONES = torch.ones(3, dtype=torch.int64)


@pytest.mark.parametrize("backend", ["eager", "auto", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"seed": [1, 2]}, TypeError, "seed"),
        ({"seed": torch.ones(3)}, TypeError, "seed"),
        ({"seed": ONES.int()}, TypeError, "seed"),
        ({"seed": ONES[:, None]}, ValueError, "seed"),
        ({"seed": ONES[0]}, ValueError, "seed"),
        ({"shape": (-1,)}, ValueError, "shape"),
        ({"shape": (2, -1)}, ValueError, "shape"),
        ({"step": -1}, ValueError, "step"),
        ({"step": 1 << 32}, ValueError, "step"),
        ({"step": ONES[:2]}, ValueError, "step"),
        ({"step": ONES[0]}, ValueError, "step"),
        ({"step": ONES.to("meta")}, ValueError, "step"),
        ({"step": torch.tensor([0, 1, -1])}, ValueError, "step"),
        ({"step": torch.tensor([0, 1, 1 << 32])}, ValueError, "step"),
        ({"step": torch.ones(3)}, TypeError, "step"),
        ({"stream": -1}, ValueError, "stream"),
        ({"stream": 1 << 32}, ValueError, "stream"),
        ({"dtype": torch.int64}, TypeError, "dtype"),
    ],
)
def test_normal_refuses_bad_input(
    backend: _dispatch.Backend, change: dict[str, Any], error: type[Exception], named: str
) -> None:
    arguments: dict[str, Any] = {"seed": ONES, "shape": (2,), **change}
    with _dispatch.backend(backend), pytest.raises(error, match=f"^{named}: "):
        random.normal(**arguments)


def test_sample_seeds_come_from_the_generator_and_the_index() -> None:
    first, again = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    ten = random.sample_seeds(10, first)
    assert torch.equal(random.sample_seeds(4, again), ten[:4])
    assert not torch.equal(random.sample_seeds(10, first), ten), "the generator must advance"
    torch.manual_seed(11)
    default = random.sample_seeds(5)
    torch.manual_seed(11)
    assert torch.equal(random.sample_seeds(5), default)


def test_sample_seeds_are_spread_over_all_bits() -> None:
    drawn = seeds(20_000)
    assert drawn.unique().numel() == 20_000
    bits = (drawn[:, None] >> torch.arange(64)) & 1
    assert ((bits.double().mean(0) - 0.5).abs() < 5 * 0.5 / math.sqrt(20_000)).all()


def test_sample_seeds_refuses_a_negative_count() -> None:
    with pytest.raises(ValueError, match=r"^n: must not be negative"):
        random.sample_seeds(-1)
