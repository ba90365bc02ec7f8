"""The CUDA kernels' device code as host code (``csrc/host_check``): built once, called with the ops' own arguments.

Every call runs all threads of all blocks twice: in the order of their numbers with every tensor ending at a page that
faults, and in reverse with every tensor beginning at one. Both runs must give the same bits, arguments that are not
results as well must stay, and so must the memory beside the results.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("module.cpp", "blocks.cpp")
COMPILERS = ("g++", "c++", "clang++")

# Undefined behaviour, such as a misaligned access of 16 bytes, becomes a trap, which the module reports.
TRAPS = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
FLAGS = ("-std=c++20", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *TRAPS)


def obstacle() -> str | None:
    """Why the module cannot be built here, or None."""
    if not (ROOT / "csrc" / "host_check").exists():
        return "runs from the source folder alone"
    if not any(shutil.which(name) for name in COMPILERS):
        return f"no C++ compiler is found ({', '.join(COMPILERS)})"
    return None if importlib.util.find_spec("pybind11") else "pybind11 is not installed; run: pip install pybind11"


@lru_cache(maxsize=1)
def load() -> Any:
    """The module, compiled anew if a source has changed."""
    import pybind11

    compiler = next(name for name in COMPILERS if shutil.which(name))
    includes = [f"-I{ROOT / 'csrc'}", f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    command = [compiler, *FLAGS, *includes]
    files = sorted(
        path for kind in ("common", "cpu", "cuda", "host_check") for path in (ROOT / "csrc" / kind).glob("*.*h")
    )
    files += [ROOT / "csrc" / "host_check" / name for name in SOURCES]
    digest = hashlib.sha256(" ".join([sys.version, *command]).encode())
    for file in files:
        digest.update(file.read_bytes())
    library = ROOT / "build" / "host_check" / digest.hexdigest()[:16] / "host_check.so"
    if not library.exists():
        _build(command, library)
    spec = importlib.util.spec_from_file_location("host_check", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(command: Sequence[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        partial = Path(folder) / library.name
        _compile(command, partial)
        partial.replace(library)


def _compile(command: Sequence[str], library: Path) -> None:
    objects = [library.parent / f"{name}.o" for name in SOURCES]
    running = [
        subprocess.Popen([*command, "-c", str(ROOT / "csrc" / "host_check" / name), "-o", str(target)], text=True)
        for name, target in zip(SOURCES, objects, strict=True)
    ]
    if any([process.wait() for process in running]):
        raise RuntimeError(f"the host check does not compile: {' '.join(command)}")
    subprocess.run([*command, "-shared", *map(str, objects), "-o", str(library)], check=True)


class Memory:
    """Tensors of one run, each between two pages that fault."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.blocks: dict[int, Any] = {}

    def empty(self, count: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
        """NaN everywhere; ``shift`` elements off the place it would have."""
        if count == 0:
            return torch.empty(0, dtype=dtype)
        block = load().Memory(count * dtype.itemsize, self.at_end, shift * dtype.itemsize)
        tensor = torch.frombuffer(block, dtype=dtype)
        self.blocks[tensor.data_ptr()] = block
        return tensor

    def copy(self, tensor: Tensor | None, shift: int = 0) -> Tensor | None:
        """A read-only copy without gaps."""
        if tensor is None:
            return None
        copied = self.empty(tensor.numel(), tensor.dtype, shift)
        copied.copy_(tensor.reshape(-1))
        self.allow_writes(copied, False)
        return copied

    def index(self, tensor: Tensor | None) -> tuple[int, int]:
        """Pointer and stride of a copy of the same stride; the elements between hold -1."""
        if tensor is None or tensor.numel() == 0:
            return 0, 0
        stride = tensor.stride(0)
        storage = self.empty((len(tensor) - 1) * stride + 1, torch.int64)
        storage.fill_(-1)
        storage[:: stride or 1] = tensor if stride else tensor[:1]
        self.allow_writes(storage, False)
        return storage.data_ptr(), stride

    def allow_writes(self, tensor: Tensor, allowed: bool) -> None:
        if tensor.numel() > 0:
            self.blocks[tensor.data_ptr()].allow_writes(allowed)

    def check(self) -> None:
        assert all(block.intact() for block in self.blocks.values()), "wrote beside its results"


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _twice(run: Callable[[Memory], list[Tensor]]) -> list[Tensor]:
    """The results of ``run`` in both orders, which must be the same bits."""
    results = []
    for reversed_order in (False, True):
        load().set_reversed(reversed_order)
        memory = Memory(at_end=not reversed_order)
        results.append([tensor.clone() for tensor in run(memory)])
        memory.check()
    for forward, backward in zip(*results, strict=True):
        assert torch.equal(_bits(forward), _bits(backward)), "depends on the order of the threads"
    return results[0]


def _table(memory: Memory, table: Tensor) -> tuple[int, bool, int, int]:
    return _pointer(memory.copy(table)), table.dtype == torch.float64, *table.shape


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def normal(
    seed: Tensor, count: int, steps: Tensor | None, step: int, stream: int, *, threads: int | None = None
) -> Tensor:
    """``diffgap::normal``; blocks of ``threads``, or as many as on a GPU."""

    def run(memory: Memory) -> list[Tensor]:
        out = memory.empty(len(seed) * count, torch.float32)
        load().normal(
            samples=len(seed),
            count=count,
            seeds=memory.index(seed),
            steps=memory.index(steps),
            step=step,
            stream=stream,
            out=_pointer(out),
            threads=threads or load().threads,
        )
        return [out]

    return _twice(run)[0].reshape(len(seed), count)


def _noising(memory: Memory, x: Tensor, t: Tensor, table: Tensor, target: int) -> dict[str, Any]:
    return {
        "samples": len(x),
        "count": math.prod(x.shape[1:]),
        "t": memory.index(t),
        "table": _table(memory, table),
        "target": target,
    }


def q_sample(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    seed: Tensor,
    target: int,
    return_noise: bool,
    *,
    threads: int | None = None,
    shift: int = 0,
) -> tuple[Tensor, ...]:
    """``diffgap::q_sample``; tensors lie ``shift`` elements off."""

    def run(memory: Memory) -> list[Tensor]:
        outs = [memory.empty(x0.numel(), x0.dtype, shift) for _ in range(2 + return_noise)]
        x_t, wanted, noise = (*outs, None)[:3]
        load().q_sample(
            _name(x0.dtype),
            **_noising(memory, x0, t, table, target),
            seeds=memory.index(seed),
            x0=_pointer(memory.copy(x0, shift)),
            x_t=_pointer(x_t),
            wanted=_pointer(wanted),
            noise=_pointer(noise),
            threads=threads or load().threads,
        )
        return outs

    return tuple(out.reshape(x0.shape) for out in _twice(run))


def q_sample_backward(
    grad_x_t: Tensor,
    grad_target: Tensor,
    t: Tensor,
    table: Tensor,
    target: int,
    *,
    threads: int | None = None,
    shift: int = 0,
) -> Tensor:
    """``diffgap::q_sample_backward``."""

    def run(memory: Memory) -> list[Tensor]:
        grad_x0 = memory.empty(grad_x_t.numel(), grad_x_t.dtype, shift)
        load().q_sample_backward(
            _name(grad_x_t.dtype),
            **_noising(memory, grad_x_t, t, table, target),
            grad_x_t=_pointer(memory.copy(grad_x_t, shift)),
            grad_target=_pointer(memory.copy(grad_target, shift)),
            grad_x0=_pointer(grad_x0),
            threads=threads or load().threads,
        )
        return [grad_x0]

    return _twice(run)[0].reshape(grad_x_t.shape)


def solver_step(
    sample: Tensor,
    output: Tensor,
    table: Tensor,
    steps: Tensor | None,
    step: int,
    unconditional: Tensor | None,
    guidance_scale: float,
    offset_form: bool,
    guidance_rescale: float,
    last_sample: Tensor | None,
    h1: Tensor | None,
    h2: Tensor | None,
    h3: Tensor | None,
    seed: Tensor | None,
    x0_clamp: float | None,
    x0_norm: float | None,
    *,
    threads: int | None = None,
    shift: int = 0,
    into: dict[str, str] | None = None,
    wanted: Sequence[str] = ("next", "x0", "corrected"),
) -> dict[str, Tensor]:
    """``diffgap::solver_step``, or ``solver_step_out``.

    Args:
        threads: Of a block; None for as many as on a GPU.
        shift: Tensors lie that many elements off.
        into: Which results take the memory of which terms, e.g. ``{"next": "sample", "x0": "h2"}``.
        wanted: Results that are written; ``corrected`` only where there is ``last_sample``.
    """
    tensors = {
        "sample": sample,
        "output": output,
        "unconditional": unconditional,
        "last": last_sample,
        "h1": h1,
        "h2": h2,
        "h3": h3,
    }
    names = [name for name in wanted if name != "corrected" or last_sample is not None]

    def run(memory: Memory) -> list[Tensor]:
        terms = {name: memory.copy(tensor, shift) for name, tensor in tensors.items()}
        results: dict[str, Tensor] = {}
        for name in names:
            term = terms[into[name]] if into and name in into else None
            results[name] = memory.empty(sample.numel(), sample.dtype, shift) if term is None else term
            memory.allow_writes(results[name], True)
        count = math.prod(sample.shape[1:])
        load().solver_step(
            _name(sample.dtype),
            samples=len(sample),
            count=count,
            row_length=count if x0_norm is None else sample.shape[-1],
            table=_table(memory, table),
            steps=memory.index(steps),
            step=step,
            seeds=memory.index(seed),
            guidance_scale=guidance_scale,
            offset_form=offset_form,
            rescale=guidance_rescale if unconditional is not None else 0.0,
            limit=math.inf if x0_clamp is None else x0_clamp,
            x0_norm=0.0 if x0_norm is None else x0_norm,
            threads=threads or load().threads,
            **{name: _pointer(tensor) for name, tensor in terms.items()},
            **{name: _pointer(results.get(name)) for name in ("next", "x0", "corrected")},
        )
        return list(results.values())

    return {name: out.reshape(sample.shape) for name, out in zip(names, _twice(run), strict=True)}
