"""solver_step: every route against the formula in float64, term by term."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffgap.ops import _dispatch
from diffgap.ops._native import CPU_MISSING
from diffgap.ops.random import STREAM_SOLVER, normal, sample_seeds
from tests.helpers import assert_close_to_oracle

module = importlib.import_module("diffgap.ops.solver_step")
solver_step: Callable[..., Any] = module.solver_step
COLUMNS: tuple[str, ...] = module.COLUMNS

needs_native = pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))
ROUTES = ["reference", "registered", pytest.param("native", marks=needs_native)]
LOW = [torch.float32, torch.float16, torch.bfloat16]


def take(route: str, patch: pytest.MonkeyPatch) -> None:
    """Send solver_step down a route: the reference, the op's default implementation, or the C++ kernel."""
    patch.setattr(_dispatch, "choose", lambda *_: "eager" if route == "reference" else "native")
    if route == "registered":
        patch.setattr(module, "_solver_step", module._solver_step_default)


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take(request.param, monkeypatch)
    return request.param


def case(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    guided: bool = True,
    corrector: bool = True,
    history: int = 3,
    noise: bool = True,
    per_sample: bool = True,
    rows: int = 5,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of solver_step with random coefficients, zero where a term is left out."""
    generator = torch.Generator().manual_seed(0)

    def tensor() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    table = torch.randn(rows, len(COLUMNS), generator=generator, dtype=torch.float64)
    unused = [f"{part}_h{j}" for part in ("corr", "pred") for j in range(history + 1, 4)]
    unused += [] if noise else ["pred_noise"]
    unused += [] if corrector else [name for name in COLUMNS if name.startswith("corr")]
    table[:, [COLUMNS.index(name) for name in unused]] = 0.0
    return {
        "sample": tensor(),
        "output": tensor(),
        "table": table,
        "step": torch.randint(0, rows, shape[:1], generator=generator) if per_sample else rows - 2,
        "unconditional": tensor() if guided else None,
        "guidance_scale": 2.5 if guided else 1.0,
        "last_sample": tensor() if corrector else None,
        "history": [tensor() for _ in range(history)],
        "seed": sample_seeds(shape[0], generator) if noise else None,
        **options,
    }


def formula(arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Sample by sample and coefficient by coefficient, in the dtype of the sample."""
    a = {"guidance_form": "standard", "guidance_rescale": 0.0, "x0_clamp": None, "x0_norm": None, **arguments}
    results = []
    for i in range(len(a["sample"])):
        step = int(a["step"][i]) if isinstance(a["step"], Tensor) else a["step"]
        c = dict(zip(COLUMNS, a["table"][step].tolist(), strict=True))
        x, output = a["sample"][i], a["output"][i]
        if a["unconditional"] is not None:
            free, g, phi = a["unconditional"][i], a["guidance_scale"], a["guidance_rescale"]
            guided = g * (output - free) + (free if a["guidance_form"] == "standard" else output)
            if phi > 0:
                guided = phi * guided * (output.std() / guided.std()) + (1 - phi) * guided
            output = guided
        x0 = c["x0_sample"] * x + c["x0_output"] * output
        if a["x0_clamp"] is not None:
            x0 = x0.clamp(-a["x0_clamp"], a["x0_clamp"])
        if a["x0_norm"] is not None:
            x0 = x0 / x0.norm(dim=-1, keepdim=True) * a["x0_norm"]
        corrected = x
        earlier = [h[i] for h in a["history"]]
        if a["last_sample"] is not None:
            corrected = c["corr_sample"] * x + c["corr_last"] * a["last_sample"][i] + c["corr_x0"] * x0
            corrected = sum((c[f"corr_h{j}"] * h for j, h in enumerate(earlier, 1)), corrected)
        following = c["pred_corrected"] * corrected + c["pred_sample"] * x + c["pred_output"] * output
        following = following + c["pred_x0"] * x0
        following = sum((c[f"pred_h{j}"] * h for j, h in enumerate(earlier, 1)), following)
        if a["seed"] is not None:
            with _dispatch.backend("eager"):
                noise = normal(a["seed"][i : i + 1], x.shape, step, x.dtype, stream=STREAM_SOLVER)[0]
            following = following + c["pred_noise"] * noise
        results.append((following, x0, corrected))
    following, x0, corrected = (torch.stack(parts) for parts in zip(*results, strict=True))
    return following, x0, corrected


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    def widen(value: Any) -> Any:
        if isinstance(value, list):
            return [widen(item) for item in value]
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: widen(value) for name, value in arguments.items()}


def check(arguments: dict[str, Any]) -> None:
    actual = solver_step(**arguments)
    oracle, eager = formula(widened(arguments)), formula(arguments)
    for ours, exact, plain in zip(actual, oracle, eager, strict=True):
        assert ours.dtype == arguments["sample"].dtype
        assert_close_to_oracle(ours, exact, plain)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("size", [1, 7, 63, 100, 1000])
def test_solver_step_matches_its_formula(route: str, dtype: torch.dtype, size: int) -> None:
    check(case((3, size), dtype))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"x0_clamp": 0.7},
    {"x0_norm": 3.0},
    {"guidance_rescale": 0.7},
    {"guidance_form": "offset"},
    {"guidance_form": "offset", "guidance_rescale": 1.0, "x0_norm": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(4, 37), (2, 3, 300)])
def test_solver_step_options(route: str, shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]) -> None:
    check(case(shape, dtype, **options))


@pytest.mark.parametrize(
    ("guided", "corrector", "history", "noise", "per_sample"),
    [*itertools.product([False, True], [False, True], [0, 1, 3], [False, True], [False, True])],
)
def test_solver_step_terms(
    route: str, guided: bool, corrector: bool, history: int, noise: bool, per_sample: bool
) -> None:
    terms = {"guided": guided, "corrector": corrector, "history": history, "noise": noise}
    check(case((3, 21), per_sample=per_sample, **terms))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ROUTES)
def test_solver_step_any_combination(name: str, data: st.DataObject) -> None:
    # Terms of a few elements may cancel to nearly nothing, of which float32 has no digit; the tests above have such.
    shapes = st.lists(st.integers(1, 19), min_size=2, max_size=4).filter(lambda sizes: math.prod(sizes) >= 16)
    shape = tuple(data.draw(shapes, label="shape"))
    guided = data.draw(st.booleans(), label="guided")
    constraint: dict[str, float] = data.draw(st.sampled_from([{}, {"x0_clamp": 0.5}, {"x0_norm": 2.0}]))
    rescale = data.draw(st.sampled_from([0.0, 0.3])) if guided and shape[1:] != (1,) * (len(shape) - 1) else 0.0
    arguments = case(
        shape,
        data.draw(st.sampled_from(LOW), label="dtype"),
        guided=guided,
        corrector=data.draw(st.booleans(), label="corrector"),
        history=data.draw(st.integers(0, 3), label="history"),
        noise=data.draw(st.booleans(), label="noise"),
        per_sample=data.draw(st.booleans(), label="per_sample"),
        guidance_rescale=rescale,
        guidance_form=data.draw(st.sampled_from(["standard", "offset"])),
        **constraint,
    )
    with pytest.MonkeyPatch.context() as patch:
        take(name, patch)
        check(arguments)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,), (2, 0, 3)])
@pytest.mark.parametrize("options", [{}, {"x0_clamp": 1.0}])
def test_solver_step_takes_empty_shapes(route: str, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    for result in solver_step(**case(shape, **options)):
        assert result.shape == shape


def test_solver_step_takes_an_empty_batch_with_every_option(route: str) -> None:
    for result in solver_step(**case((0, 4), guidance_rescale=0.5, x0_norm=1.0)):
        assert result.shape == (0, 4)


def test_solver_step_takes_one_number_per_sample(route: str) -> None:
    check(case((5,), x0_clamp=0.5))


def test_solver_step_takes_strided_inputs(route: str) -> None:
    arguments = case((6, 40), x0_norm=1.0)

    def strided(value: Any) -> Any:
        if isinstance(value, list):
            return [strided(item) for item in value]
        if not isinstance(value, Tensor):
            return value
        return value.t().contiguous().t() if value.dim() == 2 else torch.stack([value, value], 1)[:, 1]

    spread = {name: strided(value) for name, value in arguments.items()}
    for ours, expected in zip(solver_step(**spread), solver_step(**arguments), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_solver_step_of_a_sample_does_not_depend_on_the_batch(route: str, options: dict[str, Any]) -> None:
    arguments = case((5, 301), **options)
    whole = solver_step(**arguments)
    for i in range(5):

        def pick(value: Any, i: int = i) -> Any:
            if isinstance(value, list):
                return [pick(item) for item in value]
            return value[i : i + 1] if isinstance(value, Tensor) else value

        table = arguments["table"]
        alone = solver_step(**{**{name: pick(value) for name, value in arguments.items()}, "table": table})
        for one, all_of_them in zip(alone, whole, strict=True):
            torch.testing.assert_close(one[0], all_of_them[i], rtol=1e-6, atol=1e-6)


def test_solver_step_without_corrector_returns_the_sample_itself(route: str) -> None:
    arguments = case((2, 3), corrector=False)
    assert solver_step(**arguments).corrected is arguments["sample"]


def test_solver_step_puts_x0_on_the_sphere_and_leaves_zero_rows(route: str) -> None:
    arguments = case((4, 3, 50), x0_norm=7.0)
    for name in ("sample", "output", "unconditional"):
        arguments[name][1, 2] = 0.0
    x0 = solver_step(**arguments).x0
    lengths = x0.norm(dim=-1)
    assert lengths[1, 2] == 0
    lengths[1, 2] = 7.0
    torch.testing.assert_close(lengths, torch.full((4, 3), 7.0))


def test_solver_step_rescale_of_a_constant_output_is_finite(route: str) -> None:
    arguments = case((2, 8), guidance_rescale=0.5)
    arguments["output"].fill_(1.0)
    arguments["unconditional"].fill_(1.0)
    plain = solver_step(**{**arguments, "guidance_rescale": 0.0})
    torch.testing.assert_close(solver_step(**arguments).sample, plain.sample)


def test_solver_step_takes_an_output_of_another_dtype(route: str) -> None:
    arguments = case((3, 20))
    arguments["output"] = arguments["output"].bfloat16()
    same = {**arguments, "output": arguments["output"].float()}
    for ours, expected in zip(solver_step(**arguments), solver_step(**same), strict=True):
        assert torch.equal(ours, expected)


def test_solver_step_takes_a_float32_table(route: str) -> None:
    arguments = case((3, 20))
    narrow = arguments["table"].float()
    ours = solver_step(**{**arguments, "table": narrow}).sample
    assert torch.equal(ours, solver_step(**{**arguments, "table": narrow.double()}).sample)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_solver_step_gradient(options: dict[str, Any]) -> None:
    arguments = case((2, 5), torch.float64, **options)
    names = ("sample", "output", "unconditional", "last_sample")
    leaves = [arguments[name].requires_grad_() for name in names]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(solver_step(**{**arguments, **dict(zip(names, values, strict=True))}))

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("learned", ["output", "table", "guidance_scale"])
def test_solver_step_with_gradients_takes_the_reference(monkeypatch: pytest.MonkeyPatch, learned: str) -> None:
    monkeypatch.setattr(_dispatch, "choose", lambda *_: "native")
    arguments = case((2, 5))
    arguments[learned] = torch.as_tensor(arguments[learned]).requires_grad_()
    (gradient,) = torch.autograd.grad(solver_step(**arguments).sample.sum(), arguments[learned])
    assert gradient.abs().max() > 0.0
    assert solver_step(**arguments).sample.requires_grad
    with _dispatch.backend("native"), pytest.raises(RuntimeError, match="no_grad"):
        solver_step(**arguments)
    with torch.no_grad(), _dispatch.backend("auto"):
        assert not solver_step(**arguments).sample.requires_grad


@pytest.mark.parametrize("per_sample", [False, True])
def test_solver_step_compiles_in_one_graph(route: str, per_sample: bool) -> None:
    arguments = case((3, 21), per_sample=per_sample, x0_norm=1.0, guidance_rescale=0.5)
    compiled = torch.compile(solver_step, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(**arguments), solver_step(**arguments), strict=True):
        torch.testing.assert_close(ours, expected)


def test_solver_step_keeps_its_dtype_under_autocast(route: str) -> None:
    arguments = case((3, 21), guidance_rescale=0.5, x0_norm=1.0)
    expected = solver_step(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        actual = solver_step(**arguments)
    for ours, exact in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, exact)


def test_solver_step_registration() -> None:
    a, b = torch.randn(2, 3, 10)
    table = torch.randn(4, len(COLUMNS), dtype=torch.float64)
    full = (a, b, table, torch.tensor([0, 3, 1]), 0, b, 2.0, True, 0.5, a, a, b, a, sample_seeds(3), None, 2.0)
    plain = table.clone()
    needing = [i for i, name in enumerate(COLUMNS) if name.endswith(("last", "h1", "h2", "h3", "noise"))]
    plain[:, needing] = 0.0
    bare = (a, b, plain, None, 2, None, 1.0, False, 0.0, None, None, None, None, None, 0.5, None)
    for arguments in (full, bare):
        torch.library.opcheck(torch.ops.diffgap.solver_step.default, arguments)


@needs_native
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_native_solver_step_does_not_depend_on_the_number_of_threads(options: dict[str, Any]) -> None:
    arguments = case((37, 999), **options)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with _dispatch.backend("native"):
                results.append(solver_step(**arguments))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)
