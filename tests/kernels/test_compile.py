"""Every kernel of the contrastive ops compiles for every chip without a GPU, and its machine code is as intended."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels need triton: pip install triton")

from diffgap.kernels._tiles import TILES

from benchmarks.aot import TARGETS, contrastive_kernels
from benchmarks.sass import LoopCounts, loop_counts, resources, rest_counts, sass
from tests.kernels.chips import NVIDIA, SHARED_BYTES, TENSOR, WIDE_LOAD, WIDE_LOAD_NVIDIA


@cache
def compiled(chip: str, product: str) -> Mapping[str, Any]:
    kernels = contrastive_kernels(chip, product)
    assert len(kernels) >= 14
    return kernels


def computes_a_product(name: str) -> bool:
    """All but the merge of parts, and the gradient from logits that were kept."""
    return not name.endswith("/merge") and "/logits/" not in name


@pytest.fixture(autouse=True)
def _not_interpreting() -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1", "what is interpreted cannot be compiled"


def test_the_table_has_a_row_for_every_chip_and_product() -> None:
    assert set(TILES) == {(chip, product) for chip in TARGETS for product in ("half", "tf32", "ieee")}


@pytest.mark.parametrize("product", ["half", "tf32", "ieee"])
@pytest.mark.parametrize("chip", NVIDIA)
def test_kernels_compile_for_nvidia(chip: str, product: str) -> None:
    for name, kernel in compiled(chip, product).items():
        usage = resources(kernel)
        assert usage.local_bytes == 0, f"{name} spills: {usage}"
        assert usage.shared_bytes <= SHARED_BYTES[chip], f"{name}: {usage}"
        code = sass(kernel)
        if computes_a_product(name):
            assert bool(re.search(TENSOR[chip], code)) == (product != "ieee"), f"{name}: tensor-core instructions"
            assert re.search(WIDE_LOAD_NVIDIA, code), f"{name}: no 16-byte loads"


@pytest.mark.parametrize("product", ["half", "tf32", "ieee"])
def test_kernels_compile_for_amd(product: str) -> None:
    for name, kernel in compiled("gfx942", product).items():
        code = kernel.asm["amdgcn"]
        assert re.search(r"\.vgpr_spill_count: +0\b", code), f"{name} spills"
        assert re.search(r"\.private_segment_fixed_size: +0\b", code), f"{name} uses local memory"
        assert kernel.metadata.shared <= SHARED_BYTES["gfx942"], name
        if computes_a_product(name):
            assert re.search(WIDE_LOAD["gfx942"], code), f"{name}: no 16-byte loads"
            # CDNA 3 multiplies float32 in its matrix cores too.
            assert re.search(TENSOR["gfx942"], code) or product == "ieee", f"{name}: no matrix-core instructions"


@pytest.mark.parametrize("chip", NVIDIA)
def test_the_product_is_the_hottest_loop(chip: str) -> None:
    """The loop over the width has the products and 16-byte loads, and no exponential."""
    kernel = compiled(chip, "half")["clip_loss/diagonal/forward"]
    loop, rest = loop_counts(sass(kernel)), rest_counts(sass(kernel))
    assert loop.tensor > 0 and loop.load_store > 0 and loop.mufu == 0 and loop.fp32 == 0
    # Two exponentials a pair: 128 x block_n of them in each of the 32 lanes of all warps.
    tile = TILES[chip, "half"]
    assert rest.mufu >= 2 * tile.block_m * tile.block_n // (32 * tile.num_warps)


def test_counts_of_a_loop() -> None:
    code = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   MUFU.EX2 R3, R2 ;
.L_x_1:
        /*0020*/                   IADD3 R4, R4, 0x1, RZ ;
.L_x_0:
        /*0030*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R6.64] ;
        /*0040*/                   HMMA.16816.F32.BF16 R8, R12, R16, R8 ;
        /*0050*/                   FFMA R8, R8, R9, R10 ;
        /*0060*/               @P0 BRA `(.L_x_0) ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
"""
    assert loop_counts(code) == LoopCounts(tensor=1, mufu=0, fp32=1, integer=0, load_store=1)
    assert rest_counts(code) == LoopCounts(tensor=0, mufu=1, fp32=0, integer=2, load_store=0)
