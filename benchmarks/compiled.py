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
``cuda_occupancy.h`` (granularities); AMD Instinct MI300 ISA guide, 3.6 and 3.7 (registers, local memory), CDNA 4
architecture white paper (160 KiB of local memory), and LLVM's ``AMDGPUBaseInfo.cpp`` (waves of a SIMD, work groups of a
compute unit, granularity of local memory).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from diffgap.kernels.configs import CONFIGS, is_amd

from benchmarks.aot import PRODUCTS, TARGETS, Dtype, adaln_kernels, attention_kernels, contrastive_kernels
from benchmarks.sass import LoopCounts, amd_counts, counts_by_depth, resources, sass

Size = Literal["ci", "full"]


class Case(NamedTuple):
    """Kernels that are compiled together: of all launch functions of the family, or those named."""

    family: str
    chip: str
    dtype: Dtype
    size: tuple[int, ...]
    launches: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return "x".join(map(str, self.size))


@dataclass(frozen=True)
class Family:
    """Ops whose kernels have the same sizes.

    Attributes:
        sizes_are: What the numbers of a size are.
        sizes: By dtype, at least one for every row of the tables of configurations.
        ci: Of these, one for every row that has other values: what CI compiles.
        compile: The kernels of a case, by ``op/variant/kernel``.
        launches: The launch functions of some sizes, in full and in CI; of the others all.
    """

    sizes_are: str
    sizes: Mapping[Dtype, tuple[tuple[int, ...], ...]]
    ci: Mapping[Dtype, tuple[tuple[int, ...], ...]]
    compile: Callable[[Case], dict[str, Any]]
    launches: Mapping[tuple[Size, tuple[int, ...]], tuple[str, ...]] = field(default_factory=dict)


#: Queries and keys of different tiles of the short path, some of several pairs.
_TOKENS = ((4, 8), (16, 32), (16, 64), (32, 16), (32, 64), (64, 16), (64, 32))
# Columns beyond 40 and 80 are masked. A d that 8 does not divide is filled up.
_SQUARE = tuple((n, n, d) for n in (4, 8, 16, 32, 64, 256) for d in (16, 32, 40, 64, 80, 128))
_ATTENTION = _SQUARE + tuple((*tokens, d) for tokens in _TOKENS for d in (64, 128))
_CI_ATTENTION: dict[Dtype, tuple[tuple[int, int], ...]] = {
    "bf16": (
        *((n, 64) for n in (4, 8, 16, 32, 64, 256)),
        *((32, 80), (64, 80)),
        *((n, 128) for n in (16, 32, 64, 256)),
    ),
    "fp32": ((4, 64), (16, 64), (16, 128), (32, 64), (32, 128), (64, 128), (256, 64), (256, 128)),
    "tf32": ((16, 64), (16, 128), (32, 64), (32, 128), (64, 128), (256, 64), (256, 128)),
}
_ADALN: tuple[Dtype, ...] = ("bf16", "fp16", "fp32")
# Kernels depend on the numbers of rows only by the logits that are kept: 16 bytes at a time where rows are aligned.
_EVEN, _ODD = (1024, 512), (1001, 512)
_LOGITS = tuple(
    f"{op}/{positives}_logits"
    for positives in ("diagonal", "ids", "diagonal_one_sided", "ids_one_sided")
    for op in ("clip_loss", "clip_loss_backward")
)
# Every loop, with the positives that take the most registers.
_CI_CONTRASTIVE = (
    *("clip_loss/diagonal", "clip_loss/ids", "clip_loss_backward/diagonal", "clip_loss_backward/ids"),
    *("siglip_loss/ids", "siglip_loss_backward/ids", "similarity_ranks/ids", "similarity_topk/k=10"),
)
_WIDTHS = tuple((1 << exponent,) for exponent in range(4, 14))
FAMILIES: dict[str, Family] = {
    "attention": Family(
        "queries x keys x d",
        dict.fromkeys(PRODUCTS, _ATTENTION) | {"fp16": tuple(size for size in _SQUARE if size[2] in (64, 128))},
        {dtype: tuple((n, n, d) for n, d in sizes) for dtype, sizes in _CI_ATTENTION.items()},
        lambda case: attention_kernels(case.chip, case.dtype, *case.size),
    ),
    "adaln": Family(
        "features",
        dict.fromkeys(_ADALN, _WIDTHS),
        dict.fromkeys(_ADALN[::2], ((128,), (512,), (1024,), (4096,), (8192,))),
        lambda case: adaln_kernels(case.chip, case.dtype, *case.size),
    ),
    "contrastive": Family(
        "rows x features",
        dict.fromkeys(PRODUCTS, (_EVEN, _ODD)),
        dict.fromkeys(_CI_ATTENTION, (_EVEN, _ODD)),
        lambda case: contrastive_kernels(case.chip, case.dtype, *case.size, launches=case.launches),
        {("full", _ODD): _LOGITS, ("ci", _EVEN): _CI_CONTRASTIVE, ("ci", _ODD): _LOGITS[2:4]},
    ),
}


def cases(
    size: Size = "full", families: Sequence[str] = tuple(FAMILIES), chips: Sequence[str] = tuple(TARGETS)
) -> list[Case]:
    """Every shipped configuration of some families on some chips; no TF32 where the chip has none.

    Or those that CI compiles: of chips that share a table, every configuration for one of them, in turn.
    """
    found = [
        Case(name, chip, dtype, numbers, FAMILIES[name].launches.get((size, numbers), ()))
        for name in families
        for chip in chips
        for dtype, sizes in (FAMILIES[name].ci if size == "ci" else FAMILIES[name].sizes).items()
        for numbers in sizes
        if PRODUCTS[dtype] in CONFIGS[chip].contrastive
    ]
    if size == "full":
        return found
    alike = {chip: [other for other in chips if CONFIGS[other] == CONFIGS[chip]] for chip in chips}
    place: Counter[tuple[str, str]] = Counter()
    kept = []
    for case in found:
        sharing = alike[case.chip]
        if place[case[:2]] % len(sharing) == sharing.index(case.chip):
            kept.append(case)
        place[case[:2]] += 1
    return kept


@dataclass(frozen=True)
class Multiprocessor:
    """What one holds: warps and blocks at most, and shared memory in bytes, as it is given to blocks."""

    warps: int
    blocks: int
    shared_bytes: int
    system_bytes: int
    shared_granule: int

    @property
    def block_bytes(self) -> int:
        """Shared memory of one block at most."""
        return self.shared_bytes - self.system_bytes


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164 << 10, 1 << 10, 128),
    "sm_86": Multiprocessor(48, 16, 100 << 10, 1 << 10, 128),
    "sm_89": Multiprocessor(48, 24, 100 << 10, 1 << 10, 128),
    "sm_90": Multiprocessor(64, 32, 228 << 10, 1 << 10, 128),
    "sm_100": Multiprocessor(64, 32, 228 << 10, 1 << 10, 128),
    "sm_120": Multiprocessor(48, 24, 100 << 10, 1 << 10, 128),
    "gfx942": Multiprocessor(32, 16, 64 << 10, 0, 512),
    "gfx950": Multiprocessor(32, 16, 160 << 10, 0, 1280),
}
_PARTITIONS, _LANE_REGISTERS, _REGISTER_GRANULE, _TENSOR_COLUMNS = 4, 512, 8, 512


def occupancy(chip: str, warps: int, registers: int, shared_bytes: int, tensor_columns: int = 0) -> tuple[int, str]:
    """Blocks of ``warps`` that a multiprocessor holds at a time, and what there is no room for in one more."""
    limits = MULTIPROCESSORS[chip]
    shared = _round_up(shared_bytes + limits.system_bytes, limits.shared_granule)
    # AMD limits the blocks that have a barrier, and one of a single warp has none.
    blocks = limits.warps if is_amd(chip) and warps == 1 else limits.blocks
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
    """What the machine code of a kernel says.

    Attributes:
        registers: Of a thread; of AMD's both kinds together.
        spilled_bytes: Local memory of a thread.
        shared_bytes: Of a block.
        tensor: The tensor cores' instruction, or nothing; the widest where there are several.
        tensor_instructions: How many, loops once.
        load_bytes: Of a thread's widest load from global memory.
        narrowest_load_bytes: Of its narrowest.
        store_bytes: Of its widest store.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor: str
    tensor_instructions: int
    load_bytes: int
    narrowest_load_bytes: int
    store_bytes: int


@dataclass(frozen=True)
class Compiled:
    """One kernel of a case.

    Attributes:
        config: Its compile-time sizes, warps and stages.
        warps: Of a block.
        counts: Instructions of a warp by pipe: outside all loops, in loops, in loops within those, and so on.
        blocks: That a multiprocessor holds at a time, by what the kernel takes.
        limit: What there is no room for in one more.
    """

    case: Case
    kernel: str
    config: str
    code: Code
    warps: int
    counts: tuple[LoopCounts, ...]
    blocks: int
    limit: str

    @property
    def occupancy(self) -> float:
        """Warps that a multiprocessor holds at a time, of those that it can hold."""
        return self.blocks * self.warps / MULTIPROCESSORS[self.case.chip].warps


def compile_case(case: Case) -> list[Compiled]:
    """Compile the kernels of a case and read their machine code."""
    return examined(case, FAMILIES[case.family].compile(case))


def examined(case: Case, kernels: Mapping[str, Any]) -> list[Compiled]:
    """What the machine code of kernels says that were compiled for a case."""
    result = []
    for name, kernel in kernels.items():
        if is_amd(case.chip):
            code, counts = amd_code(kernel), amd_counts(kernel.asm["amdgcn"])
        else:
            text = sass(kernel)
            code, counts = nvidia_code(kernel, text), counts_by_depth(text)
        warps = kernel.metadata.num_warps
        columns = getattr(kernel.metadata, "tmem_size", None) or 0
        room = occupancy(case.chip, warps, code.registers, kernel.metadata.shared, columns)
        result.append(Compiled(case, name, _config(kernel), code, warps, counts, *room))
    return result


def _config(kernel: Any) -> str:
    """``BLOCK_M=128 BLOCK_N=64 warps=8 stages=4``."""
    names = kernel.src.fn.arg_names
    constants = {names[place[0]]: value for place, value in kernel.src.constants.items()}
    sizes = {name: value for name, value in constants.items() if name.startswith("BLOCK") or name in ("CHUNK", "ROWS")}
    sizes |= {"warps": kernel.metadata.num_warps, "stages": kernel.metadata.num_stages}
    return " ".join(f"{name}={value}" for name, value in sizes.items())


def nvidia_code(kernel: Any, text: str) -> Code:
    """From the cubin and its disassembly; the cubin's own number of shared memory has that of the system in it on some
    chips."""
    usage = resources(kernel)
    tensor = re.findall(r"\b(HMMA|HGMMA|UTC\w*MMA)\b", text)
    loads, stores = (_sizes(rf"\b{opcode}\.(\S+)", text, nvidia_bytes) for opcode in ("LDG(?:STS)?", "STG"))
    return Code(
        *(usage.registers, usage.local_bytes, kernel.metadata.shared, _widest_product(tensor), len(tensor)),
        *(max(loads, default=0), min(loads, default=0), max(stores, default=0)),
    )


def amd_code(kernel: Any) -> Code:
    """From the assembly text.

    Raises:
        ValueError: the text has another form than is known here.
    """
    text = kernel.asm["amdgcn"]
    registers, local = (re.search(rf"\.{x}: +(\d+)\b", text) for x in ("vgpr_count", "private_segment_fixed_size"))
    if registers is None or local is None:
        raise ValueError("amdgcn: expected .vgpr_count and .private_segment_fixed_size in the kernel's metadata")
    tensor = re.findall(r"\b(v_mfma)_", text)
    loads, stores = (
        _sizes(rf"\b(?:global|buffer)_{way}_(?:lds_)?(dword(?:x\d)?|[a-z]+)", text, _AMD_BYTES.__getitem__)
        for way in ("load", "store")
    )
    return Code(
        *(int(registers[1]), int(local[1]), kernel.metadata.shared, _widest_product(tensor), len(tensor)),
        *(max(loads, default=0), min(loads, default=0), max(stores, default=0)),
    )


def _widest_product(names: Sequence[str]) -> str:
    """A warp group's instruction before a warp's."""
    return next((name for name in sorted(set(names), key=lambda name: name == "HMMA")), "")


def _sizes(access: str, text: str, size: Callable[[str], int]) -> list[int]:
    return list(map(size, re.findall(access, text)))


def nvidia_bytes(modifiers: str) -> int:
    """Of ``E.128`` and the like; 32 bits have none."""
    return next((_NVIDIA_BYTES[x] for x in modifiers.split(".") if x in _NVIDIA_BYTES), 4)


_NVIDIA_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "short": 2}
_AMD_BYTES |= {"ubyte": 1, "sbyte": 1, "byte": 1}
