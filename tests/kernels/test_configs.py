"""The tables of launch configurations: every row is one that a kernel can be launched with, and is in the proof."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton: pip install triton")

from diffgap.kernels import configs
from diffgap.kernels.configs import CONFIGS, SHORT, Pass, Product, adaln_config, attention_config, is_amd

from benchmarks.aot import TARGETS
from benchmarks.compiled import FAMILIES, MULTIPROCESSORS, PRODUCTS, cases
from benchmarks.gpus import OF_CHIP

CHIPS = list(CONFIGS)
LENGTHS = (1, 3, 4, 5, 7, 8, 9, 16, 17, 32, 33, 64, 65, 4096)
WIDTHS = (8, 16, 24, 32, 64, 80, 128)


def products(chip: str) -> list[Product]:
    return [product for product in get_args(Product) if (chip, product) != ("gfx950", "tf32")]


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def test_every_chip_has_a_table_a_target_a_multiprocessor_and_a_gpu() -> None:
    assert set(CONFIGS) == set(TARGETS) == set(MULTIPROCESSORS) == set(OF_CHIP)


@pytest.mark.parametrize("chip", CHIPS)
def test_every_table_has_a_row_for_everything(chip: str) -> None:
    table = CONFIGS[chip]
    assert list(table.contrastive) == products(chip)
    both = (False, True)
    assert set(table.short) == {(p, rows, wide) for p in products(chip) for rows in (16, 32, 64) for wide in both}
    assert set(table.long) == {(p, which, wide) for p in products(chip) for which in get_args(Pass) for wide in both}
    assert list(table.adaln) == [16 << i for i in range(10)]


@pytest.mark.parametrize("chip", CHIPS)
def test_contrastive_rows_are_valid(chip: str) -> None:
    for product, tile in CONFIGS[chip].contrastive.items():
        assert all(map(is_power_of_two, (tile.block_m, tile.block_n, tile.block_d, tile.num_warps)))
        assert tile.block_m >= 64 and tile.block_n >= 64 and tile.block_d >= 16
        assert tile.num_warps <= 16 and tile.num_stages >= 1 and tile.programs >= 1
        # Rows of 16 bytes at least a load.
        assert tile.block_d * (2 if product == "half" else 4) >= 16


@pytest.mark.parametrize("chip", CHIPS)
def test_attention_rows_hold_their_tokens(chip: str) -> None:
    for product in products(chip):
        for which in get_args(Pass):
            for n_q, n_k, d in ((n_q, n_k, d) for n_q in LENGTHS for n_k in LENGTHS for d in WIDTHS):
                row = attention_config(chip, product, n_q, n_k, d, which)
                sizes = (row.block_m, row.block_n, row.chunk, row.num_warps, row.pairs)
                assert all(map(is_power_of_two, sizes)) and row.amd == is_amd(chip)
                assert min(row.block_m, row.block_n, row.chunk) >= 16 and row.chunk <= max(16, 2 * d)
                if max(n_q, n_k) <= SHORT:
                    assert row.block_m >= row.pairs * n_q and row.block_n >= row.pairs * n_k
                else:
                    assert row.pairs == 1


@pytest.mark.parametrize("chip", CHIPS)
def test_adaln_rows_hold_their_features(chip: str) -> None:
    warp = 64 if is_amd(chip) else 32
    for width in range(1, 20000, 7):
        row = adaln_config(chip, width)
        assert width <= row.block_d < max(2 * width, 17)
        assert is_power_of_two(row.num_warps) and 32 <= row.num_warps * warp <= 512
        if width <= configs.WIDEST:
            elements = row.rows * row.block_d / (row.num_warps * warp)
            assert elements == (8 if row.keeps_sums else 16) and row.keeps_sums == (width <= 4096)


@pytest.mark.parametrize("chip", CHIPS)
def test_every_row_is_compiled_in_the_proof(chip: str) -> None:
    of_chip = cases("full", chips=[chip])
    sizes = {
        (family, product): {case.size for case in of_chip if (case.family, PRODUCTS[case.dtype]) == (family, product)}
        for family in FAMILIES
        for product in products(chip)
    }
    for product in products(chip):
        assert sizes["contrastive", product] == {(1024, 512), (1001, 512)}
        for which in get_args(Pass):
            listed = {attention_config(chip, product, *size, which) for size in sizes["attention", product]}
            shipped = {
                attention_config(chip, product, n_q, n_k, d, which)
                for n_q in LENGTHS
                for n_k in LENGTHS
                for d in (64, 128)
            }
            assert shipped <= listed
    for product in ("half", "ieee"):
        assert sorted({width for (width,) in sizes["adaln", product]}) == list(CONFIGS[chip].adaln)


def alike(chip: str) -> list[str]:
    """The chips with the table of this one."""
    return [other for other in CHIPS if CONFIGS[other] == CONFIGS[chip]]


@pytest.mark.parametrize("chip", CHIPS)
def test_ci_compiles_every_row_that_has_other_values(chip: str) -> None:
    table, of_chip = CONFIGS[chip], cases("ci", chips=[chip])
    assert {case[:4] for case in of_chip} < {case[:4] for case in cases("full", chips=[chip])}
    for product in products(chip):
        of_product = [case for case in of_chip if PRODUCTS[case.dtype] == product]
        sizes = [case.size for case in of_product if case.family == "attention"]
        tokens = {(max(16, n_q), d > 64) for n_q, _, d in sizes if n_q <= SHORT}
        for rows in (16, 32, 64):
            shipped = {table.short[product, rows, wide] for wide in (False, True)}
            assert shipped == {table.short[product, rows, wide] for size, wide in tokens if size == rows}
        assert {d > 64 for n_q, _, d in sizes if n_q > SHORT} == {False, True}


def test_ci_compiles_every_row_of_a_table_once() -> None:
    """For one of the chips that share the table."""
    of_tables = Counter(case._replace(chip=alike(case.chip)[0]) for case in cases("ci"))
    assert of_tables == Counter(case for chip in CHIPS if chip == alike(chip)[0] for case in cases("ci", chips=[chip]))
    assert alike("sm_89") == ["sm_80", "sm_86", "sm_89"]
    assert {case.chip for case in cases("ci")} == set(CHIPS)


@pytest.mark.parametrize(
    ("capability", "chip"),
    [
        *(((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90")),
        *(((10, 0), "sm_100"), ((10, 3), "sm_100"), ((11, 0), "sm_80"), ((12, 0), "sm_120"), ((12, 1), "sm_120")),
    ],
)
def test_the_chip_of_a_device(capability: tuple[int, int], chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert configs.chip_of(torch.zeros(1)) == chip


@pytest.mark.parametrize(
    ("name", "chip", "product"), [("gfx942:sramecc+:xnack-", "gfx942", "tf32"), ("gfx950", "gfx950", "ieee")]
)
def test_the_chip_of_an_amd_device(name: str, chip: str, product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CDNA 4 has no TF32: float32 is multiplied as it is where torch would allow that."""
    x = SimpleNamespace(device="cuda:0", dtype=torch.float32, is_cuda=True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    assert configs.chip_of(x) == chip and configs.product_kind(x) == product
    assert configs.product_kind(SimpleNamespace(dtype=torch.bfloat16, is_cuda=True)) == "half"
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="ieee"))
    assert configs.product_kind(x) == "ieee"
