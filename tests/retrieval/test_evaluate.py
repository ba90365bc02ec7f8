from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffgap.data.store import EmbeddingStore, write_store
from diffgap.models.bridge import DiffGAP
from diffgap.models.denoiser import Denoiser
from diffgap.models.likelihood import information
from diffgap.models.scoring import Scoring, dense_scores, find_candidates, rerank, score_features
from diffgap.retrieval import baseline_scores, evaluate, weights
from diffgap.retrieval.evaluate import evaluate_runs, validation_scores
from diffgap.retrieval.options import METHODS, ScoringOptions
from diffgap.retrieval.summary import ALL_DIRECTIONS, Report
from diffgap.retrieval.tasks import Items, items, rank
from diffgap.retrieval.weights import ALPHAS, BETAS
from diffgap.training.config import RunConfig
from diffgap.training.runs import load_run
from diffgap.training.trainer import Trainer
from tests.synthetic import make_config, make_store, with_bridge

BASELINES = ("ridge", "procrustes", "cca", "mlp")
DIRECTIONS = ("audio -> text", "text -> audio")
#: Every scoring; fewer candidates than items, so that re-ranking leaves some alone.
EVERYTHING = ScoringOptions(("cosine", "bridge", "fusion", "rerank"), candidates=4)


def train_run(folder: Path, config: RunConfig) -> Path:
    store = EmbeddingStore.open(config.data.path)
    Trainer(config, store, folder, validate=validation_scores).train()
    return folder


@torch.no_grad()
def scattered(run: Path) -> Path:
    """The run with noise in all weights: its heads then err, and its denoiser moves ranks, so that weights matter."""
    model, _ = load_run(run)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.4 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(run / "model")
    return run


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
    runs = [scattered(train_run(folder / f"run{seed}", make_config(folder / "store", seed=seed))) for seed in (0, 1)]
    return runs, evaluate_runs(runs, options=EVERYTHING, replicates=50)


def brute_force_ranks(scores: torch.Tensor, query_groups: np.ndarray, gallery_groups: np.ndarray) -> dict[int, int]:
    """Strict rank of the best positive of each query that has one: wrong items that score at least as much, plus 1."""
    ranks = {}
    for row, group in enumerate(query_groups):
        positive = torch.from_numpy(gallery_groups == group)
        if positive.any():
            best = scores[row][positive].max()
            ranks[row] = int((scores[row][~positive] >= best).sum()) + 1
    return ranks


def brute_force(
    run: Path, query: str, gallery: str, scoring: Scoring, alpha: float, beta: float, split: str
) -> list[int]:
    """Ranks from the whole matrix of scores, by the formulas."""
    model, config = load_run(run)
    part = EmbeddingStore.open(config.data.path).split(split)
    sides = {name: items(part, name) for name in (query, gallery)}
    q, k = (
        model.encode(name, sides[name].embeddings, other, seed=0) for name, other in permutations((query, gallery), 2)
    )
    plain = q.own.double() @ k.own.double().T
    bridged = (q.bridged.double() @ k.own.double().T + q.own.double() @ k.bridged.double().T) / 2
    scores = {"cosine": plain, "bridge": bridged}.get(scoring, plain + alpha * bridged)
    if scoring == "rerank":
        features = score_features(q, k, "fusion", alpha)
        found = find_candidates(*features, EVERYTHING.candidates)
        told = information(model.diffusion, q.side(query), k.side(gallery), found.indices, seed=0)
        scores = dense_scores(*features, rerank(found, told, beta))
    return list(brute_force_ranks(scores, sides[query].groups, sides[gallery].groups).values())


@pytest.mark.parametrize("scoring", list(METHODS))
@pytest.mark.parametrize("direction", [("audio", "text"), ("text", "audio")])
def test_evaluate_runs_matches_brute_force(
    two: tuple[list[Path], Report], direction: tuple[str, str], scoring: Scoring
) -> None:
    runs, report = two
    name = " -> ".join(direction)
    ranks = [
        rank
        for run, alpha, beta in zip(runs, report.alphas, report.betas, strict=True)
        for rank in brute_force(run, *direction, scoring, alpha, beta, "test")
    ]
    cells = report.metrics[METHODS[scoring]][name]
    for k in (1, 5, 10):
        assert cells[f"R@{k}"].estimate == pytest.approx(np.mean([rank <= k for rank in ranks]))
    assert cells["MRR"].estimate == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert cells["MedR"].estimate == np.median(ranks)
    assert cells["R@5"].low <= cells["R@5"].estimate <= cells["R@5"].high
    assert sum(report.directions[name].queries) == len(ranks)


def test_weights_are_chosen_on_validation_data_for_all_directions_of_a_run(two: tuple[list[Path], Report]) -> None:
    runs, report = two

    def mrr(run: Path, scoring: Scoring, alpha: float, beta: float) -> float:
        both = (("audio", "text"), ("text", "audio"))
        return float(
            np.mean([np.mean([1 / r for r in brute_force(run, *way, scoring, alpha, beta, "val")]) for way in both])
        )

    for run, alpha, beta in zip(runs, report.alphas, report.betas, strict=True):
        assert mrr(run, "fusion", alpha, 0) == pytest.approx(max(mrr(run, "fusion", a, 0) for a in ALPHAS))
        assert mrr(run, "rerank", alpha, beta) == pytest.approx(max(mrr(run, "rerank", alpha, b) for b in BETAS))


def test_weights_given_are_taken_as_they_are(two: tuple[list[Path], Report], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "choose_alpha", lambda *_: pytest.fail("alpha was chosen"))
    monkeypatch.setattr(weights, "choose_beta", lambda *_, **__: pytest.fail("beta was chosen"))
    options = replace(EVERYTHING, alpha=0.3, beta=0.7)
    report = evaluate_runs(two[0][:1], options=options, with_baselines=False, replicates=5)
    assert (report.alphas, report.betas) == ([0.3], [0.7])
    for scoring, method in METHODS.items():
        for way in (("audio", "text"), ("text", "audio")):
            ranks = brute_force(two[0][0], *way, scoring, 0.3, 0.7, "test")
            found = report.metrics[method][" -> ".join(way)]["MRR"].estimate
            assert found == pytest.approx(np.mean([1 / rank for rank in ranks]))
    overall = {cells[ALL_DIRECTIONS]["MRR"].estimate for cells in report.metrics.values()}
    assert len(overall) == len(METHODS)  # so each weight was used


def test_report_has_every_method_gap_and_trajectory(two: tuple[list[Path], Report]) -> None:
    runs, report = two
    assert report.metrics.keys() == {*METHODS.values(), *BASELINES}
    for name in DIRECTIONS:
        assert all(name in cells for cells in report.metrics.values())
        assert len(report.trajectory[name]) == load_run(runs[0])[0].settings.sampling_steps
        queries, bridged, gallery = report.embeddings[name]
        assert queries.shape == bridged.shape == gallery.shape


def test_the_mean_over_directions_counts_each_the_same(two: tuple[list[Path], Report]) -> None:
    _, report = two
    for cells in report.metrics.values():
        for metric in ("R@5", "MRR", "mAP@10"):
            each = [cells[name][metric].estimate for name in DIRECTIONS]
            overall = cells[ALL_DIRECTIONS][metric]
            assert overall.estimate == pytest.approx(np.mean(each))
            assert overall.low <= overall.estimate <= overall.high
    sizes = [sum(report.directions[name].queries) for name in DIRECTIONS]
    assert sizes[0] != sizes[1]  # a mean over queries would be another number


def test_each_scoring_is_compared_with_the_heads_and_each_baseline_on_the_same_queries(
    two: tuple[list[Path], Report],
) -> None:
    _, report = two
    assert {one: set(rivals) for one, rivals in report.differences.items()} == {
        "heads (cosine)": {*BASELINES},
        **{METHODS[scoring]: {"heads (cosine)", *BASELINES} for scoring in ("bridge", "fusion", "rerank")},
    }
    for one, rivals in report.differences.items():
        for other, by_direction in rivals.items():
            for name in (*DIRECTIONS, ALL_DIRECTIONS):
                for metric in ("R@5", "MRR"):
                    a, b = (report.metrics[method][name][metric] for method in (one, other))
                    difference = by_direction[name][metric]
                    assert difference.estimate == pytest.approx(a.estimate - b.estimate)
                    # The same groups are drawn for both: no wider than the two intervals one after the other.
                    assert difference.high - difference.low <= (a.high - a.low) + (b.high - b.low) + 1e-9


@pytest.mark.parametrize(
    "options",
    [
        EVERYTHING,
        replace(EVERYTHING, steps=3, num_samples=5, guidance_scale=2.0),
        replace(EVERYTHING, solver="unipc", steps=2, candidates=100),
    ],
)
def test_costs_are_the_calls_that_are_made(
    two: tuple[list[Path], Report], options: ScoringOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows through the network, counted there, are those of the table times queries and items."""
    model, config = load_run(two[0][0])
    sides = {name: items(EmbeddingStore.open(config.data.path).split("test"), name) for name in ("text", "audio")}
    rows = [0]
    original = Denoiser.denoise

    def counted(self: Denoiser, noisy: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        rows[0] += len(noisy)
        return original(self, noisy, *arguments, **named)

    monkeypatch.setattr(Denoiser, "denoise", counted)

    def calls(act: Callable[[], Any]) -> tuple[int, Any]:
        rows[0] = 0
        result = act()
        return rows[0], result

    n, m = len(sides["text"].groups), len(sides["audio"].groups)
    resolved = options.resolved(model)
    query, q = calls(lambda: model.encode("text", sides["text"].embeddings, "audio", **resolved))
    item, k = calls(lambda: model.encode("audio", sides["audio"].embeddings, "text", **resolved))
    assert options.cost(model, "fusion", m) == options.cost(model, "bridge", m) == (query / n, item / m)
    assert options.cost(model, "cosine", m) == (0, 0)
    # Every item a candidate: each item's share is then computed once, as it would be beforehand.
    whole = replace(options, candidates=m)
    found = find_candidates(*score_features(q, k, "fusion"), m)
    told, _ = calls(lambda: information(model.diffusion, q.side("text"), k.side("audio"), found.indices))
    cost, before = whole.cost(model, "rerank", m), whole.cost(model, "fusion", m)
    assert n * (cost.query - before.query) + m * (cost.item - before.item) == told
    assert replace(options, candidates=m + 9).cost(model, "rerank", m) == cost  # no more candidates than items


def test_sampling_options_reach_the_sampler_and_the_report(
    two: tuple[list[Path], Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = DiffGAP.translate

    def spy(self: DiffGAP, target: str, **options: Any) -> torch.Tensor:
        seen.append({name: options[name] for name in ("steps", "num_samples", "solver", "guidance_scale")})
        return original(self, target, **options)

    monkeypatch.setattr(DiffGAP, "translate", spy)
    options = ScoringOptions(("bridge",), steps=3, num_samples=5, solver="ddim", guidance_scale=1.5)
    report = evaluate_runs(two[0][:1], options=options, with_baselines=False, replicates=5)
    wanted = {"steps": 3, "num_samples": 5, "solver": "ddim", "guidance_scale": 1.5}
    assert seen and all(each == wanted for each in seen)
    shown = {"scoring steps": 3, "scoring samples": 5, "solver": "ddim", "guidance": 1.5}
    assert shown.items() <= report.settings.items()
    assert len(report.trajectory["audio -> text"]) == 3
    assert report.metrics.keys() == report.costs.keys() == {"bridge"}
    assert (report.costs["bridge"].query_calls, report.costs["bridge"].item_calls) == (30, 30)
    assert report.costs["bridge"].milliseconds > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorings": ()}, "scorings is empty; name one or more of cosine, bridge, fusion, rerank"),
        ({"scorings": ("dot",)}, "scoring is 'dot'; use cosine, bridge, fusion, rerank"),
        ({"steps": 0}, "steps is 0; use 1 or more"),
        ({"num_samples": 0}, "num_samples is 0; use 1 or more"),
        ({"candidates": 0}, "candidates is 0; use 1 or more"),
        ({"solver": "heun"}, "solver 'heun' does not exist; use one of"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf; use a finite number, 0 or more"),
        ({"alpha": float("nan")}, "alpha is nan; use a finite number, 0 or more"),
        ({"scorings": ("bridge",), "alpha": 1.0}, "alpha is a weight of scoring fusion and rerank; add it"),
        ({"beta": 1.0}, "beta is a weight of scoring rerank; add it or leave beta out"),
    ],
)
def test_bad_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoringOptions(**changes)


def test_the_choice_of_a_regression_and_its_fit_never_see_the_test_split(
    two: tuple[list[Path], Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, _ = two
    seen: list[int] = []
    original = baseline_scores._distinct_pairs

    def spy(part: EmbeddingStore, a: str, b: str) -> EmbeddingStore:
        found = original(part, a, b)
        seen.append(int((found.column("split") == "test").sum()))
        assert len(np.unique(np.stack((found.rows(a), found.rows(b)), 1), axis=0)) == len(found)
        return found

    monkeypatch.setattr(baseline_scores, "_distinct_pairs", spy)
    evaluate_runs(runs[:1], replicates=5)
    assert seen == [0, 0]


def test_runs_on_the_same_data_fit_the_baselines_once(
    two: tuple[list[Path], Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    monkeypatch.setattr(evaluate, "baseline_scores", lambda *_: calls.append(None) or {})
    evaluate_runs(two[0], replicates=5)
    assert len(calls) == 1


def test_three_modalities_and_no_baselines(tmp_path: Path) -> None:
    write_store(tmp_path / "store", make_store(("audio", "image", "text")))
    run = train_run(tmp_path / "run", make_config(tmp_path / "store", steps=2))
    report = evaluate_runs([run], split="val", with_baselines=False, replicates=10)
    assert set(report.directions) == {f"{a} -> {b}" for a, b in permutations(("audio", "image", "text"), 2)}
    assert report.metrics.keys() == {"heads (cosine)", "bridge", "bridge + cosine"}
    assert set(report.metrics["bridge"]) == {*report.directions, ALL_DIRECTIONS}
    assert set(report.differences["bridge"]) == {"heads (cosine)"} and not report.differences["heads (cosine)"]


def split_store() -> EmbeddingStore:
    """Half of the rows have audio and text, half text and image; no group has audio and image."""
    full = make_store(("audio", "image", "text"), groups=48)
    rows = np.arange(len(full))
    first = rows // 2 % 8 < 4  # 4 groups take the 4 splits in turn
    index = {"group": full.column("group").tolist(), "split": full.column("split").tolist()}
    index |= {"row_audio": np.where(first, rows, -1), "row_image": np.where(first, -1, rows)}
    return EmbeddingStore.from_arrays({name: full.embeddings(name) for name in full.modalities}, index)


def test_a_store_whose_rows_lack_modalities(tmp_path: Path) -> None:
    write_store(tmp_path / "store", split_store())
    run = train_run(tmp_path / "run", make_config(tmp_path / "store", steps=2))
    report = evaluate_runs([run], options=EVERYTHING, replicates=10)
    assert set(report.directions) == {"audio -> text", "text -> audio", "image -> text", "text -> image"}
    assert report.directions["audio -> text"].queries == [12] == report.directions["text -> image"].queries
    # The gallery is all that has the modality, also rows without the queries' one.
    assert report.directions["audio -> text"].gallery_sizes == [24]
    for method in ("bridge", "re-ranked", "ridge"):
        assert set(report.metrics[method]) == {*report.directions, ALL_DIRECTIONS}


def test_a_split_without_a_pair_is_one_clear_error(tmp_path: Path) -> None:
    store = make_store()
    rows = np.arange(len(store))
    test = store.column("split") == "test"
    index = {"group": store.column("group").tolist(), "split": store.column("split").tolist()}
    index["row_audio"] = np.where(test & (rows // 2 % 8 < 4), -1, rows)
    index["row_text"] = np.where(test & (rows // 2 % 8 >= 4), -1, rows)
    arrays = {name: store.embeddings(name) for name in store.modalities}
    write_store(tmp_path / "store", EmbeddingStore.from_arrays(arrays, index))
    run = train_run(tmp_path / "run", make_config(tmp_path / "store", steps=2))
    with pytest.raises(
        ValueError, match="no group of split 'test' has two of audio, text; check the store's groups and splits"
    ):
        evaluate_runs([run])
    model, config = load_run(run)
    with pytest.raises(ValueError, match="no group of split 'test' has two of audio, text"):
        validation_scores(model, EmbeddingStore.open(config.data.path).split("test"))


def test_sequences_are_evaluated(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    arrays = {"audio": torch.randn(32, 12, generator=generator), "video": torch.randn(32, 3, 5, generator=generator)}
    index = {"split": [("train", "train", "val", "test")[i % 4] for i in range(32)]}
    write_store(
        tmp_path / "store", EmbeddingStore.from_arrays(arrays, index, lengths={"video": [1 + i % 3 for i in range(32)]})
    )
    run = train_run(tmp_path / "run", make_config(tmp_path / "store", steps=2))
    report = evaluate_runs([run], options=EVERYTHING, replicates=10)
    assert set(report.metrics) >= {*METHODS.values(), "ridge"}
    assert set(report.trajectory) == {"audio -> video", "video -> audio"}


def test_items_pools_only_the_frames_that_are_there() -> None:
    embeddings = torch.tensor([[[2.0], [4.0], [90.0]], [[1.0], [90.0], [90.0]]])
    assert Items(embeddings, np.array(["a", "b"]), torch.tensor([2, 1])).pooled().tolist() == [[3.0], [1.0]]


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
            model.encode(name, side.embeddings, other)
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
