"""The families schedule and sampler, and the modelled launches of GPUs; never a duration."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cases, parts, runner, sampler, schedule
from benchmarks.cases import Case
from benchmarks.denoiser import count_calls
from benchmarks.gpus import A100, GPUS, H100
from benchmarks.schedule import SOLVERS, Solver, noising_case, step_case
from diffgap.models.settings import BridgeSettings
from diffgap.ops._dispatch import backend
from diffgap.ops._native import CPU_MISSING
from tests.benchmarks.toys import CLOCK, QUICK

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("uncompiled")
SMALL = BridgeSettings(width=24, tokens=3, denoiser_width=16, depth=2, heads=2)
needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None,
    reason="diffusers is not installed; it takes the steps to compare with",
)
needs_native = pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))
by_name = {solver.name: solver for solver in SOLVERS}


def assert_all_pass(case: Case) -> None:
    result = runner.run_case(case, CPU, CLOCK, QUICK)
    assert not result.failures
    present = {peer.name for peer in case.on(CPU).peers if not peer.missing}
    assert {row.impl for row in result.rows} == {"diffgap", "eager", "compile", *present} - set(case.infeasible(CPU))


SMALL_CASES = (
    *(noising_case(70, 41, dtype) for dtype in ("fp32", "bf16")),
    *(step_case(solver, 5, 41, "fp32") for solver in SOLVERS),
    *(step_case(by_name[name], 64, 40, "bf16") for name in ("dpmpp_2m_cfg", "unipc_cfg", "sde_dpmpp_2m_cfg", "ddpm")),
    sampler.sampler_case(5, 3, SMALL),
    sampler.parts_case(5, 3, SMALL),
)


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
@needs_diffusers
def test_case_passes_the_gate(case: Case) -> None:
    """Every peer that is installed computes what we do, and only then is timed."""
    assert_all_pass(case)


@pytest.mark.parametrize("family", [schedule, sampler])
@pytest.mark.parametrize("size", ["ci", "full"])
def test_names_differ(family: ModuleType, size: str) -> None:
    names = [case.name for case in family.cases(size)]
    assert len(set(names)) == len(names) > 0


def test_full_size_has_the_cases_of_the_tables() -> None:
    names = {case.name for family in (schedule, sampler) for case in family.cases("full")}
    shapes = ("64x512/fp32", "256x512/fp32", "4096x512/fp32", "4096x1024/fp32", "4096x1024/bf16")
    guided = ("dpmpp_2m", "ddim", "unipc", "sde_dpmpp_2m")
    assert {f"solver_step/{name}_cfg/{shape}" for name in guided for shape in shapes} < names
    assert {f"solver_step/{name}/{shape}" for name in (*guided, "ddpm", "ddim_eta1") for shape in shapes} < names
    assert {"q_sample/fwd/256x512/fp32", "q_sample/fwd/4096x1024/fp32"} < names
    loops = {f"dpmpp_{steps}_cfg/{conditions}x256/fp32" for steps in (8, 25) for conditions in (256, 4096)}
    assert {f"{op}/{loop}" for op in ("sampler", "sampler_parts") for loop in loops} < names


# the schedule family


def in_place(solver: Solver) -> schedule.InPlace:
    step = step_case(solver, 4, 64, "fp32").inputs(CPU)["in_place"]
    assert isinstance(step, schedule.InPlace)
    return step


@pytest.mark.parametrize("solver", [solver for solver in SOLVERS if solver.in_place], ids=lambda solver: solver.name)
def test_repeated_steps_settle(solver: Solver) -> None:
    """However often a step is timed, its numbers are ordinary ones."""
    step = in_place(solver)
    for _ in range(2000):
        outputs = step()
    before = [x.clone() for x in outputs]
    for _ in range(200):
        outputs = step()
    for x, earlier in zip(outputs, before, strict=True):
        assert 0.1 < x.norm() / x.numel() ** 0.5 < 1e3
        assert x.norm() < 1.5 * earlier.norm()


def test_epsilon_would_not_settle() -> None:
    step = in_place(replace(by_name["dpmpp_2m"], prediction="epsilon"))
    for _ in range(2000):
        (x, _) = step()
    assert not x.norm() < 1e6


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)
@needs_diffusers
def test_diffusers_has_no_more_to_do_than_for_epsilon(solver: Solver) -> None:
    def calls(solver: Solver) -> int:
        case = step_case(solver, 4, 64, "fp32")
        return count_calls(case.peers[0].prepare(**case.inputs(CPU))).total()

    sphere = 3 if solver.on_sphere else 0  # norm, reciprocal, product
    assert calls(solver) <= calls(replace(solver, prediction="epsilon", on_sphere=False)) + sphere


def test_a_step_in_place_overwrites_its_own_state_alone() -> None:
    case = step_case(by_name["unipc_cfg"], 4, 64, "fp32")
    inputs = case.inputs(CPU)
    given = {name: x.clone() for name, x in inputs.items() if isinstance(x, Tensor)}
    step: schedule.InPlace = inputs["in_place"]
    oldest, newest = step.history[1], step.history[0]
    with backend("auto"):
        following, x0, corrected = case.call(**inputs)
    assert following is step.sample and corrected is step.last_sample
    assert x0 is oldest is step.history[0] and step.history[1] is newest
    assert all(torch.equal(inputs[name], x) for name, x in given.items())
    first = following.clone()
    case.call(**inputs)
    assert not torch.equal(step.sample, first)


def test_eager_and_functional_steps_return_new_tensors() -> None:
    for name, route in (("dpmpp_2m_cfg", "eager"), ("dpmpp_2m_cfg_functional", "auto")):
        case = step_case(by_name[name], 4, 64, "fp32")
        inputs = case.inputs(CPU)
        with backend(route):
            outputs = case.call(**inputs)
        assert len(outputs) == 2, "the sample and x0, which the next step needs"
        state = inputs["in_place"] and (inputs["in_place"].sample, *inputs["in_place"].history)
        given = [*cases.tensors(inputs), *(state or ())]
        assert not {x.data_ptr() for x in outputs} & {x.data_ptr() for x in given}


def test_the_gate_of_compiled_noising_refuses_what_is_not_normal_or_not_in_the_sample() -> None:
    inputs = noising_case(70, 41, "fp32").inputs(CPU)
    gate = schedule._noised(**inputs)
    noise = torch.randn(70, 41, generator=torch.Generator().manual_seed(0))
    x_t, _ = schedule._noised_with(noise, inputs["x0"], inputs["t"], inputs["table"])
    assert gate((x_t.float(), noise)) is None
    assert "output 0" in (gate((x_t.float() * 1.01, noise)) or "")
    for wrong in (1.2 * noise, noise + 0.2, noise * math.nan):
        x_t, _ = schedule._noised_with(wrong, inputs["x0"], inputs["t"], inputs["table"])
        assert "mean" in (gate((x_t.float(), wrong)) or "")


# the sampler family


def test_samples_depend_on_their_conditions() -> None:
    inputs = sampler._inputs(6, 3, SMALL, CPU)
    inputs["seeds"] = inputs["seeds"][:1].expand(6)
    (samples,) = sampler._ours(**inputs)
    cosines = samples @ samples.T
    assert cosines.fill_diagonal_(0).max() < 0.999
    torch.testing.assert_close(samples.norm(dim=1), torch.ones(6))


def test_products_of_a_sampler_are_counted_by_its_conditions() -> None:
    inputs = sampler._inputs(5, 3, SMALL, CPU)
    with backend("eager"), FlopCounterMode(display=False) as counter:
        sampler._ours(**inputs)
    assert sampler._flops(5, 3, SMALL) == counter.get_total_flops() > 0


def test_other_networks_have_as_many_parameters() -> None:
    ours = sum(x.numel() for x in sampler.diffusion_of(sampler.SETTINGS).denoiser.parameters())
    networks = {"diffusers": sampler.prior_transformer, "dalle2_pytorch": sampler.dalle2_prior}
    present = {name: network for name, network in networks.items() if importlib.util.find_spec(name)}
    if not present:
        pytest.skip(f"none of {', '.join(networks)} is installed")
    for name, network in present.items():
        assert sum(x.numel() for x in network(sampler.SETTINGS).parameters()) == pytest.approx(ours, rel=0.1), name


def test_the_gate_of_other_networks_refuses_what_is_no_answer() -> None:
    z = torch.randn(4, 8)
    gate = sampler._answered(z=z)
    assert gate((z,)) is None
    assert gate((z[:3],)) and gate((z * math.inf,)) and gate((z[:1].expand(4, 8),))


# parts


def toy() -> tuple[Tensor, ...]:
    """Three products, one of another shape; two additions, one of them in place; a view."""
    a, b = torch.full((4, 8), 0.5), torch.full((8, 8), 0.25)
    x = a @ b
    y = (x @ b).view(2, 16).view(4, 8)
    y.add_(1.0)
    return y + x, b @ b


def test_a_recording_counts_alike_calls_once() -> None:
    recording = parts.Recording(toy)
    counts = {(call.name, tuple(call.outputs[0].shape)): call.count for call in recording.calls}
    assert counts == {
        ("aten::full", (4, 8)): 1,
        ("aten::full", (8, 8)): 1,
        ("aten::mm", (4, 8)): 2,
        ("aten::mm", (8, 8)): 1,
        ("aten::add_", (4, 8)): 1,
        ("aten::add", (4, 8)): 1,
    }
    assert {call.name for call in recording.part("gemm")} == {"aten::mm"}
    assert not recording.part("attention")


def test_a_recording_tells_weights_apart_and_calls_them_in_turn() -> None:
    x, weights = torch.ones(4, 8), (torch.full((8, 8), 0.1), torch.full((8, 8), 0.2))

    def run() -> tuple[Tensor, ...]:
        y = x.clone()
        for _ in range(3):
            for weight in weights:
                y = torch.nn.functional.linear(y, weight)
        return (y,)

    recording = parts.Recording(run)
    assert [(call.name, call.count) for call in recording.calls] == [
        ("aten::clone", 1),
        ("aten::mm", 3),
        ("aten::mm", 3),
    ]
    run_again, turns = parts.part_peer("gemm").prepare(recording=recording), []
    for call in recording.part("gemm"):
        call.function = lambda y, weight, product=call.function: turns.append(weight.T) or product(y, weight)
    run_again()
    assert [x.data_ptr() for x in turns] == [x.data_ptr() for x in weights] * 3


def test_parts_are_disjoint_and_make_up_the_calls() -> None:
    kind_of = {
        "aten::addmm": "gemm",
        "mkldnn::_linear_pointwise": "gemm",
        "diffgap::attention": "attention",
        "diffgap::adaln": "adaln",
        "diffgap::solver_step_out": "step",
        "aten::cat": "other",
    }
    for name, kind in kind_of.items():
        assert [part for part, has in parts.PARTS.items() if has(name)] == [kind, "calls"]


def test_the_parts_of_a_sampler_hold_its_operations() -> None:
    """None of the kinds that it has an operation for is empty, and what is left over multiplies nothing."""

    def flops(part: str) -> int:
        run = parts.part_peer(part).prepare(recording=recording)
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    recording = sampler.parts_case(5, 3, SMALL).inputs(CPU)["recording"]
    assert flops("gemm") == flops("calls") > flops("other") == 0
    with backend("eager"):
        eager = sampler.parts_case(5, 3, SMALL).inputs(CPU)["recording"]
        assert eager.part("gemm") and not eager.part("attention")
    if CPU_MISSING is None:
        assert all(recording.part(name) for name in parts.PARTS)
        assert sum(call.count for call in recording.part("step")) == 3


def test_a_part_is_called_as_often_as_in_the_run() -> None:
    recording = parts.Recording(toy)
    run = parts.part_peer("gemm").prepare(recording=recording)
    assert count_calls(run) == {"aten::mm": 3}
    run = parts.part_peer("calls").prepare(recording=recording)
    assert count_calls(run).total() == 7


def test_a_part_that_gives_other_results_is_refused() -> None:
    recording = parts.Recording(toy)
    for name in ("gemm", "calls"):
        peer = parts.part_peer(name)
        outputs, gate = peer.prepare(recording=recording)(), peer.gate(recording=recording)
        assert gate(outputs) is None
        exact = [call.exact for call in recording.part(name) for _ in call.outputs]
        wrong = [x + 1 if position == exact.index(True) else x for position, x in enumerate(outputs)]
        assert "other results" in (gate(tuple(wrong)) or "")
        assert "results, not" in (gate(outputs[:1]) or "")
        lost = [x * math.nan for x in outputs]
        assert "other results" in (gate(tuple(lost)) or "")
    empty = parts.part_peer("adaln")
    assert empty.gate(recording=recording)(empty.prepare(recording=recording)()) == "was not called"


def test_what_is_overwritten_is_judged_as_finite_and_the_rest_as_equal() -> None:
    def run() -> tuple[Tensor, ...]:
        x = torch.full((4,), 2.0)
        y = x * x
        x.add_(y)
        return (y.neg(),)

    exact = {call.name: call.exact for call in parts.Recording(run).calls}
    # x is no longer what was made, nor what was multiplied.
    assert exact == {"aten::full": False, "aten::mul": False, "aten::add_": False, "aten::neg": True}


def test_a_part_in_place_stays_in_place_and_leaves_the_run_alone() -> None:
    state = torch.ones(4)
    recording = parts.Recording(lambda: (torch.add(state, 1.0, out=state),))
    (call,) = recording.calls
    assert call.args[0] is call.kwargs["out"] is not state
    parts.part_peer("other").prepare(recording=recording)()
    assert torch.equal(state, torch.full((4,), 2.0))


# modelled launches


@pytest.fixture
def model() -> ModuleType:
    pytest.importorskip("triton")
    return importlib.import_module("benchmarks.schedule_model")


def test_launches_and_bytes_of_a_call_counted_by_hand(model: ModuleType) -> None:
    x, row, index = torch.ones(8, 4), torch.ones(8, 1), torch.arange(8)

    def run() -> tuple[Tensor, ...]:
        scale = torch.ones(()) * 2.0  # a coefficient on the CPU
        y = x + row.expand(8, 4)  # reads 128 and 32, writes 128
        y.view(32).mul_(scale)  # reads 128 and 4, writes 128
        z = torch.empty(8, 4).normal_()  # writes 128
        z.copy_(y)  # reads 128, writes 128
        picked = row[index]  # reads 32 and 64, writes 32
        torch.add(z, picked, out=z)  # reads 128 and 32, writes 128
        return (z,)

    call = model.recorded(run, samples=8)
    names = ["add", "mul_", "normal_", "copy_", "index", "add"]
    assert [launch.name for launch in call.launches.launches] == [f"aten::{name}" for name in names]
    moved = [sum(call.launches.sizes[name] for name in launch.touches.split()) for launch in call.launches.launches]
    assert moved == [288, 260, 128, 256, 128, 288]
    for gpu in GPUS:
        kernels = call.on(gpu, "toy").kernels
        # What is made and not given back stays in L2: x and row, nothing, nothing, nothing, index, then z.
        assert [kernel.hbm for kernel in kernels] == [160, 4, 0, 0, 64, 128]
        assert [kernel.l2 for kernel in kernels] == moved
        assert [(kernel.special, kernel.integer) for kernel in kernels] == [(0, 0)] * 2 + [(64, 480)] + [(0, 0)] * 3


def test_what_l2_cannot_hold_costs_hbm_every_time(model: ModuleType) -> None:
    x = torch.ones(4, 4 << 20)  # 64 MiB
    call = model.recorded(lambda: ((x * 2 + 1).neg(),), samples=4)
    kernels = call.on(H100, "toy").kernels
    assert [kernel.hbm for kernel in kernels] == [128 << 20] * 3
    small = replace(H100, l2_bytes=1 << 30)
    assert [kernel.hbm for kernel in call.on(small, "toy").kernels] == [64 << 20, 0, 64 << 20]


@needs_native
@needs_diffusers
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ours_is_one_launch_at_the_floor(model: ModuleType, dtype: str) -> None:
    case_of = {solver.name: step_case(solver, 40, 32, dtype) for solver in SOLVERS}
    for name, case in {**case_of, "q_sample": noising_case(40, 32, dtype)}.items():
        counted = model.counted(case)
        assert "compile" not in counted.calls and {"diffgap", "eager", "diffusers"} <= counted.calls.keys()
        (kernel,) = counted.calls["diffgap"].on(A100, "diffgap").kernels
        # Beyond the floor it reads the table, and int64 seeds and timesteps.
        small = schedule._SCHEDULE.table.nbytes if name == "q_sample" else 20 * 16 * 8
        assert counted.traffic <= kernel.hbm <= counted.traffic + small + 2 * 40 * 8
        # Normal numbers, if there are any, and the combination.
        drawn = name == "q_sample" or by_name[name].table.stochastic
        special, integer = (1, 35) if drawn else (0, 0)
        assert kernel.special == special * 40 * 32
        assert kernel.integer == (integer + (17 if name == "q_sample" else 31)) * 40 * 32


@needs_diffusers
def test_diffusers_ddim_counted_by_hand(model: ModuleType) -> None:
    """Guidance: -, *, +. Epsilon: *, -, /. Then the direction's factor, x0's, and their sum."""
    call = model.counted(step_case(by_name["ddim_cfg"], 40, 32, "fp32")).calls["diffusers"]
    count = [launch.name.removeprefix("aten::") for launch in call.launches.launches]
    assert sorted(count) == ["add", "add", "div", "mul", "mul", "mul", "mul", "sub", "sub"]
    assert sum(kernel.hbm for kernel in call.on(A100, "diffusers").kernels) == pytest.approx(4 * 40 * 32 * 4, rel=0.01)


@needs_native
@needs_diffusers
def test_model_prints_and_writes_modelled_rows_only(
    model: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = [step_case(by_name["dpmpp_2m_cfg"], 40, 32, "fp32"), noising_case(40, 32, "fp32")]
    monkeypatch.setattr(model, "modelled_cases", lambda: tiny)
    path = tmp_path / "model.json"
    assert model.main(["--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert path.with_suffix(".md").read_text().strip() == printed.strip()
    assert "No GPU has run any of this" in printed and "(measured)" not in printed and "±" not in printed
    rows = json.loads(path.read_text())["rows"]
    assert {row["kind"] for row in rows} == {"modelled"} and {row["device"] for row in rows} == {x.name for x in GPUS}
    assert len(rows) == 2 * (3 + 4) and all(row["median_s"] >= row["floor_s"] > 0 for row in rows)
    ours = [row["median_s"] for row in rows if row["impl"] == "diffgap"]
    assert ours == [2.5e-6] * 4, "a launch"
    with pytest.raises(SystemExit):
        model.main(["--json", "model.txt"])


def test_modelled_cases_are_guided_steps_and_noising(model: ModuleType) -> None:
    names = {case.name for case in model.modelled_cases()}
    assert {"solver_step/dpmpp_2m_cfg/4096x512/fp32", "q_sample/fwd/4096x1024/fp32"} < names
    assert all(name.startswith("q_sample/") or "_cfg" in name for name in names)
