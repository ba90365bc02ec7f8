"""The modelled times of named GPUs: rates, units, and what is counted in compiled kernels."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.gpus import A100, GPUS, H100, OF_CHIP


@pytest.fixture
def model() -> ModuleType:
    pytest.importorskip("triton")
    return importlib.import_module("benchmarks.model")


def counts(model: ModuleType, tensor: int = 32, fp32: int = 0, rest_fp32: int = 0) -> dict[str, object]:
    loop = model.LoopCounts(tensor=tensor, mufu=0, fp32=fp32, integer=tensor // 4, load_store=tensor // 2)
    rest = model.LoopCounts(tensor=0, mufu=128, fp32=rest_fp32, integer=128, load_store=64)
    return dict.fromkeys(("_forward_kernel", "_gradient_kernel"), model.Counts(loop, rest))


def test_every_pipe_has_its_published_rate(model: ModuleType) -> None:
    clocks = 108 * 1.41e9
    work = {
        "tensor": {"flops": 312e12},
        "special": {"special": 16 * clocks},
        "fp32": {"fp32": 64 * clocks},
        "integer": {"integer": 64 * clocks},
        "load/store": {"load_store_clocks": clocks},
        "l2": {"l2": 5120 * 1.41e9},
        "hbm": {"hbm": 2.039e12},
        "launch": {"launches": 1 / 2.5e-6},
    }
    for pipe, amount in work.items():
        kernel = model.Kernel("one second", **amount)
        pipes = kernel.pipes(A100)
        assert list(pipes) == list(work)
        assert pipes.pop(pipe) == pytest.approx(1.0) == kernel.seconds(A100)
        assert max(pipes.values()) <= 2.5e-6
    assert model.Kernel("slower", 312e12, "tf32").seconds(A100) == pytest.approx(2.0)
    assert model.Kernel("faster", 989.4e12).seconds(H100) == pytest.approx(1.0)


def test_kernels_follow_one_another(model: ModuleType) -> None:
    entry = model.Implementation("two", (model.Kernel("a", 312e12), model.Kernel("b", hbm=2 * 2.039e12)), 0)
    assert entry.seconds(A100) == pytest.approx(3.0)


@pytest.mark.parametrize(("rows", "width"), [(32768, 512), (131072, 1024)])
def test_products_are_counted_in_units(model: ModuleType, rows: int, width: int) -> None:
    unit = 2.0 * rows * rows * width
    for gpu in GPUS:
        entries = {entry.name: entry for entry in model.implementations(gpu, rows, width, counts(model))}
        units = {name: sum(kernel.flops for kernel in entry.kernels) / unit for name, entry in entries.items()}
        assert units == {"diffgap": 4.0, "open_clip": 6.0, "inf_cl": 10.0}
        # Of what is stored, only open_clip's logits grow with the square of the batch.
        small = {entry.name: entry for entry in model.implementations(gpu, rows // 2, width, counts(model))}
        growth = {name: entry.peak_bytes / small[name].peak_bytes for name, entry in entries.items()}
        assert growth["open_clip"] == 4.0 and growth["diffgap"] < 2.0 == growth["inf_cl"]


def test_instructions_scale_with_the_tensor_instructions_and_the_tiles(model: ModuleType) -> None:
    def fp32(**options: int) -> float:
        entry = model.ours(A100, 32768, 512, counts(model, **options))
        return sum(kernel.fp32 for kernel in entry.kernels)

    assert fp32() == 0.0
    # An HMMA of a warp multiplies 16 x 8 x 16; for every 32 of them, two instructions of 32 lanes, in two kernels.
    assert fp32(fp32=2) == pytest.approx(2 * 32768**2 * 512 / 2048 / 32 * 2 * 32)
    assert fp32(tensor=64, fp32=4) == pytest.approx(fp32(fp32=2))
    # Tiles of 128 x 128 forward, and of 128 x 64 for the gradient, by 8 warps of 32 lanes.
    assert fp32(rest_fp32=3) == pytest.approx((256**2 + 256 * 512) * 8 * 32 * 3)


def test_model_rows_are_modelled_and_above_the_floor(model: ModuleType) -> None:
    for gpu in (OF_CHIP[chip] for chip in model.CHIPS):
        result = model.model(gpu, counts(model)).result
        assert {row.case for row in result.rows if row.impl == "diffgap"} == {
            f"clip_loss/fwd+bwd/{rows}x{width}/bf16" for rows in (32768, 131072) for width in (512, 768, 1024)
        }
        assert all(row.kind == "modelled" and row.device == gpu.name for row in result.rows)
        assert all(row.median_s >= row.floor_s for row in result.rows)
        assert {entry.impl for entry in result.skipped} == {"open_clip"}
        assert all(entry.case.split("/")[2].startswith("131072x") for entry in result.skipped)


def test_compiled_kernels_have_the_instructions_of_their_tiles(model: ModuleType) -> None:
    for gpu in (*GPUS, OF_CHIP["sm_120"]):
        whole = model.CONFIGS[gpu.chip].contrastive["half"]
        tiles = {"_forward_kernel": whole, "_gradient_kernel": whole.for_gradient()}
        for name, entry in model.compiled_counts(gpu).items():
            tile = tiles[name]
            multiply_adds = entry.loop.tensor * model.multiply_adds(gpu, tile) * tile.num_warps
            assert multiply_adds == tile.block_m * tile.block_n * tile.block_d
            assert entry.loop.load_store > 0 == entry.loop.mufu == entry.rest.tensor
            # Two exponentials a logit, and a few for the running maxima.
            exponentials = entry.rest.mufu * tile.num_warps * 32 / (tile.block_m * tile.block_n)
            assert 2.0 <= exponentials < 3.0


def test_model_prints_and_writes_modelled_rows_only(
    model: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model, "compiled_counts", lambda gpu: counts(model))
    path = tmp_path / "model.json"
    assert model.main(["--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert path.with_suffix(".md").read_text().strip() == printed.strip()
    assert "No GPU has run any of this" in printed and "(measured)" not in printed and "±" not in printed
    assert "## clip_loss on H100-SXM5-80GB (modelled)" in printed.splitlines()
    document = json.loads(path.read_text())
    assert {row["kind"] for row in document["rows"]} == {"modelled"} and len(document["rows"]) == 30
    # Another chip, which the command in the header names.
    assert model.main(["--json", str(path), "--chip", "sm_89"]) == 0
    document = json.loads(path.read_text())
    assert {row["device"] for row in document["rows"]} == {"L40S"}
    assert document["header"]["command"] == "python -m benchmarks.model --chip sm_89"
    for wrong in (["--json", "model.txt"], ["--chip", "gfx942"]):
        with pytest.raises(SystemExit):
            model.main(wrong)


def test_models_of_a_chip_that_only_attention_is_modelled_for(model: ModuleType) -> None:
    rows, without = importlib.import_module("benchmarks.modelled").rows("gfx942")
    assert {row.device for row in rows} == {"MI300X"} and {row.impl for row in rows} == {"diffgap", "eager"}
    assert without == [f"the model of {name} is not made for gfx942" for name in ("clip_loss", "schedule")]
