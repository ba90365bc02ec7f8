"""The device code of normal and q_sample, run on the host thread by thread, and the mistakes that such a run finds."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from diffgap.ops.random import STREAM_DRAW, STREAM_SOLVER, normal_reference, sample_seeds
from tests.helpers import assert_close_to_oracle
from tests.kernels import host_check

pytestmark = pytest.mark.skipif(host_check.obstacle() is not None, reason=str(host_check.obstacle()))

q_sample_module = importlib.import_module("diffgap.ops.q_sample")
TARGETS: tuple[str, ...] = q_sample_module.TARGETS
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 7, 63, 100, 512, 1000, 1025]


def fault(name: str) -> Tensor:
    """The data of a faulty kernel's two blocks of 64 threads."""
    memory = host_check.Memory(at_end=name != "read_before")
    data = memory.empty(64, torch.float32)
    data.zero_()
    host_check.load().fault(name, data.data_ptr(), 64)
    return data


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("divergent_barrier", "waits at a barrier"),
        ("two_barriers", "waits at a barrier"),
        ("missing_lane", "waits for a shuffle"),
        ("lane_outside_the_mask", "outside its mask"),
        ("write_at_size", r"thread \(3, 0\) of block \(0, 0\): accesses memory"),
        ("read_before", r"thread \(3, 0\) of block \(0, 0\): accesses memory"),
        ("misaligned", "undefined behaviour"),
    ],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_host_check_finds_a_mistake(name: str, said: str, reverse: bool) -> None:
    host_check.load().set_reversed(reverse)
    with pytest.raises(RuntimeError, match=said):
        fault(name)


def test_host_check_shows_a_missing_barrier_in_one_of_the_orders() -> None:
    seen = []
    for reverse in (False, True):
        host_check.load().set_reversed(reverse)
        seen.append(fault("missing_barrier").isnan().any().item())
    assert seen == [False, True]


def test_host_check_lets_a_warp_run_ahead() -> None:
    for reverse in (False, True):
        host_check.load().set_reversed(reverse)
        assert fault("warp_ahead").any()


def test_host_check_forgets_shared_memory_between_blocks() -> None:
    assert fault("unwritten_shared_memory").isnan().all()


def test_host_check_sees_a_write_beside_a_result() -> None:
    memory = host_check.Memory(at_end=True)
    data = memory.empty(63, torch.float32, shift=1)
    memory.check()
    host_check.load().fault("write_at_size", data.data_ptr(), 63)
    with pytest.raises(AssertionError, match="beside its results"):
        memory.check()


def test_host_check_sees_a_write_to_an_argument() -> None:
    memory = host_check.Memory(at_end=True)
    data = memory.copy(torch.zeros(64))
    assert data is not None
    with pytest.raises(RuntimeError, match="accesses memory"):
        host_check.load().fault("write_at_size", data.data_ptr(), 63)


def seeds(samples: int) -> Tensor:
    extremes = torch.tensor([0, -1, torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max, 1 << 32])
    return torch.cat([extremes, sample_seeds(samples, torch.Generator().manual_seed(0))])[:samples]


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("samples", [1, 5])
def test_normal_has_the_bits_of_the_cpu_kernel(samples: int, count: int) -> None:
    steps = torch.tensor([0, 1, (1 << 32) - 1, 1 << 31, 7])[:samples]
    for own_steps, step, stream in ((None, 0, STREAM_DRAW), (None, (1 << 32) - 1, STREAM_SOLVER), (steps, 0, 1 << 31)):
        arguments = (seeds(samples), count, own_steps, step, stream)
        actual = host_check.normal(*arguments)
        assert torch.equal(actual, torch.ops.diffgap.normal(*arguments))
        torch.testing.assert_close(actual, normal_reference(*arguments), rtol=3e-7, atol=0)


@pytest.mark.parametrize("threads", [32, 64, 96])
@pytest.mark.parametrize("count", [7, 512, 1025])
def test_normal_does_not_depend_on_the_block(count: int, threads: int) -> None:
    arguments = (seeds(9), count, None, 3, STREAM_SOLVER)
    assert torch.equal(host_check.normal(*arguments, threads=threads), host_check.normal(*arguments))


def test_normal_reads_seeds_and_steps_of_any_stride() -> None:
    seed, step = seeds(6), torch.arange(6)
    expected = host_check.normal(seed, 40, step, 0, STREAM_SOLVER)
    spread = [torch.stack([x, x], 1)[:, 1] for x in (seed, step)]
    assert torch.equal(host_check.normal(spread[0], 40, spread[1], 0, STREAM_SOLVER), expected)
    counter = torch.tensor([2]).expand(6)
    assert torch.equal(
        host_check.normal(seed, 40, counter, 0, STREAM_SOLVER), host_check.normal(seed, 40, None, 2, STREAM_SOLVER)
    )


@pytest.mark.parametrize(("samples", "count"), [(0, 4), (3, 0), (0, 0)])
def test_empty_calls_launch_nothing(samples: int, count: int) -> None:
    before = host_check.load().launches()
    assert host_check.normal(seeds(samples), count, None, 0, 0).shape == (samples, count)
    x0, t, table, seed = q_sample_inputs((samples, count))
    assert all(out.shape == x0.shape for out in host_check.q_sample(x0, t, table, seed, 0, True))
    assert host_check.q_sample_backward(x0, x0, t, table, 0).shape == x0.shape
    assert host_check.load().launches() == before


def q_sample_inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, rows: int = 6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0, t, table and seeds."""
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    t = torch.randint(0, rows, shape[:1], generator=generator)
    angle = torch.rand(rows, generator=generator, dtype=torch.float64) * 1.5
    return x0, t, torch.stack([angle.cos(), angle.sin()], 1), seeds(shape[0])


def check_q_sample(
    x0: Tensor, t: Tensor, table: Tensor, seed: Tensor, target: int, **options: Any
) -> tuple[Tensor, ...]:
    actual = host_check.q_sample(x0, t, table, seed, target, True, **options)
    oracle = q_sample_module.q_sample_reference(x0.double(), t, table, seed, target)
    for ours, exact in zip(actual, oracle, strict=True):
        assert ours.dtype == x0.dtype
        assert_close_to_oracle(ours, exact)
    return actual


@pytest.mark.parametrize("target", range(len(TARGETS)), ids=TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_q_sample_matches_the_oracle(size: int, dtype: torch.dtype, target: int) -> None:
    x0, t, table, seed = q_sample_inputs((3, size), dtype)
    x_t, wanted, noise = check_q_sample(x0, t, table, seed, target)
    drawn = torch.ops.diffgap.normal(seed, size, None, 0, STREAM_DRAW)
    assert torch.equal(noise, drawn.to(dtype))
    without = host_check.q_sample(x0, t, table, seed, target, False)
    assert len(without) == 2
    assert torch.equal(without[0], x_t) and torch.equal(without[1], wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [100, 512])
def test_q_sample_of_misaligned_tensors_has_the_same_bits(size: int, dtype: torch.dtype) -> None:
    arguments = (*q_sample_inputs((3, size), dtype), 2, True)
    aligned = host_check.q_sample(*arguments)
    for shift in (1, 2):
        for ours, expected in zip(host_check.q_sample(*arguments, shift=shift), aligned, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("threads", [32, 64])
@pytest.mark.parametrize("size", [7, 512, 1025])
def test_q_sample_does_not_depend_on_the_block_or_the_batch(size: int, threads: int) -> None:
    x0, t, table, seed = q_sample_inputs((5, size))
    whole = host_check.q_sample(x0, t, table, seed, 2, True)
    for ours, expected in zip(host_check.q_sample(x0, t, table, seed, 2, True, threads=threads), whole, strict=True):
        assert torch.equal(ours, expected)
    for i in (0, 4):
        alone = host_check.q_sample(x0[i : i + 1], t[i : i + 1], table, seed[i : i + 1], 2, True)
        assert all(torch.equal(one[0], every[i]) for one, every in zip(alone, whole, strict=True))


def test_q_sample_takes_a_float32_table_and_indices_of_any_stride() -> None:
    x0, t, table, seed = q_sample_inputs((5, 40))
    narrow = table.float()
    ours = host_check.q_sample(x0, t, narrow, seed, 2, False)
    for one, other in zip(ours, host_check.q_sample(x0, t, narrow.double(), seed, 2, False), strict=True):
        assert torch.equal(one, other)
    spread = [torch.stack([x, x, x], 1)[:, 1] for x in (t, seed)]
    for one, other in zip(ours, host_check.q_sample(x0, spread[0], narrow, spread[1], 2, False), strict=True):
        assert torch.equal(one, other)
    expanded, same = torch.tensor([3]).expand(5), torch.full((5,), 3)
    pairs = zip(
        host_check.q_sample(x0, expanded, table, seed, 2, False),
        host_check.q_sample(x0, same, table, seed, 2, False),
        strict=True,
    )
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("wrong", [-1, 6, 1 << 40, -(1 << 62)])
@pytest.mark.parametrize("target", range(len(TARGETS)), ids=TARGETS)
def test_q_sample_of_a_row_outside_the_table_is_nan(target: int, wrong: int) -> None:
    x0, t, table, seed = q_sample_inputs((4, 37))
    clean = (
        host_check.q_sample(x0, t, table, seed, target, False),
        host_check.q_sample_backward(x0, x0, t, table, target),
    )
    t[2] = wrong
    broken = (
        host_check.q_sample(x0, t, table, seed, target, False),
        host_check.q_sample_backward(x0, x0, t, table, target),
    )
    others = torch.tensor([0, 1, 3])
    for ours, expected in zip([*broken[0], broken[1]], [*clean[0], clean[1]], strict=True):
        assert ours[2].isnan().all()
        assert torch.equal(ours[others], expected[others])


@pytest.mark.parametrize("target", range(len(TARGETS)), ids=TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 100, 512, 1025])
def test_q_sample_backward_matches_the_oracle(size: int, dtype: torch.dtype, target: int) -> None:
    grad_x_t, t, table, _ = q_sample_inputs((3, size), dtype)
    grad_target = grad_x_t.flip(0) * 3 + 1
    default: Callable[..., Tensor] = q_sample_module._backward_default
    oracle = default(grad_x_t.double(), grad_target.double(), t, table, target)
    actual = host_check.q_sample_backward(grad_x_t, grad_target, t, table, target)
    assert_close_to_oracle(actual, oracle)
    assert torch.equal(host_check.q_sample_backward(grad_x_t, grad_target, t, table, target, shift=1), actual)
    assert torch.equal(host_check.q_sample_backward(grad_x_t, grad_target, t, table, target, threads=64), actual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_q_sample_keeps_nan_and_infinity(dtype: torch.dtype) -> None:
    x0, t, table, seed = q_sample_inputs((2, 16), dtype)
    x0[0, 3], x0[1, 5] = float("nan"), float("-inf")
    x_t, epsilon = host_check.q_sample(x0, t, table, seed, TARGETS.index("epsilon"), False)
    assert torch.equal(x_t.isnan(), x0.isnan())
    assert torch.equal(x_t.isinf(), x0.isinf())
    assert epsilon.isfinite().all()


@pytest.fixture
def three_blocks_along_y() -> Iterator[None]:
    host_check.load().set_grid_limit(3)
    yield
    host_check.load().set_grid_limit(0)


@pytest.mark.usefixtures("three_blocks_along_y")
def test_threads_go_on_where_the_grid_is_too_small() -> None:
    seed = seeds(2)
    assert torch.equal(
        host_check.normal(seed, 5000, None, 3, STREAM_SOLVER, threads=32),
        torch.ops.diffgap.normal(seed, 5000, None, 3, STREAM_SOLVER),
    )
    assert host_check.load().last_launch()["grid"] == (2, 3)
    x0, t, table, seed = q_sample_inputs((2, 5000))
    check_q_sample(x0, t, table, seed, 2, threads=32)


def test_one_launch_with_a_thread_for_every_unit() -> None:
    module = host_check.load()
    before = module.launches()
    host_check.q_sample(*q_sample_inputs((3, 2 * 4 * 256 + 4)), 1, False)
    assert module.launches() - before == 2  # the two orders of host_check
    assert module.last_launch() == {"grid": (3, 5), "block": (128, 1)}
    host_check.q_sample(*q_sample_inputs((9, 512)), 1, False)
    assert module.last_launch() == {"grid": (9, 1), "block": (128, 1)}
