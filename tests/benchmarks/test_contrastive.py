"""The family of contrastive losses and retrieval."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cases, contrastive, runner
from benchmarks.cases import Case
from tests.benchmarks.toys import CLOCK, CPU, QUICK
from tests.helpers import relative_l2

pytestmark = pytest.mark.usefixtures("uncompiled")


TINY = (
    contrastive.clip_case(70, 48, torch.float32),
    contrastive.clip_case(128, 96, torch.bfloat16),
    contrastive.siglip_case(70, 48, torch.float32),
    contrastive.siglip_case(128, 96, torch.bfloat16),
    contrastive.clip_budget_case(70, 48),
    *contrastive.retrieval_cases(40, 300, 48),
)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_contrastive_case_passes_the_gate(case: Case) -> None:
    """Every peer that is installed computes what we do."""
    result = runner.run_case(case, CPU, CLOCK, QUICK)
    assert not result.failures
    present = {peer.name for peer in case.on(CPU).peers if not peer.missing}
    assert {row.impl for row in result.rows} == {"diffgap", "eager", "compile", *present} - set(case.infeasible(CPU))


def test_shuffled_copies_have_the_outputs_the_large_case_expects() -> None:
    """At a size where the eager reference in float64 can still say so."""
    case = contrastive.clip_large_case(96, 16, copies=8)
    inputs = case.inputs(CPU)
    expected = case.expected(CPU)
    direct = cases.oracle(replace(case, expected=None), inputs)
    assert max(relative_l2(x, y) for x, y in zip(expected, direct, strict=True)) < 1e-6
    assert [x.shape for x in expected] == [(), (96, 16), (96, 16), ()]
    result = runner.run_case(case, CPU, CLOCK, QUICK)
    assert [row.impl for row in result.rows] == ["diffgap"] and not result.failures
    assert {skipped.impl for skipped in result.skipped} >= {"eager", "compile", "open_clip"}


def test_large_case_counts_float32_logits_of_eager_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 open_clip's are half as large: with room for eight matrices of these, eager code is out."""
    case = contrastive.clip_large_case(64, 8, 8, torch.bfloat16)
    room = SimpleNamespace(total_memory=8 * 2 * 64 * 64)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: room)
    assert set(case.infeasible(torch.device("cuda"))) == {"eager", "compile"}
    room.total_memory *= 2
    assert not case.infeasible(torch.device("cuda"))


@pytest.mark.parametrize("size", ["ci", "full"])
def test_contrastive_names(size: str) -> None:
    names = [case.name for case in contrastive.cases(size)]
    assert len(set(names)) == len(names)
    if size == "full":
        assert {
            "clip_loss/fwd+bwd/8192x512/fp32",
            "clip_loss/fwd+bwd+budget/8192x512/fp32",
            "clip_loss/fwd+bwd/65536x512/fp32",
            "siglip_loss/fwd+bwd/8192x512/bf16",
            "similarity_ranks/fwd/4096x50000x512/fp32",
            "similarity_topk/fwd/4096x50000x512/fp32",
        } <= set(names)
