from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from diffgap.data.store import EmbeddingStore, write_store
from diffgap.models.scoring import score_features
from diffgap.retrieval import evaluate
from diffgap.retrieval.evaluate import (
    ALL_DIRECTIONS,
    ALPHAS,
    SCORINGS,
    Report,
    evaluate_runs,
    items,
    rank,
    validation_scores,
)
from diffgap.training.config import RunConfig
from diffgap.training.runs import load_run
from diffgap.training.trainer import Trainer
from tests.synthetic import make_config, make_store, with_bridge

METHODS = {*SCORINGS, "ridge", "procrustes", "cca", "mlp"}


def train_run(folder: Path, config: RunConfig) -> Path:
    store = EmbeddingStore.open(config.data.path)
    Trainer(config, store, folder, validate=validation_scores).train()
    return folder


def holey_store(modalities: tuple[str, ...]) -> EmbeddingStore:
    """Rows that share an embedding, and rows without one: the last group of each split has no audio."""
    full = make_store(modalities, groups=40)
    rows = np.arange(len(full))
    texts = rows // 2  # one text a group
    lacking = np.where(rows >= len(rows) - 8, -1, rows)
    arrays = {name: full.embeddings(name) for name in modalities}
    arrays["text"] = arrays["text"][::2]
    index = {"group": full.column("group").tolist(), "split": full.column("split").tolist()}
    return EmbeddingStore.from_arrays(arrays, {**index, "row_text": texts, "row_audio": lacking})


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Report]:
    """Two runs of different seeds on audio and text, and their report."""
    folder = tmp_path_factory.mktemp("two")
    write_store(folder / "store", holey_store(("audio", "text")))
    runs = [train_run(folder / f"run{seed}", make_config(folder / "store", seed=seed)) for seed in (0, 1)]
    return runs, evaluate_runs(runs, replicates=50)


def brute_force_ranks(scores: torch.Tensor, query_groups: np.ndarray, gallery_groups: np.ndarray) -> dict[int, int]:
    """Strict rank of the best positive of each query that has one: wrong items that score at least as much, plus 1."""
    ranks = {}
    for row, group in enumerate(query_groups):
        positive = torch.from_numpy(gallery_groups == group)
        if positive.any():
            best = scores[row][positive].max()
            ranks[row] = int((scores[row][~positive] >= best).sum()) + 1
    return ranks


def brute_force(run: Path, query: str, gallery: str, method: str, alpha: float, split: str) -> list[int]:
    model, config = load_run(run)
    part = EmbeddingStore.open(config.data.path).split(split)
    sides = {name: items(part, name) for name in (query, gallery)}
    q, k = (
        model.encode(name, sides[name].embeddings, other, seed=0) for name, other in permutations((query, gallery), 2)
    )
    plain = q.own.double() @ k.own.double().T
    bridged = (q.bridged.double() @ k.own.double().T + q.own.double() @ k.bridged.double().T) / 2
    scores = {"heads (cosine)": plain, "bridge": bridged, "bridge + cosine": plain + alpha * bridged}[method]
    return list(brute_force_ranks(scores, sides[query].groups, sides[gallery].groups).values())


@pytest.mark.parametrize("method", list(SCORINGS))
@pytest.mark.parametrize("direction", [("audio", "text"), ("text", "audio")])
def test_evaluate_runs_matches_brute_force(
    two: tuple[list[Path], Report], direction: tuple[str, str], method: str
) -> None:
    runs, report = two
    name = " -> ".join(direction)
    ranks = [
        rank
        for run, alpha in zip(runs, report.alphas, strict=True)
        for rank in brute_force(run, *direction, method, alpha, "test")
    ]
    cells = report.metrics[method][name]
    for k in (1, 5, 10):
        assert cells[f"R@{k}"].estimate == pytest.approx(np.mean([rank <= k for rank in ranks]))
    assert cells["MRR"].estimate == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert cells["MedR"].estimate == np.median(ranks)
    assert cells["R@5"].low <= cells["R@5"].estimate <= cells["R@5"].high
    assert sum(report.directions[name].queries) == len(ranks)


def test_one_fusion_weight_is_chosen_on_validation_data(two: tuple[list[Path], Report]) -> None:
    """The best mean over both directions of the MRR."""
    runs, report = two
    for run, chosen in zip(runs, report.alphas, strict=True):
        mrr = {
            alpha: np.mean(
                [
                    np.mean([1 / r for r in brute_force(run, *direction, "bridge + cosine", alpha, "val")])
                    for direction in (("audio", "text"), ("text", "audio"))
                ]
            )
            for alpha in ALPHAS
        }
        assert mrr[chosen] == pytest.approx(max(mrr.values()))


def test_report_has_every_method_gap_and_trajectory(two: tuple[list[Path], Report]) -> None:
    runs, report = two
    assert report.metrics.keys() == METHODS
    for name in ("audio -> text", "text -> audio"):
        assert all(name in cells for cells in report.metrics.values())
        assert len(report.trajectory[name]) == load_run(runs[0])[0].settings.sampling_steps
        queries, bridged, gallery = report.embeddings[name]
        assert queries.shape == bridged.shape == gallery.shape
    rivals = METHODS - SCORINGS.keys()
    expected = {"bridge - heads (cosine)", "bridge + cosine - heads (cosine)"}
    expected |= {f"{one} - {rival}" for one in ("heads (cosine)", "bridge + cosine") for rival in rivals}
    assert report.differences.keys() == {"R@5", "MRR"}
    assert all(found.keys() == expected for found in report.differences.values())


def test_all_directions_are_the_mean_of_them(two: tuple[list[Path], Report]) -> None:
    _, report = two
    for cells in report.metrics.values():
        for metric in ("R@1", "R@5", "R@10", "mAP@10", "MRR"):
            mean = np.mean([cells[name][metric].estimate for name in report.directions])
            assert cells[ALL_DIRECTIONS][metric].estimate == pytest.approx(mean)
    for by_comparison in report.differences.values():
        for found in by_comparison.values():
            mean = np.mean([found[name].estimate for name in report.directions])
            assert found[ALL_DIRECTIONS].estimate == pytest.approx(mean)
            assert found[ALL_DIRECTIONS].low <= mean <= found[ALL_DIRECTIONS].high


def test_differences_are_paired(two: tuple[list[Path], Report]) -> None:
    _, report = two
    for name, difference in report.differences["R@5"]["bridge - heads (cosine)"].items():
        one, other = (report.metrics[method][name]["R@5"] for method in ("bridge", "heads (cosine)"))
        assert difference.estimate == pytest.approx(one.estimate - other.estimate)
        # The same groups are drawn for both: no wider than the two intervals one after the other.
        assert difference.high - difference.low <= (one.high - one.low) + (other.high - other.low) + 1e-9


def test_the_choice_of_a_regression_and_its_fit_never_see_the_test_split(
    two: tuple[list[Path], Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, _ = two
    seen: list[int] = []
    original = evaluate._distinct_pairs

    def spy(part: EmbeddingStore, a: str, b: str) -> EmbeddingStore:
        found = original(part, a, b)
        seen.append(int((found.column("split") == "test").sum()))
        assert len(np.unique(np.stack((found.rows(a), found.rows(b)), 1), axis=0)) == len(found)
        return found

    monkeypatch.setattr(evaluate, "_distinct_pairs", spy)
    evaluate_runs(runs[:1], replicates=5)
    assert seen == [0, 0]


def test_runs_on_the_same_data_fit_the_baselines_once(
    two: tuple[list[Path], Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    monkeypatch.setattr(evaluate, "_baseline_scores", lambda *_: calls.append(None) or {})
    evaluate_runs(two[0], replicates=5)
    assert len(calls) == 1


def test_three_modalities_and_no_baselines(tmp_path: Path) -> None:
    write_store(tmp_path / "store", make_store(("audio", "image", "text")))
    run = train_run(tmp_path / "run", make_config(tmp_path / "store", steps=2))
    report = evaluate_runs([run], split="val", with_baselines=False, replicates=10)
    assert set(report.directions) == {f"{a} -> {b}" for a, b in permutations(("audio", "image", "text"), 2)}
    assert report.metrics.keys() == set(SCORINGS)
    assert len(report.differences["R@5"]) == 2


def test_sequences_are_evaluated(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    arrays = {"audio": torch.randn(32, 12, generator=generator), "video": torch.randn(32, 3, 5, generator=generator)}
    index = {"split": [("train", "train", "val", "test")[i % 4] for i in range(32)]}
    write_store(
        tmp_path / "store", EmbeddingStore.from_arrays(arrays, index, lengths={"video": [1 + i % 3 for i in range(32)]})
    )
    report = evaluate_runs([train_run(tmp_path / "run", make_config(tmp_path / "store", steps=2))], replicates=10)
    assert set(report.metrics) >= {*SCORINGS, "ridge"}
    assert set(report.trajectory) == {"audio -> video", "video -> audio"}


def test_items_pools_only_the_frames_that_are_there() -> None:
    embeddings = torch.tensor([[[2.0], [4.0], [90.0]], [[1.0], [90.0], [90.0]]])
    assert evaluate.Items(embeddings, np.array(["a", "b"]), torch.tensor([2, 1])).pooled().tolist() == [[3.0], [1.0]]


def test_rank_leaves_out_queries_without_a_positive() -> None:
    scores = rank(torch.eye(3), torch.eye(3), np.array(["a", "x", "b"]), np.array(["b", "a", "c"]))
    assert scores.groups.tolist() == ["a", "b"]
    # Query a scores 1 with "b", 0 with its own and 0 with "c": strictly third. Query b is third likewise.
    assert scores.values["rank"].tolist() == [3.0, 3.0]
    with pytest.raises(ValueError, match="no query has a positive"):
        rank(torch.eye(2), torch.eye(2), np.array(["a", "b"]), np.array(["c", "d"]))


def test_score_features_of_validation_use_every_direction(two: tuple[list[Path], Report]) -> None:
    model, config = load_run(two[0][0])
    val = EmbeddingStore.open(config.data.path).split("val")
    expected: dict[str, list[float]] = {"score": [], "cosine": []}
    for query, gallery in permutations(("audio", "text"), 2):
        q, k = items(val, query), items(val, gallery)
        encoded = [
            model.encode(name, side.embeddings, other, num_samples=4, steps=4)
            for name, side, other in ((query, q, gallery), (gallery, k, query))
        ]
        for name, scoring in (("score", "fusion"), ("cosine", "cosine")):
            a, b = score_features(*encoded, scoring)  # type: ignore[arg-type]
            ranks = brute_force_ranks(a.double() @ b.double().T, q.groups, k.groups)
            expected[name].append(float(np.mean([r <= 5 for r in ranks.values()])))
    assert validation_scores(model, val) == pytest.approx({name: np.mean(v) for name, v in expected.items()})


@pytest.mark.parametrize(("splits", "missing"), [(("train", "val"), "test"), (("train", "test"), "val")])
def test_an_empty_split_is_one_clear_error(
    two: tuple[list[Path], Report], tmp_path: Path, splits: tuple[str, ...], missing: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(two[0][0] / "model")
    write_store(tmp_path / "store", make_store(splits=splits))
    make_config(tmp_path / "store").save(run / "config.yaml")
    with pytest.raises(ValueError, match=f"split '{missing}' is empty: the store has"):
        evaluate_runs([run])


def test_runs_that_differ_are_refused(two: tuple[list[Path], Report], tmp_path: Path) -> None:
    run, other = two[0][0], tmp_path / "other"
    other.mkdir()
    (other / "model").symlink_to(run / "model")
    config = load_run(run)[1]
    with_bridge(config, num_samples=3).save(other / "config.yaml")
    with pytest.raises(ValueError, match=r"other and .*run0 differ in bridge\.num_samples; evaluate them apart"):
        evaluate_runs([run, other])
    replace(config, train=replace(config.train, seed=7)).save(other / "config.yaml")
    assert len(evaluate_runs([run, other], with_baselines=False, replicates=5).runs) == 2


def test_importing_evaluation_leaves_matplotlib_alone() -> None:
    code = "import sys, diffgap.retrieval.report; print('matplotlib' in sys.modules)"
    root = Path(evaluate.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "False\n"
