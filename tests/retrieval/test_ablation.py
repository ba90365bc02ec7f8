"""A grid trained, killed, resumed, compared; the numbers against those of ``evaluate_runs``."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from diffgap import cli
from diffgap.data.store import write_store
from diffgap.models.settings import BridgeSettings
from diffgap.retrieval import ablation_report
from diffgap.retrieval.ablation import METRICS, SCORINGS, Ablation, complete, run_grid
from diffgap.retrieval.evaluate import evaluate_runs
from diffgap.retrieval.tasks import encode_pair, items
from diffgap.training.folder import exclusive
from diffgap.training.grid import Grid, GridRun
from diffgap.training.runs import load_run
from diffgap.training.workers import run_apart
from tests.synthetic import make_config, make_store
from tests.training.kill_loop import die_at

ROOT = Path(__file__).resolve().parents[2]
LABELS = {"cosine": "heads (cosine)", "bridge": "bridge", "fusion": "bridge + cosine"}


def write_grid(folder: Path, **variants: Any) -> str:
    """A grid on the store in ``folder``: two seeds, a tiny reference, and ``variants``.

    Without the linear denoiser, beside which a few steps of the network would change no rank.
    """
    content = {
        "base": {**make_config(folder / "store").to_dict(), "bridge.precondition": "none", "bridge.heads_first": 0},
        "seeds": [0, 1],
        "variants": {"tiny": {}, **variants},
    }
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(file)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Grid, Ablation]:
    """A folder with store/, grid.yaml and out/, whose variant "big" cannot be trained."""
    folder = tmp_path_factory.mktemp("ablation")
    write_store(folder / "store", make_store(splits=("train", "train", "val", "val", "test")))
    one_way = {"bridge.directions": "audio -> text"}
    file = write_grid(
        folder, deep={"bridge.depth": 2}, twin={"bridge.depth": 1}, big={"train.batch_size": 64}, **{"one way": one_way}
    )
    grid = Grid.load(file)
    return folder, grid, run_grid(grid, folder / "out", replicates=50)


def ranks(output: Path) -> dict[str, str]:
    return {str(file.relative_to(output)): file.read_text() for file in output.rglob("ranks-*.json")}


def test_the_table_has_the_numbers_of_evaluate_runs(done: tuple[Path, Grid, Ablation]) -> None:
    folder, _, ablation = done
    rows = {row.name: row for row in ablation.variants}
    for name in ("tiny", "deep"):
        report = evaluate_runs(
            [folder / "out" / name / f"seed{seed}" for seed in (0, 1)], split="val", with_baselines=False, replicates=2
        )
        for scoring in SCORINGS:
            for metric in METRICS:
                by_direction = report.metrics[LABELS[scoring]]
                expected = {d: by_direction[d][metric].estimate for d in report.directions}
                assert rows[name].directions[scoring][metric] == pytest.approx(expected)
                cell = rows[name].cells[scoring][metric].mean
                assert cell.estimate == pytest.approx(np.mean(list(expected.values())))
                assert cell.low <= cell.estimate <= cell.high
        assert rows[name].seeds == [0, 1] and rows[name].seconds is not None and rows[name].seconds > 0


def test_differences_are_paired_with_the_reference(done: tuple[Path, Grid, Ablation]) -> None:
    rows = {row.name: row for row in done[2].variants}
    for scoring in SCORINGS:
        for metric in METRICS:
            assert rows["tiny"].cells[scoring][metric].difference == (0, 0, 0)
            deep, tiny = (rows[name].cells[scoring][metric] for name in ("deep", "tiny"))
            assert deep.difference is not None
            assert deep.difference.estimate == pytest.approx(deep.mean.estimate - tiny.mean.estimate)
    bridge = rows["deep"].cells["bridge"]["MRR"]
    assert bridge.difference is not None and bridge.difference.estimate != 0
    # The two find the same queries hard, which the paired interval knows.
    assert bridge.difference.high - bridge.difference.low < 2 * (bridge.mean.high - bridge.mean.low)


def test_a_twin_shares_runs_and_a_failure_is_recorded(done: tuple[Path, Grid, Ablation]) -> None:
    folder, _, ablation = done
    rows = {row.name: row for row in ablation.variants}
    assert rows["twin"].twin == "tiny" and rows["twin"].cells == rows["tiny"].cells
    assert not (folder / "out" / "twin").exists()
    assert rows["big"].seeds == [] and rows["big"].cells == {}
    assert list(ablation.failures) == ["big, seed 0", "big, seed 1"]
    assert all("train.batch_size is 64 but" in reason for reason in ablation.failures.values())


def test_an_untrained_direction_takes_no_part_in_scores(done: tuple[Path, Grid, Ablation]) -> None:
    model, _ = load_run(done[0] / "out" / "one-way" / "seed0")
    sides = {name: items(make_store(), name) for name in ("audio", "text")}
    encoded = encode_pair(model, sides, seed=0).encoded
    assert not encoded["text"].bridged.any() and encoded["audio"].bridged.any()
    model.settings = replace(model.settings, directions="video -> *")
    for side in encode_pair(model, sides, seed=0).encoded.values():
        assert side.bridged.equal(side.own)


def test_what_is_done_is_left_alone(done: tuple[Path, Grid, Ablation]) -> None:
    folder, grid, ablation = done
    before = {file: file.stat().st_mtime_ns for file in (folder / "out").rglob("*") if file.is_file()}
    calls: list[tuple[int, int, str, str | None]] = []
    again = run_grid(grid, folder / "out", replicates=50, progress=lambda *call: calls.append(call))
    assert again == ablation
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert [call[:3] for call in calls] == [(6, 8, ""), (7, 8, "big, seed 0"), (8, 8, "big, seed 1")]


def test_another_split_needs_no_new_training(done: tuple[Path, Grid, Ablation]) -> None:
    folder, grid, ablation = done
    tiny = replace(grid, variants={"tiny": grid.variants["tiny"]}, seeds=(0,))
    model = folder / "out" / "tiny" / "seed0" / "model" / "model.safetensors"
    before = model.stat().st_mtime_ns
    test = run_grid(tiny, folder / "out", split="test", replicates=2)
    assert model.stat().st_mtime_ns == before and test.split == "test" and test.variants[0].seconds is not None
    assert test.variants[0].directions != ablation.variants[0].directions


def test_variants_with_other_queries_get_no_difference(done: tuple[Path, Grid, Ablation], tmp_path: Path) -> None:
    grid = done[1]
    write_store(tmp_path / "store", make_store(groups=50))
    tiny = grid.variants["tiny"]
    other = replace(tiny, data=replace(tiny.data, path=str(tmp_path / "store")))
    mixed = Grid("tiny", (0,), {"tiny": tiny, "elsewhere": other})
    row = run_grid(mixed, tmp_path / "out", replicates=2).variants[1]
    assert row.cells["bridge"]["MRR"].difference is None and row.cells["bridge"]["MRR"].mean.estimate > 0


def test_command_refuses_a_changed_grid(done: tuple[Path, Grid, Ablation], capsys: pytest.CaptureFixture[str]) -> None:
    folder = done[0]
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["ablate", str(folder / "grid.yaml"), str(folder / "out"), "--steps", "7"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "was trained with train.steps " in said
    assert said.count("\n") == 1 and sorted(folder.rglob("*")) == before


def test_command_writes_the_report_and_tells_of_failures(
    done: tuple[Path, Grid, Ablation], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, ablation = done
    with pytest.raises(SystemExit) as stop:
        cli.main(["ablate", str(folder / "grid.yaml"), str(folder / "out"), "--bootstrap", "50"])
    captured = capsys.readouterr()
    assert stop.value.code == 1 and "2 runs failed, the first big, seed 0: train.batch_size is 64" in captured.err
    assert "8/8 big, seed 1: failed" in captured.out.replace("\n", " ")
    found = json.loads((folder / "out" / "ablation.json").read_text())
    assert found == json.loads(json.dumps(ablation_report.as_json(ablation)))
    shown = {line.split("\u2502")[1].strip(): line for line in captured.out.splitlines() if "\u2502" in line}
    assert list(shown) == ["tiny", "deep", "one way"]  # with runs of their own
    for row in ablation.variants[:2]:
        for scoring in SCORINGS:
            mean = row.cells[scoring]["MRR"].mean
            assert f" {100 * mean.estimate:.1f} [{100 * mean.low:.1f}, {100 * mean.high:.1f}]" in shown[row.name]
    difference = ablation.variants[1].cells["fusion"]["MRR"].difference
    assert difference is not None and f" {100 * difference.estimate:+.1f} [" in shown["deep"]
    text = (folder / "out" / "ablation.md").read_text()
    cell = ablation.variants[1].cells["fusion"]["MRR"]
    assert f"| deep | {100 * cell.mean.estimate:.1f} [{100 * cell.mean.low:.1f}, " in text
    assert "| deep | `bridge.depth: 2` | 2 of 2 | " in text and "| twin | nothing: the same as tiny | 2 of 2 |" in text
    assert "- big, seed 1: train.batch_size is 64" in text
    assert (folder / "out" / "ablation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "grid nowhere is neither a file nor a bundled grid (paper)"),
        (["paper", "out", "--bootstrap", "0"], "bootstrap is 0; use 1"),
        (["paper", "out", "--jobs", "0"], "jobs is 0; use 1 or more"),
        (["paper", "out", "--split", "all"], "invalid choice 'all'"),
        (["paper"], "OUTPUT"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["ablate", *arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def _complete_or_die(task: tuple[GridRun, int], output: Path, split: str) -> None:
    run, operation = task
    die_at(operation, str(output))
    complete(run, output, split)


def test_a_run_killed_at_any_change_of_a_file_ends_at_the_same_ranks(
    done: tuple[Path, Grid, Ablation], tmp_path: Path
) -> None:
    folder, grid, _ = done
    run = next(grid.runs())
    draw = random.Random(0)
    tasks = [(run, draw.randint(3, 30)) for _ in range(8)] + [(run, 10**9)]
    reasons: list[str | None] = []
    run_apart(_complete_or_die, tasks, tmp_path, "val", finished=lambda _, reason: reasons.append(reason))
    assert sum(reason is not None and "SIGKILL" in reason for reason in reasons) >= 3
    assert reasons[-1] is None
    file = "tiny/seed0/ranks-val.json"
    assert ranks(tmp_path)[file] == ranks(folder / "out")[file]


def test_the_whole_command_killed_and_started_again(done: tuple[Path, Grid, Ablation], tmp_path: Path) -> None:
    folder, grid, _ = done
    output, second = tmp_path / "out", tmp_path / "out" / "deep" / "seed0"
    command = [sys.executable, "-m", "diffgap", "ablate", str(folder / "grid.yaml"), str(output)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    _wait_for(lambda: any(second.glob("checkpoints/step-*")))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    first = output / "tiny" / "seed0" / "ranks-val.json"
    before = first.stat().st_mtime_ns
    _wait_for(lambda: _free(second))  # the run's process ends with the command's
    calls: list[int] = []
    run_grid(grid, output, replicates=2, progress=lambda number, *_: calls.append(number))
    assert first.stat().st_mtime_ns == before and 1 <= calls[0] < 6
    expected = ranks(folder / "out")
    assert {name: text for name, text in expected.items() if "-val" in name} == ranks(output)


def _wait_for(condition: Any) -> None:
    for _ in range(60_000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never came")


def _free(folder: Path) -> bool:
    try:
        with exclusive(folder):
            return True
    except ValueError:
        return False


def test_trains_follows_directions_and_weight() -> None:
    settings = BridgeSettings(directions="audio -> *, text -> image")
    pairs = [(a, b) for a in ("audio", "image", "text") for b in ("audio", "image", "text") if settings.trains(a, b)]
    assert pairs == [("audio", "image"), ("audio", "text"), ("text", "image")]
    assert BridgeSettings().trains("a", "b") and not BridgeSettings().trains("a", "a")
    assert not BridgeSettings(diffusion_weight=0).trains("a", "b")
