"""The family generator; never a duration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import generator, runner
from benchmarks.cases import Case
from diffgap.models import blocks
from diffgap.models.mel_generator import MelGeneratorConfig
from diffgap.models.randomness import uniform
from diffgap.ops.attention import attention
from diffgap.ops.random import normal
from tests.benchmarks.toys import CLOCK, QUICK
from tests.helpers import assert_close_to_oracle

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("uncompiled")
SMALL = MelGeneratorConfig(12, bands=8, patch_bands=8, width=16, depth=2, heads=2)
STEP, SAMPLE = generator.step_case(3, 18, SMALL), generator.sample_case(3, 18, 4, SMALL)


@pytest.mark.parametrize("case", [STEP, SAMPLE], ids=lambda case: case.name)
def test_case_passes_the_gate(case: Case) -> None:
    result = runner.run_case(case, CPU, CLOCK, QUICK)
    assert not result.failures
    present = {peer.name for peer in case.on(CPU).peers if not peer.missing}
    assert {row.impl for row in result.rows} == {"diffgap", "eager", "compile", *present}
    assert all(row.floor_s > 0 for row in result.rows)


def test_full_size_is_ten_seconds() -> None:
    assert [case.name for case in generator.cases("full")] == [
        "generator_step/8x626x64/fp32",
        "generator_sample/dpmpp_25_cfg/1x626x64/fp32",
        "generator_sample/dpmpp_25_cfg/8x626x64/fp32",
    ]


def test_repeated_steps_are_the_same_step() -> None:
    inputs = STEP.inputs(CPU)
    weights = [p.detach().clone() for p in inputs["training"].generator.parameters()]
    first, second = (generator._our_step(**inputs) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(weights, inputs["training"].generator.parameters(), strict=True))


def test_what_is_wrong_is_not_timed() -> None:
    def wrong_step(**inputs: object) -> tuple[Tensor, ...]:
        *rest, last = generator._our_step(**inputs)  # type: ignore[arg-type]
        return (*rest, 1.01 * last)

    def wrong_sample(**inputs: object) -> tuple[Tensor, ...]:
        return (1.001 * generator._our_sample(**inputs)[0],)  # type: ignore[arg-type]

    for case, wrong in ((STEP, wrong_step), (SAMPLE, wrong_sample)):
        result = runner.run_case(replace(case, call=wrong), CPU, CLOCK, QUICK)
        assert result.failures and not result.rows


def test_rivals_with_other_random_numbers_are_held_to_the_loss() -> None:
    inputs = STEP.inputs(CPU)
    judge, ours = generator._similar(**inputs), generator._our_step(**inputs)
    assert judge(ours) is None
    assert "a loss of" in str(judge((2 * ours[0], *ours[1:])))
    assert "not finite" in str(judge((*ours[:-2], ours[-2] / 0, ours[-1])))
    assert "another loss or other gradients" in str(judge(ours[:-1]))


def test_plain_torch_draws_its_own_numbers_and_only_while_asked() -> None:
    inputs = STEP.inputs(CPU)
    ours = generator._our_step(**inputs)
    with generator.plain_torch():
        torch.manual_seed(0)
        first = generator._our_step(**inputs)
        torch.manual_seed(1)
        second = generator._our_step(**inputs)
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[0], ours[0])
    assert all(torch.equal(x, y) for x, y in zip(generator._our_step(**inputs), ours, strict=True))


def test_plain_torch_does_our_step_with_our_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = STEP.inputs(CPU)
    monkeypatch.setattr(generator, "_torch_uniform", uniform)
    monkeypatch.setattr(torch, "randn_like", lambda x: normal(inputs["seeds"], x.shape[1:]))
    found = generator._stepped(compiled=False, plain=True, **inputs)()
    for x, oracle in zip(found, STEP.expected(CPU), strict=True):  # type: ignore[misc]
        assert_close_to_oracle(x, oracle)


def test_plain_torch_attends_by_torch_to_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: called.append(1) or plain(*a, **k)
    )
    seeds = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 5, 2, 8, generator=seeds) for _ in range(3))
    weights = {"q_weight": torch.rand(8, generator=seeds), "k_weight": torch.rand(8, generator=seeds)}
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    with generator.plain_torch():
        found = blocks.attention(q, k, v, key_mask=mask, **weights)
    assert called
    torch.testing.assert_close(found, attention(q, k, v, key_mask=mask, **weights))


def test_flops_grow_with_the_sounds() -> None:
    assert generator.step_case(6, 18, SMALL).flops == 2 * STEP.flops
    assert generator.sample_case(6, 18, 4, SMALL).flops == 2 * SAMPLE.flops
