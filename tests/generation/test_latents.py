"""Latents of spectrograms: the autoencoder's own numbers, lengths, and a generator of them from training to sound."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra generation)")
pytest.importorskip("librosa", reason="librosa is not installed (extra generation)")
from diffgap.data.store import EmbeddingStore  # noqa: E402
from diffgap.encoders.registry import build_encoder  # noqa: E402
from diffgap.generation.latents import (  # noqa: E402
    AUDIOLDM,
    LatentMel,
    LatentSettings,
    MelAutoencoder,
    parse_settings,
)
from diffgap.generation.mel import MelSettings  # noqa: E402
from diffgap.generation.native import load_generator  # noqa: E402
from diffgap.generation.trainer import GeneratorData, GeneratorRunConfig, GeneratorSettings  # noqa: E402
from diffgap.training.config import TrainConfig  # noqa: E402
from tests.generation.diffusers_pipelines import vae  # noqa: E402
from tests.generation.studio import MEL, TONES, WORDS, Studio  # noqa: E402
from tests.helpers import run  # noqa: E402

SPEC = "?sample_rate=8000&n_fft=256&hop=80&bands=8&high=4000"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    vae().save_pretrained(found)
    return found


def mel(frames: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((frames, 8)).astype(np.float32)


@pytest.mark.parametrize("frames", [1, 2, 7, 12])
def test_latents_are_the_means_of_the_autoencoder(folder: Path, frames: int) -> None:
    coder, model = MelAutoencoder(folder, MEL), diffusers.AutoencoderKL.from_pretrained(folder).eval()
    assert (coder.settings.channels, coder.settings.factor, coder.settings.bands) == (4, 2, 16)
    x = mel(frames)
    filled = np.concatenate([x, np.full((frames % 2, 8), np.log(MEL.floor), np.float32)])
    with torch.no_grad():
        z = model.encode(torch.from_numpy(filled)[None, None]).latent_dist.mean * 0.9
        back = model.decode(z / 0.9).sample[0, 0]
    latents = coder.encode(x)
    assert latents.shape == (-(-frames // 2), 16)
    np.testing.assert_allclose(latents.reshape(len(latents), 4, 4).transpose(1, 0, 2), z[0], atol=1e-5)
    np.testing.assert_allclose(coder.decode(latents), back, atol=1e-5)


def test_a_recording_is_encoded_as_if_alone(folder: Path) -> None:
    encoder = LatentMel(folder, MEL)
    waves = [np.random.default_rng(n).standard_normal(n).astype(np.float32) for n in (700, 1600)]
    values, lengths = encoder.encode(waves)
    assert values.shape == (2, 11, 16) and lengths.tolist() == [5, 11]
    for row, length, wave in zip(values, lengths, waves, strict=True):
        np.testing.assert_array_equal(row[:length], encoder.autoencoder.encode(MEL.log_mel(wave)))
        assert length == encoder.autoencoder.settings.frames(len(wave) / 8000)
    assert not values[0, 5:].any()


def test_descriptions_say_all(folder: Path) -> None:
    settings = MelAutoencoder(folder).settings
    assert settings.mel == AUDIOLDM and parse_settings(settings.description) == settings
    assert parse_settings(MEL.description) == MEL
    assert isinstance(settings, LatentSettings) and settings.frames(1.0) == 51 and settings.seconds(51) == 1.01
    encoder = build_encoder("mel", f"latent-mel:{folder}{SPEC}")
    assert encoder.fingerprint == f"latent-mel:{MelAutoencoder(folder, MEL).settings.description}"
    for bad in ("x", "[]", '{"weights": 1}', '{"mel": {}, "weights": ""}'):
        with pytest.raises(ValueError, match="describes"):
            parse_settings(bad)


def test_what_is_no_autoencoder_of_spectrograms_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json and weights"):
        MelAutoencoder(tmp_path)
    with pytest.raises(ValueError, match="9 bands must be a multiple"):
        MelAutoencoder(folder, MelSettings(bands=9))
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (weights,) = damaged.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is no whole AutoencoderKL"):
        MelAutoencoder(damaged, MEL)
    coder = MelAutoencoder(folder, MEL)
    for bad in (np.zeros((0, 8), np.float32), np.zeros((3, 9), np.float32)):
        with pytest.raises(ValueError, match="log_mel is"):
            coder.encode(bad)
        with pytest.raises(ValueError, match="latents are"):
            coder.decode(bad)


def test_from_recordings_to_sound_through_latents(
    folder: Path, studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoken = ["--audio", TONES, "--text", WORDS, "--mel", f"latent-mel:{folder}{SPEC}", "--workers", 0]
    assert run("embed", studio.media, tmp_path / "store", *spoken) == 0
    GeneratorRunConfig(
        data=GeneratorData(str(tmp_path / "store"), bridge=str(studio.bridge)),
        generator=GeneratorSettings(sampling_steps=2, patch_frames=2),
        train=TrainConfig(steps=2, batch_size=8, warmup_steps=1, eval_every=2, checkpoint_every=2),
    ).save(tmp_path / "run.yaml")
    assert run("train-generator", tmp_path / "run", "--config", tmp_path / "run.yaml") == 0
    asked = ["--generator", tmp_path / "run", "--text", "a tone", "--encoder", WORDS, "--seconds", 0.21]
    assert run("generate", *asked, "-o", tmp_path / "a.wav") == 2
    assert "the autoencoder is not given" in capsys.readouterr().err
    assert run("generate", *asked, "--autoencoder", folder, "-o", tmp_path / "a.wav") == 0
    assert len(soundfile.read(tmp_path / "a.wav")[0]) == 1680
    with pytest.raises(ValueError, match="none for spectrograms"):
        load_generator(studio.generator, autoencoder=str(folder))
    made = ["--generator", tmp_path / "run", "--autoencoder", folder, "--media", studio.media, "--limit", 2]
    assert run("generate-set", *made, "--systems", "reference", "vocoder", "raw", "-o", tmp_path / "set") == 0
    store = EmbeddingStore.open(tmp_path / "store")
    assert store.dim("mel") == 16
