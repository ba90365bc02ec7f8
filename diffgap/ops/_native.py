"""Loads the compiled libraries, and says in one sentence why one is absent."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from diffgap._version import __version__
from diffgap.ops._build_id import sources_id, version_id

_PACKAGE = Path(__file__).resolve().parent.parent
_CSRC = _PACKAGE.parent / "csrc"  # beside the package in a source folder alone
_HOW = "--editable" if _CSRC.is_dir() else "--force-reinstall"
_BUILD = f"in diffgap's source folder run: pip install --no-build-isolation --no-deps {_HOW} ."


def _check_torch(version: str) -> None:
    """Raise ImportError, with the fix, where torch is older than what the kernels and their registration need."""
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
        raise ImportError(
            f"diffgap {__version__} needs torch >= 2.10, this is torch {version}; "
            "run: pip install --upgrade 'torch>=2.10'"
        )


def _age(library: Path, csrc: Path) -> str | None:
    """What the library at hand was built from instead of this diffgap, or ``None``. Its calls could crash."""
    if sys.platform != "linux":
        return None
    with library.open("rb") as file:
        first_page = file.read(4096)
    if version_id(__version__) not in first_page:
        return f"another version than diffgap {__version__}"
    # An installed package has no sources beside it, and needs none: pip replaces both of them together.
    if csrc.is_dir() and sources_id(csrc, library.name.partition(".")[0]) not in first_page:
        return "other sources than csrc has now"
    return None


def left_out(stem: str, package: Path = _PACKAGE) -> str | None:
    """Why setup.py did not build a library when diffgap was installed last, by its note; ``None`` where it did."""
    note = package / f"{stem}.missing"
    return note.read_text(encoding="utf-8").strip() if note.is_file() else None


def not_built(stem: str, needs: str, package: Path = _PACKAGE) -> str | None:
    """That ``diffgap/<stem>.*.so`` is not there, why and the fix, in one sentence; ``None`` where it is."""
    if any(package.glob(f"{stem}.*so")):
        return None
    why = left_out(stem, package)
    return f"{stem} is not built{f': {why}' if why else f' (needs {needs} and torch at install)'}; {_BUILD}"


def _load(stem: str, needs: str, package: Path = _PACKAGE) -> str | None:
    """Load ``diffgap/<stem>.*.so``; return ``None``, or why it cannot run and the fix, in one sentence."""
    if missing := not_built(stem, needs, package):
        return missing
    found = sorted(package.glob(f"{stem}.*so"))
    if age := _age(found[0], package.parent / "csrc"):
        why = left_out(stem, package)
        return f"{found[0].name} was built from {age}{f', and not again: {why}' if why else ''}; {_BUILD}"
    try:
        torch.ops.load_library(os.fspath(found[0]))
    except OSError as error:
        reason = str(error).splitlines()[0]
        return f"{found[0].name} does not load beside torch {torch.__version__} ({reason}); {_BUILD}"
    return None


def _gpu_obstacle() -> str | None:
    """Why no kernel can run on the GPUs here, or ``None``: none is visible, or one is too old."""
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    if torch.version.hip is not None:
        return None
    capabilities = [torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())]
    if (oldest := min(capabilities, default=(8, 0))) >= (8, 0):
        return None
    return (
        f"the kernels need compute capability 8.0, and a visible GPU has {oldest[0]}.{oldest[1]}; "
        "leave it out of CUDA_VISIBLE_DEVICES, or use the eager backend"
    )


_check_torch(torch.__version__)

#: Why the C++ CPU kernels cannot run here, or ``None``.
CPU_MISSING = _load("_C_cpu", "a C++20 compiler")

#: Why the CUDA kernels cannot run here, or ``None``. Loaded only where there is a GPU.
CUDA_MISSING = _gpu_obstacle() or _load("_C_cuda", "nvcc")


def _triton_obstacle() -> str | None:
    if obstacle := _gpu_obstacle():
        return obstacle
    return None if find_spec("triton") else "triton is not installed; run: pip install triton"


#: Why the Triton kernels cannot run here, or ``None``. Triton itself is imported at the first call of a kernel.
TRITON_MISSING = _triton_obstacle()
