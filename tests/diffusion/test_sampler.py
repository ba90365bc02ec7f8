from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffgap.diffusion import Guidance, NoiseSchedule, SamplingLoop, SolverTable, build_solver, sample
from diffgap.ops.random import normal
from diffgap.ops.solver_step import StepOutput, solver_step

SHAPE = (6,)
SEEDS = torch.tensor([[3, 1], [4, -1], [5, 9]])


def table(name: str = "unipc", steps: int = 5, **options: Any) -> SolverTable:
    return build_solver(name, NoiseSchedule("scaled_linear", prediction_type="sample"), steps, **options)


def model(x: Tensor, step: int) -> Tensor:
    return torch.tanh(x.roll(1, -1) + 0.1 * step)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp", "sde_dpmpp", "unipc"])
def test_sample_depends_on_the_seed_alone(name: str) -> None:
    """Bit for bit, whatever batch a sample stands in and however its seeds are laid out."""
    solver = table(name)
    together = sample(model, solver, SEEDS, SHAPE)
    assert together.shape == (3, 2, *SHAPE)
    for i, j in ((0, 0), (2, 1)):
        assert torch.equal(sample(model, solver, SEEDS[i, j : j + 1], SHAPE)[0], together[i, j])
    assert torch.equal(sample(model, solver, SEEDS.T, SHAPE), together.transpose(0, 1))
    assert len(together.reshape(6, -1).unique(dim=0)) == 6


def test_sample_noise_is_fresh_in_every_step() -> None:
    seeds = torch.arange(2)
    first = normal(seeds, (5000,))
    drawn: list[Tensor] = [first]
    solver = table("ddpm", 4)

    def keep(step: int, result: StepOutput) -> None:
        drawn.append(result.sample / solver.column("pred_noise")[step])

    # A network that predicts 0 from the start leaves x' = pred_sample x + pred_noise noise.
    sample(lambda x, step: 0 * x, solver, seeds, (5000,), callback=keep, steps=2)
    second = drawn[1] - solver.column("pred_sample")[0] / solver.column("pred_noise")[0] * first
    third = drawn[2] - solver.column("pred_sample")[1] / solver.column("pred_noise")[1] * (
        drawn[1] * solver.column("pred_noise")[0]
    )
    for a, b in ((first, second), (first, third), (second, third)):
        assert torch.corrcoef(torch.stack((a[0].double(), b[0].double())))[0, 1].abs() < 0.06
    assert second.std() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("form", ["standard", "offset"])
def test_sample_guides_in_one_batch(form: Any) -> None:
    solver = table("dpmpp", 4)
    sizes: list[int] = []

    def conditional(x: Tensor, step: int) -> Tensor:
        return torch.tanh(x + 1)

    def both(x: Tensor, step: int) -> Tensor:
        sizes.append(len(x))
        halves = x.chunk(2)
        assert torch.equal(*halves)
        return torch.cat((conditional(halves[0], step), torch.tanh(halves[1])))

    def by_hand(x: Tensor, step: int) -> Tensor:
        yes, no = conditional(x, step), torch.tanh(x)
        return (no if form == "standard" else yes) + 2.5 * (yes - no)

    seeds = torch.arange(3)
    guided = sample(both, solver, seeds, SHAPE, guidance=Guidance(2.5, form=form), dtype=torch.float64)
    expected = sample(by_hand, solver, seeds, SHAPE, dtype=torch.float64)
    assert sizes == [6] * 4
    torch.testing.assert_close(guided, expected, rtol=1e-12, atol=1e-12)
    rescaled = sample(both, solver, seeds, SHAPE, guidance=Guidance(2.5, rescale=0.7, form=form))
    assert not torch.allclose(rescaled, guided.float())


def test_sample_stops_early_with_x0() -> None:
    solver, seeds = table(), torch.arange(3)
    path: list[StepOutput] = []

    def keep(step: int, result: StepOutput) -> bool:
        assert step == len(path)
        path.append(result)
        return step == 1

    stopped = sample(model, solver, seeds, SHAPE, callback=keep)
    assert len(path) == 2
    assert torch.equal(stopped, path[1].x0)
    assert torch.equal(sample(model, solver, seeds, SHAPE, steps=2), stopped)
    assert torch.equal(sample(model, solver, seeds, SHAPE, steps=5), sample(model, solver, seeds, SHAPE))


@pytest.mark.parametrize("name", ["ddim", "dpmpp", "unipc"])
def test_sample_constrains_x0(name: str) -> None:
    on_sphere = sample(model, table(name), torch.arange(3), (2, 6), x0_norm=4.0)
    torch.testing.assert_close(on_sphere.norm(dim=-1), torch.full((3, 2), 4.0))  # the last step returns x0
    assert sample(model, table(name), torch.arange(3), SHAPE, x0_clamp=0.3).abs().max() <= 0.3 + 1e-6


def test_sample_starts_from_initial() -> None:
    solver = table("ddim")
    noise = normal(SEEDS.reshape(-1), SHAPE).reshape(3, 2, *SHAPE)
    assert torch.equal(sample(model, solver, SEEDS, SHAPE, initial=noise), sample(model, solver, SEEDS, SHAPE))
    kept = noise.clone()
    sample(model, solver, SEEDS, SHAPE, initial=noise)
    assert torch.equal(noise, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sample_in_other_dtypes(dtype: torch.dtype) -> None:
    result = sample(model, table("sde_dpmpp"), torch.arange(3), SHAPE, dtype=dtype)
    assert result.dtype == dtype
    exact = sample(model, table("sde_dpmpp"), torch.arange(3), SHAPE, dtype=torch.float64)
    torch.testing.assert_close(result.double(), exact, rtol=0.1, atol=0.1)


def test_sample_takes_an_empty_batch_and_leaves_no_graph() -> None:
    assert sample(model, table(), torch.zeros(0, dtype=torch.int64), SHAPE).shape == (0, *SHAPE)
    weight = torch.ones(6, requires_grad=True)
    assert not sample(lambda x, step: x * weight, table(), torch.arange(2), SHAPE).requires_grad


@pytest.mark.parametrize("name", ["ddim", "sde_dpmpp", "dpmpp", "unipc"])
@pytest.mark.parametrize("guidance", [None, Guidance(2.0, rescale=0.5)])
def test_steps_in_place_equal_steps_into_new_memory(name: str, guidance: Guidance | None) -> None:
    solver = table(name, 7, **({"order": 3} if name in ("dpmpp", "unipc") else {}))
    seeds = torch.arange(4)
    x = last_sample = normal(seeds, SHAPE, dtype=torch.float64)
    history = [torch.zeros_like(x)] * solver.history
    for step in range(len(solver)):
        options: dict[str, Any] = {"last_sample": last_sample if solver.corrects else None}
        conditional = model(x, step)
        if guidance is not None:
            options |= {"unconditional": conditional, "guidance_scale": 2.0, "guidance_rescale": 0.5}
        result = solver_step(x, conditional, solver.coefficients, step, history=history, seed=seeds, **options)
        x, last_sample = result.sample, result.corrected
        history = [result.x0, *history][: solver.history]
    found = sample(model, solver, seeds, SHAPE, guidance=guidance, dtype=torch.float64)
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["sde_dpmpp", "unipc"])
def test_a_loop_forgets_the_batch_before(name: str) -> None:
    solver, seeds = table(name), torch.arange(3)
    loop = SamplingLoop(model, solver, 3, SHAPE, device=seeds.device)
    expected = sample(model, solver, seeds, SHAPE)
    loop(seeds + 7, torch.full((3, *SHAPE), torch.nan))
    assert torch.equal(loop(seeds), expected)
    assert torch.equal(loop(seeds, callback=lambda step, _: step == 2), sample(model, solver, seeds, SHAPE, steps=3))


def test_a_loop_refuses_what_it_would_have_to_bend() -> None:
    def untouched(x: Tensor, step: int) -> Tensor:
        raise AssertionError("the network was called")

    loop, seeds = SamplingLoop(untouched, table(), 3, SHAPE, device=torch.device("cpu")), torch.arange(3)
    with pytest.raises(TypeError, match=r"seeds is torch.float32; give int64"):
        loop(seeds.float())
    with pytest.raises(ValueError, match=r"seeds is \(1,\); this loop takes \(3,\)"):
        loop(seeds[:1])
    with pytest.raises(ValueError, match=r"initial is \(6,\); this loop takes \(3, 6\)"):
        loop(seeds, torch.zeros(SHAPE))


class _Replays:
    """Stands for a recorded graph."""

    def replay(self) -> None:
        pass


def test_a_recorded_loop_takes_neither_start_nor_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, seeds = SamplingLoop(model, table(), 3, SHAPE, device=torch.device("cpu")), torch.arange(3)
    monkeypatch.setattr(loop, "_graph", _Replays())
    monkeypatch.setattr(loop, "_recorded", seeds, raising=False)
    assert loop(seeds) is seeds
    with pytest.raises(ValueError, match="initial: a recorded loop takes none"):
        loop(seeds, torch.zeros(3, *SHAPE))
    with pytest.raises(ValueError, match="callback: a recorded loop takes none"):
        loop(seeds, callback=lambda *_: None)


def test_a_step_records_no_gradients_whoever_runs_it() -> None:
    """Recording a loop runs it too, outside of a call."""
    weight = torch.ones(6, requires_grad=True)
    loop = SamplingLoop(lambda x, step: x * weight, table(), 3, SHAPE, device=torch.device("cpu"))
    loop(torch.arange(3))
    assert not loop._run(None, draws=True).requires_grad


def test_callbacks_may_keep_what_they_get() -> None:
    solver, seeds, kept = table(), torch.arange(3), []
    sample(model, solver, seeds, SHAPE, callback=lambda _, result: kept.append(result))
    for steps, result in enumerate(kept[:-1], 1):
        assert torch.equal(result.x0, sample(model, solver, seeds, SHAPE, steps=steps))
    assert torch.equal(kept[-1].sample, sample(model, solver, seeds, SHAPE))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps is 0; use 1 to 5"),
        ({"steps": 6}, ValueError, "steps is 6"),
        ({"seeds": torch.arange(3.0)}, TypeError, "seeds is torch.float32; give int64"),
        ({"initial": torch.ones(3, 5)}, ValueError, r"initial is \(3, 5\); it must be \(3, 6\)"),
    ],
)
def test_sample_refuses_before_any_work(options: dict[str, Any], error: type[Exception], message: str) -> None:
    def untouched(x: Tensor, step: int) -> Tensor:
        raise AssertionError("the network was called")

    with pytest.raises(error, match=message):
        sample(untouched, table(), **{"seeds": torch.arange(3), "shape": SHAPE, **options})
