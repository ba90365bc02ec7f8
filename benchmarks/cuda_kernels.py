"""The CUDA kernels of the schedule in the proof: compiled as ``setup.py`` has it, read by :mod:`benchmarks.nvcc`.

They have one layout for all sizes and chips, ``csrc/cuda/launch.cuh``: a thread for 16 bytes of a tensor. Code of sm_80
is what runs on sm_86 and sm_89. Each call is modelled with all instructions of a thread taken once, be they in a branch
that it does not take.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.aot import Dtype
from benchmarks.compiled import Case, Code, Compiled, nvidia_bytes, occupancy
from benchmarks.nvcc import Kernel, mistakes, read_kernels, readable
from benchmarks.sass import counts_of
from benchmarks.work import Work

#: Threads of a block: ``kThreads`` of ``csrc/cuda/launch.cuh``, in warps of 32.
_WARPS = 4
#: Bytes that a thread moves of each tensor.
_UNIT_BYTES = 16
#: Whose code a chip runs, where it is another's.
_CODE_OF = {"sm_86": "sm_80", "sm_89": "sm_80"}
_DTYPES: dict[str, Dtype] = {"float": "fp32", "Half": "fp16", "BFloat16": "bf16"}
#: Of a kernel: the case that it is modelled in, (B, D) of it, and tensors read and written. ``row_step`` also puts x0
#: on the sphere.
_CALLS = {
    "normal": ("normal", (4096, 1024), 1),
    "q_sample": ("q_sample", (4096, 1024), 3),
    "q_sample_backward": ("q_sample_backward", (4096, 1024), 3),
    "step": ("solver_step/dpmpp_2m_cfg", (4096, 512), 6),
    "row_step": ("solver_step/dpmpp_2m_cfg_sphere", (4096, 512), 6),
}


class Found(NamedTuple):
    """A kernel, what it does in a call, and what it shall not do."""

    compiled: Compiled
    work: Work
    faults: tuple[str, ...]


def found_in(files: Sequence[Path], chips: Sequence[str]) -> Iterator[Found]:
    """The kernels of compiled files, for each chip that they have code for."""
    kernels = {key: kernel for file in files for key, kernel in read_kernels(file).items()}
    names = readable(sorted({name for name, _ in kernels}))
    for chip in chips:
        for mangled, name in names.items():
            code_of = _CODE_OF.get(chip, chip)
            if kernel := kernels.get((mangled, code_of)):
                yield _found(chip, name, kernel, tuple(mistakes(mangled, kernel)))


def _found(chip: str, name: str, kernel: Kernel, faults: tuple[str, ...]) -> Found:
    base, _, arguments = name.partition("_kernel")
    dtype: Dtype = next((_DTYPES[x] for x in re.findall(r"\w+", arguments) if x in _DTYPES), "fp32")
    call, shape, tensors = _CALLS[base]
    loads, stores = ([nvidia_bytes(x) for x in kernel.accesses if x.startswith(way)] for way in ("LDG", "STG"))
    code = Code(
        *(kernel.registers, kernel.local_bytes, kernel.shared_bytes, "", 0),
        *(max(loads, default=0), min(loads, default=0), max(stores, default=0)),
    )
    compiled = Compiled(
        Case("schedule", chip, dtype, ()),
        f"{call.partition('/')[0]}/{name.replace(' ', '')}",
        f"warps={_WARPS}",
        code,
        _WARPS,
        (counts_of(kernel.instructions),),
        *occupancy(chip, _WARPS, kernel.registers, kernel.shared_bytes),
    )
    moved = float(shape[0] * shape[1] * (4 if dtype == "fp32" else 2))
    programs = moved / _UNIT_BYTES / (32 * _WARPS)
    return Found(compiled, Work(f"{call}/{shape[0]}x{shape[1]}", programs, (), 0.0, tensors * moved, 0.0), faults)
