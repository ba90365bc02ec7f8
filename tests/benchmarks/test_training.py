"""The family training; never a duration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import runner, training
from benchmarks.cases import Case
from benchmarks.parts import TRAINING_PARTS
from diffgap.models.settings import BridgeSettings
from diffgap.ops._dispatch import backend
from diffgap.ops._native import CPU_MISSING
from tests.benchmarks.toys import CLOCK, QUICK

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("uncompiled")
SMALL = BridgeSettings(width=24, tokens=3, denoiser_width=16, depth=2, heads=2)
needs_native = pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))


@pytest.mark.parametrize("stage", training.STAGES_OF["full"])
@pytest.mark.parametrize("make", [training.step_case, training.parts_case])
def test_case_passes_the_gate(make: object, stage: training.Stage) -> None:
    case: Case = make(stage, 64, SMALL)  # type: ignore[operator]
    result = runner.run_case(case, CPU, CLOCK, QUICK)
    assert not result.failures
    present = {peer.name for peer in case.on(CPU).peers if not peer.missing}
    assert {row.impl for row in result.rows} == {"diffgap", "eager", "compile", *present} - set(case.infeasible(CPU))


def test_full_size_has_the_batches_of_the_table() -> None:
    names = [case.name for case in training.cases("full")]
    assert len(set(names)) == len(names)
    for op in ("training_step", "training_parts"):
        for stage in ("joint", "heads", "diffusion"):
            assert {f"{op}/{stage}/{batch}x512/fp32" for batch in (256, 1024, 8192)} < set(names)


@pytest.mark.parametrize("stage", training.STAGES_OF["full"])
def test_repeated_steps_are_the_same_step(stage: training.Stage) -> None:
    inputs = training.step_case(stage, 16, SMALL).inputs(CPU)
    weights = [p.detach().clone() for p in inputs["training"].bridge.parameters()]
    first, second = (training._ours(**inputs) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(weights, inputs["training"].bridge.parameters(), strict=True))


def test_every_parameter_of_a_stage_has_a_gradient_that_is_not_zero() -> None:
    """Modulation and output are off zero, so that a wrong gradient anywhere shows."""
    for stage in training.STAGES_OF["full"]:
        inputs = training.step_case(stage, 64, SMALL).inputs(CPU)
        gradients = [x for x in training._ours(**inputs) if x.dim()]
        assert gradients and all(bool(x.any()) for x in gradients)


def test_a_wrong_gradient_is_not_timed() -> None:
    case = training.step_case("heads", 16, SMALL)

    def wrong(**inputs: object) -> tuple[Tensor, ...]:
        *losses, last = training._ours(**inputs)  # type: ignore[arg-type]
        return (*losses, 1.01 * last)

    assert runner.run_case(replace(case, call=wrong), CPU, CLOCK, QUICK).failures


def test_rivals_with_other_random_numbers_are_held_to_the_losses() -> None:
    inputs = training.step_case("joint", 64, SMALL).inputs(CPU)
    judge, ours = training._similar(**inputs), training._ours(**inputs)
    assert judge(ours) is None
    assert "a loss of" in str(judge((2 * ours[0], *ours[1:])))
    assert "not finite, or zeros" in str(judge((*ours[:-1], torch.zeros_like(ours[-1]))))
    assert "not finite" in str(judge((*ours[:-1], ours[-1] / 0)))
    assert "other losses or gradients" in str(judge(ours[:-1]))


def test_plain_torch_draws_its_own_numbers_and_only_while_asked() -> None:
    inputs = training.step_case("joint", 64, SMALL).inputs(CPU)
    ours = training._ours(**inputs)
    with backend("eager"), training.torch_randomness():
        torch.manual_seed(0)
        first = training._ours(**inputs)
        torch.manual_seed(1)
        second = training._ours(**inputs)
    assert not torch.equal(first[0], second[0])
    assert all(torch.equal(x, y) for x, y in zip(training._ours(**inputs), ours, strict=True))


@needs_native
@pytest.mark.parametrize("stage", training.STAGES_OF["full"])
def test_parts_are_those_that_a_stage_has(stage: training.Stage) -> None:
    """Each of the parts of a stage has calls, others have none, and together they are all."""
    with backend("native"):
        recording = training.parts_case(stage, 64, SMALL).inputs(CPU)["recording"]
        sizes = {kind: len(recording.part(kind)) for kind in TRAINING_PARTS}
    assert {kind for kind, count in sizes.items() if count} == training._CALLED[stage]
    assert sum(count for kind, count in sizes.items() if kind != "calls") == sizes["calls"]


def test_flops_grow_with_the_batch_and_its_square() -> None:
    """Of the heads: layers in proportion to the batch, and the four products of the contrastive loss to its square."""
    small, large = (training.step_case("heads", batch, SMALL).flops for batch in (64, 128))
    assert large - 2 * small == 4 * 2 * SMALL.width * (128**2 - 2 * 64**2)
