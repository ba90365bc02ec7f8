"""The table of compiled kernels: what is read from machine code, and how many blocks a multiprocessor holds."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def compiled() -> ModuleType:
    pytest.importorskip("triton")
    return importlib.import_module("benchmarks.compiled")


@pytest.fixture
def row(compiled: ModuleType) -> Callable[..., Any]:
    def build(**changes: object) -> Any:
        fields: dict[str, object] = {
            **{"family": "adaln", "chip": "sm_90", "dtype": "bf16", "size": "512", "kernel": "adaln/gated/forward"},
            **{"registers": 40, "spilled_bytes": 0, "shared_bytes": 1536, "warps": 4, "tensor_instructions": 7},
            **{"load_bytes": 16, "store_bytes": 8, "blocks": 12, "limit": "registers"},
        }
        return compiled.Row(**fields | changes)

    return build


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


def test_every_configuration_of_attention_is_in_the_table(compiled: ModuleType) -> None:
    from diffgap.kernels._attention_configs import config_for

    cases = [case for case in compiled.cases() if case.family == "attention"]
    lengths = [1, 3, 4, 5, 7, 8, 9, 16, 17, 32, 33, 64, 65, 4096]
    for chip in compiled.TARGETS:
        for dtype, product in compiled._PRODUCTS.items():
            sizes = [case.size for case in cases if (case.chip, case.dtype) == (chip, dtype)]
            for which in ("forward", "backward"):
                listed = {config_for(chip, product, *size, which) for size in sizes}
                shipped = {
                    config_for(chip, product, n_q, n_k, d, which)
                    for n_q in lengths
                    for n_k in lengths
                    for d in (64, 128)
                }
                assert shipped == listed


def test_every_family_has_every_chip(compiled: ModuleType) -> None:
    cases = compiled.cases()
    assert len(set(cases)) == len(cases)
    for name, family in compiled.FAMILIES.items():
        of_family = [case for case in cases if case.family == name]
        assert len(of_family) == len(compiled.TARGETS) * len(family.dtypes) * len(family.sizes)
        assert {case.chip for case in of_family} == set(compiled.TARGETS) == set(compiled.MULTIPROCESSORS)
    assert {case.family for case in compiled.cases(["adaln"])} == {"adaln"}


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
    monkeypatch.setattr(compiled, "sass", lambda kernel: text)
    monkeypatch.setattr(compiled, "resources", lambda kernel: SimpleNamespace(registers=72, local_bytes=16))
    kernel = SimpleNamespace(metadata=SimpleNamespace(shared=4096))
    assert compiled.nvidia_code(kernel) == compiled.Code(72, 16, 4096, 2, 16, 4)
    monkeypatch.setattr(compiled, "sass", lambda kernel: text.replace("STG.E ", "STG.E.ENL2.256 "))
    assert compiled.nvidia_code(kernel).store_bytes == 32
    monkeypatch.setattr(compiled, "sass", lambda kernel: "")
    assert compiled.nvidia_code(kernel) == compiled.Code(72, 16, 4096, 0, 0, 0)


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
    assert compiled.amd_code(kernel) == compiled.Code(293, 12, 16384, 2, 16, 4)
    kernel.asm["amdgcn"] = text.replace(".vgpr_count", ".registers")
    with pytest.raises(ValueError, match="vgpr_count"):
        compiled.amd_code(kernel)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted cannot be compiled")
def test_kernels_are_compiled_and_examined(compiled: ModuleType) -> None:
    case = compiled.Case("attention", "sm_80", "bf16", (16, 16, 64))
    rows = compiled.examine_all([case])
    assert [row.kernel for row in rows] == ["attention/all/short_forward", "attention_backward/all/short_backward"]
    for row, products in zip(rows, (2, 5), strict=True):
        assert (row.family, row.chip, row.dtype, row.size, row.kind) == (*case[:3], "16x16x64", "compiled")
        assert 32 <= row.registers <= 255 and row.spilled_bytes == 0 and row.warps == 2 and row.shared_bytes > 0
        assert row.load_bytes == row.store_bytes == 16
        # An instruction multiplies 16 x 8 x 16; each warp has half of the columns.
        assert row.tensor_instructions == products * (16 * 16 * 64) // (16 * 8 * 16) // 2
        assert (row.blocks, row.limit) == compiled.occupancy("sm_80", 2, row.registers, row.shared_bytes)


def test_summary_has_the_extremes(compiled: ModuleType, row: Callable[..., Any]) -> None:
    rows = [row(), row(registers=255, spilled_bytes=288, blocks=1), row(shared_bytes=4096), row(chip="gfx942")]
    head, _, first, second, end = compiled.summary(rows)
    assert head.count("|") == first.count("|") == 9 and end == ""
    assert first == "| adaln | sm_90 | 3 | 255 | 1 | 288 B | 4 KiB | 4 |"
    assert second == "| adaln | gfx942 | 1 | 40 | 0 | 0 B | 1.5 KiB | 48 |"


def test_main_prints_and_writes_compiled_rows_only(
    compiled: ModuleType,
    row: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(compiled, "examine_all", lambda cases: asked.extend(cases) or [row(), row(chip="gfx942")])
    path = tmp_path / "compiled.json"
    assert compiled.main(["adaln", "--json", str(path)]) == 0
    assert asked == compiled.cases(["adaln"])
    printed = capsys.readouterr().out
    assert path.with_suffix(".md").read_text(encoding="utf-8").strip() == printed.strip()
    assert "No GPU has run any of this" in printed and "measured" not in printed
    assert "`python -m benchmarks.compiled adaln`" in printed
    lines = printed.splitlines()
    assert "## adaln on gfx942 (compiled)" in lines
    line = "| bf16 | 512 | adaln/gated/forward | 40 | 0 B | 1.5 KiB | 4 | 7 | 16 B | 8 B | 12 | registers |"
    assert lines.count(line) == 2
    document = json.loads(path.read_text(encoding="utf-8"))
    assert [(row["chip"], row["kind"]) for row in document["rows"]] == [("sm_90", "compiled"), ("gfx942", "compiled")]
    assert set(document["header"]) == {"date", "command", "versions", "kind"}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("arguments", [["flash"], ["--json", "compiled.txt"]])
def test_main_rejects_what_it_does_not_know(compiled: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        compiled.main(arguments)
