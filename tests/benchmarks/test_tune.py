"""Tuning without a GPU: what is proposed and dropped, how the search goes by a clock that is told, what is printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from diffgap.kernels.configs import CONFIGS, Attention, Rows, Short, Tile, attention_config

from benchmarks import __main__ as command
from benchmarks import tune
from benchmarks.compiled import MULTIPROCESSORS, Case, Code, Compiled
from benchmarks.tune import best, halving, tiles

SHIPPED = Short(64, 2)


def fake_clock(seconds: Mapping[Any, float]) -> tuple[Callable[..., dict[Any, float]], list[tuple[list[Any], float]]]:
    """A clock that reads what it is told, and what it was asked for."""
    asked: list[tuple[list[Any], float]] = []

    def time(configs: Sequence[Any], budget: float) -> dict[Any, float]:
        asked.append((list(configs), budget))
        return {config: seconds[config] for config in configs}

    return time, asked


def test_halving_finds_the_fastest_and_keeps_what_ships() -> None:
    # What ships is the slowest by far, and stays to the end.
    seconds = {SHIPPED: 9.0} | {Short(16, i): 1.0 + i for i in range(8)}
    time, asked = fake_clock(seconds)
    times = halving(list(seconds), time, 2.0)
    assert times == {SHIPPED: 9.0, Short(16, 0): 1.0}
    assert [(len(configs), budget) for configs, budget in asked] == [(9, 2.0), (5, 4.0), (3, 8.0), (2, 16.0)]
    assert all(configs[0] == SHIPPED for configs, _ in asked)
    assert best(times, SHIPPED) == Short(16, 0)


def test_halving_of_one_times_it_once() -> None:
    time, asked = fake_clock({SHIPPED: 1.0})
    assert halving([SHIPPED], time, 2.0) == {SHIPPED: 1.0} and len(asked) == 1


def test_what_is_hardly_faster_is_no_better() -> None:
    other = Short(32, 4)
    assert best({SHIPPED: 1.0, other: 0.98}, SHIPPED) == SHIPPED
    assert best({SHIPPED: 1.0, other: 0.96}, SHIPPED) == other
    assert best({SHIPPED: 1.0, other: 1.5}, SHIPPED) == SHIPPED


@pytest.mark.parametrize("chip", list(CONFIGS))
def test_proposed_tiles_fit_and_have_what_ships_among_them(chip: str) -> None:
    for product, shipped in CONFIGS[chip].contrastive.items():
        size = 2 if product == "half" else 4
        proposals = tiles(chip, product)
        assert len(set(proposals)) == len(proposals) >= 20
        assert shipped in proposals
        for tile in proposals:
            stages = max(tile.num_stages - 1, 1)
            assert stages * (tile.block_m + tile.block_n) * tile.block_d * size <= MULTIPROCESSORS[chip].block_bytes
            assert 16 <= tile.block_m * tile.block_n / (32 * tile.num_warps) <= 128
        read = [1 / tile.block_m + 1 / tile.block_n for tile in proposals]
        assert read == sorted(read)


@pytest.mark.parametrize("warp", [32, 64])
def test_proposed_rows_of_adaln(warp: int) -> None:
    chip = "gfx942" if warp == 64 else "sm_90"
    for width, shipped in CONFIGS[chip].adaln.items():
        proposals = tune.holdings(width, warp)
        assert shipped in proposals
        for row in proposals:
            elements = row.rows * width / (row.num_warps * warp)
            assert 4 <= elements <= 32 and row.keeps_sums == (elements <= 8) and row.num_warps * warp <= 1024


def test_proposed_rows_of_attention() -> None:
    for chip, amd in (("sm_90", False), ("gfx942", True)):
        for product, which, wide in CONFIGS[chip].long:
            shipped = attention_config(chip, product, 256, 256, 128 if wide else 64, which)
            assert shipped in tune.longs(wide, amd), (chip, which, wide)
        assert set(CONFIGS[chip].short.values()) <= set(tune.shorts())


def test_every_row_of_the_table_is_tuned() -> None:
    rows = list(tune.rows_of("sm_90", tune.FIELDS, torch.zeros))
    table = CONFIGS["sm_90"]
    keys = {field: [row.key for row in rows if row.field == field] for field in tune.FIELDS}
    assert keys == {field: list(getattr(table, field)) for field in tune.FIELDS}
    assert all(row.shipped in row.proposals for row in rows if row.field != "short")
    assert {row.field for row in tune.rows_of("sm_90", ["adaln"], torch.zeros)} == {"adaln"}


def made_up(compiles: Callable[[Short], int | None], proposals: Sequence[Short], results: Mapping[Short, Any]) -> Any:
    """A row of which ``compiles`` says how many bytes spill, or None where the compiler raises."""

    def compiled(config: Short) -> list[Compiled]:
        spilled = compiles(config)
        if spilled is None:
            raise RuntimeError("out of resource: shared memory")
        code = Code(64, spilled, 1024, "HMMA", 8, 16, 16, 16)
        case = Case("attention", "sm_80", "bf16", (16, 16, 64))
        return [
            Compiled(
                case, "attention/all/short_forward", "BLOCK_M=16 BLOCK_N=16 BLOCK_D=64", code, 2, (), 4, "registers"
            )
        ]

    def launches(config: Short) -> dict[str, Callable[[], Any]]:
        return {"attention": lambda: (results[config], torch.zeros(0), torch.ones(2, dtype=torch.int32))}

    return tune.Row("short", ("half", 16, False), SHIPPED, proposals, "half", compiled, launches)


def test_what_spills_or_does_not_compile_is_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    proposals = [SHIPPED, *(Short(16, warps) for warps in (1, 2, 4, 8, 16))]
    row = made_up(lambda config: {1: 8, 2: None}.get(config.num_warps, 0), proposals, {})
    assert tune.screened(row) == [SHIPPED, Short(16, 4), Short(16, 8), Short(16, 16)]
    assert "Short(chunk=16, num_warps=2): RuntimeError" in capsys.readouterr().err
    assert tune.screened(row, most=2) == [SHIPPED, Short(16, 4), Short(16, 8)]


def test_what_gives_other_results_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    wrong, right, broken = Short(16, 1), Short(16, 2), Short(16, 4)
    values = torch.linspace(1, 2, 64, dtype=torch.bfloat16)
    results = {SHIPPED: values, wrong: values * 1.5, right: values * (1 + 2**-8)}
    row = made_up(lambda config: 0, [wrong, right, broken], results)
    time, asked = fake_clock({SHIPPED: 2.0, right: 1.0})
    config, times = tune.tune(row, lambda row, configs, seconds: time(configs, seconds), 1.0)
    assert (config, times) == (right, {SHIPPED: 2.0, right: 1.0})
    assert asked == [([SHIPPED, right], 1.0)]
    said = capsys.readouterr().err
    assert f"{wrong}: attention: output 0: relative L2 error" in said and f"{broken}: KeyError" in said


def test_rows_are_printed_as_python_to_paste(capsys: pytest.CaptureFixture[str]) -> None:
    values = torch.ones(8)
    other = Short(16, 4)
    faster = made_up(lambda config: 0, [other], {SHIPPED: values, other: values})
    same = replace(faster, key=("half", 32, False))
    seconds = {faster.key: {SHIPPED: 3.0, other: 2.0}, same.key: {SHIPPED: 2.0, other: 3.0}}
    tune.print_rows([faster, same], lambda row, configs, budget: {x: seconds[row.key][x] for x in configs}, 1.0)
    head, first, second = capsys.readouterr().out.splitlines()
    assert head == "# short"
    pasted = eval("{" + first.partition("#")[0] + second.partition("#")[0] + "}", {"Short": Short})
    assert pasted == {("half", 16, False): other, ("half", 32, False): SHIPPED}
    assert first.endswith("# 1.50x") and second.endswith("# as it ships")


@pytest.mark.parametrize("config", [Tile(64, 64, 32, 4, 2), Attention(64, 32, 64, 4), Rows(1, 1024, 4, True)])
def test_every_kind_of_row_can_be_pasted(config: Any) -> None:
    row = made_up(lambda config: 0, [], {})
    names = {kind.__name__: kind for kind in (Tile, Attention, Rows)}
    assert eval("{" + row.paste(config) + "}", names) == {("half", 16, False): config}


def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        command.main(["tune"])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no CUDA device is visible" in last and last.startswith("python -m benchmarks tune: error:")


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command.main(["proof"])
    assert "pip install triton" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--kernel", "flash"], ["--seconds", "0"]])
def test_main_rejects_what_it_does_not_know(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["tune", *argv])
    assert stopped.value.code == 2


def test_main_tunes_the_chip_that_is_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(tune, "chip_of", lambda x: "sm_90")
    monkeypatch.setattr(tune.torch, "empty", lambda *size, device: SimpleNamespace(device=device))
    monkeypatch.setattr(tune, "rows_of", lambda chip, fields, make: asked.append((chip, fields)) or [])
    assert command.main(["tune", "--kernel", "adaln", "short"]) == 0
    assert asked == [("sm_90", ["short", "adaln"])]
    assert capsys.readouterr().out.startswith("# sm_90: NVIDIA H100, triton ")
