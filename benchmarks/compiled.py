"""What the shipped Triton kernels take and hold, compiled for every chip: registers, spills, shared memory, occupancy.

Nothing is launched and nothing is timed. Kernels are compiled as :mod:`benchmarks.aot` has them, with the configuration
and the options of a real call (attention with all of its options, which take the most registers); their machine code is
read with :mod:`benchmarks.sass`, AMD's from its assembly text.

Blocks of threads per multiprocessor are the fewest that one of these leaves room for:

- registers: a multiprocessor has four partitions of 512 a lane; a warp takes those of its lanes, in eights;
- shared memory, of which every block takes some for the system on NVIDIA's chips;
- tensor memory: 512 columns on sm_100;
- warps and blocks that a multiprocessor holds at most.

Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the CUDA toolkit's
``cuda_occupancy.h`` (granularities); AMD Instinct MI300 ISA guide, 3.6 and 3.7 (registers, local memory), and LLVM's
``AMDGPUBaseInfo.cpp`` (waves of a SIMD, work groups of a compute unit).

``python -m benchmarks.compiled [family ...] [--json FILE]`` prints the tables, all of kind ``compiled``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import triton
from diffgap.kernels._tiles import Product

from benchmarks.aot import TARGETS, adaln_kernels, attention_kernels, contrastive_kernels
from benchmarks.report import write
from benchmarks.sass import loop_counts, resources, rest_counts, sass

Dtype = Literal["bf16", "fp32", "tf32"]
_PRODUCTS: dict[Dtype, Product] = {"bf16": "half", "fp32": "ieee", "tf32": "tf32"}
_TORCH: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Case(NamedTuple):
    """Kernels that are compiled together."""

    family: str
    chip: str
    dtype: Dtype
    size: tuple[int, ...]

    @property
    def label(self) -> str:
        return "x".join(map(str, self.size))


@dataclass(frozen=True)
class Family:
    """Ops whose kernels have the same sizes.

    Attributes:
        sizes_are: What the numbers of a size are.
        sizes: One for every row of the tables of configurations.
        dtypes: float16 has the kernels of bfloat16; tf32 is float32 where torch multiplies it so.
        compile: The kernels of a case, by ``op/variant/kernel``.
    """

    sizes_are: str
    sizes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Dtype, ...]
    compile: Callable[[Case], dict[str, Any]]


def _attention(case: Case) -> dict[str, Any]:
    n_q, n_k, d = case.size
    return attention_kernels(case.chip, _PRODUCTS[case.dtype], n_q, n_k, d)


#: Queries and keys: every tile of the short path, some of several pairs, and a length of the long one.
_TOKENS = (
    *((4, 4), (4, 8), (8, 8), (16, 16), (16, 32), (16, 64), (32, 16), (32, 32), (32, 64), (64, 16), (64, 32), (64, 64)),
    (256, 256),
)
FAMILIES: dict[str, Family] = {
    "attention": Family(
        "queries x keys x d",
        # Columns beyond 80 are masked.
        tuple((n_q, n_k, d) for n_q, n_k in _TOKENS for d in (64, 80, 128) if d != 80 or n_q == n_k >= 16),
        ("bf16", "fp32", "tf32"),
        _attention,
    ),
    "adaln": Family(
        "features",
        tuple((width,) for width in (128, 256, 512, 1024, 2048, 4096, 8192)),
        ("bf16", "fp32"),
        lambda case: adaln_kernels(case.chip, _TORCH[case.dtype], *case.size),
    ),
    "contrastive": Family(
        "features",
        ((512,),),
        ("bf16", "fp32", "tf32"),
        lambda case: contrastive_kernels(case.chip, _PRODUCTS[case.dtype], *case.size),
    ),
}


def cases(families: Sequence[str] = tuple(FAMILIES)) -> list[Case]:
    """Every shipped configuration."""
    return [
        Case(name, chip, dtype, size)
        for name in families
        for chip in TARGETS
        for dtype in FAMILIES[name].dtypes
        for size in FAMILIES[name].sizes
    ]


@dataclass(frozen=True)
class Multiprocessor:
    """What one holds: warps and blocks at most, and shared memory in bytes, as it is given to blocks."""

    warps: int
    blocks: int
    shared_bytes: int
    system_bytes: int
    shared_granule: int


#: The other multiprocessors of a major version have less shared memory, as 8.6 does.
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164 << 10, 1 << 10, 128),
    "sm_90": Multiprocessor(64, 32, 228 << 10, 1 << 10, 128),
    "sm_100": Multiprocessor(64, 32, 228 << 10, 1 << 10, 128),
    "sm_120": Multiprocessor(48, 24, 100 << 10, 1 << 10, 128),
    "gfx942": Multiprocessor(32, 16, 64 << 10, 0, 512),
}
_PARTITIONS, _LANE_REGISTERS, _REGISTER_GRANULE, _TENSOR_COLUMNS = 4, 512, 8, 512


def occupancy(chip: str, warps: int, registers: int, shared_bytes: int, tensor_columns: int = 0) -> tuple[int, str]:
    """Blocks of ``warps`` that a multiprocessor holds at a time, and what there is no room for in one more."""
    limits = MULTIPROCESSORS[chip]
    shared = _round_up(shared_bytes + limits.system_bytes, limits.shared_granule)
    # AMD limits the blocks that have a barrier, and one of a single warp has none.
    blocks = limits.warps if chip == "gfx942" and warps == 1 else limits.blocks
    room = {
        "warps": limits.warps // warps,
        "blocks": blocks,
        "registers": _LANE_REGISTERS // _round_up(registers, _REGISTER_GRANULE) * _PARTITIONS // warps,
        "shared memory": limits.shared_bytes // shared if shared else blocks,
        "tensor memory": _TENSOR_COLUMNS // tensor_columns if tensor_columns else blocks,
    }
    scarce = min(room, key=lambda name: room[name])
    return room[scarce], scarce


def _round_up(size: int, granule: int) -> int:
    return -(-size // granule) * granule


class Code(NamedTuple):
    """What the machine code of a kernel says."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_instructions: int
    load_bytes: int
    store_bytes: int


@dataclass(frozen=True)
class Row:
    """One kernel.

    Attributes:
        registers: Of a thread; of AMD's both kinds together.
        spilled_bytes: Local memory of a thread.
        shared_bytes: Of a block.
        warps: Of a block.
        tensor_instructions: In the machine code, loops once.
        load_bytes: Of a thread's widest load from global memory.
        store_bytes: Likewise.
        blocks: That a multiprocessor holds at a time, by what the kernel takes.
        limit: What there is no room for in one more.
    """

    family: str
    chip: str
    dtype: str
    size: str
    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    tensor_instructions: int
    load_bytes: int
    store_bytes: int
    blocks: int
    limit: str
    kind: str = "compiled"


def examine(case: Case) -> list[Row]:
    """Compile the kernels of a case and read their machine code."""
    rows = []
    for name, kernel in FAMILIES[case.family].compile(case).items():
        code = amd_code(kernel) if case.chip == "gfx942" else nvidia_code(kernel)
        warps = kernel.metadata.num_warps
        columns = getattr(kernel.metadata, "tmem_size", None) or 0
        room = occupancy(case.chip, warps, code.registers, kernel.metadata.shared, columns)
        rows.append(
            Row(
                *(case.family, case.chip, case.dtype, case.label, name),
                *(code.registers, code.spilled_bytes, code.shared_bytes, warps),
                *(code.tensor_instructions, code.load_bytes, code.store_bytes),
                *room,
            )
        )
    return rows


def nvidia_code(kernel: Any) -> Code:
    """From the cubin; its own number of shared memory has that of the system in it on some chips."""
    usage, text = resources(kernel), sass(kernel)
    tensor = loop_counts(text).tensor + rest_counts(text).tensor
    load, store = (_widest(rf"\b{opcode}\.(\S+)", text, _nvidia_bytes) for opcode in ("LDG(?:STS)?", "STG"))
    return Code(usage.registers, usage.local_bytes, kernel.metadata.shared, tensor, load, store)


def amd_code(kernel: Any) -> Code:
    """From the assembly text.

    Raises:
        ValueError: the text has another form than is known here.
    """
    text = kernel.asm["amdgcn"]
    registers, local = (re.search(rf"\.{x}: +(\d+)\b", text) for x in ("vgpr_count", "private_segment_fixed_size"))
    if registers is None or local is None:
        raise ValueError("amdgcn: expected .vgpr_count and .private_segment_fixed_size in the kernel's metadata")
    tensor = len(re.findall(r"\bv_mfma_", text))
    load, store = (
        _widest(rf"\b(?:global|buffer)_{way}_(?:lds_)?(dword(?:x\d)?|[a-z]+)", text, _AMD_BYTES.__getitem__)
        for way in ("load", "store")
    )
    return Code(int(registers[1]), int(local[1]), kernel.metadata.shared, tensor, load, store)


def _widest(access: str, text: str, size: Callable[[str], int]) -> int:
    return max(map(size, re.findall(access, text)), default=0)


def _nvidia_bytes(modifiers: str) -> int:
    """Of ``E.128`` and the like; 32 bits have none."""
    return next((_NVIDIA_BYTES[x] for x in modifiers.split(".") if x in _NVIDIA_BYTES), 4)


_NVIDIA_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "short": 2}
_AMD_BYTES |= {"ubyte": 1, "sbyte": 1, "byte": 1}


def examine_all(of: Sequence[Case]) -> list[Row]:
    """All rows, compiled in as many processes as there are processors."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        return [row for rows in pool.map(examine, of) for row in rows]


def summary(rows: Sequence[Row]) -> list[str]:
    """The extremes of every family on every chip."""
    lines = ["| family | chip | kernels | most registers | kernels that spill | most spilled | most shared memory |"]
    lines[0] += " fewest warps a multiprocessor |"
    lines.append("|---|---|" + "---:|" * 6)
    for family, chip in dict.fromkeys((row.family, row.chip) for row in rows):
        of = [row for row in rows if (row.family, row.chip) == (family, chip)]
        cells = [
            *(len(of), max(row.registers for row in of), sum(row.spilled_bytes > 0 for row in of)),
            *(f"{max(row.spilled_bytes for row in of)} B", kib(max(row.shared_bytes for row in of))),
            min(row.blocks * row.warps for row in of),
        ]
        lines.append(f"| {family} | {chip} | " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def table(rows: Sequence[Row], sizes_are: str) -> list[str]:
    """One line per kernel of a family on one chip."""
    names = ("registers", "spilled", "shared", "warps", "tensor", "load", "store", "blocks", "limit")
    lines = [f"| dtype | {sizes_are} | kernel | " + " | ".join(names) + " |"]
    lines.append("|---|---|---|" + "---:|" * (len(names) - 1) + "---|")
    for row in rows:
        cells = [
            *(row.dtype, row.size, row.kernel, str(row.registers), f"{row.spilled_bytes} B", kib(row.shared_bytes)),
            *(str(row.warps), str(row.tensor_instructions), f"{row.load_bytes} B", f"{row.store_bytes} B"),
            *(str(row.blocks), row.limit),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def kib(size: int) -> str:
    """Bytes as KiB."""
    return f"{size / 1024:.3g} KiB"


def to_markdown(header: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The extremes, then everything."""
    lines = [
        f"# Compiled: the kernels of every shipped configuration, {header['date']}",
        "",
        f"`{header['command']}`; triton {header['versions']['triton']}",
        "",
        "No GPU has run any of this: every number is *compiled*, read from machine code, or follows from it and the "
        "chip's published limits. Registers and spilled bytes are of a thread, shared memory and warps of a block. "
        "`tensor` counts tensor-core instructions in the machine code, a loop's once; `load` and `store` are a "
        "thread's widest accesses of global memory. `blocks` fit on a multiprocessor at a time, for lack of `limit` "
        "no more. Attention has all of its options; float16 has the kernels of bfloat16, and tf32 is float32 where "
        "torch multiplies it so. Sources: `benchmarks/compiled.py`.",
        "",
        *summary(rows),
    ]
    for family, chip in dict.fromkeys((row.family, row.chip) for row in rows):
        of = [row for row in rows if (row.family, row.chip) == (family, chip)]
        lines += [f"## {family} on {chip} (compiled)", "", *table(of, FAMILIES[family].sizes_are)]
    return "\n".join(lines)


def to_json(header: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """One object of ``header`` and ``rows``, one row a line."""
    of_rows = ",\n    ".join(json.dumps(asdict(row)) for row in rows)
    return f'{{\n  "header": {json.dumps(header)},\n  "rows": [\n    {of_rows}\n  ]\n}}\n'


def main(argv: Sequence[str]) -> int:
    """Print the tables, and write them with ``--json``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description="Resources of every kernel.")
    parser.add_argument("family", nargs="*", default=list(FAMILIES), help=f"of {', '.join(FAMILIES)}; all by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write FILE, and .md beside it")
    options = parser.parse_args(argv)
    if unknown := set(options.family) - set(FAMILIES):
        parser.error(f"expected families of {', '.join(FAMILIES)}, got {', '.join(sorted(unknown))}")
    if options.json is not None and options.json.suffix != ".json":
        parser.error(f"--json: expected a name that ends in .json, got {options.json.name}")
    header = {
        "date": date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.compiled", *(x for x in FAMILIES if x in options.family)]),
        "versions": {"triton": triton.__version__, "torch": torch.__version__},
        "kind": "compiled",
    }
    rows = examine_all(cases([x for x in FAMILIES if x in options.family]))
    document = to_markdown(header, rows)
    print(document)
    if options.json is not None:
        for target in write(options.json, to_json(header, rows), document):
            print(f"wrote {target}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
