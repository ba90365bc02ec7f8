"""What a compiled kernel uses and executes, read from its cubin with the tools inside the triton package."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# By the pipe that executes them: comparisons, minima and selections of floats go through the integer pipe.
_PIPES = {
    "tensor": ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "IMMA", "BMMA", "OMMA", "QMMA"),
    "mufu": ("MUFU",),
    "fp32": ("FADD", "FMUL", "FFMA", "FSWZADD", "HADD", "HMUL", "HFMA"),
    "load_store": ("LD", "ST", "ATOM", "RED", "SHFL", "UBLKCP", "UTMA", "UTCCP"),
    "integer": (
        "IADD", "IMAD", "IMNMX", "VIMNMX", "VIADD", "ISETP", "ISCADD", "IABS", "LOP", "SHF", "LEA", "SEL", "PRMT",
        "MOV", "POPC", "FLO", "SGXT", "BMSK", "FMNMX", "FSEL", "FSETP", "PLOP", "F2F", "I2F", "F2I",
    ),
}  # fmt: skip

_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([.\w]*)([^;]*);")
_AMD_LABEL = re.compile(r"^(\.LBB\w+):")
_AMD_INSTRUCTION = re.compile(r"^\s+([a-z]+_\w+)()")
_AMD_BRANCH = re.compile(r"^\s+s_c?branch\w*\s+(\.LBB\w+)")
_AMD_SPECIAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
_AMD_FLOAT = re.compile(r"v_(pk_)?(add|sub|subrev|mul|fma|fmac|mac|mad|dot2?)\w*_(f|bf)(16|32)")

#: Instructions of a loop at least: shorter ones wait for a barrier.
_LOOP_INSTRUCTIONS = 9


@dataclass(frozen=True)
class Resources:
    """What one program takes: registers a thread, shared memory, and local memory (spills) a thread, in bytes."""

    registers: int
    shared_bytes: int
    local_bytes: int


@dataclass(frozen=True)
class LoopCounts:
    """Instructions of one warp by pipe."""

    tensor: int
    mufu: int
    fp32: int
    integer: int
    load_store: int


def _run(tool: str, compiled: Any, *options: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        done = subprocess.run([str(_TOOLS / tool), *options, str(cubin)], capture_output=True, text=True, check=True)
    return done.stdout


def sass(compiled: Any) -> str:
    """Disassembly of a kernel that Triton compiled for an NVIDIA chip."""
    return _run("nvdisasm", compiled, "-c", "-ndf")  # without data flow, which nothing here reads


def resources(compiled: Any) -> Resources:
    """Registers, shared and local memory of a kernel that Triton compiled for an NVIDIA chip.

    Raises:
        ValueError: the tool's output has another form than is known here.
    """
    usage = _run("cuobjdump", compiled, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump: expected REG, STACK, SHARED and LOCAL, got {usage!r}")
    registers, stack, static_shared, local = map(int, found.groups())
    return Resources(registers, int(compiled.metadata.shared) + static_shared, stack + local)


def _loops_and_code(text: str) -> tuple[list[tuple[int, int]], list[str]]:
    """Loops as first and last instruction, and the mnemonics (opcode and modifiers) of all instructions.

    What stands behind the last EXIT is waiting for a barrier that was not open at first, and then a branch back.
    """
    loops, code = _parsed(text, _LABEL, _INSTRUCTION, re.compile(r"\bBRA\b.*\((\.L_x_\d+)\)"))
    end = max((place for place, name in enumerate(code) if name == "EXIT"), default=len(code))
    return [(first, last) for first, last in loops if last <= end], code


def _parsed(
    text: str, label: re.Pattern[str], instruction: re.Pattern[str], branch: re.Pattern[str]
) -> tuple[list[tuple[int, int]], list[str]]:
    labels: dict[str, int] = {}
    code: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in text.splitlines():
        if named := label.match(line):
            labels[named[1]] = len(code)
        elif found := instruction.match(line):
            target = branch.search(line)
            if target is not None and target[1] in labels:
                loops.append((labels[target[1]], len(code)))
            code.append(found[1] + found[2])
    return [loop for loop in loops if loop[0] < loop[1]], code


def counts_of(code: list[str]) -> LoopCounts:
    """Instructions by pipe, given their mnemonics."""
    counts = dict.fromkeys(_PIPES, 0)
    for mnemonic in code:
        # Instructions of the uniform datapath (UIADD3, ULDC, ...) go to none of the pipes, but UTC and UBLKCP do.
        pipe = next((pipe for pipe, names in _PIPES.items() if mnemonic.startswith(names)), None)
        if pipe is not None:
            counts[pipe] += 1
    return LoopCounts(**counts)


def _main_loop(text: str) -> tuple[tuple[int, int], list[str]]:
    """The hottest loop: of the innermost ones, that with the most products, or instructions where none has any."""
    loops, code = _loops_and_code(text)
    innermost = [x for x in loops if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    if not innermost:
        return (0, -1), code
    return max(innermost, key=lambda x: (counts_of(code[x[0] : x[1] + 1]).tensor, x[1] - x[0])), code


def loop_counts(sass: str) -> LoopCounts:
    """Instructions in one pass of the hottest loop, that over the width of the embeddings; zeros without a loop."""
    (first, last), code = _main_loop(sass)
    return counts_of(code[first : last + 1])


def rest_counts(sass: str) -> LoopCounts:
    """Instructions outside the hottest loop, each counted once: what a tile costs besides its product."""
    (first, last), code = _main_loop(sass)
    return counts_of(code[:first] + code[last + 1 :])


def counts_by_depth(sass: str) -> tuple[LoopCounts, ...]:
    """Instructions of a warp outside all loops, in the outermost loops, in loops within those, and so on."""
    return _by_depth(*_loops_and_code(sass), counts_of)


def amd_counts(assembly: str) -> tuple[LoopCounts, ...]:
    """:func:`counts_by_depth` of AMD's assembly text, where floats and integers share the vector units."""
    return _by_depth(*_parsed(assembly, _AMD_LABEL, _AMD_INSTRUCTION, _AMD_BRANCH), _amd_count)


def _by_depth(
    loops: list[tuple[int, int]], code: list[str], count: Callable[[list[str]], LoopCounts]
) -> tuple[LoopCounts, ...]:
    # Several branches back to one label are one loop.
    last = {first: max(end for start, end in loops if start == first) for first, _ in loops}
    real = [(first, end) for first, end in last.items() if end - first + 1 >= _LOOP_INSTRUCTIONS]
    depths = [sum(first <= place <= end for first, end in real) for place in range(len(code))]
    levels = range(max(depths, default=0) + 1)
    return tuple(count([x for x, depth in zip(code, depths, strict=True) if depth == level]) for level in levels)


def _amd_count(code: list[str]) -> LoopCounts:
    counts = dict.fromkeys(_PIPES, 0)
    for name in code:
        if name.startswith("v_mfma"):
            counts["tensor"] += 1
        elif _AMD_SPECIAL.match(name):
            counts["mufu"] += 1
        elif _AMD_FLOAT.match(name):
            counts["fp32"] += 1
        elif name.startswith("v_") and "accvgpr" not in name:
            counts["integer"] += 1
        elif name.startswith(("global_", "buffer_", "flat_", "ds_")):
            counts["load_store"] += 1
    return LoopCounts(**counts)
