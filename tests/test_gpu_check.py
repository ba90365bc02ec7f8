"""``make gpu`` without a GPU: the comparison of made-up rows, and the one line that says that nothing was run."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpus import Gpu
from benchmarks.runner import Row

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "gpu_check.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="runs from the source folder alone")


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)  # where dataclasses look up annotations
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(module)
    return module


def modelled(case: str, impl: str, median_s: float, device: str = "H100-SXM5-80GB") -> Row:
    return Row(case, impl, median_s, 0.0, None, 1e-6, 0, device, "modelled")


def measured(case: str, impl: str, median_s: float, device: str = "cuda") -> Row:
    return Row(case, impl, median_s, 1e-7, None, 1e-6, 8, device)


def write(path: Path, *rows: Row) -> Path:
    path.write_text(json.dumps({"header": {}, "rows": [asdict(row) for row in rows]}))
    return path


def test_times_are_compared_by_case_and_implementation(gpu_check: ModuleType) -> None:
    found = gpu_check.compare(
        [modelled("a", "diffgap", 2.0), modelled("a", "sdpa", 2.0), modelled("b", "diffgap", 4.0)],
        [
            *(measured("a", "diffgap", 2.2), measured("b", "diffgap", 1.0), measured("c", "diffgap", 1.0)),
            # Measured on the processor, and no measurement at all.
            *(measured("a", "sdpa", 9.0, "cpu"), modelled("a", "sdpa", 9.0)),
        ],
    )
    # The furthest off first, be it too slow or too fast.
    assert [(x.case, x.impl, x.ratio) for x in found] == [("b", "diffgap", 0.25), ("a", "diffgap", 1.1)]
    assert [x.off for x in found] == [True, False]


@pytest.mark.parametrize(("ratio", "off"), [(0.74, True), (0.76, False), (1.0, False), (1.24, False), (1.26, True)])
def test_off_is_more_than_a_quarter(gpu_check: ModuleType, ratio: float, off: bool) -> None:
    assert gpu_check.Comparison("a", "diffgap", 2.0, 2.0 * ratio).off == off


def test_report_says_what_was_off(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    from benchmarks import modelled as models

    def fails(gpu: Gpu) -> list[Row]:
        raise RuntimeError("no C++ kernels\nat all")

    def rows_on(gpu: Gpu) -> list[Row]:
        return [modelled("attention/fwd/x", impl, 1e-3, gpu.name) for impl in ("diffgap", "eager", "sdpa_flash")]

    of_models = {"a": (("sm_90",), rows_on), "b": (("sm_90",), fails), "c": (("sm_80",), rows_on)}
    monkeypatch.setattr(models, "MODELS", of_models)
    rows = [measured("attention/fwd/x", "diffgap", 1.1e-3), measured("attention/fwd/x", "eager", 2e-3)]
    results = write(tmp_path / "h100-2026-02-01.json", *rows)
    path = gpu_check.report(results, "sm_90", "NVIDIA H100")
    assert path == tmp_path / "h100-2026-02-01-models.md"
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        "gpu: the model of b: RuntimeError: no C++ kernels",
        "gpu: the model of c is not made for sm_90",
        "gpu: off by 2.00x: attention/fwd/x eager: modelled 1.00 ms, measured 2.00 ms",
    ]
    assert said[3].startswith("gpu: 2 modelled times measured, 1 off; wrote ") and len(said) == 4
    text = path.read_text(encoding="utf-8")
    content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert text == gpu_check.to_markdown(content["header"], [gpu_check.Comparison(**row) for row in content["rows"]])
    assert "Of 3 modelled rows 2 were measured, of which 1 were off by more than 25%." in text
    assert text.count("| attention/fwd/x | eager | 1.00 ms | 2.00 ms | 2.00 |") == 2
    assert text.count("| attention/fwd/x | diffgap | 1.00 ms | 1.10 ms | 1.10 |") == 1


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [{"kind": "measured"}]}'])
def test_a_file_of_something_else(gpu_check: ModuleType, tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected a file of results"):
        gpu_check.rows_in(path, "measured")


def test_the_name_of_the_results(gpu_check: ModuleType) -> None:
    assert gpu_check.file_name("NVIDIA H100 80GB HBM3", "2026-01-31") == "nvidia-h100-80gb-hbm3-2026-01-31.json"


def test_without_a_gpu_it_says_so_in_one_line(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "run", lambda command: pytest.fail("ran something"))
    assert gpu_check.main([]) == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert "no CUDA device is visible" in line and printed.out == ""


@pytest.mark.parametrize("failing", [None, "pytest", "benchmarks", "benchmarks.kernel_times"])
def test_everything_is_run_and_reported_whatever_fails(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: str | None
) -> None:
    pytest.importorskip("triton")
    from diffgap.kernels import configs

    ran: list[Any] = []

    def run(command: list[str]) -> bool:
        ran.append(command)
        if command[0] == "benchmarks":
            write(Path(command[-1]), measured("a", "diffgap", 1.0))
        return command[0] != failing

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch, "empty", lambda *size, device: SimpleNamespace(device=device))
    monkeypatch.setattr(configs, "chip_of", lambda x: "sm_90")
    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    reported: list[Any] = []
    monkeypatch.setattr(gpu_check, "report", lambda *args: reported.append(args))
    assert gpu_check.main(["--size", "ci"]) == (failing is not None)
    assert [command[:2] for command in ran] == [
        ["pytest", "tests/gpu"],
        ["benchmarks", "schedule"],
        ["benchmarks.kernel_times", "--json"],
    ]
    assert ran[2][2] == ran[1][-1].replace(".json", "-kernels.json")
    assert {"modelled", "contrastive", "attention", "cuda", "ci"} <= set(ran[1])
    ((path, chip, name),) = reported
    assert (
        path.parent == tmp_path and path.name.startswith("nvidia-h100-2") and (chip, name) == ("sm_90", "NVIDIA H100")
    )
