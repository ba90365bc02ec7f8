"""Loads the compiled libraries, and says in one sentence why one is absent."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
_REBUILD = "rebuild with: pip install --no-build-isolation --force-reinstall --no-deps diffgap (from its source folder: .)"


def _load(stem: str, absent: str) -> str | None:
    """Load ``diffgap/<stem>*.so``; return ``None``, or the reason it could not be and the fix."""
    found = sorted(_PACKAGE.glob(f"{stem}.*so")) + sorted(_PACKAGE.glob(f"{stem}.pyd"))
    if not found:
        return absent
    try:
        torch.ops.load_library(os.fspath(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load beside torch {torch.__version__} ({error}); {_REBUILD}"
    return None


#: Why the C++ CPU kernels cannot run here, or ``None``.
CPU_MISSING = _load("_C_cpu", f"the C++ extension is not built (needs a C++20 compiler and torch at install); {_REBUILD}")

#: Why the CUDA kernels cannot run here, or ``None``. Loaded only where there is a GPU.
CUDA_MISSING = (
    _load("_C_cuda", f"the CUDA extension is not built (needs nvcc at install); {_REBUILD}")
    if torch.cuda.is_available()
    else "no CUDA device is visible"
)
