"""What diffgap says of a library or a torch that does not fit it, before anything is called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diffgap
from diffgap._version import __version__
from diffgap.ops import _native
from diffgap.ops._build_id import sources_id, version_id

CSRC = Path(diffgap.__file__).resolve().parents[1] / "csrc"

linux = pytest.mark.skipif(sys.platform != "linux", reason="libraries carry an id on Linux alone")
FIXES = ("run: pip install --no-build-isolation --no-deps --editable .", "--no-deps --force-reinstall .")


def write_library(package: Path, build_id: bytes) -> None:
    """A file in place of the library that has an id, and is no library."""
    package.mkdir(exist_ok=True)
    (package / "_C_cpu.abi3.so").write_bytes(bytes(100) + build_id + bytes(100))


def write_sources(folder: Path) -> Path:
    for name in ("common/a.h", "cpu/a.cpp", "cuda/a.cu"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@linux
def test_library_of_another_version_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    write_library(tmp_path / "diffgap", version_id("0.0.9") + bytes(12))
    said = _native._load("_C_cpu", "a compiler", tmp_path / "diffgap")
    assert said is not None and said.endswith(FIXES)
    assert said.startswith(f"_C_cpu.abi3.so was built from another version than diffgap {__version__}; ")


@linux
def test_stale_library_says_why_it_was_not_built_again(tmp_path: Path) -> None:
    write_library(tmp_path, version_id("0.0.9") + bytes(12))
    (tmp_path / "_C_cpu.missing").write_text("the C++ kernels need a C++20 compiler (apt install g++, or set CXX)\n")
    said = _native._load("_C_cpu", "a compiler", tmp_path)
    assert said is not None and said.endswith(FIXES)
    assert f"than diffgap {__version__}, and not again: the C++ kernels need a C++20 compiler (apt install" in said


@linux
def test_library_of_other_sources_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    csrc = write_sources(tmp_path / "csrc")
    write_library(tmp_path / "diffgap", version_id(__version__) + sources_id(csrc, "_C_cpu"))
    library = tmp_path / "diffgap" / "_C_cpu.abi3.so"
    assert _native._age(library, csrc) is None
    (csrc / "cuda" / "a.cu").write_text("changed")
    assert _native._age(library, csrc) is None, "the library for the CPU has nothing of the other one's sources"
    (csrc / "common" / "a.h").write_text("changed")
    said = _native._load("_C_cpu", "a compiler", tmp_path / "diffgap")
    assert said is not None and said.endswith(FIXES)
    assert said.startswith("_C_cpu.abi3.so was built from other sources than csrc has now; ")


@linux
@pytest.mark.parametrize("change", ["edit", "rename", "add", "remove"])
def test_every_change_of_the_sources_counts(tmp_path: Path, change: str) -> None:
    csrc = write_sources(tmp_path / "csrc")
    before = sources_id(csrc, "_C_cpu")
    file = csrc / "cpu" / "a.cpp"
    if change == "edit":
        file.write_text("b")
    elif change == "rename":
        file.rename(csrc / "cpu" / "b.cpp")
    elif change == "add":
        (csrc / "cpu" / "b.h").touch()
    else:
        file.unlink()
    assert sources_id(csrc, "_C_cpu") != before


@pytest.mark.skipif(_native.CPU_MISSING is not None or not CSRC.is_dir(), reason="needs a library beside its sources")
def test_library_that_was_just_built_is_taken(tmp_path: Path) -> None:
    (library,) = Path(diffgap.__file__).parent.glob("_C_cpu.*so")
    assert _native._age(library, CSRC) is None
    assert _native._age(library, tmp_path / "none") is None
    shutil.copytree(CSRC, tmp_path / "csrc")
    with (tmp_path / "csrc" / "cpu" / "random.cpp").open("a") as file:
        file.write("// changed\n")
    assert _native._age(library, tmp_path / "csrc") == "other sources than csrc has now"


@linux
def test_library_that_does_not_load_says_why(tmp_path: Path) -> None:
    write_library(tmp_path, version_id(__version__))
    said = _native._load("_C_cpu", "a compiler", tmp_path)
    assert said is not None and said.endswith(FIXES)
    assert said.startswith("_C_cpu.abi3.so does not load beside torch ")


def test_library_that_is_not_there_says_what_it_needs(tmp_path: Path) -> None:
    said = _native._load("_C_cpu", "a C++20 compiler", tmp_path)
    assert said is not None and said.endswith(FIXES)
    assert said.startswith("_C_cpu is not built (needs a C++20 compiler and torch at install); ")


@pytest.mark.parametrize("version", ["2.9.1", "2.9.0+cu126", "1.13.1"])
def test_old_torch_is_refused_in_one_sentence(version: str) -> None:
    with pytest.raises(ImportError, match=r"needs torch >= 2\.10, this is torch .*; run: pip install --upgrade"):
        _native._check_torch(version)


@pytest.mark.parametrize("version", ["2.10.0", "2.14.1+cu130", "2.16.0a0+git1234", "3.0.0"])
def test_newer_torch_is_taken(version: str) -> None:
    _native._check_torch(version)


@pytest.mark.parametrize(
    ("torch", "said"),
    [
        (
            "torch.__version__ = '2.9.1'",
            "needs torch >= 2.10, this is torch 2.9.1; run: pip install --upgrade 'torch>=2.10'",
        ),
        ("sys.modules['torch'] = None", "; run: pip install torch"),
    ],
)
def test_doctor_repeats_what_is_wrong_with_torch(torch: str, said: str) -> None:
    code = f"import sys, torch\n{torch}\nsys.argv = ['diffgap', 'doctor']\nfrom diffgap.__main__ import main\nmain()"
    environment = {**os.environ, "PYTHONPATH": str(Path(diffgap.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("diffgap: ") and line.endswith(said)


def gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """As if there were one GPU of each compute capability."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])


def test_a_gpu_that_is_too_old_leaves_its_tensors_to_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, (9, 0), (7, 5))
    reason = _native._triton_obstacle()
    assert reason is not None and reason == _native._gpu_obstacle()
    assert "a visible GPU has 7.5" in reason and "CUDA_VISIBLE_DEVICES" in reason
    gpus(monkeypatch, (9, 0), (8, 0))
    assert _native._gpu_obstacle() is None


def test_gpu_without_triton_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, (9, 0))
    monkeypatch.setitem(sys.modules, "triton", None)
    assert _native._triton_obstacle() == "triton is not installed; run: pip install triton"
