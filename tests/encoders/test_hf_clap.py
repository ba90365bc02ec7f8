"""CLAP by transformers: saved, loaded by path, and compared with the model and its processor."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from diffgap.data.media import Source
from tests.encoders.checkpoints import assert_same, no_network, waveform, write_roberta_tokenizer, write_wav

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("no_network")
__all__ = ["no_network"]

VOCABULARY = 300
POSITIONS = 40  # 38 tokens: RoBERTa's positions begin after the padding token's id


def save_clap(folder: Path, fused: bool, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": POSITIONS,
    }  # fmt: skip
    audio = {
        "patch_embeds_hidden_size": 8, "hidden_size": 64, "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2],
        "enable_fusion": fused, "fusion_type": "aff_2d" if fused else None, "aff_block_r": 4,
    }  # fmt: skip
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=16)
    model = transformers.ClapModel(config).eval()
    with torch.no_grad():  # the default initialisation makes every input nearly the same vector
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    extractor = transformers.ClapFeatureExtractor(
        truncation="fusion" if fused else "rand_trunc", frequency_min=0 if fused else 50
    )
    extractor.save_pretrained(folder)
    write_roberta_tokenizer(folder, VOCABULARY)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    root = tmp_path_factory.mktemp("clap")
    return {fused: save_clap(root / f"fused-{fused}", fused) for fused in (False, True)}


@pytest.fixture
def middle_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's random crops, drawn from the middle of each third."""
    monkeypatch.setattr(np.random, "choice", lambda third: third[len(third) // 2])


def original_audio(folder: Path, waves: list[np.ndarray], longer: list[bool]) -> np.ndarray:
    model = transformers.ClapModel.from_pretrained(folder).eval()
    extractor = transformers.ClapFeatureExtractor.from_pretrained(folder)
    inputs = extractor(waves, sampling_rate=48_000, return_tensors="pt")
    with torch.no_grad():
        output = model.get_audio_features(inputs["input_features"], is_longer=torch.tensor(longer)[:, None])
    return getattr(output, "pooler_output", output).numpy()


def original_texts(folder: Path, texts: list[str]) -> np.ndarray:
    model = transformers.ClapModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        with torch.no_grad():
            output = model.get_text_features(**tokenizer(text, truncation=True, max_length=38, return_tensors="pt"))
        rows.append(getattr(output, "pooler_output", output)[0].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("fused", [False, True])
def test_short_recordings_equal_the_package(folders: dict[bool, Path], fused: bool, tmp_path: Path) -> None:
    from diffgap.encoders.hf_clap import ClapAudio

    waves = [waveform(seconds, seed=seed) for seed, seconds in enumerate((1.5, 4.0, 10.0))]
    encoder = ClapAudio(folders[fused])
    read = [encoder.reader(Source(path=write_wav(tmp_path / f"{i}.wav", wave))) for i, wave in enumerate(waves)]
    rows = encoder.encode(read)
    assert rows.dtype == np.float32 and rows.shape == (3, 16)
    assert_same(rows, original_audio(folders[fused], waves, [False] * 3))
    assert np.linalg.norm(rows[0] - rows[1]) > 0.01, "the recordings must not all look the same to the model"


def test_long_fused_recordings_equal_the_package_with_middle_crops(
    folders: dict[bool, Path], middle_crops: None, tmp_path: Path
) -> None:
    from diffgap.encoders.hf_clap import ClapAudio

    # 10.008 s has more samples than the model takes, but not more frames.
    waves = [waveform(23.0, seed=1), waveform(10.02, seed=2), waveform(2.0, seed=3), waveform(10.008, seed=4)]
    encoder = ClapAudio(folders[True])
    read = [encoder.reader(Source(path=write_wav(tmp_path / f"{i}.wav", wave))) for i, wave in enumerate(waves)]
    together = encoder.encode(read)
    expected = original_audio(folders[True], waves, [True, True, False, False])
    assert_same(together, expected)
    not_fused = original_audio(folders[True], waves, [False] * 4)
    assert np.linalg.norm(together[0] - not_fused[0]) > 1e-3


def test_long_recordings_are_the_unit_mean_of_their_windows(folders: dict[bool, Path], tmp_path: Path) -> None:
    from diffgap.encoders.hf_clap import ClapAudio

    wave = waveform(18.0)
    encoder = ClapAudio(folders[False])
    row = encoder.encode([encoder.reader(Source(path=write_wav(tmp_path / "long.wav", wave)))])[0]
    starts = [0, 240_000, 384_000]  # every 5 s, and one that ends with the recording
    windows = original_audio(folders[False], [wave[start : start + 480_000] for start in starts], [False] * 3)
    mean = (windows / np.linalg.norm(windows, axis=1, keepdims=True)).mean(axis=0)
    assert_same(row[None], (mean / np.linalg.norm(mean))[None])


def test_texts_equal_the_package_and_do_not_depend_on_their_batch(folders: dict[bool, Path]) -> None:
    from diffgap.encoders.hf_clap import ClapText

    texts = ["a dog barks", "rain", "dog " * 60, "a very long caption of wind in the trees"] * 12
    encoder = ClapText(folders[False])
    together = encoder.encode(texts)
    assert_same(together[:4], original_texts(folders[False], texts[:4]))
    alone = np.concatenate([encoder.encode([text]) for text in texts[:4]])
    assert_same(together, np.tile(alone, (12, 1)))
    assert np.linalg.norm(alone[0] - alone[1]) > 0.01
    assert encoder.encode([]).shape == (0, 16)
    with pytest.raises(TypeError, match=r"pass \[text\]"):
        encoder.encode("a dog barks")


def test_audio_does_not_depend_on_its_batch(folders: dict[bool, Path]) -> None:
    from diffgap.encoders.hf_clap import ClapAudio

    for fused in (False, True):
        encoder = ClapAudio(folders[fused])
        longest = 25.0 if fused else 10.0
        items = [encoder.reader.prepare(waveform(seconds, seed=7)) for seconds in (2.0, longest, 0.3)]
        together = encoder.encode(items)
        alone = np.concatenate([encoder.encode([item]) for item in items])
        assert_same(together, alone)
        assert encoder.encode([]).shape == (0, 16)


def test_both_towers_share_a_space_and_fingerprints_change_with_what_changes_embeddings(
    folders: dict[bool, Path], tmp_path: Path
) -> None:
    from diffgap.encoders.hf_clap import ClapAudio, ClapText

    audio, text = ClapAudio(folders[False]), ClapText(folders[False])
    assert audio.space == text.space and audio.space.startswith("clap:")
    assert audio.fingerprint != text.fingerprint
    copy = shutil.copytree(folders[False], tmp_path / "copy")
    assert ClapAudio(copy).fingerprint == audio.fingerprint, "a copy elsewhere is the same encoder"
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps(settings | {"frequency_min": 60}))
    changed = ClapAudio(copy)
    assert changed.fingerprint != audio.fingerprint and changed.space == audio.space
    other = save_clap(tmp_path / "other", fused=False, seed=1)
    assert ClapAudio(other).space != audio.space


def test_the_reader_crosses_processes(folders: dict[bool, Path], tmp_path: Path) -> None:
    from diffgap.encoders.hf_clap import ClapAudio

    reader = ClapAudio(folders[True]).reader
    source = Source(path=write_wav(tmp_path / "sound.wav", waveform(1.0)))
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.description == reader.description
    np.testing.assert_array_equal(copy(source)[0].spectrogram, reader(source)[0].spectrogram)


def test_the_layout_of_a_saved_processor_loads(folders: dict[bool, Path], tmp_path: Path) -> None:
    from diffgap.encoders.hf_clap import ClapAudio

    folder = shutil.copytree(folders[False], tmp_path / "processor")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    extractor = transformers.ClapFeatureExtractor.from_pretrained(folder)
    (folder / "preprocessor_config.json").unlink()
    transformers.ClapProcessor(extractor, tokenizer).save_pretrained(folder)
    item = waveform(1.0)
    saved, plain = ClapAudio(folder), ClapAudio(folders[False])
    np.testing.assert_array_equal(
        saved.encode([saved.reader.prepare(item)]), plain.encode([plain.reader.prepare(item)])
    )


def test_older_files_with_position_ids_load(folders: dict[bool, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from diffgap.encoders.hf_clap import ClapText

    folder = shutil.copytree(folders[False], tmp_path / "old")
    state = load_file(folder / "model.safetensors") | {
        "text_model.embeddings.position_ids": torch.arange(POSITIONS)[None]
    }
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    np.testing.assert_array_equal(ClapText(folder).encode(["dog"]), ClapText(folders[False]).encode(["dog"]))


def test_an_incomplete_checkpoint_is_refused_where_transformers_draws_weights(
    folders: dict[bool, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from diffgap.encoders.hf_clap import ClapAudio

    folder = shutil.copytree(folders[False], tmp_path / "part")
    state = load_file(folder / "model.safetensors")
    del state["audio_projection.linear1.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of ClapModel, audio_projection\.linear1\.weight"):
        ClapAudio(folder)


def test_the_tokenizer_without_a_vocabulary_is_refused(folders: dict[bool, Path], tmp_path: Path) -> None:
    from diffgap.encoders.hf_clap import ClapText

    folder = shutil.copytree(folders[False], tmp_path / "bare")
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"tokenizer.*copy tokenizer\.json"):
        ClapText(folder)


def test_contradicting_settings_and_other_folders_are_refused(folders: dict[bool, Path], tmp_path: Path) -> None:
    from diffgap.encoders.hf_clap import ClapAudio

    folder = shutil.copytree(folders[False], tmp_path / "mixed")
    shutil.copy(folders[True] / "preprocessor_config.json", folder)
    with pytest.raises(ValueError, match=r"truncation 'fusion', but config\.json says enable_fusion False"):
        ClapAudio(folder)
    with pytest.raises(ValueError, match="not a transformers checkpoint"):
        ClapAudio(tmp_path / "absent")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights"):
        ClapAudio(folder)
