"""Published rates of the GPUs that the models are made for."""

from __future__ import annotations

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
