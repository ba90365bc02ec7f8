"""benchmarks.scaling_model: its arithmetic against cases worked out by hand, and what it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import ring_model, scaling_model
from benchmarks.gpus import A100, GPUS, H100
from benchmarks.ring_model import GPU_COUNTS
from benchmarks.scaling_model import BRIDGES, Step, Work, all_reduce_seconds, count_step, efficiency, rows_on, step
from diffgap.models.settings import BridgeSettings

#: Rates at which everything can be worked out by heart: 1e12 useful operations and 1e9 useful bytes a second.
ROUND = replace(A100, bf16=1e12 / 0.6, hbm=1e9 / 0.8, nvlink=1e9 / 0.8, infiniband=1e9 / 0.8)
WORK = Work(operations=3e9, calls=100, parameters=1_000_000, width=10, pairs=1)


def test_one_gpu_by_hand() -> None:
    found = step(ROUND, 1, WORK, rows=1000)
    # 1,000 rows of 3e9 operations; 40 MB of AdamW; a tile of 4 x 2 x 1,000 x 1,000 x 10 operations, and no ring.
    assert found.bridge == pytest.approx(3.0)
    assert found.optimizer == pytest.approx(0.04)
    assert found.ring == pytest.approx(80e-6)
    assert found.exchange == 0.0
    assert found.seconds == pytest.approx(3.0 + 0.04 + 80e-6)
    assert found.products == pytest.approx(3.0 + 80e-6)
    assert found.floor == pytest.approx(0.6 * found.products)


def test_the_all_reduce_by_hand() -> None:
    # Each of 4 GPUs sends 2 x 3/4 of 4 MB, in 2 x log2(4) messages of 10 microseconds.
    assert all_reduce_seconds(ROUND, 4, 1_000_000) == pytest.approx(6e-3 + 40e-6)
    # Between nodes a GPU has the links of its node, 8 GB/s here, but never more than it can receive.
    assert all_reduce_seconds(ROUND, 16, 1_000_000) == pytest.approx(2 * 15 / 16 * 4e-3 + 80e-6)
    assert all_reduce_seconds(ROUND, 1, 1_000_000) == 0.0


def test_the_backward_pass_hides_the_all_reduce_as_far_as_it_goes() -> None:
    # A row takes 3 ms, of which the backward pass is 2 ms; the all-reduce takes 6.04 ms.
    assert step(ROUND, 4, WORK, rows=1).exchange == pytest.approx(4.04e-3)
    assert step(ROUND, 4, WORK, rows=4).exchange == 0.0


def test_a_small_bridge_takes_the_time_of_its_calls() -> None:
    assert step(ROUND, 1, replace(WORK, operations=1.0), rows=10).bridge == pytest.approx(100 * 5e-6)


def test_the_ring_takes_the_longest_of_compute_transfer_and_calls() -> None:
    # 4 GPUs of 10 rows: tiles of nothing, 360 and 760 bytes a hop: the calls decide, 4 steps of 108 and of 22.
    assert step(ROUND, 4, WORK, rows=10).ring == pytest.approx(4 * 130 * 5e-6)
    # 100,000 rows: 0.2 and 0.6 s of products a step.
    assert step(ROUND, 4, WORK, rows=100_000).ring == pytest.approx(4 * 0.8)
    # A link of 1 MB/s: 3.6 and 7.6 MB a hop.
    slow = replace(ROUND, nvlink=1e6 / 0.8)
    assert step(slow, 4, WORK, rows=100_000).ring == pytest.approx(4 * (3.6 + 7.6 + 2 * 10e-6))
    assert step(ROUND, 4, replace(WORK, pairs=3), rows=10).ring == pytest.approx(3 * 4 * 130 * 5e-6)


def test_efficiency_is_rows_a_second_and_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {1: 8.0, 4: 4.0}
    monkeypatch.setattr(scaling_model, "step", lambda gpu, gpus, work, rows: Step(times[gpus], 0.0, 0.0, 0.0, 0.0, 0.0))
    assert efficiency(A100, 4, WORK, "weak") == pytest.approx(2.0)
    assert efficiency(A100, 4, WORK, "strong") == pytest.approx(0.5)
    assert rows_on("strong", 4) * 4 == rows_on("strong", 1)


def test_the_step_is_counted_as_a_bridge_of_heads_alone_has_it() -> None:
    """Linear heads make two products a row and modality, forward and for the weight; there is no denoiser."""
    width = 32
    work = count_step(BridgeSettings(width=width, diffusion_weight=0.0, embeddings_per_input=0.0, precondition="none"))
    assert work.operations == 2 * (2 * 512 * width * 2)
    assert (work.width, work.pairs) == (width, 1)


def test_a_deeper_bridge_has_more_of_everything() -> None:
    small, large = (count_step(BRIDGES[name]) for name in ("recommended", "large"))
    assert large.operations > 100 * small.operations
    assert large.parameters > 100 * small.parameters
    assert large.calls > small.calls


def test_no_step_is_below_the_published_peaks_and_all_is_modelled() -> None:
    works = {name: count_step(settings) for name, settings in BRIDGES.items()}
    for gpu in GPUS:
        rows = scaling_model.rows_of(gpu, works)
        assert len(rows) == len({row.case for row in rows}) == 2 * len(BRIDGES) * len(GPU_COUNTS)
        assert all(row.median_s > row.floor_s > 0 for row in rows)
        assert {row.kind for row in rows} == {"modelled"}
    assert GPU_COUNTS[-1] == 1024
    work = works["large"]
    assert step(H100, 8, work, 1024).seconds < step(A100, 8, work, 1024).seconds


def test_the_ring_model_counts_no_calls_of_its_own() -> None:
    assert ring_model.ours(A100, 4, 10, 40).seconds < ring_model.ours(A100, 4, 10, 40, (1.0, 0.0)).seconds


def test_main_prints_and_writes_modelled_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling_model.main(["--json", str(tmp_path / "scaling.json")]) == 0
    printed = capsys.readouterr().out
    assert "No GPU has run any of this" in printed and printed.count("(modelled)") == 2 * len(BRIDGES) * len(GPUS)
    assert (tmp_path / "scaling.md").read_text(encoding="utf-8") == printed.removesuffix("\n")
    document = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))
    assert document["header"]["kind"] == "modelled"
    assert len(document["rows"]) == 2 * len(BRIDGES) * len(GPU_COUNTS) * len(GPUS)


def test_main_refuses_another_suffix(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scaling_model.main(["--json", "scaling.md"])
    assert "ends in .json" in capsys.readouterr().err
