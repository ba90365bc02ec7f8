"""Compiled kernels: what is read from machine code, and how many blocks a multiprocessor holds."""

from __future__ import annotations

import importlib
import os
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("triton")

from benchmarks import sass


@pytest.fixture
def compiled() -> ModuleType:
    pytest.importorskip("triton")
    return importlib.import_module("benchmarks.compiled")


@pytest.mark.parametrize(
    ("chip", "warps", "registers", "shared_bytes", "tensor_columns", "blocks", "limit"),
    [
        # 512 registers a lane in each of four partitions: six warps of 80, and so twelve blocks of two warps.
        ("sm_80", 2, 80, 4096, 0, 12, "registers"),
        # 73 are 80; a block of eight warps has two in each partition, of which two fit.
        ("sm_80", 8, 73, 0, 0, 3, "registers"),
        ("sm_80", 8, 255, 0, 0, 1, "registers"),
        # 164 KiB in blocks of 40 + 1 KiB, or one byte more.
        ("sm_80", 4, 32, 40 << 10, 0, 4, "shared memory"),
        ("sm_80", 4, 32, (40 << 10) + 1, 0, 3, "shared memory"),
        ("sm_90", 4, 32, 40 << 10, 0, 5, "shared memory"),
        ("sm_90", 1, 16, 0, 0, 32, "blocks"),
        ("sm_90", 8, 16, 0, 0, 8, "warps"),
        ("sm_100", 4, 64, 1024, 256, 2, "tensor memory"),
        ("sm_120", 1, 16, 0, 0, 24, "blocks"),
        ("sm_120", 4, 40, 0, 0, 12, "warps"),
        # A block that fits nowhere.
        ("sm_120", 4, 40, 100 << 10, 0, 0, "shared memory"),
        # 300 are 304, of 512: one warp in each of the four SIMDs.
        ("gfx942", 4, 300, 16384, 0, 1, "registers"),
        ("gfx942", 4, 128, 16384, 0, 4, "registers"),
        ("gfx942", 4, 64, 16384, 0, 4, "shared memory"),
        ("gfx942", 2, 32, 0, 0, 16, "warps"),
        ("gfx942", 1, 64, 0, 0, 32, "warps"),
    ],
)
def test_occupancy_by_hand(
    compiled: ModuleType,
    chip: str,
    warps: int,
    registers: int,
    shared_bytes: int,
    tensor_columns: int,
    blocks: int,
    limit: str,
) -> None:
    assert compiled.occupancy(chip, warps, registers, shared_bytes, tensor_columns) == (blocks, limit)


def test_every_family_has_every_chip(compiled: ModuleType) -> None:
    for size in ("ci", "full"):
        cases = compiled.cases(size)
        assert len(set(cases)) == len(cases)
        assert {(case.family, case.chip) for case in cases} == {
            (family, chip) for family in compiled.FAMILIES for chip in compiled.TARGETS
        }
    assert {case.family for case in compiled.cases("full", ["adaln"])} == {"adaln"}
    assert {case.chip for case in compiled.cases("full", chips=["sm_90"])} == {"sm_90"}
    # Triton refuses TF32 there.
    of_cdna4 = {(case.family, case.dtype) for case in compiled.cases("full", chips=["gfx950"])}
    assert of_cdna4 == {(x, dtype) for x in compiled.FAMILIES for dtype in ("bf16", "fp16", "fp32")}


def test_nvidia_code(compiled: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
.L_x_0:
        /*0000*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R6.64] ;
        /*0010*/                   LDG.E.U16 R4, desc[UR4][R6.64] ;
        /*0020*/                   HMMA.16816.F32.BF16 R8, R12, R16, R8 ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
        /*0040*/                   HMMA.16816.F32.BF16 R8, R12, R16, R8 ;
        /*0050*/                   STG.E desc[UR4][R6.64], R4 ;
        /*0060*/                   STG.E.U8 desc[UR4][R6.64], R4 ;
        /*0070*/                   STS.128 [R5], R4 ;
        /*0080*/                   EXIT ;
"""
    monkeypatch.setattr(compiled, "resources", lambda kernel: SimpleNamespace(registers=72, local_bytes=16))
    kernel = SimpleNamespace(metadata=SimpleNamespace(shared=4096))
    assert compiled.nvidia_code(kernel, text) == compiled.Code(72, 16, 4096, "HMMA", 2, 16, 2, 4)
    assert compiled.nvidia_code(kernel, text.replace("STG.E ", "STG.E.ENL2.256 ")).store_bytes == 32
    # One instruction of a warp group beside others.
    groups = compiled.nvidia_code(kernel, text.replace("HMMA.16816", "HGMMA.64x64x16", 1))
    assert (groups.tensor, groups.tensor_instructions) == ("HGMMA", 2)
    assert compiled.nvidia_code(kernel, text.replace("HMMA.", "UTCHMMA.")).tensor == "UTCHMMA"
    assert compiled.nvidia_code(kernel, "") == compiled.Code(72, 16, 4096, "", 0, 0, 0, 0)


def test_amd_code(compiled: ModuleType) -> None:
    text = """
        global_load_dwordx2 v[0:1], v2, s[0:1]
        buffer_load_dwordx4 v[4:7], v2, s[0:3], 0 offen
        buffer_load_ubyte v8, v2, s[0:3], 0 offen
        v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
        v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
        ds_write_b128 v0, v[4:7]
        global_store_short_d16_hi v0, v1, s[0:1]
        buffer_store_dword v8, v2, s[0:3], 0 offen
    .agpr_count:     37
    .private_segment_fixed_size: 12
    .vgpr_count:     293
"""
    kernel = SimpleNamespace(asm={"amdgcn": text}, metadata=SimpleNamespace(shared=16384))
    assert compiled.amd_code(kernel) == compiled.Code(293, 12, 16384, "v_mfma", 2, 16, 1, 4)
    kernel.asm["amdgcn"] = text.replace(".vgpr_count", ".registers")
    with pytest.raises(ValueError, match="vgpr_count"):
        compiled.amd_code(kernel)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted cannot be compiled")
def test_kernels_are_compiled_and_examined(compiled: ModuleType) -> None:
    case = compiled.Case("attention", "sm_80", "bf16", (16, 16, 64))
    rows = compiled.compile_case(case)
    assert [row.kernel for row in rows] == ["attention/all/short_forward", "attention_backward/all/short_backward"]
    for row, products in zip(rows, (2, 5), strict=True):
        code = row.code
        assert row.case == case and row.config == "BLOCK_M=16 BLOCK_N=16 BLOCK_D=64 CHUNK=64 warps=2 stages=1"
        assert 32 <= code.registers <= 255 and code.spilled_bytes == 0 and row.warps == 2 and code.shared_bytes > 0
        assert code.load_bytes == code.store_bytes == 16
        # An instruction multiplies 16 x 8 x 16; each warp has half of the columns. There is no loop.
        assert code.tensor_instructions == products * (16 * 16 * 64) // (16 * 8 * 16) // 2
        assert [level.tensor for level in row.counts] == [code.tensor_instructions]
        assert (row.blocks, row.limit) == compiled.occupancy("sm_80", 2, code.registers, code.shared_bytes)
        assert row.occupancy == row.blocks * 2 / 64


LOOPS = """
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


def test_counts_of_a_loop() -> None:
    assert sass.loop_counts(LOOPS) == sass.LoopCounts(tensor=1, mufu=0, fp32=1, integer=0, load_store=1)
    assert sass.rest_counts(LOOPS) == sass.LoopCounts(tensor=0, mufu=1, fp32=0, integer=2, load_store=0)


def test_counts_by_depth() -> None:
    """Six more products in the inner loop, since loops as short as this wait for a barrier."""
    outside = sass.LoopCounts(tensor=0, mufu=1, fp32=0, integer=1, load_store=0)
    assert sum(level.integer for level in sass.counts_by_depth(LOOPS)) == 2 and len(sass.counts_by_depth(LOOPS)) == 1
    product = "        /*0040*/                   HMMA.16816.F32.BF16 R8, R12, R16, R8 ;\n"
    outer, inner = sass.counts_by_depth(LOOPS.replace(product, 7 * product))[1:]
    assert sass.counts_by_depth(LOOPS.replace(product, 7 * product))[0] == outside
    assert outer == sass.LoopCounts(tensor=0, mufu=0, fp32=0, integer=1, load_store=0)
    assert inner == sass.LoopCounts(tensor=7, mufu=0, fp32=1, integer=0, load_store=1)


def test_what_waits_behind_the_exit_is_no_loop() -> None:
    """A wait for a barrier that was not open at first stands behind EXIT, and branches back to what follows it."""
    waits = """
.L_x_2:
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*00a0*/              @!P0 BRA `(.L_x_2) ;
        /*00b0*/                   BRA `(.L_x_1) ;
"""
    product = "        /*0040*/                   HMMA.16816.F32.BF16 R8, R12, R16, R8 ;\n"
    after = "        /*0078*/                   FADD R8, R8, R9 ;\n        /*0080*/                   EXIT ;"
    text = LOOPS.replace(product, 7 * product).replace("        /*0080*/                   EXIT ;", after)
    assert sass.counts_by_depth(text)[0].fp32 == 1
    assert sass.counts_by_depth(text + waits)[1:] == sass.counts_by_depth(text)[1:]
    assert sass.loop_counts(text + waits) == sass.loop_counts(text)


def test_counts_of_amd_by_depth() -> None:
    text = """
\ts_load_dwordx4 s[0:3], s[4:5], 0x0
\tv_exp_f32_e32 v1, v2
.LBB0_1:
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\tds_write_b128 v5, v[0:3]
\tv_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
\tv_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]
\tv_mul_f32_e32 v0, v1, v2
\tv_add_u32_e32 v0, v1, v2
\tv_max_f32_e32 v0, v1, v2
\tv_accvgpr_read_b32 v0, a0
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
"""
    outside, loop = sass.amd_counts(text)
    assert outside == sass.LoopCounts(tensor=0, mufu=1, fp32=0, integer=0, load_store=0)
    assert loop == sass.LoopCounts(tensor=1, mufu=0, fp32=2, integer=2, load_store=2)
