"""The frame of ``python -m benchmarks``: order, gate, rows and reports; never a duration."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks import cases, check, contrastive, floors, machine, memory, report, runner, timing
from benchmarks.__main__ import main
from benchmarks.cases import Case, Peer
from diffgap.ops import _dispatch
from tests.benchmarking import CLOCK, QUICK
from tests.helpers import relative_l2

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("uncompiled")
ROW_KEYS = ["case", "impl", "median_s", "iqr_s", "peak_bytes", "floor_s", "threads", "device", "kind"]


def twice(x: Tensor) -> tuple[Tensor]:
    return (2 * x,)


def toy_case(call=twice, peers: tuple[Peer, ...] = (), *, learn: bool = False, flops: float = 0.0) -> Case:
    def inputs(device: torch.device) -> cases.Inputs:
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(device)
        return {"x": x.requires_grad_(learn)}

    return Case("double/fwd/64x32/fp32", torch.float32, inputs, call, peers, flops)


def wrong_peer(x: Tensor) -> cases.Run:
    return lambda: (2.01 * x,)


def noisy_peer(x: Tensor) -> cases.Run:
    return lambda: (2 * x + torch.randn_like(x),)


def noisy_oracle(x: Tensor, draw_dtype: torch.dtype) -> tuple[Tensor]:
    return (2 * x + torch.randn(x.shape, dtype=draw_dtype).double(),)


# timing


def test_time_interleaved_gives_every_function_a_turn_in_every_round() -> None:
    turns: list[str] = []

    def clock(function, calls: int) -> float:
        turns.append(function())
        return 1.0

    budget = timing.Budget(seconds=1e9, min_rounds=1, max_rounds=20, turn_seconds=0.0)
    result = timing.time_interleaved({name: lambda name=name: name for name in "abcd"}, clock, budget)
    warm_up, rounds = turns[:4], [turns[i : i + 4] for i in range(4, len(turns), 4)]
    assert sorted(warm_up) == list("abcd")
    assert len(rounds) == 20 and all(sorted(turn) == list("abcd") for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 5, "the order must change between rounds"
    assert all(result[name] == timing.Timing(1.0, 0.0, 20) for name in "abcd")


def test_time_interleaved_repeats_fast_functions_within_a_sample() -> None:
    seen: dict[str, set[int]] = {"fast": set(), "slow": set()}
    durations = {"fast": 1e-4, "slow": 1.0}

    def clock(function, calls: int) -> float:
        seen[function()].add(calls)
        return durations[function()]

    budget = timing.Budget(seconds=0.0, min_rounds=1, sample_seconds=1e-3, turn_seconds=0.0)
    timing.time_interleaved({"fast": lambda: "fast", "slow": lambda: "slow"}, clock, budget)
    assert max(seen["fast"]) == 16 and seen["slow"] == {1}


def test_time_interleaved_reports_median_and_quartiles() -> None:
    values = iter([1.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    budget = timing.Budget(seconds=0.0, min_rounds=5, max_rounds=5, turn_seconds=0.0)
    result = timing.time_interleaved({"f": lambda: None}, lambda function, calls: next(values), budget)
    assert result["f"] == timing.Timing(3.0, 2.0, 5)


def test_time_interleaved_ends_at_the_limit_with_two_samples_of_each() -> None:
    budget = timing.Budget(seconds=1e9, min_rounds=50, turn_seconds=0.0, limit_seconds=0.0, slow_seconds=2.0)
    durations = {"brief": 1.0, "slow": 3.0}
    result = timing.time_interleaved(
        {name: lambda name=name: name for name in durations}, lambda function, calls: durations[function()], budget
    )
    # The slow one's warm-up is a sample of its own.
    assert result == {"brief": timing.Timing(1.0, 0.0, 2), "slow": timing.Timing(3.0, 0.0, 3)}


@pytest.mark.parametrize("threads", [1, 2])
def test_cpu_clock_calls_as_often_as_told(threads: int) -> None:
    count: list[int] = []
    assert timing.CpuClock(threads)(lambda: count.append(1), 7) >= 0.0
    assert len(count) == 7


def test_cpu_clock_of_one_thread_does_not_count_time_not_run() -> None:
    assert timing.CpuClock(1)(lambda: time.sleep(0.05), 1) < 0.05 <= timing.CpuClock(2)(lambda: time.sleep(0.05), 1)


# memory and floors


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory on the CPU is read from Linux's /proc")
def test_peak_bytes_counts_temporaries_and_memory_torch_does_not_know() -> None:
    mib = 1 << 20

    def tensors() -> Tensor:
        a = torch.ones(16 * mib, dtype=torch.int8)
        return a + a

    peak = memory.peak_bytes(tensors, CPU)
    assert peak is not None and 31 * mib < peak < 36 * mib
    peak = memory.peak_bytes(lambda: b"\1" * (24 * mib), CPU)
    assert peak is not None and 23 * mib < peak < 28 * mib


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's malloc only")
def test_freed_memory_is_not_mapped_again() -> None:
    """In a process of its own, which then keeps it for good."""
    code = """
import resource, torch
from benchmarks.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(16 << 20).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
keep_freed_memory()
print(first, [faults() for _ in range(20)][-1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 100 * max(after, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory on the CPU is read from Linux's /proc")
@pytest.mark.parametrize(("enough", "calls"), [(1e9, 3), (0.0, 1)])
def test_peak_bytes_calls_a_slow_function_once(monkeypatch: pytest.MonkeyPatch, enough: float, calls: int) -> None:
    monkeypatch.setattr(memory, "_ENOUGH_SECONDS", enough)
    count: list[int] = []
    memory.peak_bytes(lambda: count.append(1), CPU)
    assert len(count) == calls


def test_traffic_bytes_counts_each_tensor_of_the_dtype_once() -> None:
    x, index = torch.zeros(10), torch.zeros(10, dtype=torch.int64)
    assert floors.traffic_bytes([x, index], [x, torch.zeros(4)], torch.float32) == 56


def test_probes_scale_to_the_case() -> None:
    assert floors.copy_probe(1000, CPU).units == 1.0
    assert floors.gemm_probe(2 * 1024**3 * 5, torch.float32, CPU).units == 5.0


# the gate


def test_mismatch_accepts_the_oracle_and_refuses_what_differs() -> None:
    exact = torch.randn(100, generator=torch.Generator().manual_seed(0)).double()
    single, half = exact.float(), exact.bfloat16()
    assert check.mismatch((single,), (exact,), (single,)) is None
    assert check.mismatch((half,), (exact,), (half,)) is None
    assert "output 0" in check.mismatch((single * 1.0001,), (exact,), (single,))
    assert "output 0" in check.mismatch((half * 1.05,), (exact,), (half,))
    assert "output 0" in check.mismatch((single[:50],), (exact,), (single,))
    assert "output 0" in check.mismatch((single.clone().fill_(float("nan")),), (exact,), (single,))
    assert "2 outputs" in check.mismatch((single, single), (exact,), (single,))
    assert "0 outputs" in check.mismatch((), (exact,), (single,))


def test_mismatch_gives_peers_ten_times_the_room() -> None:
    exact = torch.ones(100).double()
    near = exact.float() * (1 + 5e-5)
    assert check.mismatch((near,), (exact,), None) is None
    assert check.mismatch((near,), (exact,), (exact.float(),)) is not None


def test_mismatch_lets_a_peer_return_float32_of_a_low_precision_computation() -> None:
    exact = torch.ones(100).double()
    near = exact.float() * (1 + 5e-3)
    assert check.mismatch((near,), (exact,), None, torch.bfloat16) is None
    assert check.mismatch((near,), (exact,), None, torch.float32) is not None
    assert check.mismatch((near,), (exact,), (exact.float(),), torch.bfloat16) is not None
    assert check.mismatch((exact.float() * 1.05,), (exact,), None, torch.bfloat16) is not None


def retrieval_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, gallery, positives and exact scores; gallery rows 2i and 2i + 1 differ by less than float32 can tell."""
    generator = torch.Generator().manual_seed(0)
    q, g = (torch.nn.functional.normalize(torch.randn(n, 32, generator=generator), dim=1) for n in (20, 100))
    g = g.repeat_interleave(2, dim=0)
    g[1::2] *= 1 + 2**-20
    return q, g, torch.randperm(200, generator=generator)[:20], q.double() @ g.double().T


def test_ranks_gate_accepts_what_rounding_allows_and_nothing_else() -> None:
    q, g, positives, scores = retrieval_inputs()
    target = scores.gather(1, positives[:, None])
    ranks = (scores > target).sum(dim=1) + 1
    gate = check.ranks_gate(q, g, positives)
    assert gate((ranks,)) is None
    # The positive's twin may stand on either side of it.
    twin = scores.gather(1, (positives ^ 1)[:, None])
    swapped = torch.where((twin > target)[:, 0], ranks - 1, ranks + 1)
    assert gate((swapped,)) is None
    for wrong in (torch.where((twin > target)[:, 0], ranks + 1, ranks - 1), swapped - 2, swapped + 2):
        assert "rank of query" in (gate((wrong,)) or "")
    assert "shape" in (gate((ranks[:5],)) or "")


def test_topk_gate_accepts_ties_in_either_order_and_nothing_else() -> None:
    q, g, _, scores = retrieval_inputs()
    values, indices = scores.topk(6, dim=1)
    gate = check.topk_gate(q, g, 6)
    assert gate((values.float(), indices)) is None
    assert gate((values.float(), indices ^ 1)) is None
    changed = indices.clone()
    changed[3, 2] = changed[3, 3]
    assert gate((values.float(), changed)) == "repeated index of query 3 is wrong, as of 1 in 20 queries"
    seventh = scores.topk(8, dim=1)
    changed = torch.cat([indices[:, :4], seventh.indices[:, 6:]], dim=1)
    skipped = torch.cat([values[:, :4], seventh.values[:, 6:]], dim=1).float()
    assert "index of query 0" in (gate((skipped, changed)) or "")
    assert "value of query 0" in (gate((values.float() + 1e-3, indices)) or "")
    assert "value of query 0" in (gate((values.float() * float("nan"), indices)) or "")
    assert "outside" in (gate((values.float(), indices + 200)) or "")
    assert "shapes" in (gate((values[:, :5].float(), indices[:, :5])) or "")


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


# the contrastive family

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


# reports


def sample_result() -> tuple[dict[str, object], runner.Result]:
    rows = [
        runner.Row("op/fwd/8/fp32", "diffgap", 1e-3, 1e-5, 2 << 20, 5e-4, 1, "cpu"),
        runner.Row("op/fwd/8/fp32", "eager", 3e-3, 1e-5, 4 << 20, 5e-4, 1, "cpu"),
        runner.Row("op/fwd/9/fp32", "diffgap", 2e-6, 0.0, None, 1e-6, 1, "cpu"),
        runner.Row("op/fwd/8/fp32", "diffgap", 1e-6, 0.0, 0, 5e-7, 1, "H100", "modelled"),
    ]
    missing = {"faiss": "pip install faiss-cpu"}
    return machine.header(CPU, CLOCK, ["--json", "/a/b.json"], ["numpy"]), runner.Result(rows, ["bad case"], missing)


def test_to_json_holds_the_header_and_rows_of_the_schema() -> None:
    header, result = sample_result()
    document = json.loads(report.to_json(header, result))
    assert list(document) == ["header", "rows", "failures", "missing", "skipped"]
    assert all(list(row) == ROW_KEYS for row in document["rows"])
    assert {"date", "command", "machine", "versions", "threads", "clock", "device", "backends"} <= set(
        document["header"]
    )
    assert json.loads(report.to_json(header, runner.Result()))["rows"] == []


def test_header_keeps_no_folder_of_the_command() -> None:
    header = machine.header(CPU, CLOCK, ["--json", "/a/b.json", "--json=/c/d.json"], ["numpy", "no-such-package"])
    assert header["command"] == "python -m benchmarks --json b.json --json=d.json"
    assert "numpy" in header["versions"] and "no-such-package" not in header["versions"]


def test_to_markdown_shows_ratios_floor_missing_and_failures() -> None:
    lines = report.to_markdown(*sample_result()).splitlines()
    assert "| case | floor | diffgap | eager |" in lines
    row = "| fwd/8/fp32 | 500 µs | 1.00 ms ± 10.0 µs (50% of floor) | 3.00 ms ± 10.0 µs (3.00x) |"
    assert row in lines
    assert "| fwd/8/fp32 | 2.0 MiB | 4.0 MiB (2.00x) |" in lines
    assert "| fwd/9/fp32 | 1.00 µs | 2.00 µs ± 0.00 ns (50% of floor) |  |" in lines
    assert "- faiss: `pip install faiss-cpu`" in lines and "- bad case" in lines
    assert lines.index("## op (measured)") < lines.index("## op (modelled)")


def test_to_markdown_shows_what_was_not_run_and_why() -> None:
    header, result = sample_result()
    result.skipped.append(runner.Skipped("op/fwd/9/fp32", "eager", "needs 16 GiB"))
    result.skipped.append(runner.Skipped("op/fwd/8/fp32", "torch", "takes minutes"))
    lines = report.to_markdown(header, result).splitlines()
    assert "| fwd/9/fp32 | 1.00 µs | 2.00 µs ± 0.00 ns (50% of floor) | not run: needs 16 GiB |  |" in lines
    assert any(line.endswith("(3.00x) | not run: takes minutes |") for line in lines)
    assert json.loads(report.to_json(header, result))["skipped"][1] == {
        "case": "op/fwd/8/fp32",
        "impl": "torch",
        "reason": "takes minutes",
    }


def test_save_writes_json_tables_and_picture(tmp_path: Path) -> None:
    written = report.save(tmp_path / "new" / "run.json", *sample_result())
    assert [path.name for path in written] == ["run.json", "run.md", "run.png"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["run.json", "run.md", "run.png"]
    assert written[2].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("value", "text"), [(2.0, "2.00 s"), (0.0123, "12.3 ms"), (0.1234, "123 ms"), (4.5e-6, "4.50 µs"), (0.0, "0.00 ns")]
)
def test_seconds(value: float, text: str) -> None:
    assert report.seconds(value) == text


# the command


def fake_family(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.schedule", SimpleNamespace(cases=lambda size: [case]))


def test_main_lists_without_running(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "--list"]) == 0
    assert "q_sample/fwd/256x512/fp32" in capsys.readouterr().out.splitlines()


def test_main_runs_saves_and_exits_zero(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_family(monkeypatch, toy_case(flops=2.0 * 64))
    path = tmp_path / "run.json"
    assert main(["schedule", "--seconds", "0.01", "--json", str(path), "--threads", "1"]) == 0
    assert len(json.loads(path.read_text())["rows"]) == 3
    assert "## double (measured)" in capsys.readouterr().out


def test_main_exits_non_zero_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_family(monkeypatch, toy_case(peers=(Peer("numpy", wrong_peer, "numpy"),)))
    assert main(["schedule", "--seconds", "0.01", "--threads", "1"]) == 1
    assert "Failures" in capsys.readouterr().out


def test_a_case_without_memory_loses_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(device: torch.device) -> cases.Inputs:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 96 GiB")

    path = tmp_path / "run.json"
    kept: list[int] = []

    def stopped(device: torch.device) -> cases.Inputs:
        kept.append(len(json.loads(path.read_text())["rows"]))
        raise KeyboardInterrupt

    several = [replace(toy_case(), inputs=too_large, name="large"), toy_case(), replace(toy_case(), inputs=stopped)]
    monkeypatch.setitem(sys.modules, "benchmarks.schedule", SimpleNamespace(cases=lambda size: several))
    with pytest.raises(KeyboardInterrupt):
        main(["schedule", "--seconds", "0.01", "--json", str(path), "--threads", "1"])
    assert kept == [3] and len(json.loads(path.read_text())["rows"]) == 3
    assert json.loads(path.read_text())["failures"] == ["large: OutOfMemoryError: CUDA out of memory."]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nonsense"], "family: nonsense does not exist"),
        (["--threads", "0"], "--threads: must be at least 1"),
        (["--seconds", "-1"], "--seconds: must be positive"),
        (["--json", "run.txt"], "--json: expected a name that ends in .json"),
        pytest.param(
            ["--device", "cuda"],
            "no CUDA device is visible",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is visible"),
        ),
    ],
)
def test_main_refuses_bad_options(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
