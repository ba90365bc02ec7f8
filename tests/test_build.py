"""setup.py: what it builds, what it says where something is missing, and what the libraries link against."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diffgap
from diffgap.ops import _native
from diffgap.ops._native import CPU_MISSING

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = sorted(Path(diffgap.__file__).parent.glob("_C_*.so"))

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs from the source folder alone")


def setup(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of setup.py, without pyproject.toml, in ``folder``."""
    shutil.copy(ROOT / "setup.py", folder)
    if not (folder / "csrc").exists():
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        (folder / "diffgap" / "ops").mkdir(parents=True)
        for name in ("_version.py", "ops/_build_id.py"):
            shutil.copy(ROOT / "diffgap" / name, folder / "diffgap" / name)
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=folder,
        env={**os.environ, "DIFFGAP_CPU": "auto", "DIFFGAP_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(not LIBRARIES, reason=str(CPU_MISSING))
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_libraries_use_the_stable_abi_alone() -> None:
    for library in LIBRARIES:
        command = ["nm", "-D", "-C", "--undefined-only", str(library)]
        symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "torch_parallel_for" in symbols or "aoti_torch" in symbols
        unstable = [line for line in symbols.splitlines() if re.search(r"\b(at|c10|torch)::|\bPy[A-Z_]", line)]
        assert not unstable, f"{library.name}: {unstable}"
        assert library.name.endswith(".abi3.so")


INSTRUCTION_SETS = """
import sys, torch
from diffgap.ops import clip_loss, siglip_loss, similarity_ranks, similarity_topk
from diffgap.ops.q_sample import q_sample
from diffgap.ops.random import normal
from diffgap.ops.solver_step import COLUMNS, solver_step
seed = torch.arange(5)
a, b = normal(seed, (3, 333)), normal(seed, (3, 333), 1)
table = torch.linspace(-1, 1, len(COLUMNS), dtype=torch.float64)[None]
options = {"unconditional": b, "guidance_scale": 2.0, "guidance_rescale": 0.5, "last_sample": a, "history": [b, a, b]}
results = [a, b]
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    results += q_sample(a.to(dtype), seed * 0, table[:, -2:], seed, "v_prediction")
    results += solver_step(a.to(dtype), b.to(dtype), table, 0, seed=seed, x0_norm=9.0, **options)
    left, right = (x[:, 0].repeat(30, 1).add(x[1, 1]).mul(0.05).to(dtype).requires_grad_() for x in (a, b))
    for loss in (clip_loss(left, right, 10.0), siglip_loss(left, right, 10.0, -3.0)):
        results += [loss.detach(), *torch.autograd.grad(loss, (left, right))]
    results.append(similarity_ranks(left, right, torch.arange(150)))
    results += similarity_topk(left, right, 40)
torch.save(results, sys.argv[1])
"""


@pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set_gives_the_same_numbers(tmp_path: Path, isa: str) -> None:
    results = {}
    for name in ("widest", isa):
        file = tmp_path / f"{name}.pt"
        environment = {**os.environ, "DIFFGAP_CPU_ISA": name, "DIFFGAP_BACKEND": "native"}
        command = [sys.executable, "-c", INSTRUCTION_SETS, str(file)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        results[name] = torch.load(file)
    for noise, same in zip(results[isa][:2], results["widest"][:2], strict=True):
        assert torch.equal(noise, same)
    for ours, widest in zip(results[isa][2:], results["widest"][2:], strict=True):
        torch.testing.assert_close(ours, widest)


def test_install_without_a_compiler_is_pure_python(tmp_path: Path) -> None:
    result = setup(tmp_path, "--version", CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr
    messages = [line for line in result.stderr.splitlines() if line.startswith("diffgap: ")]
    assert len(messages) == 1
    assert "C++20 compiler" in messages[0]


def test_install_without_torch_is_pure_python(tmp_path: Path) -> None:
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "torch.py").write_text("raise ImportError('not installed')\n")
    result = setup(tmp_path, "--version", PYTHONPATH=str(tmp_path / "stub"))
    assert result.returncode == 0, result.stderr
    messages = [line for line in result.stderr.splitlines() if line.startswith("diffgap: ")]
    assert len(messages) == 1
    assert "torch at build time" in messages[0]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"DIFFGAP_CPU": "1", "CXX": "no-such-compiler"}, "DIFFGAP_CPU=1, but"),
        ({"DIFFGAP_CPU": "yes"}, "DIFFGAP_CPU: use 0 or 1"),
        ({"DIFFGAP_CUDA": "1", "CUDA_HOME": "no-such-folder"}, "DIFFGAP_CUDA=1, but the CUDA kernels need nvcc"),
    ],
)
def test_forced_build_fails_in_one_line(tmp_path: Path, variables: dict[str, str], said: str) -> None:
    result = setup(tmp_path, "--version", **variables)
    assert result.returncode == 1
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def executable(file: Path, script: str) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return str(file)


def the_sentence(result: subprocess.CompletedProcess[str]) -> str:
    """What a failed build says at its end, where pip shows it."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("diffgap: ")
    return last


def test_old_torch_at_build_time(tmp_path: Path) -> None:
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "torch.py").write_text("__version__ = '2.9.1+cpu'\n")
    said = the_sentence(setup(tmp_path, "--version", DIFFGAP_CPU="1", PYTHONPATH=str(tmp_path / "stub")))
    assert "torch >= 2.10 at build time, this is 2.9.1+cpu (pip install --upgrade torch)" in said


def test_old_setuptools(tmp_path: Path) -> None:
    (tmp_path / "stub").mkdir()
    stub = "__version__ = '65.5.0'\nExtension = find_packages = setup = None\n"
    (tmp_path / "stub" / "setuptools.py").write_text(stub)
    said = the_sentence(setup(tmp_path, "--version", PYTHONPATH=str(tmp_path / "stub")))
    assert "needs setuptools >= 77, this is 65.5.0; run: pip install -U setuptools wheel" in said


def test_kernels_that_do_not_compile(tmp_path: Path) -> None:
    script = 'case "$*" in *" -c "*) echo "internal compiler error" >&2; exit 1;; *) echo "g++ (GNU) 12.2.0";; esac'
    result = setup(tmp_path, "build_ext", CXX=executable(tmp_path / "c++", script), DIFFGAP_CPU="1")
    assert "internal compiler error" in result.stdout + result.stderr
    said = the_sentence(result)
    assert "the kernels for cpu do not compile here" in said
    assert said.endswith("set DIFFGAP_CPU=0")


needs_cuda_torch = pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")


@needs_cuda_torch
@pytest.mark.parametrize(
    ("prints", "found"), [("release 1.2, V1.2.3", "found release 1.2"), ("", "found one that does not say its release")]
)
def test_cuda_toolkit_of_another_version(tmp_path: Path, prints: str, found: str) -> None:
    executable(tmp_path / "toolkit" / "bin" / "nvcc", f"echo '{prints}'")
    switches = {"DIFFGAP_CPU": "0", "DIFFGAP_CUDA": "1", "CUDA_HOME": str(tmp_path / "toolkit")}
    said = the_sentence(setup(tmp_path, "--version", **switches))
    assert f"as torch is, {found} (set CUDA_HOME to a toolkit of CUDA {str(torch.version.cuda).split('.')[0]})" in said


@needs_cuda_torch
def test_cuda_headers_missing(tmp_path: Path) -> None:
    executable(tmp_path / "toolkit" / "bin" / "nvcc", f"echo 'release {torch.version.cuda}, V1'")
    # Away from the headers of NVIDIA's wheels, which may lie beside this torch.
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "sitecustomize.py").write_text(
        f"import sysconfig\npath = sysconfig.get_path\nsysconfig.get_path = lambda name, *rest, **others: "
        f"{str(tmp_path)!r} if name == 'purelib' else path(name, *rest, **others)\n"
    )
    switches = {"DIFFGAP_CPU": "0", "DIFFGAP_CUDA": "1", "CUDA_HOME": str(tmp_path / "toolkit")}
    said = the_sentence(setup(tmp_path, "--version", PYTHONPATH=str(tmp_path / "stub"), **switches))
    assert re.search(r"need the CUDA file cuda_\w+\.h \(pip install nvidia-cuda-runtime\S*, or install", said)


def test_nothing_is_built_when_switched_off(tmp_path: Path) -> None:
    result = setup(tmp_path, "--version", DIFFGAP_CPU="0")
    assert result.returncode == 0
    assert "diffgap: " not in result.stderr


@needs_cuda_torch
def test_what_was_not_built_is_noted_in_the_package(tmp_path: Path) -> None:
    for name in ("diffgap", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("_C_*", "__pycache__"))
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    executable(tmp_path / "toolkit" / "bin" / "nvcc", "echo 'release 1.2, V1.2.3'")
    build = ("build_py", "--build-lib", "out")
    package, cuda = tmp_path / "out" / "diffgap", {"DIFFGAP_CUDA": "auto", "CUDA_HOME": str(tmp_path / "toolkit")}
    assert setup(tmp_path, *build, CXX="no-such-compiler", **cuda).returncode == 0
    for stem, said in (
        ("_C_cpu", "_C_cpu is not built: the C++ kernels need a C++20 compiler (apt install g++, or set CXX); in "),
        (
            "_C_cuda",
            f"_C_cuda is not built: the CUDA kernels need nvcc of CUDA {str(torch.version.cuda).split('.')[0]}",
        ),
    ):
        sentence = _native.not_built(stem, "unknown", package)
        assert sentence is not None and sentence.startswith(said) and "run: pip install" in sentence
    # A later build that has a compiler, into the same folder.
    compiler = executable(tmp_path / "c++", "exit 0")
    assert setup(tmp_path, *build, CXX=compiler).returncode == 0
    assert _native.left_out("_C_cpu", package) is None
    assert _native.left_out("_C_cuda", package) == "DIFFGAP_CUDA=0 left it out (unset it)"


CUDA_OPS = ("normal", "q_sample", "q_sample_backward", "solver_step", "solver_step_out")
LOAD = """
import sys, torch
torch.ops.load_library(sys.argv[1])
for op in sys.argv[2:]:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"diffgap::{op}", "CUDA"), op
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_cuda_library_builds_and_loads_without_a_gpu(tmp_path: Path) -> None:
    switches = {"DIFFGAP_CPU": "0", "DIFFGAP_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    result = setup(tmp_path, "build_ext", "--build-lib", "out", **switches)
    if "but the CUDA kernels need" in result.stderr:
        pytest.skip(result.stderr.strip().splitlines()[-1])
    assert result.returncode == 0, result.stdout + result.stderr
    (library,) = (tmp_path / "out" / "diffgap").glob("_C_cuda*.so")
    loaded = subprocess.run([sys.executable, "-c", LOAD, library, *CUDA_OPS], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    symbols = subprocess.run(["nm", "-D", "-C", "--undefined-only", library], capture_output=True, text=True).stdout
    assert not re.search(r"\b(at|c10)::", symbols)
    assert "cudaLaunchKernel" not in symbols, "the CUDA runtime must be linked statically"
