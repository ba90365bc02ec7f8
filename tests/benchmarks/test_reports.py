"""Results as JSON, tables and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import machine, report, runner
from tests.benchmarks.toys import CLOCK, CPU

ROW_KEYS = ["case", "impl", "median_s", "iqr_s", "peak_bytes", "floor_s", "threads", "device", "kind"]


def sample_result() -> tuple[dict[str, object], runner.Result]:
    rows = [
        runner.Row("op/fwd/8/fp32", "diffgap", 1e-3, 1e-5, 2 << 20, 5e-4, 1, "cpu"),
        runner.Row("op/fwd/8/fp32", "eager", 3e-3, 1e-5, 4 << 20, 5e-4, 1, "cpu"),
        runner.Row("op/fwd/8/fp32", "compile", 8e-4, 1e-5, 1 << 20, 5e-4, 1, "cpu"),
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\n"
            "processor\t: 1\ncpu family\t: 27\nmodel\t\t: 3\nmodel name\t: another\n",
            {"cpu": "AMD EPYC", "cpu_family": 26, "cpu_model": 2},
        ),
        ("processor\t: 0\nCPU part\t: 0xd40\n\n", {"cpu": "aarch64"}),
    ],
)
def test_header_has_the_generation_of_the_processor(
    text: str, expected: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine.platform, "processor", lambda: "aarch64")
    monkeypatch.setattr(machine.Path, "read_text", lambda path, **_: text)
    found = machine.header(CPU, CLOCK, [], [])
    assert {name: value for name, value in found["machine"].items() if name.startswith("cpu")} == expected
    monkeypatch.undo()
    family = ", family 26 model 2" if "cpu_family" in expected else ""
    assert f"{expected['cpu']}{family} ({found['machine']['isa']}" in report.to_markdown(found, runner.Result())


def test_to_markdown_shows_ratios_floor_missing_and_failures() -> None:
    lines = report.to_markdown(*sample_result()).splitlines()
    assert "| case | floor | diffgap | eager | compile |" in lines
    # A peer that is faster has its loss in its own column.
    row = (
        "| fwd/8/fp32 | 500 µs | 1.00 ms ± 10.0 µs (50% of floor) | 3.00 ms ± 10.0 µs (3.00x) "
        "| 800 µs ± 10.0 µs (0.80x) |"
    )
    assert row in lines
    assert "| fwd/8/fp32 | 2.0 MiB | 4.0 MiB (2.00x) | 1.0 MiB (0.50x) |" in lines
    assert "| fwd/9/fp32 | 1.00 µs | 2.00 µs ± 0.00 ns (50% of floor) |  |  |" in lines
    assert "- faiss: `pip install faiss-cpu`" in lines and "- bad case" in lines
    assert lines.index("## op (measured)") < lines.index("## op (modelled)")


def test_to_markdown_shows_what_was_not_run_and_why() -> None:
    header, result = sample_result()
    result.skipped.append(runner.Skipped("op/fwd/9/fp32", "eager", "needs 16 GiB"))
    result.skipped.append(runner.Skipped("op/fwd/8/fp32", "torch", "takes minutes"))
    lines = report.to_markdown(header, result).splitlines()
    assert "| fwd/9/fp32 | 1.00 µs | 2.00 µs ± 0.00 ns (50% of floor) | not run: needs 16 GiB |  |  |" in lines
    assert any(line.endswith("(0.80x) | not run: takes minutes |") for line in lines)
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
