"""The device code of solver_step, run on the host thread by thread."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from diffgap.diffusion import NoiseSchedule, build_solver
from diffgap.ops.random import STREAM_SOLVER, sample_seeds
from tests.helpers import assert_close_to_oracle
from tests.kernels import host_check

pytestmark = pytest.mark.skipif(host_check.obstacle() is not None, reason=str(host_check.obstacle()))

module = importlib.import_module("diffgap.ops.solver_step")
COLUMNS: tuple[str, ...] = module.COLUMNS
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 7, 63, 100, 512, 1000, 1025]
RESULTS = ("next", "x0", "corrected")

#: The op's arguments in the order of its schema.
Arguments = dict[str, Any]


def case(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    guided: bool = True,
    corrector: bool = True,
    history: int = 3,
    noise: bool = True,
    per_sample: bool = True,
    **options: Any,
) -> Arguments:
    """Random tensors and coefficients, every term in use."""
    generator = torch.Generator().manual_seed(0)

    def tensor() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    terms = [tensor() for _ in range(7)]
    earlier = [terms[4 + j] if j < history else None for j in range(3)]
    arguments: Arguments = {
        "sample": terms[0],
        "output": terms[1],
        "table": torch.randn(5, len(COLUMNS), generator=generator, dtype=torch.float64),
        "steps": torch.randint(0, 5, shape[:1], generator=generator) if per_sample else None,
        "step": 0 if per_sample else 3,
        "unconditional": terms[2] if guided else None,
        "guidance_scale": 2.5,
        "offset_form": False,
        "guidance_rescale": 0.0,
        "last_sample": terms[3] if corrector else None,
        "h1": earlier[0],
        "h2": earlier[1],
        "h3": earlier[2],
        "seed": sample_seeds(shape[0], generator) if noise else None,
        "x0_clamp": None,
        "x0_norm": None,
    }
    assert options.keys() <= arguments.keys()
    return {**arguments, **options}


def oracle(arguments: Arguments) -> dict[str, Tensor]:
    """The eager reference in float64."""

    def widen(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    results = module.solver_step_reference(*map(widen, arguments.values()))
    return {name: result for name, result in zip(RESULTS, results, strict=True) if result is not None}


def check(arguments: Arguments, **options: Any) -> dict[str, Tensor]:
    actual = host_check.solver_step(*arguments.values(), **options)
    expected = oracle(arguments)
    assert actual.keys() == expected.keys()
    for name, result in actual.items():
        assert result.dtype == arguments["sample"].dtype
        assert_close_to_oracle(result, expected[name])
    return actual


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() <= expected.keys()
    for name, result in actual.items():
        assert torch.equal(result, expected[name]), name


#: Each takes another way through the kernels: no reduction, over rows, over samples, over both.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"x0_clamp": 0.7},
    {"x0_norm": 3.0},
    {"guidance_rescale": 0.7},
    {"offset_form": True, "guidance_rescale": 1.0, "x0_norm": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_solver_step_matches_the_oracle(size: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    if size == 1:  # a standard deviation needs two elements
        options = {**options, "guidance_rescale": 0.0}
    check(case((3, size), dtype, **options))


# Rows that begin and end inside of a unit, several rows of a block, rows and samples that no block holds at once.
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (5, 3, 37),
        (2, 3, 300),
        (2, 2, 3, 64),
        (40, 4),
        (2, 4100),
        (2, 3, 2056),
        (1, 3, 2051),
        (1, 9000),
        (2, 3, 127),
        (2, 3, 255),
    ],
)
def test_solver_step_of_other_shapes(shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]) -> None:
    check(case(shape, dtype, **options))


@pytest.mark.parametrize(
    ("guided", "corrector", "history", "noise", "per_sample"),
    [*itertools.product([False, True], [False, True], [0, 1, 3], [False, True], [False, True])],
)
@pytest.mark.parametrize("options", [{}, {"x0_norm": 2.0}], ids=str)
def test_solver_step_terms(
    guided: bool, corrector: bool, history: int, noise: bool, per_sample: bool, options: dict[str, Any]
) -> None:
    terms: dict[str, Any] = {"guided": guided, "corrector": corrector, "history": history, "noise": noise}
    check(case((3, 21), per_sample=per_sample, **terms, **options))


SOLVERS: list[tuple[str, dict[str, Any]]] = [
    ("ddpm", {}),
    ("ddim", {}),
    ("ddim", {"eta": 1.0}),
    ("dpmpp", {"order": 1}),
    ("dpmpp", {"order": 2}),
    ("dpmpp", {"order": 3}),
    ("sde_dpmpp", {}),
    ("unipc", {"order": 1}),
    ("unipc", {"order": 3}),
    ("euler_flow", {}),
    ("euler_flow", {"stochastic_sampling": True}),
]


@pytest.mark.parametrize(("name", "options"), SOLVERS)
@pytest.mark.parametrize("offset_form", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_solver_step_of_every_row_of_every_table(
    name: str, options: dict[str, Any], offset_form: bool, dtype: torch.dtype
) -> None:
    kind: Any = "flow" if name == "euler_flow" else "scaled_linear"
    table = build_solver(name, NoiseSchedule(kind, prediction_type="v_prediction"), 6, **options)
    arguments = case(
        (6, 40),
        dtype,
        corrector=table.corrects,
        history=table.history,
        noise=table.stochastic,
        table=table.coefficients,
        steps=torch.arange(6),
        offset_form=offset_form,
        x0_norm=6.0,
    )
    together = check(arguments)
    for step in range(6):
        one = check({**arguments, "steps": None, "step": step})
        assert_same({name: result[step] for name, result in one.items()}, {n: x[step] for n, x in together.items()})


def test_solver_step_draws_the_noise_of_the_cpu_op() -> None:
    arguments = case((3, 100), per_sample=False, guided=False, corrector=False, history=0)
    arguments["table"] = torch.zeros(5, len(COLUMNS), dtype=torch.float64)
    arguments["table"][:, COLUMNS.index("pred_noise")] = 1.0
    for steps, step in ((None, 4), (torch.tensor([4, 0, 2]), 0)):
        actual = host_check.solver_step(*{**arguments, "steps": steps, "step": step}.values())
        drawn = torch.ops.diffgap.normal(arguments["seed"], 100, steps, step, STREAM_SOLVER)
        assert torch.equal(actual["next"], drawn)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_solver_step_takes_a_float32_table(options: dict[str, Any]) -> None:
    arguments = case((3, 40), **options)
    narrow = arguments["table"].float()
    ours = host_check.solver_step(*{**arguments, "table": narrow}.values())
    assert_same(ours, host_check.solver_step(*{**arguments, "table": narrow.double()}.values()))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_solver_step_reads_steps_and_seeds_of_any_stride(options: dict[str, Any]) -> None:
    arguments = case((5, 40), **options)
    expected = host_check.solver_step(*arguments.values())
    spread = {name: torch.stack([arguments[name]] * 3, 1)[:, 1] for name in ("steps", "seed")}
    assert_same(host_check.solver_step(*{**arguments, **spread}.values()), expected)
    counter = {**arguments, "steps": torch.tensor([2]).expand(5)}
    assert_same(
        host_check.solver_step(*counter.values()),
        host_check.solver_step(*{**arguments, "steps": None, "step": 2}.values()),
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 512), (2, 3, 64), (2, 4100)])
def test_solver_step_of_misaligned_tensors_has_the_same_bits(
    shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    arguments = case(shape, dtype, **options)
    aligned = host_check.solver_step(*arguments.values())
    assert_same(host_check.solver_step(*arguments.values(), shift=1), aligned)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("threads", [32, 64])
@pytest.mark.parametrize("shape", [(9, 63), (3, 512), (2, 3, 300)])
def test_solver_step_does_not_depend_on_the_block(
    shape: tuple[int, ...], threads: int, options: dict[str, Any]
) -> None:
    arguments = case(shape, **options)
    assert_same(
        host_check.solver_step(*arguments.values(), threads=threads), host_check.solver_step(*arguments.values())
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_solver_step_goes_on_where_the_grid_is_too_small(dtype: torch.dtype) -> None:
    host_check.load().set_grid_limit(3)
    try:
        check(case((2, 5000), dtype), threads=32)
        assert host_check.load().last_launch()["grid"] == (2, 3)
    finally:
        host_check.load().set_grid_limit(0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(5, 301), (5, 3, 64)])
def test_solver_step_of_a_sample_does_not_depend_on_the_batch(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    arguments = case(shape, **options)
    whole = host_check.solver_step(*arguments.values())
    for i in range(5):
        alone: Arguments = {
            name: value[i : i + 1] if isinstance(value, Tensor) and name != "table" else value
            for name, value in arguments.items()
        }
        one = host_check.solver_step(*alone.values())
        assert_same({name: x[0] for name, x in one.items()}, {name: x[i] for name, x in whole.items()})


ALIASES: list[dict[str, str]] = [
    {"next": "sample"},
    {"next": "sample", "x0": "h3", "corrected": "last"},
    {"next": "last", "x0": "output", "corrected": "sample"},
    {"next": "unconditional", "x0": "h1", "corrected": "h2"},
    {"x0": "sample", "next": "output"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("into", ALIASES, ids=str)
@pytest.mark.parametrize("shape", [(3, 100), (2, 3, 37), (2, 9000)])
def test_solver_step_over_its_own_terms_has_the_same_bits(
    shape: tuple[int, ...], into: dict[str, str], options: dict[str, Any]
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        arguments = case(shape, dtype, **options)
        expected = host_check.solver_step(*arguments.values())
        assert_same(host_check.solver_step(*arguments.values(), into=into), expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("wanted", [("next",), ("next", "x0"), ("next", "corrected")])
def test_solver_step_writes_what_is_wanted(wanted: tuple[str, ...], options: dict[str, Any]) -> None:
    arguments = case((3, 100), **options)
    some = host_check.solver_step(*arguments.values(), wanted=wanted)
    assert tuple(some) == wanted
    assert_same(some, host_check.solver_step(*arguments.values()))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("wrong", [-1, 5, 1 << 40, -(1 << 62)])
def test_solver_step_of_a_row_outside_the_table_is_nan(wrong: int, options: dict[str, Any]) -> None:
    arguments = case((4, 37), **options)
    clean = host_check.solver_step(*arguments.values())
    arguments["steps"][2] = wrong
    broken = host_check.solver_step(*arguments.values())
    others = torch.tensor([0, 1, 3])
    for name, result in broken.items():
        assert result[2].isnan().all()
        assert torch.equal(result[others], clean[name][others])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_solver_step_keeps_what_is_not_finite_in_its_own_sample(options: dict[str, Any]) -> None:
    arguments = case((4, 3, 24), **options)
    clean = host_check.solver_step(*arguments.values())
    arguments["output"][1, 0, 3], arguments["sample"][2, 1, 4] = float("nan"), float("nan")
    broken = host_check.solver_step(*arguments.values())
    for name, result in broken.items():
        assert result[1].isnan().any() and result[2].isnan().any()
        assert torch.equal(result[[0, 3]], clean[name][[0, 3]])
    assert broken["x0"][1, 0, 3].isnan() and broken["x0"][2, 1, 4].isnan()


def test_solver_step_leaves_rows_of_zeros() -> None:
    arguments = case((2, 3, 48), x0_norm=7.0)
    for name in ("sample", "output", "unconditional"):
        arguments[name][1, 2] = 0.0
    x0 = host_check.solver_step(*arguments.values())["x0"]
    lengths = torch.full((2, 3), 7.0)
    lengths[1, 2] = 0.0
    torch.testing.assert_close(x0.norm(dim=-1), lengths)


def test_solver_step_rescale_of_a_constant_output_is_finite() -> None:
    arguments = case((2, 8), guidance_rescale=0.5)
    arguments["output"].fill_(1.0)
    arguments["unconditional"].fill_(1.0)
    plain = host_check.solver_step(*{**arguments, "guidance_rescale": 0.0}.values())
    assert_same(host_check.solver_step(*arguments.values()), plain)


def test_solver_step_rescale_of_an_offset_output_is_accurate() -> None:
    arguments = case((2, 3000), guidance_rescale=0.7)
    arguments["output"] += 1000.0
    arguments["unconditional"] += 1000.0
    check(arguments)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,), (2, 0, 3)])
@pytest.mark.parametrize("options", [{}, {"x0_clamp": 1.0}], ids=str)
def test_solver_step_of_nothing_launches_nothing(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    before = host_check.load().launches()
    results = host_check.solver_step(*case(shape, **options).values())
    assert all(result.shape == shape for result in results.values())
    assert host_check.load().launches() == before


@pytest.mark.parametrize(
    ("shape", "options", "grid", "block"),
    [
        ((64, 512), {"x0_norm": 1.0}, (64, 1), (128, 1)),
        ((4, 1024), {"x0_norm": 1.0}, (4, 1), (256, 1)),
        ((4, 2, 512), {"x0_norm": 1.0}, (8, 1), (128, 1)),
        ((4, 512), {"guidance_rescale": 0.5, "x0_norm": 1.0}, (4, 1), (128, 1)),
        ((2, 4, 64, 64), {"guidance_rescale": 0.5}, (2, 1), (512, 1)),
        ((2, 4, 64, 64), {}, (2, 32), (128, 1)),
        ((64, 512), {}, (64, 1), (128, 1)),
        ((3, 768), {}, (3, 2), (96, 1)),
        ((9, 20), {}, (1, 1), (8, 16)),
        ((9, 20), {"x0_norm": 1.0}, (1, 1), (8, 16)),
        ((40, 100), {"x0_norm": 1.0}, (10, 1), (32, 4)),
    ],
)
def test_solver_step_is_one_launch(
    shape: tuple[int, ...], options: dict[str, Any], grid: tuple[int, int], block: tuple[int, int]
) -> None:
    before = host_check.load().launches()
    host_check.solver_step(*case(shape, **options).values())
    assert host_check.load().launches() - before == 2  # the two orders of host_check
    assert host_check.load().last_launch() == {"grid": grid, "block": block}
