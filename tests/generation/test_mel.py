"""Log-mel spectrograms and the vocoders that turn them back into sound."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffgap.generation.mel import MelSettings
from diffgap.generation.vocoder import GriffinLim, HiFiGAN, Vocos, load_vocoder

pytest.importorskip("librosa", reason="librosa is not installed (extra generation)")

SETTINGS = MelSettings(sample_rate=8000, n_fft=512, hop=128, bands=32, high=4000)


def chirp(seconds: float = 1.0, rate: int = 8000) -> np.ndarray:
    t = np.arange(int(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (300 * t + 400 * t**2))).astype(np.float32)


def filters(settings: MelSettings) -> np.ndarray:
    """Triangles on Slaney's or HTK's scale, written out."""
    if settings.htk:
        to_mel, to_hz = lambda f: 2595 * np.log10(1 + f / 700), lambda m: 700 * (10 ** (m / 2595) - 1)
    else:

        def to_mel(f):
            return f / (200 / 3) if f < 1000 else 15 + 27 * np.log(f / 1000) / np.log(6.4)

        def to_hz(m):
            return np.where(m < 15, m * 200 / 3, 1000 * 6.4 ** ((m - 15) / 27))

    edges = to_hz(np.linspace(to_mel(settings.low), to_mel(settings.high), settings.bands + 2))
    bins = np.arange(settings.n_fft // 2 + 1) * settings.sample_rate / settings.n_fft
    rows = []
    for left, middle, right in zip(edges, edges[1:], edges[2:], strict=False):
        triangle = np.maximum(0, np.minimum((bins - left) / (middle - left), (right - bins) / (right - middle)))
        rows.append(triangle if settings.htk else triangle * 2 / (right - left))
    return np.stack(rows)


@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, htk=True, low=100, high=3000, floor=1e-3)])
@pytest.mark.parametrize("samples", [1, 127, 128, 5000])
def test_log_mel_is_its_formula(settings: MelSettings, samples: int) -> None:
    wave = np.random.default_rng(0).standard_normal(samples).astype(np.float32) * 0.1
    found = settings.log_mel(wave)
    assert found.shape == (1 + samples // 128, 32)
    assert found.dtype == np.float32
    padded = np.pad(wave.astype(np.float64), 256)
    window = np.hanning(513)[:-1]
    frames = [np.abs(np.fft.rfft(padded[128 * i : 128 * i + 512] * window)) for i in range(len(found))]
    expected = np.log(np.maximum(np.stack(frames) @ filters(settings).T, settings.floor))
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_frames_of_seconds() -> None:
    assert SETTINGS.frames_per_second == 62.5
    for seconds in (0.0, 0.5, 1.3):
        wave = np.zeros(max(1, int(seconds * 8000)), np.float32)
        assert SETTINGS.frames(seconds) == len(SETTINGS.log_mel(wave))


def test_description_is_read_back() -> None:
    assert MelSettings.parse(MelSettings.vocos().description) == MelSettings.vocos()
    for bad in ("{}x", '{"bins": 3}', "[]", "3"):
        with pytest.raises(ValueError, match="describes no mel settings"):
            MelSettings.parse(bad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hop": 600}, "hop"),
        ({"high": 4001}, "high"),
        ({"low": 4000}, "low"),
        ({"floor": 0.0}, "floor"),
        ({"bands": 0}, "bands"),
    ],
)
def test_bad_settings_are_refused(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes)


@pytest.mark.parametrize(
    "wave", [np.zeros((2, 5), np.float32), np.zeros(0, np.float32), np.full(9, np.nan, np.float32)]
)
def test_bad_waves_are_refused(wave: np.ndarray) -> None:
    with pytest.raises(ValueError, match="wave"):
        SETTINGS.log_mel(wave)


def test_griffin_lim_gives_back_the_spectrogram() -> None:
    wave = chirp()
    mel = SETTINGS.log_mel(wave)
    back = GriffinLim(SETTINGS)(mel)
    assert len(back) == (len(mel) - 1) * 128
    assert np.array_equal(back, GriffinLim(SETTINGS)(mel))
    again = SETTINGS.log_mel(back)
    loud = mel > mel.max() - 4
    assert np.median(np.abs(again - mel)[loud]) < 0.1  # nepers; of the sweep itself, not of what is 35 dB below it
    peaks = np.abs(np.fft.rfft(back[2000:2512])).argmax(), np.abs(np.fft.rfft(wave[2000:2512])).argmax()
    assert abs(int(peaks[0]) - int(peaks[1])) <= 2


def test_griffin_lim_of_one_frame_and_of_silence() -> None:
    silent = np.full((1, 32), np.log(SETTINGS.floor), np.float32)
    assert GriffinLim(SETTINGS)(silent).shape == (1,)
    quiet = GriffinLim(SETTINGS)(np.repeat(silent, 9, 0))
    assert np.isfinite(quiet).all()
    assert np.abs(quiet).max() < 1e-3


@pytest.mark.parametrize("mel", [np.zeros((0, 32)), np.zeros((3, 31)), np.zeros(32), np.full((2, 32), np.inf)])
def test_vocoders_refuse_other_shapes(mel: np.ndarray) -> None:
    with pytest.raises(ValueError, match="log_mel"):
        GriffinLim(SETTINGS)(mel.astype(np.float32))


def test_hifigan_from_a_local_folder(tmp_path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=32, sampling_rate=8000, upsample_initial_channel=16, upsample_rates=[8, 16],
        upsample_kernel_sizes=[16, 32], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]],
    )  # fmt: skip
    original = transformers.SpeechT5HifiGan(config).eval()
    original.save_pretrained(tmp_path)
    mel = SETTINGS.log_mel(chirp(0.2))
    vocoder = load_vocoder(f"hifigan:{tmp_path}", SETTINGS)
    assert isinstance(vocoder, HiFiGAN)
    wave = vocoder(mel)
    assert wave.shape == (len(mel) * 128,)
    with torch.no_grad():
        np.testing.assert_allclose(wave, original(torch.from_numpy(mel)).numpy(), atol=1e-6)
    with pytest.raises(ValueError, match="hop"):
        HiFiGAN(tmp_path, replace(SETTINGS, hop=64))
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        HiFiGAN(tmp_path / "none")


def test_vocos_imports_no_class_that_a_file_names(tmp_path, monkeypatch) -> None:
    import diffgap.generation.vocoder as module

    monkeypatch.setattr(module, "require", lambda *_: None)
    monkeypatch.setitem(__import__("sys").modules, "vocos", type("M", (), {})())
    for name in ("heads", "models"):
        part = type("M", (), {"ISTFTHead": None, "VocosBackbone": None})()
        monkeypatch.setitem(__import__("sys").modules, f"vocos.{name}", part)
    evil = {"feature_extractor": {"class_path": "os.system", "init_args": {"command": "true"}}}
    (tmp_path / "config.yaml").write_text(json.dumps(evil))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"os\.system.*only vocos"):
        Vocos(tmp_path)


def test_vocos_from_a_local_folder(tmp_path) -> None:
    pytest.importorskip("vocos", reason="vocos is not installed")
    from vocos.heads import ISTFTHead
    from vocos.models import VocosBackbone

    backbone = {"input_channels": 100, "dim": 16, "intermediate_dim": 32, "num_layers": 1}
    head = {"dim": 16, "n_fft": 1024, "hop_length": 256}
    parts = {
        "feature_extractor": {"class_path": "vocos.feature_extractors.MelSpectrogramFeatures", "init_args": {}},
        "backbone": {"class_path": "vocos.models.VocosBackbone", "init_args": backbone},
        "head": {"class_path": "vocos.heads.ISTFTHead", "init_args": head},
    }
    torch.manual_seed(0)
    modules = {"backbone": VocosBackbone(**backbone).eval(), "head": ISTFTHead(**head).eval()}
    (tmp_path / "config.yaml").write_text(json.dumps(parts))
    state = {f"{name}.{key}": value for name, part in modules.items() for key, value in part.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    mel = MelSettings.vocos().log_mel(chirp(0.2, 24_000))
    wave = load_vocoder(f"vocos:{tmp_path}", MelSettings.vocos())(mel)
    with torch.no_grad():
        expected = modules["head"](modules["backbone"](torch.from_numpy(mel.T.copy())[None]))[0]
    np.testing.assert_allclose(wave, expected.numpy(), atol=1e-6)
    with pytest.raises(ValueError, match="settings"):
        load_vocoder(f"vocos:{tmp_path}", SETTINGS)


def test_unknown_vocoders_are_refused() -> None:
    assert isinstance(load_vocoder("griffin-lim", SETTINGS), GriffinLim)
    for spec in ("wavenet", "hifigan", "vocos:", "griffin-lim:x"):
        with pytest.raises(ValueError, match="unknown"):
            load_vocoder(spec, SETTINGS)
