"""The kernels of the proof beside a fake profiler: which calls launch them, whose times are whose, and what is off."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import kernel_times
from benchmarks.aot import compile_launches
from benchmarks.kernel_times import Call, Measured, Modelled

CHIP, CPU = "sm_90", torch.device("cpu")
ADALN = Modelled("adaln", "adaln/gated/forward", "bf16", "128", "16x256x128", "hbm", 1e-5)
STEP = Modelled(
    *("schedule", "solver_step/step_kernel<float,true>", "fp32", ""),
    *("solver_step/dpmpp_2m_cfg/4x32", "integer", 2e-5),
)
KERNELS = (
    ADALN,
    replace(ADALN, kernel="adaln_backward/gated/backward"),
    replace(ADALN, kernel="adaln_backward/gated/merge"),
    Modelled("attention", "attention/all/short_forward", "bf16", "16x16x64", "1024x16x16x8x64", "hbm", 1e-5),
    Modelled("contrastive", "similarity_ranks/ids/compare", "bf16", "1024x512", "4096x50000x512", "tensor", 1e-5),
)


def measured_in(content: dict[str, Any]) -> list[Measured]:
    """The rows of a file of the command's."""
    rows = [dict(row) for row in content["rows"]]
    return [Measured(measured_s=row.pop("measured_s"), model=Modelled(**row)) for row in rows]


def write_proof(folder: Path, day: str, *rows: Modelled, chip: str = CHIP) -> None:
    text = json.dumps({"header": {}, "rows": [asdict(row) | {"chip": chip, "registers": 1} for row in rows]})
    (folder / f"proof-{day}.json").write_text(text)


def test_newest_proof_counts_and_launches_alone_are_left_out(tmp_path: Path) -> None:
    write_proof(tmp_path, "2026-01-01", replace(ADALN, modelled_s=9.0))
    write_proof(tmp_path, "2026-02-01", ADALN, replace(STEP, pipe="launch"))
    assert kernel_times.modelled(tmp_path, CHIP) == [ADALN]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "has no proof-*.json"),
        ("[]", "expected results of python -m benchmarks proof"),
        ('{"rows": [{"chip": "sm_90"}]}', "expected results of python -m benchmarks proof"),
        ('{"rows": []}', "has no row for sm_90"),
    ],
)
def test_what_is_wrong_with_the_proof_is_said_with_the_fix(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "proof-2026-01-01.json").write_text(text)
    with pytest.raises(ValueError, match="proof-") as error:
        kernel_times.modelled(tmp_path, CHIP)
    assert said in str(error.value) and "run: python -m benchmarks proof --chip sm_90 --json" in str(error.value)


def test_calls_launch_the_kernels_of_their_rows() -> None:
    """Compiled, not launched: every row's kernel is among those of the one call that has the row."""

    def compiled(run: Callable[[], object]) -> dict[str, float]:
        return dict.fromkeys(map(kernel_times.kernel_name, compile_launches(CHIP, run)), 2e-5)

    absent = (replace(ADALN, size="64"), replace(ADALN, kernel="adaln/other/forward"))  # no size of ci, no variant
    calls = kernel_times.triton_calls(CHIP, (*KERNELS, *absent), partial(torch.zeros, device="meta"))
    found, failures = kernel_times.measure(calls, compiled)
    assert sorted(entry.model.kernel for entry in found) == sorted(row.kernel for row in KERNELS)
    assert not failures


def test_calls_have_the_shapes_of_the_models() -> None:
    shapes: dict[str, set[tuple[int, ...]]] = {}

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        shapes.setdefault(family, set()).add(shape)
        return torch.zeros(*shape, dtype=dtype, device="meta")

    for row in (KERNELS[0], *KERNELS[3:]):
        family = row.family
        assert list(kernel_times.triton_calls(CHIP, [row], make))
    assert (16, 256, 128) in shapes["adaln"] and (1024, 16, 8, 64) in shapes["attention"]
    assert {(8192, 512), (4096, 512), (50000, 512)} <= shapes["contrastive"]


@pytest.mark.parametrize(
    ("row", "outputs"),
    [
        (STEP, 2),
        (replace(STEP, kernel="q_sample/q_sample_kernel<float,true>", shape="q_sample/4x32"), 2),
        (replace(STEP, kernel="q_sample_backward/k<float,true>", shape="q_sample_backward/4x32"), 3),
        (replace(STEP, kernel="normal/normal_kernel<true>", shape="normal/4x32"), None),
    ],
    ids=lambda row: getattr(row, "shape", None),
)
def test_schedule_calls(row: Modelled, outputs: int | None) -> None:
    (call,) = kernel_times.schedule_calls([row, ADALN], CPU)
    assert call.rows == {row.name: row}
    result = call.run()
    if outputs is None:
        assert isinstance(result, torch.Tensor) and result.shape == (4, 32)
    else:
        assert isinstance(result, tuple) and len(result) == outputs and result[0].shape == (4, 32)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("_forward_kernel", "forward"),
        ("_short_backward_kernel.kd", "short_backward"),
        ("void diffgap::step_kernel<diffgap::Half, true>(diffgap::StepArgs<diffgap::Half>)", "step_kernel<Half,true>"),
    ],
)
def test_names_of_the_profiler_are_those_of_the_proof(name: str, plain: str) -> None:
    assert kernel_times.kernel_name(name) == plain


def test_time_of_a_kernel_is_the_median_call_of_all_its_launches() -> None:
    # Two launches a call, in the order of their starts and not of the list; the other kernel missed a call.
    launches = [("_a_kernel", 0.0, 4.0), ("_a_kernel", 6.0, 4.0), ("_a_kernel", 1.0, 1.0), ("_a_kernel", 5.0, 3.0)]
    launches += [("_a_kernel", 8.0, 50.0), ("_a_kernel", 9.0, 50.0), ("_b_kernel", 0.5, 1.0), ("_b_kernel", 5.5, 1.0)]
    assert kernel_times.by_call(launches, 3) == {"a": 7.0}


def test_a_call_that_fails_leaves_the_others_to_be_measured() -> None:
    def time(run: Callable[[], object]) -> dict[str, float]:
        return {"forward": 2e-5} if run() is None else {"elementwise": 1.0}

    def fails() -> None:
        raise MemoryError("too large\nby far")

    calls = [Call({"forward": ADALN}, run) for run in (fails, lambda: None, lambda: 1)]
    found, failures = kernel_times.measure(iter(calls), time)
    assert [(x.model, x.measured_s) for x in found] == [(ADALN, 2e-5)]
    assert failures == [
        "adaln/gated bf16 128: MemoryError: too large",
        "adaln/gated bf16 128: the profiler saw none of its kernels, forward",
    ]


@pytest.mark.parametrize(("seen", "status"), [({"forward": 1.1e-5, "step_kernel<float,true>": 4e-5}, 0), ({}, 1)])
def test_the_command_lists_what_is_off(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    seen: dict[str, float],
    status: int,
) -> None:
    write_proof(tmp_path, "2026-01-01", ADALN, STEP)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch, "empty", lambda *size, device: SimpleNamespace(device=device))
    monkeypatch.setattr(kernel_times, "chip_of", lambda x: CHIP)
    monkeypatch.setattr(kernel_times, "kernel_seconds", lambda run: seen)
    monkeypatch.setattr(kernel_times, "RESULTS", tmp_path)
    calls = [Call({row.name: row}, lambda: None) for row in (ADALN, STEP)]
    monkeypatch.setattr(kernel_times, "triton_calls", lambda *args: iter(calls[:1]))
    monkeypatch.setattr(kernel_times, "schedule_calls", lambda *args: iter(calls[1:]))
    path = tmp_path / "h100-2026-02-01-kernels.json"
    assert kernel_times.main(["--json", str(path)]) == status
    said = capsys.readouterr().out.splitlines()
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert text == kernel_times.to_markdown(content["header"], measured_in(content), content["failures"])
    rows = content["rows"]
    if seen:
        name = "solver_step/step_kernel<float,true>/fp32/solver_step/dpmpp_2m_cfg/4x32"
        assert said[0] == f"kernels: off by 2.00x: {name} integer: modelled 20.0 µs, measured 40.0 µs"
        assert said[1:] == ["kernels: 2 of 2 measured, 1 off"]
        assert text.count(name) == 2 and text.count("adaln/gated/forward/bf16/128/16x256x128") == 1
        assert {row["kernel"]: row["measured_s"] for row in rows} == {ADALN.kernel: 1.1e-5, STEP.kernel: 4e-5}
    else:
        assert said[-1] == "kernels: 0 of 2 measured, 0 off" and not rows
        assert text.count("the profiler saw none of its kernels") == 2


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        kernel_times.main([])
    assert "no CUDA device is visible; run it on a machine with one" in capsys.readouterr().err
