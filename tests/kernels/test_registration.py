"""The launch functions fit the schemas of the ops that they implement, and are imported no earlier than needed."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton: pip install triton")

from diffgap.ops import _dispatch

IMPLEMENTATIONS = {
    "adaln": ("diffgap.kernels.adaln", "forward"),
    "adaln_backward": ("diffgap.kernels.adaln", "backward"),
    "attention": ("diffgap.kernels.attention", "forward"),
    "attention_backward": ("diffgap.kernels.attention", "backward"),
    "clip_loss": ("diffgap.kernels.clip_loss", "forward"),
    "clip_loss_backward": ("diffgap.kernels.clip_loss", "backward"),
    "siglip_loss": ("diffgap.kernels.siglip_loss", "forward"),
    "siglip_loss_backward": ("diffgap.kernels.siglip_loss", "backward"),
    "similarity_ranks": ("diffgap.kernels.similarity", "ranks"),
    "similarity_topk": ("diffgap.kernels.similarity", "topk"),
}


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_a_launch_function_takes_the_arguments_of_its_op(op: str) -> None:
    module, function = IMPLEMENTATIONS[op]
    schema = getattr(torch.ops.diffgap, op).default._schema
    *parameters, sizes = inspect.signature(getattr(import_module(module), function)).parameters
    assert parameters == [argument.name for argument in schema.arguments]
    assert sizes in ("tile", "config")


def test_implement_registers_a_function_that_it_imports_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[tuple[str, str], Any] = {}

    class Library:
        def impl(self, name: str, function: Any, key: str) -> None:
            registered[name, key] = function

    monkeypatch.setattr(_dispatch, "_LIBRARY", Library())
    present, absent = (_dispatch.Native("Triton", (torch.float32,), reason) for reason in (None, "no CUDA device"))
    _dispatch.implement(absent, "module_that_is_not_there", op="function")
    assert registered == {}
    _dispatch.implement(present, "module_that_is_not_there", op="function")
    _dispatch.implement(present, "operator", total="add")
    assert registered["total", "CUDA"](2, 3) == 5
    with pytest.raises(ModuleNotFoundError, match="module_that_is_not_there"):
        registered["op", "CUDA"]()


def test_every_op_is_implemented_where_there_is_a_gpu() -> None:
    """The op modules name the functions above; torch.cuda is made to look present in a process of its own."""
    code = """
import torch
torch.cuda.is_available = lambda: True
import diffgap.ops
for op in %r:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"diffgap::{op}", "CUDA"), op
from diffgap.ops import _dispatch
for op in ("adaln", "attention", "clip_loss", "siglip_loss", "similarity_topk", "similarity_ranks"):
    assert _dispatch._ops[op]["cuda"].missing is None, op
import sys
assert "triton" not in sys.modules
"""
    command = [sys.executable, "-c", code % (list(IMPLEMENTATIONS),)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
