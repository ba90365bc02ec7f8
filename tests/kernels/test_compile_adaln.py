"""Every kernel of adaln compiles for every chip without a GPU, at every width it has a configuration for."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton: pip install triton")

from diffgap.kernels.adaln import config_for

from benchmarks.aot import adaln_kernels
from benchmarks.sass import resources, sass
from tests.kernels.chips import NVIDIA, SHARED_BYTES

WIDTHS = [128, 512, 1024, 4096, 8192]
DTYPES = [torch.float32, torch.bfloat16]

#: Kernels per chip, dtype and width: two of the forward pass, three of the backward pass, two that merge sums.
KERNELS = 7


@cache
def compiled(chip: str, dtype: torch.dtype, width: int) -> Mapping[str, Any]:
    kernels = adaln_kernels(chip, dtype, width)
    assert len(kernels) == KERNELS
    return kernels


@pytest.fixture(autouse=True)
def _not_interpreting() -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1", "what is interpreted cannot be compiled"


@pytest.mark.parametrize("warp", [32, 64])
def test_every_width_has_a_configuration(warp: int) -> None:
    for width in range(1, 8193):
        config = config_for(width, warp)
        assert width <= config.block_d < max(2 * width, 17)
        assert config.num_warps & (config.num_warps - 1) == 0 and 32 <= config.num_warps * warp <= 512
        elements = config.rows * config.block_d / (config.num_warps * warp)
        assert elements == (8 if config.keeps_sums else 16)
        assert config.keeps_sums == (width <= 4096)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("chip", NVIDIA)
def test_kernels_compile_for_nvidia(chip: str, width: int, dtype: torch.dtype) -> None:
    for name, kernel in compiled(chip, dtype, width).items():
        usage = resources(kernel)
        assert usage.local_bytes == 0, f"{name} spills: {usage}"
        assert usage.shared_bytes <= SHARED_BYTES[chip], f"{name}: {usage}"
        code = sass(kernel)
        loads = re.findall(r"\bLDG\.E\S*", code)
        assert loads and all(".128" in load for load in loads), f"{name}: {loads}"
        assert re.search(r"\bSTG\.E\S*\.128", code) or name.endswith("/merge"), f"{name}: no 16-byte stores"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_kernels_compile_for_amd(width: int, dtype: torch.dtype) -> None:
    for name, kernel in compiled("gfx942", dtype, width).items():
        code = kernel.asm["amdgcn"]
        assert re.search(r"\.vgpr_spill_count: +0\b", code), f"{name} spills"
        assert re.search(r"\.private_segment_fixed_size: +0\b", code), f"{name} uses local memory"
        assert kernel.metadata.shared <= SHARED_BYTES["gfx942"], name
        loads = re.findall(r"(?:global|buffer)_load_\w+", code)
        if not name.endswith("/merge"):  # which has 8 elements a thread, in float32 of two threads' columns
            assert loads and all(load.endswith("dwordx4") for load in loads), f"{name}: {loads}"


@pytest.mark.parametrize("chip", ["sm_80", "gfx942"])
def test_kernels_compile_for_widths_that_are_no_power_of_two(chip: str) -> None:
    for width in (1, 7, 100, 1000):
        assert len(compiled(chip, torch.float16, width)) == KERNELS
