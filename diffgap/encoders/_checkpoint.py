"""Weights in checkpoints that others wrote, read without running anything in them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


def read_state_dict(file: Path, key: str) -> Mapping[str, torch.Tensor]:
    """The tensors of ``file`` by name: its entry ``key``, or the whole of it where there is none.

    Training checkpoints hold numpy scalars and arrays (a best score, a sampler's order) beside the weights: those are
    let in, nothing else is.

    Raises:
        ValueError: no such file, one that holds more than that, or no tensors.
    """
    if not file.is_file():
        raise ValueError(f"checkpoint {file} does not exist")
    scalar, reconstruct = np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]
    allowed: list[Any] = [np.dtype, np.ndarray, *{type(np.dtype(kind)) for kind in "?bhilqBHILQefd"}]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # before numpy 2 and since
        allowed += [(scalar, f"{module}.scalar"), (reconstruct, f"{module}._reconstruct")]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{file} cannot be read as weights alone, and it is not run as code: {reason}; "
            f"save its state_dict alone: torch.save({{{key!r}: state_dict}}, file)"
        ) from error
    state = content.get(key, content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file} holds no state_dict of tensors")
    return state
