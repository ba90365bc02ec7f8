"""The command ``python -m benchmarks``."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cases
from benchmarks.__main__ import main
from benchmarks.cases import Case, Peer
from tests.benchmarks.toys import toy_case, wrong_peer

pytestmark = pytest.mark.usefixtures("uncompiled")


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
