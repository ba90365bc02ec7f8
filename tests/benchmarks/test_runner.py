"""One case: what is measured, refused, missing and left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import cases, runner
from benchmarks.cases import Peer
from diffgap.ops import _dispatch
from tests.benchmarks.toys import CLOCK, CPU, QUICK, noisy_oracle, noisy_peer, toy_case, twice, wrong_peer
from tests.helpers import relative_l2

pytestmark = pytest.mark.usefixtures("uncompiled")


def test_run_case_measures_what_matches_the_oracle() -> None:
    peers = (Peer("numpy", lambda x: lambda: (x + x,), "numpy"), Peer("torch", noisy_peer, "torch", noisy_oracle))
    result = runner.run_case(toy_case(peers=peers), CPU, CLOCK, QUICK)
    assert not result.failures and not result.missing
    assert [row.impl for row in result.rows] == ["diffgap", "eager", "compile", "numpy", "torch"]
    for row in result.rows:
        assert row.median_s > 0 and row.iqr_s >= 0 and row.floor_s > 0
        assert (row.case, row.device, row.kind) == ("double/fwd/64x32/fp32", "cpu", "measured")


def test_run_case_refuses_to_time_a_wrong_peer() -> None:
    case = toy_case(peers=(Peer("numpy", wrong_peer, "numpy"),))
    result = runner.run_case(case, CPU, CLOCK, QUICK)
    assert "numpy" not in {row.impl for row in result.rows} and len(result.rows) == 3
    assert len(result.failures) == 1 and "double/fwd/64x32/fp32 numpy: output 0" in result.failures[0]


def test_run_case_times_nothing_if_ours_is_wrong() -> None:
    def broken(x: Tensor) -> tuple[Tensor]:
        return (2 * x if _dispatch._mode == "eager" else 3 * x,)

    result = runner.run_case(toy_case(broken), CPU, CLOCK, QUICK)
    assert result.rows == [] and "diffgap: output 0" in result.failures[0]


def test_run_case_reports_an_exception_in_one_line() -> None:
    def raising(x: Tensor) -> cases.Run:
        def run() -> cases.Outputs:
            raise ValueError("no such thing\nsecond line")

        return run

    case = toy_case(peers=(Peer("numpy", raising, "numpy"),))
    result = runner.run_case(case, CPU, CLOCK, QUICK)
    assert result.failures == ["double/fwd/64x32/fp32 numpy: ValueError: no such thing"]
    assert len(result.rows) == 3


def test_run_case_measures_the_others_where_a_peer_cannot_be_prepared() -> None:
    def broken(x: Tensor) -> cases.Run:
        raise ImportError("no such operator")

    result = runner.run_case(toy_case(peers=(Peer("broken", broken, "numpy", module="numpy"),)), CPU, CLOCK, QUICK)
    assert {row.impl for row in result.rows} == {"diffgap", "eager", "compile"}
    assert result.failures == ["double/fwd/64x32/fp32 broken: ImportError: no such operator"]


def test_run_case_lists_a_missing_peer_with_its_command() -> None:
    case = toy_case(peers=(Peer("no_such_package", wrong_peer, "no-such-package"),))
    result = runner.run_case(case, CPU, CLOCK, QUICK)
    assert result.missing == {"no_such_package": "pip install no-such-package"}
    assert not result.failures and len(result.rows) == 3


def test_run_case_finds_a_peer_by_its_module_and_leaves_out_another_devices() -> None:
    peers = (
        Peer("two_ways", lambda x: lambda: (x + x,), "numpy", module="numpy"),
        Peer("only_cuda", lambda x: lambda: (x + x,), "no-such-package", devices=("cuda",)),
    )
    result = runner.run_case(toy_case(peers=peers), CPU, CLOCK, QUICK)
    assert [row.impl for row in result.rows] == ["diffgap", "eager", "compile", "two_ways"]
    assert not result.missing and not result.failures


def test_run_case_lists_what_is_infeasible_and_does_not_run_it() -> None:
    def call(x: Tensor) -> tuple[Tensor]:
        assert _dispatch._mode != "eager", "neither eager nor compile may run, for the oracle's sake either"
        return twice(x)

    def never(x: Tensor) -> cases.Run:
        raise AssertionError

    def doubled(device: torch.device) -> tuple[Tensor]:
        return (2 * toy_case().inputs(device)["x"].double(),)

    reasons = {"eager": "too large", "compile": "too large", "numpy": "too slow"}
    case = replace(
        toy_case(call, peers=(Peer("numpy", never, "numpy"),)), expected=doubled, infeasible=lambda device: reasons
    )
    result = runner.run_case(case, CPU, CLOCK, QUICK)
    assert [row.impl for row in result.rows] == ["diffgap"] and not result.failures
    assert {(skipped.impl, skipped.reason) for skipped in result.skipped} == set(reasons.items())
    wrong = replace(case, expected=lambda device: (doubled(device)[0] * (1 + 5e-5),))
    assert "diffgap: output 0" in runner.run_case(wrong, CPU, CLOCK, QUICK).failures[0], "the contract, without eager"


def test_run_case_judges_by_the_cases_gate_and_a_peers_own() -> None:
    built: list[str] = []

    def gate(x: Tensor) -> cases.Gate:
        built.append("case")
        return lambda outputs: None if torch.equal(outputs[0], 2 * x) else "not doubled"

    def peer_gate(x: Tensor) -> cases.Gate:
        built.append("peer")
        return lambda outputs: None if torch.equal(outputs[0], 3 * x) else "not trebled"

    peers = (
        Peer("a", lambda x: lambda: (3 * x,), "numpy", module="numpy", gate=peer_gate),
        Peer("b", lambda x: lambda: (2 * x,), "numpy", module="numpy", gate=peer_gate),
        Peer("c", lambda x: lambda: (3 * x,), "numpy", module="numpy"),
    )
    result = runner.run_case(replace(toy_case(peers=peers), gate=gate), CPU, CLOCK, QUICK)
    assert [row.impl for row in result.rows] == ["diffgap", "eager", "compile", "a"]
    assert [failure.partition(" ")[2] for failure in result.failures] == ["b: not trebled", "c: not doubled"]
    assert sorted(built) == ["case", "peer"], "a gate is built once"


def test_implementations_differentiate_inputs_that_require_a_gradient() -> None:
    case = toy_case(lambda x: (x.square(), x.sum()), learn=True)
    inputs = case.inputs(CPU)
    square, total, gradient = cases.implementations(case, inputs)["diffgap"]()
    exact = cases.oracle(case, inputs)
    assert square.shape == (64, 32) and total.shape == ()
    assert gradient.shape == (64, 32) and exact[2].dtype == torch.float64
    assert relative_l2(gradient, exact[2]) < 1e-6
    assert gradient.std() > 0.1
