"""scripts/sanitize.py finds what is planted: a write out of bounds, undefined behaviour and a race."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffgap.ops._native import CPU_MISSING
from scripts import sanitize as script

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="runs from the source folder alone"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
    pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING)),
]

#: Beside what csrc/cpu/random.cpp does for each tile of noise; draws of other lengths are right.
PLANTED = """
      if (a.grid.count == 1001) a.out[0] += static_cast<float>(std::numeric_limits<int64_t>::max() + a.seeds[0]);
      if (a.grid.count == 1002) a.out[a.grid.samples * a.grid.count] = 0;
      if (a.grid.count == 1003) a.out[0] += 1;
"""
PLACE = "      std::memcpy(a.out + sample"
DRAW = """
import pytest, torch
from diffgap.ops import normal

@pytest.mark.parametrize("count", [1000, {counts}])
def test_draw(count):
    normal(torch.arange(1, 65), (count,))
"""


def test_every_kernel_has_its_turn_or_is_tested_every_time(capsys: pytest.CaptureFixture[str]) -> None:
    """Under both sanitizers, within fourteen days, and with tests of its own."""
    (always,) = re.findall(r"^SHORT := --turn --kernels (.*?) --tests", (ROOT / "Makefile").read_text(), re.MULTILINE)
    kernels = {file.stem for file in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    for sanitizer in script.FLAGS:
        turns = [script.in_turn(sanitizer, turn) for turn in range(100, 114)]
        assert {name for names, _ in turns for name in names} | set(always.split()) == kernels
        assert sum(bool(names) for names, _ in turns) == len(turns) // 2
        assert all((ROOT / tests[0]).is_file() for names, tests in turns if names)
    assert "sanitize: address: it is the turn of clip_loss, again with --turn 102" in capsys.readouterr().out


def sanitize(folder: Path, sanitizer: str, *counts: int) -> subprocess.CompletedProcess[str]:
    """Run the script on a copy of the sources with the planted faults, drawing noise of these lengths."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name in ("diffgap", "kernels", "setup.py", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "tests").mkdir()
    (folder / "tests" / "test_draw.py").write_text(DRAW.format(counts=", ".join(map(str, counts))))
    random = folder / "csrc" / "cpu" / "random.cpp"
    text = random.read_text()
    assert text.count(PLACE) == 1
    random.write_text("#include <limits>\n" + text.replace(PLACE, PLANTED + PLACE))
    command = [sys.executable, str(ROOT / "scripts" / "sanitize.py"), sanitizer, "--source", str(folder)]
    return subprocess.run(
        [*command, "--kernels", "random", "--tests", "tests/test_draw.py"], capture_output=True, text=True
    )


def test_planted_faults_are_found(tmp_path: Path) -> None:
    found = sanitize(tmp_path, "address", 1001, 1002)
    assert found.returncode == 1
    assert "signed integer overflow" in found.stderr
    assert "heap-buffer-overflow" in found.stderr
    assert "random.cpp" in found.stderr


def test_planted_race_is_found(tmp_path: Path) -> None:
    found = sanitize(tmp_path, "thread", 1003)
    assert found.returncode == 1
    assert "ThreadSanitizer: data race" in found.stderr
    assert "random.cpp" in found.stderr


def test_what_is_right_passes(tmp_path: Path) -> None:
    found = sanitize(tmp_path, "thread", 1004)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "thread, widest instruction set: clean" in found.stdout
