"""``make cuda-check`` finds what it looks for."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from benchmarks import nvcc

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "cuda_check.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="runs from the source folder alone")

HEADERS = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/include/cuda_runtime.h"))
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")

KERNELS = """
extern "C" __global__ void plain(float* x) { x[threadIdx.x] += 1.0f; }

template <bool kVector>
__global__ void copy(const float* from, float* to) {
  const unsigned i = threadIdx.x;
#if defined(NARROW)
  for (int j = 0; j < 4; ++j) to[4 * i + j] = from[4 * i + j];
#else
  reinterpret_cast<float4*>(to)[i] = reinterpret_cast<const float4*>(from)[i];
#endif
}
template __global__ void copy<true>(const float*, float*);

#if defined(INDEXED)
extern "C" __global__ void indexed(const unsigned* at, float* x) {
  float values[64] = {};
  for (int i = 0; i < 999; ++i) values[at[i] % 64u] += x[i];
  for (int i = 0; i < 64; ++i) x[i] = values[i];
}
#endif

#if defined(SPILLS)
extern "C" __global__ void spills(float* x) {
  float values[48];
#pragma unroll
  for (int i = 0; i < 48; ++i) values[i] = x[32 * i + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 48; ++i) x[32 * i + threadIdx.x] = values[47 - i] * values[(i + 7) % 48];
}
#endif
"""


def load() -> Any:
    spec = importlib.util.spec_from_file_location("cuda_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_check"] = module  # where dataclasses look up annotations
    spec.loader.exec_module(module)
    return module


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def compiled(folder: Path, *options: str) -> str:
    source, binary = folder / "kernels.cu", folder / "kernels.fatbin"
    source.write_text(KERNELS)
    includes = [f"-I{header.parent}" for header in HEADERS]
    subprocess.run(["nvcc", "-arch=sm_90", "-fatbin", *includes, *options, "-o", str(binary), str(source)], check=True)
    return str(binary)


@needs_nvcc
def test_cuda_check_passes_good_kernels_and_prints_their_registers(tmp_path: Path) -> None:
    result = run(compiled(tmp_path))
    assert result.returncode == 0, result.stderr
    header, *rows = result.stdout.splitlines()
    assert header.split() == ["registers", "sm_90"]
    assert sorted(row.split()[0] for row in rows) == ["copy<true>", "plain"]
    assert all(0 < int(row.split()[-1]) < 64 for row in rows)


@needs_nvcc
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-DSPILLS", "-maxrregcount=24"), r"spills on sm_90: keeps \d+ bytes a thread in local memory"),
        (("-DINDEXED",), r"indexed on sm_90: keeps \d+ bytes a thread in local memory"),
        (("-DNARROW",), r"copy<true> on sm_90: accesses global memory by STG\.E instead of 16 bytes"),
    ],
)
def test_cuda_check_refuses(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    result = run(compiled(tmp_path, *options))
    assert result.returncode == 1
    (message,) = result.stderr.splitlines()
    assert re.search(said, message), message


@needs_nvcc
def test_cuda_check_misses_a_chip_and_a_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = load()
    assert module.check([Path(compiled(tmp_path))], ["sm_80", "sm_90"]) == 2
    assert "plain: not compiled for sm_80" in capsys.readouterr().err
    assert module.check([]) == 1
    assert "no kernel is found" in capsys.readouterr().err


def test_cuda_check_refuses_loads_of_single_elements() -> None:
    wide = ["LDG.E.128", "LDG.E.64", "STG.E.128"]
    name = "_Z4copyI6__halfLb1ELb0EEvPT_"
    assert nvcc.is_vector(name) and not nvcc.is_vector("_Z4copyI6__halfLb0ELb1EEvPT_")
    assert nvcc.mistakes(name, nvcc.Kernel(32, 0, 0, wide)) == []
    for narrow in ("LDG.E.U16", "STG.E.64", "STG.E"):
        (text,) = nvcc.mistakes(name, nvcc.Kernel(32, 0, 0, [*wide, narrow]))
        assert f"by {narrow} instead" in text
    (text,) = nvcc.mistakes(name, nvcc.Kernel(32, 0, 0, ["LDG.E.128"]))
    assert "no store" in text


def test_cuda_check_refuses_more_shared_memory_than_a_block_gets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load()
    for taken, wrong in ((49152, 0), (49153, 1)):
        kernels = {("plain", "sm_90"): nvcc.Kernel(32, taken, 0, [])}
        monkeypatch.setattr(module, "read_kernels", lambda file, kernels=kernels: kernels)
        assert module.check([Path("fake")]) == wrong
    said = "cuda-check: plain on sm_90: takes 49153 bytes of shared memory, and a block gets 49152\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(("chip", "system"), [("sm_80", 0), ("sm_90", 1024), ("sm_90a", 1024), ("sm_120", 1024)])
def test_shared_memory_of_the_system_is_not_the_kernels(
    monkeypatch: pytest.MonkeyPatch, chip: str, system: int
) -> None:
    usage = {"--dump-resource-usage": " Function plain:\n  REG:32 STACK:0 SHARED:1408 LOCAL:0 TEXTURE:0\n"}
    monkeypatch.setattr(nvcc, "_dump", lambda file, option: {chip: usage.get(option, "")})
    assert nvcc.read_kernels(Path("fake"))["plain", chip].shared_bytes == 1408 - system


def test_cuda_check_without_nvcc_says_so_in_one_line_and_passes(tmp_path: Path) -> None:
    result = run(CUDA_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert line.startswith("cuda-check: nothing is compiled here, which takes ")
