"""The routes an op can take, for the tests of all ops."""

from __future__ import annotations

from types import ModuleType

import pytest

from diffgap.ops import _dispatch
from diffgap.ops._native import CPU_MISSING

#: The eager reference, the registered ops' default implementations, and the C++ kernels.
ROUTES = [
    "reference",
    "registered",
    pytest.param("native", marks=pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))),
]


def take(route: str, patch: pytest.MonkeyPatch, module: ModuleType, **ops: str) -> None:
    """Send ``module``'s op down a route; ``ops`` maps its registered ops to their default implementations.

    Kernels take no float64: on the native route float64 takes the reference.
    """
    if route == "native":
        patch.setattr(_dispatch, "_mode", "auto")
    else:
        patch.setattr(_dispatch, "choose", lambda *_: "eager" if route == "reference" else "native")
    if route == "registered":
        for op, default in ops.items():
            patch.setattr(module, op, getattr(module, default))
