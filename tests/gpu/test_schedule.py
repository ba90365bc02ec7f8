"""normal, q_sample and solver_step on a GPU, against float64 and against the CPU's bits."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import diffgap
from diffgap.ops._native import CUDA_MISSING
from diffgap.ops.random import STREAM_SOLVER, normal, sample_seeds
from tests.helpers import assert_close_to_oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA_MISSING is not None, reason=f"the CUDA C++ kernels cannot run: {CUDA_MISSING}"),
]

q_sample_module = importlib.import_module("diffgap.ops.q_sample")
step_module = importlib.import_module("diffgap.ops.solver_step")
q_sample: Callable[..., tuple[Tensor, ...]] = q_sample_module.q_sample
solver_step: Callable[..., Any] = step_module.solver_step
COLUMNS: tuple[str, ...] = step_module.COLUMNS
TARGETS: tuple[str, ...] = q_sample_module.TARGETS
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

SHAPES = [
    (3, 1),
    (5, 7),
    (3, 63),
    (64, 512),
    (3, 1000),
    (4, 1025),
    (2, 3, 300),
    (2, 4, 64, 64),
    (2, 3, 2056),
    (1, 70_001),
]

#: Each takes another way through the kernels: no reduction, over rows, over samples, over both.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"x0_clamp": 0.7},
    {"x0_norm": 3.0},
    {"guidance_rescale": 0.7},
    {"guidance_form": "offset", "guidance_rescale": 1.0, "x0_norm": 0.5},
]


@pytest.fixture(autouse=True)
def _native() -> Any:
    with diffgap.backend("native"):
        yield


def q_sample_arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x0, t, table and seeds on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    angle = torch.rand(6, generator=generator, dtype=torch.float64) * 1.5
    t = torch.randint(0, 6, shape[:1], generator=generator)
    return x0, t, torch.stack([angle.cos(), angle.sin()], 1), sample_seeds(shape[0], generator)


def step_arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    """solver_step's arguments on the CPU, every term in use."""
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(7, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return {
        "sample": terms[0],
        "output": terms[1],
        "table": torch.randn(5, len(COLUMNS), generator=generator, dtype=torch.float64),
        "step": torch.randint(0, 5, shape[:1], generator=generator),
        "unconditional": terms[2],
        "guidance_scale": 2.5,
        "last_sample": terms[3],
        "history": list(terms[4:]),
        "seed": sample_seeds(shape[0], generator),
        **options,
    }


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``change`` applied to the tensors in it."""
    if isinstance(value, dict):
        return {name: mapped(item, change) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(item, change) for item in value)
    return change(value) if isinstance(value, Tensor) else value


def cuda(value: Any) -> Any:
    return mapped(value, lambda x: x.cuda())


def widened(value: Any) -> Any:
    return mapped(value, lambda x: x.double() if x.is_floating_point() else x)


def assert_no_wait(function: Callable[[], object]) -> None:
    function()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launched(function: Callable[[], object]) -> list[str]:
    """Names of the kernels and copies of one call."""
    function()
    torch.utils.deterministic.fill_uninitialized_memory = False  # which launches a kernel for every output
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
    torch.utils.deterministic.fill_uninitialized_memory = True
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("count", [1, 7, 512, 1025, 300_001])
def test_normal_has_the_bits_of_the_cpu_kernel(count: int) -> None:
    seed, step = sample_seeds(33), torch.arange(33) * 0x07FFFFFF
    ours = normal(seed.cuda(), (count,), step.cuda(), stream=STREAM_SOLVER)
    assert torch.equal(ours.cpu(), normal(seed, (count,), step, stream=STREAM_SOLVER))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_q_sample_matches_the_oracle(shape: tuple[int, ...], dtype: torch.dtype, target: str) -> None:
    x0, t, table, seed = q_sample_arguments(shape, dtype)
    actual = q_sample(*cuda((x0, t, table, seed)), target, return_noise=True)
    oracle = q_sample_module.q_sample_reference(x0.double(), t, table, seed, TARGETS.index(target))
    for ours, exact in zip(actual, oracle, strict=True):
        assert ours.dtype == dtype
        assert_close_to_oracle(ours.cpu(), exact)
    assert torch.equal(actual[2].cpu(), normal(seed, shape[1:], dtype=dtype))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_q_sample_gradient_matches_the_oracle(dtype: torch.dtype, target: str) -> None:
    x0, t, table, seed = q_sample_arguments((7, 301), dtype)
    grads = [torch.randn(7, 301, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (1, 2)]
    leaf = x0.cuda().requires_grad_()
    x_t, wanted = q_sample(leaf, *cuda((t, table, seed)), target)
    outputs = [x_t, wanted] if wanted.requires_grad else [x_t]
    (actual,) = torch.autograd.grad(outputs, leaf, cuda(grads[: len(outputs)]))
    oracle = q_sample_module._backward_default(*widened(grads), t, table, TARGETS.index(target))
    assert_close_to_oracle(actual.cpu(), oracle)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_solver_step_matches_the_oracle(shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]) -> None:
    if shape[1:] == (1,):  # a standard deviation needs two elements
        options = {**options, "guidance_rescale": 0.0}
    arguments = step_arguments(shape, dtype, **options)
    actual = solver_step(**cuda(arguments))
    with diffgap.backend("eager"):
        oracle = solver_step(**widened(arguments))
    for ours, exact in zip(actual, oracle, strict=True):
        assert ours.dtype == dtype
        assert_close_to_oracle(ours.cpu(), exact)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_solver_step_takes_any_strides(options: dict[str, Any]) -> None:
    arguments = cuda(step_arguments((6, 40), **options))
    expected = solver_step(**arguments)
    spread = mapped(
        arguments,
        lambda x: torch.stack([x, x], 1)[:, 1] if x.dim() == 1 else x.t().contiguous().t(),
    )
    misaligned = mapped(arguments, lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape))
    assert misaligned["sample"].data_ptr() % 16 != 0
    for other in (spread, misaligned):
        for ours, exact in zip(solver_step(**other), expected, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_solver_step_is_deterministic_and_does_not_depend_on_the_batch(options: dict[str, Any]) -> None:
    arguments = cuda(step_arguments((129, 512), **options))
    whole = solver_step(**arguments)
    for ours, same in zip(solver_step(**arguments), whole, strict=True):
        assert torch.equal(ours, same)
    alone = mapped({name: x for name, x in arguments.items() if name != "table"}, lambda x: x[77:78])
    for ours, all_of_them in zip(solver_step(**alone, table=arguments["table"]), whole, strict=True):
        assert torch.equal(ours[0], all_of_them[77])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_solver_step_over_its_own_terms_has_the_same_bits(options: dict[str, Any]) -> None:
    arguments = cuda(step_arguments((64, 512), **options))
    expected = solver_step(**arguments)
    out = (arguments["sample"], arguments["history"][2], arguments["last_sample"])
    for ours, exact in zip(solver_step(**arguments, out=out), expected, strict=True):
        assert torch.equal(ours, exact)


def test_a_row_outside_the_table_is_nan_and_the_context_lives_on() -> None:
    arguments = cuda(step_arguments((4, 37)))
    clean = solver_step(**arguments)
    arguments["step"][2] = 5
    others = torch.tensor([0, 1, 3], device="cuda")
    for ours, exact in zip(solver_step(**arguments), clean, strict=True):
        assert ours[2].isnan().all()
        assert torch.equal(ours[others], exact[others])
    x0, t, table, seed = cuda(q_sample_arguments((4, 37)))
    t[2] = -1
    assert all(result[2].isnan().all() for result in q_sample(x0, t, table, seed))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_solver_step_replays_in_a_cuda_graph_with_a_counter(options: dict[str, Any]) -> None:
    arguments = cuda(step_arguments((16, 512), **options))
    first = arguments["sample"].clone()
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    in_place = {**arguments, "step": counter.expand(16), "out": (arguments["sample"], None, None)}

    def advance() -> None:
        solver_step(**in_place)
        counter.add_(1)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        advance()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance()
    counter.zero_()
    arguments["sample"].copy_(first)
    expected = first
    for step in range(5):
        expected = solver_step(**{**arguments, "sample": expected, "step": step}).sample
        graph.replay()
        assert torch.equal(arguments["sample"], expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_solver_step_is_one_kernel_and_never_waits(options: dict[str, Any]) -> None:
    arguments = cuda(step_arguments((64, 512), **options))
    per_sample = {**arguments, "step": torch.tensor([3], device="cuda").expand(64)}
    for call in ({**arguments, "step": 2}, arguments, per_sample):
        assert_no_wait(partial(solver_step, **call))
        (name,) = launched(partial(solver_step, **call))
        assert "step_kernel" in name


def test_q_sample_and_its_gradient_are_one_kernel_each_and_never_wait() -> None:
    x0, t, table, seed = cuda(q_sample_arguments((64, 512)))
    leaf, grad = x0.requires_grad_(), torch.ones_like(x0)

    def both_passes() -> None:
        torch.autograd.grad(q_sample(leaf, t, table, seed, "v_prediction"), leaf, (grad, grad))

    assert_no_wait(both_passes)
    names = launched(both_passes)
    assert len(names) == 2
    assert "q_sample_kernel" in names[0] and "q_sample_backward_kernel" in names[1]


def test_normal_is_one_kernel_and_never_waits() -> None:
    seed, step = sample_seeds(64).cuda(), torch.tensor([3], device="cuda").expand(64)
    assert_no_wait(lambda: normal(seed, (512,), step))
    (name,) = launched(lambda: normal(seed, (512,), step))
    assert "normal_kernel" in name


def test_ops_run_on_the_current_stream() -> None:
    arguments = cuda(step_arguments((64, 512)))
    expected = solver_step(**arguments).sample
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = arguments["sample"].clone()
        ours = solver_step(**{**arguments, "sample": late}).sample
    stream.synchronize()
    assert torch.equal(ours, expected)


def test_ops_compile_without_a_break() -> None:
    arguments = cuda(step_arguments((16, 512), x0_norm=1.0))

    def function(x0: Tensor, t: Tensor, table: Tensor, seed: Tensor) -> Tensor:
        x_t, wanted = q_sample(x0, t, table, seed, "v_prediction")
        return solver_step(**{**arguments, "sample": x_t, "output": wanted}).sample

    inputs = cuda(q_sample_arguments((16, 512)))
    with torch.no_grad():
        assert torch.equal(torch.compile(function, fullgraph=True)(*inputs), function(*inputs))
