"""Builds diffgap's two native libraries; everything else about the package is in ``pyproject.toml``.

``diffgap._C_cpu`` (C++) is built wherever there is a C++20 compiler, ``diffgap._C_cuda`` wherever there is nvcc.
Both need torch at build time (``pip install --no-build-isolation``). Without them diffgap installs as pure
Python and ``diffgap doctor`` says what is missing. Both use LibTorch's stable ABI: one binary serves every
Python >= 3.10 and torch >= 2.10.

Environment: ``DIFFGAP_CPU`` and ``DIFFGAP_CUDA`` (0 leaves the library out, 1 makes its absence an error),
``CXX``, ``CUDA_HOME``, ``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS``.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# errno and floating-point exceptions are not used; without them loops with sqrt and selections vectorise.
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
# Vectors are passed between functions that are always inlined, so their ABI (-Wpsabi) does not matter.
CXX_FLAGS += ["-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-psabi"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "-cudart", "static", "-Xcompiler", "-fvisibility=hidden"]
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
CUDA_HEADERS = ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h")


class Missing(Exception):
    """What a library needs and this machine lacks, in one line."""


def sources(*patterns: str) -> list[str]:
    """Files below the repository root, relative to it as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def find_compiler() -> str:
    """A C++ compiler that takes C++20, ``$CXX`` first."""
    for command in [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(command)[0]) is None:
            continue
        probe = [*shlex.split(command), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
        if subprocess.run(probe, input="#include <concepts>\n", text=True, capture_output=True).returncode == 0:
            return command
    raise Missing("a C++20 compiler (apt install g++, or set CXX)")


def find_torch() -> Any:
    try:
        import torch
    except ImportError:
        raise Missing("torch at build time (install torch, then pip install --no-build-isolation)") from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        raise Missing(f"torch >= 2.10 at build time, this one is {torch.__version__}")
    return torch


def cpu_extension() -> Extension:
    torch = find_torch()
    os.environ["CXX"] = find_compiler()
    library = Path(torch.__file__).parent
    return Extension(
        "diffgap._C_cpu",
        sources("csrc/cpu/*.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        library_dirs=[str(library / "lib")],
        libraries=["torch_cpu"],
        depends=sources("csrc/common/*.h", "csrc/cpu/*.h"),
        extra_compile_args={"cxx": [*CXX_FLAGS, *DEFINES, "-isystem", str(library / "include")]},
        language="c++",
        py_limited_api=True,
    )


def cuda_folders(home: Path, kind: str) -> list[Path]:
    """Folders named ``kind`` of the toolkit, then of NVIDIA's wheels beside torch."""
    toolkit = (home / "bin" / "nvcc").resolve().parent.parent
    found = [
        toolkit / kind,
        home / kind,
        *sorted(Path(sysconfig.get_path("purelib")).glob(f"nvidia/*/{kind}")),
    ]
    return [folder for folder in found if folder.is_dir()]


def first_with(folders: list[Path], name: str, fix: str) -> str:
    for folder in folders:
        if (folder / name).exists():
            return str(folder)
    raise Missing(f"the CUDA file {name} ({fix})")


def cuda_extension() -> Extension:
    torch = find_torch()
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        raise Missing("nvcc (install the CUDA toolkit, or set CUDA_HOME)")
    if torch.version.cuda is None:
        raise Missing("a CUDA build of torch, this one is for the CPU alone")
    nvcc = subprocess.run([f"{CUDA_HOME}/bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    if f"release {torch.version.cuda.split('.')[0]}." not in nvcc:
        raise Missing(f"an nvcc of torch's own CUDA major version, {torch.version.cuda}")
    os.environ["CXX"] = find_compiler()
    includes = cuda_folders(Path(CUDA_HOME), "include")
    headers = {first_with(includes, name, "pip install nvidia-cuda-runtime, or the toolkit") for name in CUDA_HEADERS}
    libraries = [folder for kind in ("lib64", "lib") for folder in cuda_folders(Path(CUDA_HOME), kind)]
    runtime = first_with(libraries, "libcudart_static.a", "pip install nvidia-cuda-runtime, or the toolkit")
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
    library = Path(torch.__file__).parent
    return Extension(
        "diffgap._C_cuda",
        sources("csrc/cuda/*.cu"),
        include_dirs=[str(ROOT / "csrc"), str(library / "include"), *sorted(headers)],
        library_dirs=[str(library / "lib"), runtime],
        libraries=["torch_cpu", "torch_cuda", "cudart_static", "dl", "rt", "pthread"],
        depends=sources("csrc/common/*.h", "csrc/cuda/*.h", "csrc/cuda/*.cuh"),
        extra_compile_args={"cxx": [*CXX_FLAGS, *DEFINES, "-DUSE_CUDA"], "nvcc": NVCC_FLAGS + DEFINES},
        # Named although no symbol may need it yet, so that loading works without a GPU.
        extra_link_args=["-Wl,--no-as-needed"],
        language="c++",
        py_limited_api=True,
    )


def extensions() -> list[Extension]:
    """The libraries that can be built here; says what is missing for the others."""
    builders: dict[str, tuple[str, Callable[[], Extension]]] = {
        "DIFFGAP_CPU": ("C++ kernels", cpu_extension),
        "DIFFGAP_CUDA": ("CUDA kernels", cuda_extension),
    }
    found = []
    for variable, (title, build) in builders.items():
        wanted = os.environ.get(variable, "auto")
        if wanted not in ("0", "1", "auto"):
            sys.exit(f"diffgap: {variable}: use 0 or 1, got {wanted!r}")
        if wanted == "0":
            continue
        try:
            found.append(build())
        except Missing as missing:
            if wanted == "1":
                sys.exit(f"diffgap: {variable}=1, but the {title} need {missing}")
            print(f"diffgap: installing without its {title}: they need {missing}", file=sys.stderr)
    return found


def build_commands() -> dict[str, Any]:
    from torch.utils.cpp_extension import BuildExtension

    return {"build_ext": BuildExtension}


ext_modules = extensions()
setup(
    # The folder of bundled data counts as a package for setuptools.
    packages=[
        *find_packages(include=["diffgap", "diffgap.*"]),
        "diffgap.data.sound_effects",
        "diffgap.data.stamps",
        "diffgap.kernels",
    ],
    package_dir={"diffgap.kernels": "kernels"},
    ext_modules=ext_modules,
    cmdclass=build_commands() if ext_modules else {},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
