"""What machine code may use on a chip, and what it should hold."""

from __future__ import annotations

from benchmarks.aot import TARGETS

#: Shared memory of one program at most (CUDA C++ programming guide, "technical specifications per compute
#: capability"; 8.0's own limit is 163 KiB, but the same code runs on 8.6 and 8.9) and local memory of gfx942.
SHARED_BYTES = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10}

#: The tensor core's instruction.
TENSOR = {
    "sm_80": r"\bHMMA\.",
    "sm_90": r"\bHGMMA\.",
    "sm_100": r"\bUTC\w*MMA",
    "sm_120": r"\bHMMA\.",
    "gfx942": "v_mfma",
}

#: A global load of 16 bytes: into registers, or straight into shared memory.
WIDE_LOAD = {"gfx942": r"(global|buffer)_load_(dwordx4|lds_dwordx4)"}
WIDE_LOAD_NVIDIA = r"\bLDGSTS\.E\S*\.128\b|\bLDG\.E\S*\.128\b"

NVIDIA = [chip for chip in TARGETS if chip.startswith("sm_")]
