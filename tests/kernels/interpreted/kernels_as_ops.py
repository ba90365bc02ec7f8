"""Puts the Triton kernels behind the public functions on CPU tensors, with tiles small enough for the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
from diffgap.kernels import clip_loss, siglip_loss, similarity
from diffgap.kernels.configs import Tile

from diffgap.ops import _dispatch

TILE = Tile(16, 16, 16, num_warps=4, num_stages=2, programs=1)

#: Registered op of a module, and the launch function that stands in for it.
_LAUNCHES: dict[str, dict[str, Callable[..., Any]]] = {
    "clip_loss": {"_forward_op": clip_loss.forward, "_backward_op": clip_loss.backward},
    "siglip_loss": {"_forward_op": siglip_loss.forward, "_backward_op": siglip_loss.backward},
    "similarity": {"_topk_op": similarity.topk, "_ranks_op": similarity.ranks},
}


def with_tile(launch: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: launch(*args, tile=TILE)


def use_kernels(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Until the test ends, the public functions of ``diffgap.ops.<module>`` run the kernels."""
    monkeypatch.setattr(_dispatch, "choose", lambda op, tensor: "native")
    for name, launch in _LAUNCHES[module].items():
        monkeypatch.setattr(import_module(f"diffgap.ops.{module}"), name, with_tile(launch))
