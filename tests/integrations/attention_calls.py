"""Which attention a model computes by: calls of our op and of torch's, counted below autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

TORCHS = ("_scaled_dot_product", "_native_multi_head_attention", "_fused_sdp")


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def attention_calls(function: Callable[[], Any]) -> tuple[int, int]:
    """How often ``function`` calls our forward op, and any of torch's."""
    with _Record() as record:
        function()
    ours = record.names.count(torch.ops.diffgap.attention.default._schema.name)
    return ours, sum(any(torchs in name for torchs in TORCHS) for name in record.names)
