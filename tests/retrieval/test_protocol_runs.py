"""The protocols on the runs of a bridge: its heads, the bridge and both, on a store of clips with five captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffgap.data.store import EmbeddingStore, write_store
from diffgap.models.bridge import DiffGAP
from diffgap.retrieval.evaluate import evaluate_runs
from diffgap.retrieval.options import METHODS, ScoringOptions
from diffgap.retrieval.protocol_evaluate import evaluate_protocol
from diffgap.training.runs import load_run
from diffgap.training.trainer import Trainer
from tests.retrieval.test_protocols import TO_AUDIO, TO_TEXT, worst_order
from tests.synthetic import make_config, make_store


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """store/, a run of it, and captions/, the clips of its test split with five captions and one audio each."""
    folder = tmp_path_factory.mktemp("protocols")
    store = make_store(groups=60, per_group=5)
    write_store(folder / "store", store)
    Trainer(make_config(folder / "store", steps=4), store, folder / "run", validate=lambda *_: {"score": 0.0}).train()
    shuffle(folder / "run")
    write_store(folder / "captions", caption_store(store))
    return folder


def caption_store(store: EmbeddingStore, **encoders: str) -> EmbeddingStore:
    part = store.split("test")
    clip = np.repeat(np.arange(len(part) // 5), 5)
    index = {"group": part.column("group").tolist(), "split": ["test"] * len(part), "row_audio": clip}
    arrays = {"audio": part.embeddings("audio", np.arange(0, len(part), 5)), "text": part.embeddings("text")}
    return EmbeddingStore.from_arrays(arrays, index, encoders=encoders)


@torch.no_grad()
def shuffle(run: Path) -> None:
    """Noise in all weights, so that scorings differ."""
    model, _ = load_run(run)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(run / "model")


def bridge_scores(model: DiffGAP, store: EmbeddingStore, alpha: float) -> dict[str, np.ndarray]:
    """(captions, clips) scores by the formulas, bridged with the run's own settings and seed 0."""
    audio = store.embeddings("audio", np.arange(0, len(store), 5))
    a, t = model.encode("audio", audio, "text", seed=0), model.encode("text", store.embeddings("text"), "audio", seed=0)
    plain = (t.own.double() @ a.own.double().T).numpy()
    bridged = ((t.bridged.double() @ a.own.double().T + t.own.double() @ a.bridged.double().T) / 2).numpy()
    return {"heads (cosine)": plain, "bridge": bridged, "bridge + cosine": plain + alpha * bridged}


def test_a_run_is_scored_by_its_heads_its_bridge_and_both(trained: Path) -> None:
    data, options = str(trained / "captions"), ScoringOptions(alpha=0.75)
    report = evaluate_protocol("audiocaps", [trained / "run"], data=data, options=options, replicates=20)
    assert set(report.metrics) == {METHODS["cosine"], METHODS["bridge"], METHODS["fusion"]}
    model, _ = load_run(trained / "run")
    store = EmbeddingStore.open(trained / "captions")
    clip = np.repeat(np.arange(15), 5)
    seen = set()
    for method, scores in bridge_scores(model, store, 0.75).items():
        for direction, one, right in (
            (TO_AUDIO, scores, clip[:, None] == np.arange(15)),
            (TO_TEXT, scores.T, np.arange(15)[:, None] == clip),
        ):
            ranks = [np.flatnonzero(own[worst_order(row, own)]) for row, own in zip(one, right, strict=True)]
            cells = report.metrics[method][direction]
            for k in (1, 5, 10):
                assert cells[f"R@{k}"].estimate == pytest.approx(np.mean([own[0] < k for own in ranks]))
            precision = [sum(j / (r + 1) for j, r in enumerate(own, 1) if r < 10) / min(len(own), 10) for own in ranks]
            assert cells["mAP@10"].estimate == pytest.approx(np.mean(precision))
            assert cells["R@5"].low <= cells["R@5"].estimate <= cells["R@5"].high
            seen.add((direction, cells["mAP@10"].estimate))
    assert len(seen) == 6  # the scorings differ, so that none stands in for another


def test_a_run_on_its_own_data_scores_pairs_as_the_plain_evaluation_does(trained: Path) -> None:
    options = ScoringOptions(("cosine", "bridge", "fusion", "rerank"), steps=1, num_samples=1, candidates=3)
    plain = evaluate_runs([trained / "run"], options=options, with_baselines=False, replicates=5)
    report = evaluate_protocol("pairs", [trained / "run"], options=options, replicates=5)
    assert (report.alphas, report.betas, report.settings) == (plain.alphas, plain.betas, plain.settings)
    for method, by_direction in report.metrics.items():
        for direction in (TO_AUDIO, TO_TEXT):
            assert by_direction[direction] == plain.metrics[method][direction]


def test_runs_are_pooled_on_one_store(trained: Path) -> None:
    data = str(trained / "captions")
    one = evaluate_protocol("audiocaps", [trained / "run"], data=data, replicates=20)
    twice = evaluate_protocol("audiocaps", [trained / "run", trained / "run"], data=data, replicates=20)
    assert twice.alphas == one.alphas * 2
    assert twice.metrics["bridge"][TO_TEXT]["R@5"].estimate == one.metrics["bridge"][TO_TEXT]["R@5"].estimate


def test_given_weights_need_none_of_the_runs_own_data(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = evaluate_protocol.__globals__["load_data"]
    monkeypatch.setitem(
        evaluate_protocol.__globals__, "load_data", lambda config: asked.append(config.path) or original(config)
    )
    options = ScoringOptions(alpha=0.5)
    evaluate_protocol("audiocaps", [trained / "run"], data=str(trained / "captions"), options=options, replicates=2)
    assert asked == [str(trained / "captions")]


def test_embeddings_of_another_encoder_than_the_runs_are_refused(trained: Path, tmp_path: Path) -> None:
    store = EmbeddingStore.open(trained / "store")
    index = {"group": store.column("group").tolist(), "split": store.column("split").tolist()}
    arrays = {name: store.embeddings(name) for name in store.modalities}
    own = EmbeddingStore.from_arrays(arrays, index, encoders={"audio": "clap:1"})
    write_store(tmp_path / "own", own)
    Trainer(make_config(tmp_path / "own", steps=2), own, tmp_path / "run", validate=lambda *_: {"score": 0.0}).train()
    write_store(tmp_path / "same", caption_store(store, audio="clap:1", text="minilm"))
    evaluate_protocol("audiocaps", [tmp_path / "run"], data=str(tmp_path / "same"), replicates=2)
    write_store(tmp_path / "other", caption_store(store, audio="clap:2", text="minilm"))
    with pytest.raises(ValueError, match="own data was embedded by 'clap:1', but of data by 'clap:2'; embed both"):
        evaluate_protocol("audiocaps", [tmp_path / "run"], data=str(tmp_path / "other"), replicates=2)
