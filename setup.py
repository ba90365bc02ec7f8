"""Builds diffgap's two native libraries; everything else about the package is in ``pyproject.toml``.

``diffgap._C_cpu`` (C++) is built wherever there is a C++20 compiler, ``diffgap._C_cuda`` wherever there is nvcc.
Both need torch at build time (``pip install --no-build-isolation``). Without them diffgap installs as pure
Python, with ``_C_cpu.missing`` and ``_C_cuda.missing`` in place of the libraries, which hold the reasons that ``diffgap
doctor`` repeats: pip hides what a build prints. Both use LibTorch's stable ABI: one binary serves every
Python >= 3.10 and torch >= 2.10.

Environment: ``DIFFGAP_CPU`` and ``DIFFGAP_CUDA`` (0 leaves the library out, 1 makes its absence an error),
``CXX``, ``CUDA_HOME``, ``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS``.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension, find_packages, setup

# Older ones end in a page about pyproject.toml's licence instead; venvs of Python 3.10 and 3.11 start with them.
if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(f"diffgap: needs setuptools >= 77, this is {setuptools.__version__}; run: pip install -U setuptools wheel")

ROOT = Path(__file__).resolve().parent
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# errno and floating-point exceptions are not used; without them loops with sqrt and selections vectorise.
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
# Vectors are passed between functions that are always inlined, so their ABI (-Wpsabi) does not matter.
CXX_FLAGS += ["-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-psabi"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "-cudart", "static", "-Xcompiler", "-fvisibility=hidden"]
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
CUDA_HEADERS = ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h")
VERSION = runpy.run_path(str(ROOT / "diffgap" / "_version.py"))["__version__"]
BUILD_ID = runpy.run_path(str(ROOT / "diffgap" / "ops" / "_build_id.py"))


class Missing(Exception):
    """What a library needs and this machine lacks, with the fix, in one line."""


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


def link_options(library: str) -> list[str]:
    """Writes the id into the library by which ``diffgap.ops._native`` tells a stale one."""
    if sys.platform != "linux":
        return []
    build_id = BUILD_ID["version_id"](VERSION) + BUILD_ID["sources_id"](ROOT / "csrc", library)
    return [f"-Wl,--build-id=0x{build_id.hex()}"]


def find_torch() -> Any:
    try:
        import torch
    except ImportError:
        raise Missing("torch at build time (install torch, then pip install --no-build-isolation)") from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        raise Missing(f"torch >= 2.10 at build time, this is {torch.__version__} (pip install --upgrade torch)")
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
        extra_link_args=link_options("_C_cpu"),
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


def first_with(folders: list[Path], name: str, torch_cuda: str) -> str:
    for folder in folders:
        if (folder / name).exists():
            return str(folder)
    major = torch_cuda.partition(".")[0]
    wheel = "nvidia-cuda-runtime-cu12" if major == "12" else "nvidia-cuda-runtime"
    raise Missing(f"the CUDA file {name} (pip install {wheel}, or install the toolkit of CUDA {major})")


def cuda_extension() -> Extension:
    torch = find_torch()
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        raise Missing("nvcc (install the CUDA toolkit, or set CUDA_HOME)")
    if torch.version.cuda is None:
        raise Missing(f"a torch built for CUDA, {torch.__version__} is not (https://pytorch.org/get-started)")
    said = subprocess.run([f"{CUDA_HOME}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.\d+", said)
    major = torch.version.cuda.partition(".")[0]
    if release is None or release[1] != major:
        found = release[0] if release else "one that does not say its release"
        raise Missing(f"nvcc of CUDA {major}, as torch is, found {found} (set CUDA_HOME to a toolkit of CUDA {major})")
    os.environ["CXX"] = find_compiler()
    includes = cuda_folders(Path(CUDA_HOME), "include")
    headers = {first_with(includes, name, torch.version.cuda) for name in CUDA_HEADERS}
    libraries = [folder for kind in ("lib64", "lib") for folder in cuda_folders(Path(CUDA_HOME), kind)]
    runtime = first_with(libraries, "libcudart_static.a", torch.version.cuda)
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
        extra_link_args=["-Wl,--no-as-needed", *link_options("_C_cuda")],
        language="c++",
        py_limited_api=True,
    )


def extensions() -> tuple[list[Extension], dict[str, str]]:
    """The libraries that can be built here; and by library why the others are not, which is printed too."""
    builders: dict[str, tuple[str, str, Callable[[], Extension]]] = {
        "DIFFGAP_CPU": ("_C_cpu", "C++ kernels", cpu_extension),
        "DIFFGAP_CUDA": ("_C_cuda", "CUDA kernels", cuda_extension),
    }
    found, without = [], {}
    for variable, (library, title, build) in builders.items():
        wanted = os.environ.get(variable, "auto")
        if wanted not in ("0", "1", "auto"):
            sys.exit(f"diffgap: {variable}: use 0 or 1, got {wanted!r}")
        if wanted == "0":
            without[library] = f"{variable}=0 left it out (unset it)"
            continue
        try:
            found.append(build())
        except Missing as missing:
            if wanted == "1":
                sys.exit(f"diffgap: {variable}=1, but the {title} need {missing}")
            without[library] = f"the {title} need {missing}"
            print(f"diffgap: installing without its {title}: they need {missing}", file=sys.stderr)
    return found, without


def modules_command(without: dict[str, str]) -> Any:
    from setuptools.command.build_py import build_py

    class Modules(build_py):
        """setuptools', with a note beside the modules of why a library is not there."""

        def run(self) -> None:
            super().run()
            package = (ROOT if self.editable_mode else Path(self.build_lib)) / "diffgap"
            for library in ("_C_cpu", "_C_cuda"):
                note = package / f"{library}.missing"
                note.unlink(missing_ok=True)
                if library in without:
                    note.write_text(f"{without[library]}\n", encoding="utf-8")

    return Modules


def build_commands() -> dict[str, Any]:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """torch's, which leaves the fix to its reader."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                libraries = [extension.name.removeprefix("diffgap._C_") for extension in self.extensions]
                switches = " ".join(f"DIFFGAP_{library.upper()}=0" for library in libraries)
                sys.exit(
                    f"diffgap: the kernels for {' and '.join(libraries)} do not compile here ({error}, see above); "
                    f"to install without them, set {switches}"
                )

    return {"build_ext": Build}


ext_modules, left_out = extensions()
setup(
    # Folders of bundled data count as packages for setuptools.
    packages=[
        *find_packages(include=["diffgap", "diffgap.*"]),
        "diffgap.data.sound_effects",
        "diffgap.data.stamps",
        "diffgap.data.stamps.frames",
        "diffgap.kernels",
        "diffgap.training.grids",
    ],
    package_dir={"diffgap.kernels": "kernels"},
    ext_modules=ext_modules,
    cmdclass={"build_py": modules_command(left_out), **(build_commands() if ext_modules else {})},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
