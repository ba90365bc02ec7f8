"""Published rates of the GPUs that the models are made for: one of every chip that the kernels are compiled for."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peaks. Per second: operations of dense products, bytes of HBM, bytes of links in one direction; the others per
    multiprocessor and clock.

    Sources, of which those marked * were read as others quote them (OpenXLA's and PyTorch's tables, published notes):

    - Units (FP32, INT, special functions): CUDA C++ Programming Guide, architecture of compute capability 8.x, 9.0,
      10.0 and 12.0. It has 64 INT units for 12.0 too; the RTX Blackwell whitepaper* and the CUDA C++ Best Practices
      Guide 13.4* have 128 for sums and 64 for shifts, logic and products: the higher is taken, for a bound.
    - A100, H100: architecture whitepapers* and data sheets* (multiprocessors, clock, products, memory, L2, NVLink: half
      of 600 and 900 GB/s); DGX A100 and DGX H100 data sheets (one InfiniBand port per GPU, 200 and 400 Gb/s). H100's
      clock is that of products; without any it is 1.98e9. A100's whitepaper gives L2's 5,120 bytes a clock; no
      document gives H100's, which is taken as that.
    - A10, L40S: data sheets (products, memory), cudaGetDeviceProperties (clock, L2, L40S's multiprocessors);
      TechPowerUp (A10's multiprocessors, with which its clock makes the published 31.2e12 in float32).
    - B200: HGX B200 PCF summary* (an eighth of its dense products), Blackwell technical brief, table 3* (memory's
      7.7e12, for which 8e12 was printed at first), cudaGetDeviceProperties and nvidia-smi (multiprocessors, clock, L2).
    - RTX 5090: RTX Blackwell architecture whitepaper, table 3* (multiprocessors, clock, products with FP32
      accumulation, memory), cudaGetDeviceProperties (L2).
    - MI300X: CDNA 3 whitepaper (units, products, memory, L2) and data sheet* (TF32; the whitepaper's 490.3e12 is
      MI300A's). MI355X: product brief* (clock, memory), CDNA 4 whitepaper, table 1 and text* (units, products, special
      functions twice as fast as CDNA 3's; L2 of the same width).

    Provisional, as no document of AMD's gives it: special functions of CDNA 3 (a quarter of the lanes, by LLVM's
    ``SISchedule.td``), and so CDNA 4's. AMD's FP32 rate is the published one, which may take packed instructions. Where
    L2's rate is not known it is no limit, and where links do not matter they have none.
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
    special: float = 16,
) -> Gpu:
    """With 128 FP32 units a multiprocessor, as all chips since sm_80 have."""
    return Gpu(
        *(name, chip, multiprocessors, clock, bf16, tf32, special, 128, integer, hbm, memory, 0.0, 0.0),
        *(l2_bytes, l2_bytes_per_clock),
    )


A10 = _without_links("A10", "sm_86", 72, 1.695e9, 125e12, 62.5e12, 64, 600e9, 24 * 10**9, 6 << 20)
# Half of the data sheet's 733e12 with sparsity, which its units make at its clock, and not the 362.05e12 printed there.
L40S = _without_links("L40S", "sm_89", 142, 2.52e9, 366.5e12, 183e12, 64, 864e9, 48 * 10**9, 96 << 20)
B200 = _without_links("B200", "sm_100", 148, 1.965e9, 2.25e15, 1.125e15, 64, 7.7e12, 180 * 10**9, 253 << 19)
RTX_5090 = _without_links("RTX 5090", "sm_120", 170, 2.407e9, 209.5e12, 104.8e12, 128, 1.792e12, 32 * 10**9, 96 << 20)
# What spares HBM is the Infinity Cache of 256 MB. CDNA 4 has no TF32.
MI300X = _without_links(
    "MI300X", "gfx942", 304, 2.1e9, 1307.4e12, 653.7e12, 64, 5.3e12, 192 * 10**9, 256 << 20, 16384.0
)
MI355X = _without_links(
    "MI355X", "gfx950", 256, 2.4e9, 2516.6e12, 0.0, 64, 8e12, 288 * 10**9, 256 << 20, 16384.0, special=32
)

#: One for every chip.
OF_CHIP = {gpu.chip: gpu for gpu in (A100, A10, L40S, H100, B200, RTX_5090, MI300X, MI355X)}
