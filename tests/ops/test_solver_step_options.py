"""solver_step: what it keeps apart, samples and elements that are not finite, and what it refuses, on all routes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffgap.ops import _dispatch
from diffgap.ops.q_sample import q_sample
from tests.helpers import assert_close_to_oracle
from tests.ops import routes
from tests.ops.test_solver_step import COLUMNS, LOW, OPTIONS, case, check, module, needs_native, solver_step, widened


def take(route: str, patch: pytest.MonkeyPatch) -> None:
    defaults = {"_solver_step": "_solver_step_default", "_solver_step_out": "_solver_step_out_default"}
    routes.take(route, patch, module, **defaults)


@pytest.fixture(params=routes.ROUTES)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take(request.param, monkeypatch)
    return request.param


def picked(arguments: dict[str, Any], index: Tensor) -> dict[str, Any]:
    """The arguments of some samples of the batch."""

    def pick(value: Any) -> Any:
        if isinstance(value, list):
            return [pick(item) for item in value]
        return value[index] if isinstance(value, Tensor) else value

    return {name: value if name == "table" else pick(value) for name, value in arguments.items()}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(9, 301), (9, 3, 5, 7)])
def test_bits_of_a_sample_depend_on_nothing_else(
    route: str, shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Any order of the batch, any part of it, and a row of its own or the batch's."""
    arguments = case(shape, dtype, **options)
    whole = solver_step(**arguments)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    for shuffled, ordered in zip(solver_step(**picked(arguments, order)), whole, strict=True):
        assert torch.equal(shuffled, ordered[order])
    for i in range(9):
        alone = {**picked(arguments, torch.tensor([i])), "step": int(arguments["step"][i])}
        for one, several in zip(solver_step(**alone), whole, strict=True):
            assert torch.equal(one[0], several[i])


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(2, 5, 1), (2, 5, 3), (3, 7, 63), (2, 3, 257), (1, 2, 3, 41), (2, 1000)])
@pytest.mark.parametrize("form", ["standard", "offset"])
def test_rows_of_any_length_are_put_on_the_sphere(
    route: str, form: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    check(case(shape, dtype, x0_norm=3.0, guidance_form=form))


@pytest.mark.parametrize("options", [*OPTIONS, {"guidance_scale": 0.0}, {"guidance_scale": -2.0}], ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (4, 1, 255), (2, 513), (3, 5, 129)])
def test_guidance_at_the_edges_of_tiles(route: str, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    for dtype in LOW:
        check(case(shape, dtype, **options))


@pytest.mark.parametrize("dtype", LOW)
def test_rescale_of_outputs_far_from_zero(route: str, dtype: torch.dtype) -> None:
    """A variance as the mean square less the squared mean would be rounding error here."""
    arguments = case((3, 4000), dtype, guidance_rescale=1.0)
    for name in ("output", "unconditional"):
        arguments[name] = (arguments[name].double() + 300).to(dtype)
    check(arguments)


def test_expanded_inputs_are_read_right(route: str) -> None:
    arguments = case((4, 6, 10), x0_norm=1.0, guidance_rescale=0.3)
    row, column = torch.randn(2, 10), torch.randn(4, 6, 1)
    arguments |= {"output": row[0].expand(4, 6, 10), "unconditional": column.expand(4, 6, 10)}
    arguments["history"][1] = row[1].expand(4, 6, 10)
    arguments["sample"] = arguments["sample"].transpose(0, 2).contiguous().transpose(0, 2)
    check(arguments)


PLACES = ["sample", "output", "unconditional", "last_sample", "history0", "history2"]


@pytest.mark.parametrize("options", [{}, {"x0_clamp": 0.7}, {"x0_norm": 2.0}, {"guidance_rescale": 0.7}], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", LOW)
def test_what_is_not_finite_stays_where_it_belongs(
    route: str, dtype: torch.dtype, place: str, bad: float, options: dict[str, Any]
) -> None:
    arguments = case((3, 5, 41), dtype, **options)
    spoilt = arguments["history"][int(place[-1])] if place.startswith("history") else arguments[place]
    spoilt[1, 2, 30] = bad
    exact = solver_step(**widened(arguments))
    for ours, expected in zip(solver_step(**arguments), exact, strict=True):
        elsewhere = torch.ones(3, 5, 41, dtype=torch.bool)
        elsewhere[(1, 2) if "x0_norm" in options else (1, 2, 30)] = False
        assert ours[elsewhere].isfinite().all()
        kinds = [(x.isnan(), x == torch.inf, x == -torch.inf) for x in (ours, expected)]
        assert all(torch.equal(*masks) for masks in zip(*kinds, strict=True))
        finite = expected.isfinite()
        assert_close_to_oracle(ours[finite], expected[finite], expected.to(dtype)[finite])


@pytest.mark.parametrize("dtype", LOW)
def test_clamp_keeps_nan_and_bounds_infinities(route: str, dtype: torch.dtype) -> None:
    sample = torch.tensor([[float("nan"), torch.inf, -torch.inf, 2.0, -2.0, 0.5]] * 9, dtype=dtype)
    table = torch.zeros(1, len(COLUMNS), dtype=torch.float64)
    table[0, COLUMNS.index("x0_sample")] = table[0, COLUMNS.index("pred_x0")] = 1.0
    x0 = solver_step(sample, torch.zeros_like(sample), table, 0, x0_clamp=1.0).x0
    expected = torch.tensor([[float("nan"), 1.0, -1.0, 1.0, -1.0, 0.5]] * 9, dtype=dtype)
    assert torch.equal(x0.nan_to_num(9.0), expected.nan_to_num(9.0))


def test_noise_is_that_of_the_samples_own_seed_and_step(route: str) -> None:
    """Two samples with one seed and different steps, two with one step and different seeds, and a pair of twins."""
    arguments = case((5, 2, 37))
    arguments["seed"] = torch.tensor([7, 7, 1 << 40, -1, 7])
    arguments["step"] = torch.tensor([0, 3, 3, 3, 0])
    for name in ("sample", "output", "unconditional", "last_sample"):
        arguments[name][4] = arguments[name][0]
    for earlier in arguments["history"]:
        earlier[4] = earlier[0]
    check(arguments)
    following = solver_step(**arguments).sample
    assert torch.equal(following[0], following[4])
    quiet = solver_step(**{**arguments, "table": zeroed(arguments["table"], "pred_noise"), "seed": None}).sample
    noise = (following - quiet).double().flatten(1)
    noise /= arguments["table"][arguments["step"]][:, [COLUMNS.index("pred_noise")]]
    alike = torch.corrcoef(noise)
    alike[[0, 4], [4, 0]] = 0.0
    assert alike.fill_diagonal_(0.0).abs().max() < 0.6  # 5 deviations of 74 elements


def zeroed(table: Tensor, column: str) -> Tensor:
    table = table.clone()
    table[:, COLUMNS.index(column)] = 0.0
    return table


def test_rows_ask_for_the_terms_of_the_samples_that_use_them(route: str) -> None:
    """Of per-sample rows it is enough that one needs a term."""
    arguments = case((3, 4), noise=False)
    quiet = {**arguments, "seed": None}
    assert solver_step(**quiet).sample.isfinite().all()
    for column, names, error in (
        ("pred_noise", {"seed": None}, "seed"),
        ("corr_last", {"last_sample": None}, "last_sample"),
        ("pred_h3", {"history": arguments["history"][:2]}, "history"),
    ):
        table = torch.zeros_like(arguments["table"])
        table[4, COLUMNS.index(column)] = -1.0
        chosen = {**quiet, "table": table, **names}
        solver_step(**{**chosen, "step": torch.tensor([0, 1, 3])})
        with pytest.raises(ValueError, match=f"^{error}: not given"):
            solver_step(**{**chosen, "step": torch.tensor([0, 4, 3])})


INTEGERS = torch.ones(3, 4, dtype=torch.int32)
INDEX = torch.ones(3, dtype=torch.int64)
# What is changed in case((3, 4)), the error, and the argument it names.
BAD_INPUT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"sample": INTEGERS}, TypeError, "sample"),
    ({"sample": torch.tensor(1.0)}, ValueError, "sample"),
    ({"output": torch.ones(3, 5)}, ValueError, "output"),
    ({"output": torch.ones(4)}, ValueError, "output"),
    ({"output": INTEGERS}, TypeError, "output"),
    ({"output": torch.ones(3, 4, device="meta")}, ValueError, "output"),
    ({"unconditional": torch.ones(4)}, ValueError, "unconditional"),
    ({"unconditional": INTEGERS}, TypeError, "unconditional"),
    ({"unconditional": torch.ones(3, 4, device="meta")}, ValueError, "unconditional"),
    ({"last_sample": torch.ones(4, 3)}, ValueError, "last_sample"),
    ({"last_sample": INTEGERS}, TypeError, "last_sample"),
    ({"last_sample": torch.ones(3, 4, device="meta")}, ValueError, "last_sample"),
    ({"history": [torch.ones(3, 4), torch.ones(3, 1), torch.ones(3, 4)]}, ValueError, r"history\[1\]"),
    ({"history": [torch.ones(3, 4), torch.ones(3, 4), INTEGERS]}, TypeError, r"history\[2\]"),
    ({"history": [torch.ones(3, 4, device="meta"), *[torch.ones(3, 4)] * 2]}, ValueError, r"history\[0\]"),
    ({"history": [torch.ones(3, 4)] * 4}, ValueError, "history"),
    ({"table": torch.ones(5, 7)}, ValueError, "table"),
    ({"table": torch.ones(len(COLUMNS))}, ValueError, "table"),
    ({"table": torch.ones(5, len(COLUMNS), dtype=torch.int64)}, ValueError, "table"),
    ({"table": torch.ones(5, len(COLUMNS), device="meta")}, ValueError, "table"),
    ({"table": [1.0]}, ValueError, "table"),
    ({"step": 5}, ValueError, "step"),
    ({"step": -1}, ValueError, "step"),
    ({"step": 1.5}, TypeError, "step"),
    ({"step": torch.tensor([0, 1, 5])}, ValueError, "step"),
    ({"step": torch.tensor([0, -1, 2])}, ValueError, "step"),
    ({"step": torch.tensor([0, 1])}, ValueError, "step"),
    ({"step": torch.tensor(2)}, ValueError, "step"),
    ({"step": torch.tensor([0.0, 1.0, 2.0])}, TypeError, "step"),
    ({"step": torch.tensor([0, 1, 2], dtype=torch.int32)}, TypeError, "step"),
    ({"step": INDEX.to("meta")}, ValueError, "step"),
    ({"seed": torch.ones(2, dtype=torch.int64)}, ValueError, "seed"),
    ({"seed": torch.ones(3)}, TypeError, "seed"),
    ({"seed": 3}, TypeError, "seed"),
    ({"seed": INDEX.to("meta")}, ValueError, "seed"),
    ({"guidance_scale": float("nan")}, ValueError, "guidance_scale"),
    ({"guidance_scale": float("inf")}, ValueError, "guidance_scale"),
    ({"guidance_form": "other"}, ValueError, "guidance_form"),
    ({"guidance_rescale": 1.5}, ValueError, "guidance_rescale"),
    ({"guidance_rescale": -0.1}, ValueError, "guidance_rescale"),
    ({"guidance_rescale": float("nan")}, ValueError, "guidance_rescale"),
    (case((3, 1), guidance_rescale=0.5), ValueError, "guidance_rescale"),
    ({"x0_clamp": -1.0}, ValueError, "x0_clamp"),
    ({"x0_clamp": 0.0}, ValueError, "x0_clamp"),
    ({"x0_clamp": float("nan")}, ValueError, "x0_clamp"),
    ({"x0_norm": float("inf")}, ValueError, "x0_norm"),
    ({"x0_norm": 0.0}, ValueError, "x0_norm"),
    ({"x0_clamp": 1.0, "x0_norm": 1.0}, ValueError, "x0_norm"),
    (case((3,), x0_norm=1.0), ValueError, "x0_norm"),
    ({"last_sample": None}, ValueError, "last_sample"),
    ({"history": []}, ValueError, "history"),
    ({"history": [torch.ones(3, 4)]}, ValueError, "history"),
    ({"seed": None}, ValueError, "seed"),
]


BACKENDS = ["eager", "auto", pytest.param("native", marks=needs_native)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("change", "error", "named"), BAD_INPUT)
def test_solver_step_refuses_bad_input(
    backend: _dispatch.Backend, change: dict[str, Any], error: type[Exception], named: str
) -> None:
    with _dispatch.backend(backend), pytest.raises(error, match=f"^{named}: "):
        solver_step(**{**case((3, 4)), **change})


def noise_and_step(x0: Tensor, t: Tensor, levels: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """Both ops of a training step that rolls the solver out, with work for the compiler around them."""
    x_t, target, noise = q_sample(2 * x0, t, levels, arguments["seed"], "v_prediction", return_noise=True)
    result = solver_step(**{**arguments, "sample": x_t, "output": target.cos()})
    return result.sample + 1, result.x0, result.corrected, noise


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_noising_and_stepping_compile_to_one_graph(route: str, compiler: str, per_sample: bool) -> None:
    if compiler == "inductor" and route != "native":
        pytest.skip("one inductor case is enough: it compiles C++")
    arguments = case((3, 21), per_sample=per_sample, x0_norm=1.0, guidance_rescale=0.5)
    inputs = torch.randn(3, 21), torch.tensor([0, 2, 1]), torch.rand(3, 2, dtype=torch.float64), arguments
    torch._dynamo.reset()
    compiled = torch.compile(noise_and_step, fullgraph=True, backend=compiler)
    for ours, expected in zip(compiled(*inputs), noise_and_step(*inputs), strict=True):
        assert_close_to_oracle(ours, expected.double())
