"""solver_step with ``out``: results in given memory, which may be that of its arguments, on all routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffgap.ops import _dispatch
from diffgap.ops.q_sample import q_sample
from diffgap.ops.random import sample_seeds
from tests.helpers import assert_close_to_oracle
from tests.ops import routes
from tests.ops.test_solver_step import COLUMNS, LOW, OPTIONS, case, needs_native, solver_step
from tests.ops.test_solver_step_options import BACKENDS, BAD_INPUT, take

Out = tuple[Tensor, "Tensor | None", "Tensor | None"]


@pytest.fixture(params=routes.ROUTES)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take(request.param, monkeypatch)
    return request.param


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    def copy(value: Any) -> Any:
        if isinstance(value, list):
            return [copy(item) for item in value]
        return value.clone() if isinstance(value, Tensor) else value

    return {name: copy(value) for name, value in arguments.items()}


def tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors among the arguments, by name; the history as h1, h2 and h3."""
    found = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    return found | {f"h{j}": value for j, value in enumerate(arguments["history"], 1)}


def places(arguments: dict[str, Any], names: tuple[str | None, str | None, str | None]) -> Out:
    """``out`` of arguments by their names, of fresh memory for "new", and of None."""
    given = tensors(arguments)
    like = arguments["sample"]
    first, *rest = (torch.empty_like(like) if name == "new" else given[name] if name else None for name in names)
    assert isinstance(first, Tensor)
    return first, *rest


def check(arguments: dict[str, Any], names: tuple[str | None, str | None, str | None]) -> None:
    """The bits of the functional form, in the memory that was given and nowhere else."""
    expected = solver_step(**copied(arguments))
    before = tensors(copied(arguments))
    out = places(arguments, names)
    result = solver_step(**arguments, out=out)
    for ours, given, wanted in zip(result, out, expected, strict=True):
        assert ours is given
        assert ours is None or torch.equal(ours, wanted)
    for name, tensor in tensors(arguments).items():
        assert name in names or torch.equal(tensor, before[name]), f"{name} was written to"


TERMS = ("sample", "output", "unconditional", "last_sample", "h1", "h2", "h3")
PLACES: list[tuple[str | None, str | None, str | None]] = [
    ("new", "new", "new"),
    ("new", None, None),
    ("sample", None, None),
    ("sample", "h3", None),
    ("sample", "h3", "last_sample"),
    ("sample", None, "last_sample"),
    *((TERMS[i], TERMS[(i + 1) % 7], TERMS[(i + 2) % 7]) for i in range(7)),  # each result over each argument
]


@pytest.mark.parametrize("names", PLACES, ids=str)
@pytest.mark.parametrize("dtype", LOW)
def test_results_go_where_told(
    route: str, dtype: torch.dtype, names: tuple[str | None, str | None, str | None]
) -> None:
    for options in OPTIONS:
        for shape in ((3, 7), (2, 3, 257)):
            check(case(shape, dtype, **options), names)
    check(case((37, 999), dtype), names)  # enough for two threads


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 63, 100, 1000])
@pytest.mark.parametrize("per_sample", [False, True])
def test_results_of_any_size_replace_arguments(route: str, per_sample: bool, size: int, dtype: torch.dtype) -> None:
    check(case((3, size), dtype, per_sample=per_sample), ("sample", "h3", "last_sample"))
    plain = case((3, size), dtype, per_sample=per_sample, guided=False, corrector=False, history=1, noise=False)
    check(plain, ("sample", "h1", None))
    check(case((size,), dtype, per_sample=per_sample), ("sample", "h3", "last_sample"))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,), (2, 0, 3)])
def test_results_may_be_empty(route: str, shape: tuple[int, ...]) -> None:
    check(case(shape), ("sample", "h3", "last_sample"))


def test_arguments_with_gaps_and_of_other_dtypes_are_only_read(route: str) -> None:
    """Views into the very memory that is written: they are read in full before."""
    arguments = case((6, 6), x0_norm=1.0, guidance_rescale=0.5)
    sample = arguments["sample"]
    arguments["output"], arguments["last_sample"] = sample.t(), sample[0].expand(6, 6)
    arguments["history"][0] = arguments["history"][0].bfloat16()
    expected = solver_step(**copied(arguments))
    out = (sample, torch.empty(6, 6), torch.empty(6, 6))
    solver_step(**arguments, out=out)
    for ours, wanted in zip(out, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)


@needs_native
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_results_in_place_do_not_depend_on_the_number_of_threads(options: dict[str, Any]) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            arguments = case((40, 7, 129), **options)
            with _dispatch.backend("native"):
                results.append(solver_step(**arguments, out=places(arguments, ("sample", "h3", "last_sample"))))
    finally:
        torch.set_num_threads(before)
    for one, two, five in zip(*results, strict=True):
        assert torch.equal(one, two) and torch.equal(one, five)


def test_a_trajectory_in_place_is_the_functional_one(route: str) -> None:
    """UniPC's memory: one sample, one corrected sample and a ring of three predictions, none allocated on the way."""
    steps = 7
    start = case((5, 129), rows=steps, per_sample=False, x0_norm=4.0)
    start["table"] /= 4
    outputs = torch.randn(steps, 2, 5, 129, generator=torch.Generator().manual_seed(2))
    x, last, history = start["sample"], start["last_sample"], start["history"]
    memory = copied(start)
    ring, options = memory["history"], {name: start[name] for name in ("table", "guidance_scale", "seed", "x0_norm")}
    for step, (output, free) in enumerate(outputs):
        options |= {"step": step, "unconditional": free}
        x, x0, last = solver_step(x, output, last_sample=last, history=history, **options)
        history = [x0, *history[:2]]
        out = (memory["sample"], ring[-1], memory["last_sample"])
        solver_step(memory["sample"], output, last_sample=memory["last_sample"], history=ring, out=out, **options)
        ring = [ring[-1], *ring[:2]]
        for ours, wanted in zip((memory["sample"], memory["last_sample"], *ring), (x, last, *history), strict=True):
            assert torch.equal(ours, wanted)
    assert {x.data_ptr() for x in ring} == {x.data_ptr() for x in memory["history"]}


def test_a_step_in_place_is_one_operation() -> None:
    calls: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    arguments = case((3, 21), per_sample=False)
    out = places(arguments, ("sample", "h3", "last_sample"))
    with pytest.MonkeyPatch.context() as patch, Record():
        patch.setattr(_dispatch, "choose", lambda *_: "native")
        solver_step(**arguments, out=out)
    assert calls == ["diffgap::solver_step_out"]


def untouched(arguments: dict[str, Any], out: Any, error: type[Exception], named: str) -> None:
    """The call fails, and no argument and no result has changed."""
    written = [x for x in (*tensors(arguments).values(), *out) if isinstance(x, Tensor) and x.device.type == "cpu"]
    before = [x.clone() for x in written]
    with pytest.raises(error, match=f"^{named}: "):
        solver_step(**arguments, out=out)
    for now, then in zip(written, before, strict=True):
        assert torch.equal(now.nan_to_num(7.0), then.nan_to_num(7.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("change", "error", "named"), BAD_INPUT)
def test_nothing_is_written_on_bad_input(
    backend: _dispatch.Backend, change: dict[str, Any], error: type[Exception], named: str
) -> None:
    good = case((3, 4))
    given = {**good, **change}
    in_place = good["sample"], good["history"][2], good["last_sample"]
    with _dispatch.backend(backend):
        untouched(given, tuple(torch.full((3, 4), 5.0) for _ in range(3)), error, named)
        untouched(given, in_place, error, named)


def overlapping() -> tuple[Tensor, Tensor]:
    memory = torch.zeros(16)
    return memory[:12].view(3, 4), memory[4:].view(3, 4)


def blank(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape or (3, 4), **options)


SAME = blank()
BAD_OUT: dict[str, Callable[[], Any]] = {
    "row too long": lambda: (blank(3, 5), None, None),
    "flat": lambda: (blank(12), None, None),
    "x0 transposed": lambda: (blank(), blank(4, 3), None),
    "corrected of one row": lambda: (blank(), None, blank(1, 4)),
    "wider dtype": lambda: (blank(dtype=torch.float64), None, None),
    "x0 of a lower dtype": lambda: (blank(), blank(dtype=torch.bfloat16), None),
    "corrected of integers": lambda: (blank(), None, blank(dtype=torch.int32)),
    "device": lambda: (blank(device="meta"), None, None),
    "x0's device": lambda: (blank(), blank(device="meta"), None),
    "strides": lambda: (blank(4, 3).t(), None, None),
    "x0's gaps": lambda: (blank(), blank(3, 8)[:, ::2], None),
    "corrected expanded": lambda: (blank(), None, blank(4).expand(3, 4)),
    "one tensor twice": lambda: (SAME, SAME, None),
    "a view of it": lambda: (SAME, None, SAME.view(3, 4)),
    "x0 and corrected": lambda: (blank(), SAME, SAME),
    "overlap": lambda: (*overlapping(), None),
    "overlap of x0 and corrected": lambda: (blank(), *overlapping()),
    "no sample": lambda: (None, blank(), None),
    "two": lambda: (blank(), None),
    "four": lambda: (blank(), None, None, None),
    "a tensor": blank,
}


@pytest.mark.parametrize("kind", BAD_OUT)
@pytest.mark.parametrize("per_sample", [False, True])
def test_bad_out_is_refused_and_nothing_written(route: str, per_sample: bool, kind: str) -> None:
    untouched(case((3, 4), per_sample=per_sample), BAD_OUT[kind](), ValueError, "out")


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("name", TERMS)
def test_out_that_overlaps_an_argument_in_part_is_refused(route: str, name: str, place: int) -> None:
    """Such an element would be written before its neighbour is read."""
    arguments = case((3, 4))
    argument, shifted = overlapping()
    argument.copy_(tensors(arguments)[name])
    if name.startswith("h"):
        arguments["history"][int(name[1]) - 1] = argument
    else:
        arguments[name] = argument
    out: list[Any] = [torch.zeros(3, 4), None, None]
    out[place] = shifted
    untouched(arguments, tuple(out), ValueError, "out")


def test_corrected_needs_a_corrector(route: str) -> None:
    untouched(case((3, 4), corrector=False), (torch.zeros(3, 4), None, torch.zeros(3, 4)), ValueError, "out")


def test_out_records_no_gradient(route: str) -> None:
    arguments = case((3, 4))
    arguments["output"].requires_grad_()
    untouched(arguments, (torch.zeros(3, 4), None, None), ValueError, "out")
    with torch.no_grad():
        check(case((3, 4)), ("sample", "h3", "last_sample"))


@pytest.mark.parametrize("leaf", [False, True])
def test_out_takes_no_tensor_that_gradients_are_recorded_for(route: str, leaf: bool) -> None:
    """What is recorded is how its old values came to be."""
    place = torch.zeros(3, 4, requires_grad=True)
    untouched(case((3, 4)), (place if leaf else 2 * place, None, None), ValueError, "out")


def test_autograd_notices_what_is_overwritten(route: str) -> None:
    """A gradient that needs the old values fails, instead of taking the new ones for them."""
    arguments = case((3, 4))
    weight = torch.randn(3, 4, requires_grad=True)
    losses = [(weight * x).sum() for x in (arguments["sample"], arguments["history"][2], arguments["last_sample"])]
    with torch.no_grad():
        solver_step(**arguments, out=places(arguments, ("sample", "h3", "last_sample")))
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_solver_step_out_registration() -> None:
    a, b = torch.randn(2, 3, 10)
    table = torch.randn(4, len(COLUMNS), dtype=torch.float64)
    seed, steps = sample_seeds(3), torch.tensor([0, 3, 1])
    full = (a, b, table, steps, 0, b, 2.0, True, 0.5, a, a, b, a, seed, None, 2.0)
    plain = torch.zeros_like(table)
    plain[:, : COLUMNS.index("corr_last")] = 0.5
    bare = (a, b, plain, None, 2, None, 1.0, False, 0.0, None, None, None, None, None, 0.5, None)
    new = torch.zeros(3, 3, 10)
    for arguments in ((*full, *new), (*full, new[0], None, new[2]), (*bare, new[0], new[1], None)):
        torch.library.opcheck(torch.ops.diffgap.solver_step_out.default, arguments)


def noise_and_steps(x0: Tensor, levels: Tensor, memory: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """Noising, then two steps in the memory that is given, with work for the compiler in between."""
    x_t, target = q_sample(2 * x0, torch.tensor([0, 2, 1]), levels, options["seed"], "flow_prediction")
    sample, last, ring = memory["sample"], memory["last_sample"], list(memory["history"])
    sample.add_(x_t)
    for output in (target.cos(), target.sin()):
        solver_step(sample, output, last_sample=last, history=ring, out=(sample, ring[2], last), **options)
        sample.mul_(0.5)
        ring = [ring[2], *ring[:2]]
    return sample + ring[0]


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_steps_in_place_compile_to_one_graph(route: str, compiler: str, per_sample: bool) -> None:
    if compiler == "inductor" and route != "native":
        pytest.skip("one inductor case is enough: it compiles C++")
    arguments = case((3, 21), per_sample=per_sample, x0_norm=1.0, guidance_rescale=0.5)
    memory = {name: arguments.pop(name) for name in ("sample", "last_sample", "history")}
    options = {name: value for name, value in arguments.items() if name != "output"}
    x0, levels = torch.randn(3, 21), torch.rand(3, 2, dtype=torch.float64)
    eager_memory = copied(memory)
    expected = noise_and_steps(x0, levels, eager_memory, options)
    torch._dynamo.reset()
    actual = torch.compile(noise_and_steps, fullgraph=True, backend=compiler)(x0, levels, memory, options)
    assert_close_to_oracle(actual, expected.double())
    for name, tensor in tensors(memory).items():
        assert_close_to_oracle(tensor, tensors(eager_memory)[name].double())
