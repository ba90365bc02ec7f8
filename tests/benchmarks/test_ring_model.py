"""benchmarks.ring_model: its counts against their definitions, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import ring_model
from benchmarks.gpus import A100, GPUS, H100
from benchmarks.ring_model import GLOBAL_BATCH, Pass, inf_cl, open_clip, ours

WIDTH = 512


@pytest.mark.parametrize("gpus", [1, 8, 1024])
@pytest.mark.parametrize(("model", "units"), [(ours, 4), (open_clip, 6), (inf_cl, 10)])
def test_all_gpus_together_do_the_units_of_the_whole_batch(model, units: int, gpus: int) -> None:
    assert gpus * model(A100, gpus, WIDTH).operations == units * 2 * GLOBAL_BATCH**2 * WIDTH


@pytest.mark.parametrize("model", [ours, open_clip, inf_cl])
def test_one_gpu_sends_nothing(model) -> None:
    assert model(A100, 1, WIDTH).link_bytes == 0


def test_ring_memory_falls_with_the_number_of_gpus_and_logits_do_not_fit() -> None:
    assert ours(A100, 8, WIDTH).peak_bytes == 128 * ours(A100, 1024, WIDTH).peak_bytes
    rows = GLOBAL_BATCH // 8
    assert open_clip(A100, 8, WIDTH).peak_bytes > 2 * rows * GLOBAL_BATCH > A100.memory


def test_a_step_of_a_ring_takes_the_slower_of_compute_and_transfer() -> None:
    busy = Pass(operations=1e12, rate=1e12, hop_bytes=1.0)
    total, compute, _ = busy.times(A100, 4, leaving=0)
    assert total == compute == 4 / ring_model.COMPUTE_UTILISATION
    idle = Pass(operations=1.0, rate=1e12, hop_bytes=8e9)
    total, _, link = idle.times(A100, 16, leaving=2)
    near, far = (8e9 / (ring_model.BYTES_UTILISATION * rate) for rate in (A100.nvlink, A100.infiniband))
    assert total == link == pytest.approx(14 * near + 2 * far + 16 * ring_model.HOP_SECONDS)


def test_no_time_is_below_the_published_peaks() -> None:
    for gpu in GPUS:
        rows, _ = ring_model.rows_of(gpu)
        assert all(row.median_s > row.floor_s for row in rows)
        assert {row.kind for row in rows} == {"modelled"}
    for gpus in ring_model.GPU_COUNTS:
        assert ours(H100, gpus, WIDTH).seconds < ours(A100, gpus, WIDTH).seconds


def test_main_prints_and_writes_modelled_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ring_model.main(["--json", str(tmp_path / "ring.json")]) == 0
    printed = capsys.readouterr().out
    assert "(modelled)" in printed and "No GPU has run any of this" in printed
    assert (tmp_path / "ring.md").read_text(encoding="utf-8") == printed.removesuffix("\n")
    document = json.loads((tmp_path / "ring.json").read_text(encoding="utf-8"))
    shown = {(row["case"], row["impl"], row["device"]) for row in document["rows"]}
    assert len(shown) == len(document["rows"])
    cases = len(GPUS) * len(ring_model.WIDTHS) * len(ring_model.GPU_COUNTS)
    assert len(document["rows"]) + len(document["skipped"]) == 3 * cases
    assert {entry["impl"] for entry in document["skipped"]} == {"open_clip"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ring.json", "ring.md"]


def test_main_refuses_another_suffix(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ring_model.main(["--json", "ring.md"])
    assert "ends in .json" in capsys.readouterr().err
