"""Loads the compiled libraries, and says in one sentence why one is absent."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
_BUILD = "in diffgap's source folder run: pip install --no-build-isolation --no-deps --force-reinstall ."


def _load(stem: str, needs: str) -> str | None:
    """Load ``diffgap/<stem>.*.so``; return ``None``, or why it cannot run and the fix, in one sentence."""
    found = sorted(_PACKAGE.glob(f"{stem}.*so"))
    if not found:
        return f"{stem} is not built (needs {needs} and torch at install); {_BUILD}"
    try:
        torch.ops.load_library(os.fspath(found[0]))
    except OSError as error:
        reason = str(error).splitlines()[0]
        return f"{found[0].name} does not load beside torch {torch.__version__} ({reason}); {_BUILD}"
    return None


#: Why the C++ CPU kernels cannot run here, or ``None``.
CPU_MISSING = _load("_C_cpu", "a C++20 compiler")

#: Why the CUDA kernels cannot run here, or ``None``. Loaded only where there is a GPU.
CUDA_MISSING = _load("_C_cuda", "nvcc") if torch.cuda.is_available() else "no CUDA device is visible"


def _triton_obstacle() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    return None if find_spec("triton") else "triton is not installed; run: pip install triton"


#: Why the Triton kernels cannot run here, or ``None``. Triton itself is imported at the first call of a kernel.
TRITON_MISSING = _triton_obstacle()
