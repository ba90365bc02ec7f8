"""The mel distance, against the formula written down anew, and cases whose distance is known."""

from __future__ import annotations

import numpy as np
import pytest

from diffgap.generation.mel import MelSettings
from diffgap.generation.metrics import MelStatistics, evaluate_audio, mel_distances
from diffgap.generation.metrics.backbone import describe

RATE = 16_000
pytest.importorskip("librosa")
pytest.importorskip("soundfile")


def noise(seed: int, seconds: float = 0.5, *, moving: bool = False) -> np.ndarray:
    """Noise; ``moving``: with an envelope of its own."""
    rng = np.random.default_rng(seed)
    wave = 0.1 * rng.normal(size=int(seconds * RATE))
    if moving:
        wave *= np.repeat(rng.uniform(0.05, 1.0, size=10), -(-len(wave) // 10))[: len(wave)]
    return wave.astype(np.float32)


def said(*waves: np.ndarray) -> np.ndarray:
    backbone = MelStatistics()
    return np.stack([one["mel"] for one in describe(backbone, waves, [str(i) for i in range(len(waves))])])


def test_is_the_formula() -> None:
    import librosa

    made = [noise(seed, moving=True) for seed in range(3)]
    real = [noise(seed + 9, 0.7, moving=True) for seed in range(3)]
    expected = []
    for pair in zip(made, real, strict=True):
        statistics = []
        for wave in pair:
            mel = librosa.feature.melspectrogram(
                y=wave, sr=RATE, n_fft=1024, hop_length=256, n_mels=64, fmax=8000, power=1.0, pad_mode="constant"
            )
            decibels = 20 * np.log10(np.maximum(mel.astype(np.float64), 1e-5))
            statistics.append((decibels.mean(1), decibels.std(1)))
        (mean_g, std_g), (mean_r, std_r) = statistics
        expected.append(np.sqrt(((mean_g - mean_r) ** 2 + (std_g - std_r) ** 2).mean()))
    assert mel_distances(said(*made), said(*real)) == pytest.approx(expected, rel=1e-4)


def test_ten_times_the_level_is_twenty_decibels() -> None:
    wave = noise(0)
    assert mel_distances(said(wave), said(10 * wave))[0] == pytest.approx(20.0, rel=1e-4)
    assert mel_distances(said(wave), said(wave))[0] == 0.0


def test_hears_movement_where_the_mean_is_the_same() -> None:
    still, moving = np.zeros((1, 4)), np.array([[0.0, 0.0, 3.0, 4.0]])
    assert mel_distances(still, moving)[0] == pytest.approx(np.sqrt((9 + 16) / 2))


def test_is_a_figure_with_its_scale_and_values_of_pairs() -> None:
    made = {str(seed): noise(seed) for seed in range(6)}
    real = {str(seed): noise(seed + 50, moving=True) for seed in range(6)}
    report = evaluate_audio(made, real, backbones=MelStatistics(), sample_rate=RATE, resamples=20)
    (figure,) = report.figures
    assert (figure.metric, figure.backbone, figure.sample_rate, figure.generated) == ("mel_distance", "mel", RATE, 6)
    assert figure.values == pytest.approx(mel_distances(said(*made.values()), said(*real.values())))
    assert figure.estimate == pytest.approx(np.mean(figure.values)) and figure.low < figure.estimate < figure.high
    assert (figure.better, figure.settings) == ("lower", {"unit": "dB"})
    closer = evaluate_audio(real, real, backbones=MelStatistics(), sample_rate=RATE, resamples=20)
    assert closer.figure("mel_distance").estimate == 0.0


def test_other_settings_are_another_scale() -> None:
    assert MelStatistics().fingerprint != MelStatistics(MelSettings(bands=32)).fingerprint
    assert MelStatistics(MelSettings.vocos()).sample_rate == 24_000


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="paired row by row"):
        mel_distances(np.ones((2, 4)), np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"must be \(N, 2 M\)"):
        mel_distances(np.ones((2, 3)), np.ones((2, 3)))
