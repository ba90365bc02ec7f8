from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffgap.data.store import EmbeddingStore, write_store
from diffgap.models.bridge import DiffGAP
from diffgap.training.config import DataConfig
from diffgap.training.runs import bridge_embeddings, load_data, load_run
from tests.synthetic import TINY, make_config, make_store


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a model with random weights, of audio vectors and video sequences, and its store."""
    folder = tmp_path_factory.mktemp("runs")
    generator = torch.Generator().manual_seed(0)
    arrays = {"audio": torch.randn(8, 12, generator=generator), "video": torch.randn(8, 3, 5, generator=generator)}
    index = {"split": ["train", "train", "val", "test"] * 2, "row_audio": [0, 1, 2, 3, 4, 5, 6, 3]}
    write_store(
        folder / "store", EmbeddingStore.from_arrays(arrays, index, lengths={"video": [1, 2, 3, 3, 2, 1, 2, 3]})
    )
    (folder / "run").mkdir()
    make_config(folder / "store").save(folder / "run" / "config.yaml")
    model = DiffGAP({"audio": 12, "video": 5}, TINY, ["video"])
    for parameter in model.parameters():  # a new denoiser predicts zero
        torch.nn.init.normal_(parameter.data, std=0.3, generator=generator)
    model.save_pretrained(folder / "run" / "model")
    return folder / "run"


def test_load_data_opens_stamps_and_stores(tmp_path: Path) -> None:
    write_store(tmp_path / "store", make_store())
    assert load_data(DataConfig(path=str(tmp_path / "store"))).modalities == ("audio", "text")
    seeds = [load_data(DataConfig(split_seed=seed)).column("split").tolist() for seed in (0, 1)]
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"path": "nowhere"}, FileNotFoundError, "nowhere is not an embedding store"),
        ({"split_seed": 30}, ValueError, r"seed 30 has no split list; choose 0\.\.29"),
        ({"modalities": ("audio", "smell")}, ValueError, r"data\.modalities names 'smell', which stamps does not hold"),
    ],
)
def test_load_data_refuses(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_data(replace(DataConfig(), **changes))  # type: ignore[arg-type]


def test_load_run(run: Path, tmp_path: Path) -> None:
    model, config = load_run(run)
    assert model.modalities == ("audio", "video") and not model.training
    assert config.bridge == TINY
    with pytest.raises(FileNotFoundError, match=r"no run folder \(no config\.yaml\); train one with"):
        load_run(tmp_path)
    config.save(tmp_path / "config.yaml")
    with pytest.raises(FileNotFoundError, match="holds no model yet; finish it with"):
        load_run(tmp_path)


def test_bridge_embeddings_of_vectors_towards_sequences(run: Path) -> None:
    samples = bridge_embeddings(run, "audio", "video", num_samples=2, frames=4, split="all")
    # Seven distinct recordings: the last row repeats one.
    assert samples.embeddings("video").shape == (14, 4, 16)
    assert samples.column("id")[:3].tolist() == ["0#0", "0#1", "1#0"]
    assert samples.column("split")[:6].tolist() == ["train"] * 4 + ["val"] * 2
    assert set(samples.column("source")) == {"audio -> video"}


def test_bridge_embeddings_does_not_look_at_frames_that_are_not_there(run: Path, tmp_path: Path) -> None:
    store = EmbeddingStore.open(run.parent / "store")
    x, lengths = store.embeddings("video").clone(), store.lengths("video")
    assert lengths is not None
    x[torch.arange(3) >= lengths[:, None]] = 7.0
    write_store(tmp_path / "other", store.with_embeddings("video", x, lengths=lengths))
    one, two = (
        bridge_embeddings(run, "video", "audio", data=str(path)).embeddings("audio")
        for path in (run.parent / "store", tmp_path / "other")
    )
    torch.testing.assert_close(one, two)


def test_bridge_embeddings_refuses(run: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "whole.npy", np.ones((3, 12), dtype=np.int64))
    write_store(tmp_path / "store", make_store(("text", "image")))
    for options, message in (
        ({"num_samples": 0}, "num_samples is 0"),
        ({"split": "most"}, "split 'most' is unknown"),
        ({"data": str(tmp_path / "whole.npy")}, "whole.npy holds int64 of shape"),
        ({"data": str(tmp_path / "store")}, "source 'audio' is not in the data; it has image, text"),
        ({}, "frames is not given, and .* give the number of frames to sample, as 'video' is a"),
    ):
        with pytest.raises(ValueError, match=message):
            bridge_embeddings(run, "audio", "video", **options)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"frames is 3, but 'audio' is one vector in the bridge in .*; leave frames out"
    ):
        bridge_embeddings(run, "video", "audio", frames=3)
