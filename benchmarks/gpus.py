"""Published rates of the GPUs that the models are made for: one of every chip that the kernels are compiled for."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peaks. Per second: operations of dense products, bytes of HBM, bytes of links in one direction; the others per
    multiprocessor and clock.

    Sources: NVIDIA A100 and H100 Tensor Core GPU Architecture whitepapers and data sheets (multiprocessors, clock,
    products, memory, L2, NVLink: half of 600 and 900 GB/s); DGX A100 and DGX H100 data sheets (one InfiniBand port per
    GPU, 200 and 400 Gb/s); CUDA C++ Programming Guide, throughput of native arithmetic instructions, compute capability
    8.0 and 9.0 (FP32, INT, special functions). A100's whitepaper gives L2's 5,120 bytes a clock; no document gives
    H100's, which is taken as that.

    The others are not checked against a document yet, and what is modelled of them is provisional: look them up in the
    data sheets of A10, L40S, HGX B200 (an eighth of it, half of its rates with sparsity), MI300X and MI355X, in the Ada
    and RTX Blackwell architecture whitepapers (multiprocessors, clocks, L2), the same tables of instructions, and
    AMD's CDNA 3 whitepaper (L2, special functions). Where L2's rate is not known it is no limit, and where links do not
    matter they have none.
    """

    name: str
    chip: str
    multiprocessors: int
    clock: float
    bf16: float
    tf32: float
    special: float
    fp32: float
    integer: float
    hbm: float
    memory: int
    nvlink: float
    infiniband: float
    l2_bytes: int
    l2_bytes_per_clock: float = 5120.0

    @property
    def matrix_fp32(self) -> float:
        """Products of IEEE float32, which take the FP32 units, or AMD's matrix cores at as high a rate."""
        return 2 * self.fp32 * self.multiprocessors * self.clock


A100 = Gpu(
    name="A100-SXM4-80GB",
    chip="sm_80",
    multiprocessors=108,
    clock=1.41e9,
    bf16=312e12,
    tf32=156e12,
    special=16,
    fp32=64,
    integer=64,
    hbm=2.039e12,
    memory=80 * 10**9,
    nvlink=300e9,
    infiniband=25e9,
    l2_bytes=40 << 20,
)
H100 = Gpu(
    name="H100-SXM5-80GB",
    chip="sm_90",
    multiprocessors=132,
    clock=1.83e9,  # at which 132 multiprocessors of 4,096 operations make the published 989.4e12
    bf16=989.4e12,
    tf32=494.7e12,
    special=16,
    fp32=128,
    integer=64,
    hbm=3.35e12,
    memory=80 * 10**9,
    nvlink=450e9,
    infiniband=50e9,
    l2_bytes=50 << 20,
)
GPUS = (A100, H100)


def _without_links(
    name: str,
    chip: str,
    multiprocessors: int,
    clock: float,
    bf16: float,
    tf32: float,
    integer: float,
    hbm: float,
    memory: int,
    l2_bytes: int,
    l2_bytes_per_clock: float = math.inf,
) -> Gpu:
    """With 128 FP32 units and 16 special ones a multiprocessor, as all chips since sm_80 have."""
    return Gpu(
        *(name, chip, multiprocessors, clock, bf16, tf32, 16, 128, integer, hbm, memory, 0.0, 0.0),
        *(l2_bytes, l2_bytes_per_clock),
    )


A10 = _without_links("A10", "sm_86", 72, 1.695e9, 125e12, 62.5e12, 64, 600e9, 24 * 10**9, 6 << 20)
L40S = _without_links("L40S", "sm_89", 142, 2.52e9, 362.05e12, 183e12, 64, 864e9, 48 * 10**9, 96 << 20)
# At its clock 148 multiprocessors make the published 75e12 in float32.
B200 = _without_links("B200", "sm_100", 148, 1.98e9, 2.25e15, 1.125e15, 64, 8e12, 180 * 10**9, 126 << 20)
RTX_5090 = _without_links("RTX 5090", "sm_120", 170, 2.407e9, 209.5e12, 104.8e12, 128, 1.792e12, 32 * 10**9, 96 << 20)
# What spares HBM is the Infinity Cache of 256 MB. CDNA 4 has no TF32.
MI300X = _without_links(
    "MI300X", "gfx942", 304, 2.1e9, 1307.4e12, 653.7e12, 64, 5.3e12, 192 * 10**9, 256 << 20, 16384.0
)
MI355X = _without_links("MI355X", "gfx950", 256, 2.4e9, 2516.6e12, 0.0, 64, 8e12, 288 * 10**9, 256 << 20, 16384.0)

#: One for every chip.
OF_CHIP = {gpu.chip: gpu for gpu in (A100, A10, L40S, H100, B200, RTX_5090, MI300X, MI355X)}
