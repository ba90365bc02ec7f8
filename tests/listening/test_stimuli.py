"""Loudness, anchors and levels against the standards' own numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile

from diffgap.listening.loudness import integrated_loudness, k_weighting
from diffgap.listening.stimuli import LOUDNESS, level, low_pass, noisy, pcm16, read_wave

RATE = 48_000


def sine(frequency: float, seconds: float = 2.0, amplitude: float = 1.0, rate: int = RATE) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def test_the_filter_is_the_table_of_bs1770() -> None:
    shelf = [1.53512485958697, -2.69169618940638, 1.19839281085285, 1.0, -1.69065929318241, 0.73248077421585]
    high_pass = [1.0, -2.0, 1.0, 1.0, -1.99004745483398, 0.99007225036621]
    np.testing.assert_allclose(k_weighting(48_000), [shelf, high_pass], rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="4000 Hz"):
        k_weighting(2000)


def test_loudness_of_a_tone() -> None:
    # BS.1770-4: a 997 Hz sine at 0 dB of full scale in one channel is -3.01 LUFS.
    assert integrated_loudness(sine(997), RATE) == pytest.approx(-3.01, abs=0.01)
    assert integrated_loudness(sine(997, amplitude=0.1), RATE) == pytest.approx(-23.01, abs=0.01)
    assert integrated_loudness(sine(997, 0.2), RATE) == pytest.approx(-3.01, abs=0.05)  # less than a block
    assert integrated_loudness(np.zeros(RATE), RATE) == -math.inf


def test_pauses_are_gated() -> None:
    tone, faint = sine(997, 4.0, 0.1), sine(997, 8.0, 0.001)
    alone = integrated_loudness(tone, RATE)
    assert integrated_loudness(np.concatenate([tone, np.zeros(8 * RATE)]), RATE) == pytest.approx(alone, abs=0.3)
    assert integrated_loudness(np.concatenate([tone, faint]), RATE) == pytest.approx(alone, abs=0.3)


@pytest.mark.parametrize(("cutoff", "rate"), [(3500.0, 16_000), (3500.0, 48_000), (7000.0, 24_000)])
def test_anchors_keep_to_bs1534(cutoff: float, rate: int) -> None:
    def gain(frequency: float) -> float:
        middle = slice(rate // 2, -rate // 2)
        tone = sine(frequency, 2.0, rate=rate)
        return 20 * math.log10(np.std(low_pass(tone, rate, cutoff)[middle]) / np.std(tone[middle]))

    for share in (0.1, 0.5, 0.9, 0.98):
        assert abs(gain(share * cutoff)) <= 0.1
    assert gain(cutoff * 8 / 7) <= -25
    assert gain(cutoff * 9 / 7) <= -50


def test_anchors_stay_in_step() -> None:
    tone = sine(500, rate=16_000)
    np.testing.assert_allclose(low_pass(tone, 16_000, 3500.0)[2000:-2000], tone[2000:-2000], atol=0.012)


def test_sounds_of_a_trial_are_equally_loud() -> None:
    waves = level([sine(300, 1.0, 0.9), sine(1000, 1.5, 0.01), sine(3000, 1.0, 0.2)], RATE)
    loudness = [integrated_loudness(np.trim_zeros(wave), RATE) for wave in waves]
    assert loudness == pytest.approx([LOUDNESS] * 3, abs=0.05)  # the fades
    assert {len(wave) for wave in waves} == {round(1.5 * RATE)}
    assert all(abs(wave[0]) < 1e-3 and abs(wave[-1]) < 1e-3 for wave in waves)


def test_nothing_clips() -> None:
    click = np.zeros(RATE)
    click[1000] = 0.5
    waves = level([click, sine(300, 1.0, 0.9), np.zeros(RATE)], RATE)
    assert max(np.abs(wave).max() for wave in waves) == pytest.approx(10 ** (-1 / 20))
    assert integrated_loudness(waves[0], RATE) == pytest.approx(integrated_loudness(waves[1], RATE), abs=0.2)
    assert not waves[2].any()


def test_noise_has_the_power_of_the_sound() -> None:
    tone = sine(300, 1.0, 0.3)
    noise = noisy(tone, np.random.default_rng(0)) - tone
    assert np.mean(noise**2) / np.mean(tone**2) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize(
    ("dtype", "loud"), [(np.int16, 16384), (np.int32, 1 << 30), (np.uint8, 192), (np.float32, 0.5), (np.float64, 0.5)]
)
def test_wav_files_of_every_kind(tmp_path: Path, dtype: type, loud: float) -> None:
    wavfile.write(tmp_path / "a.wav", 8000, np.full((10, 2), loud).astype(dtype))
    np.testing.assert_allclose(read_wave(tmp_path / "a.wav", 8000), np.full(10, 0.5))


@pytest.mark.parametrize("damage", ["junk", "cut", "rate", "nan", "empty"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "a.wav"
    samples = np.array([np.nan if damage == "nan" else 0.1] * (0 if damage == "empty" else 100), np.float32)
    wavfile.write(file, 8000 if damage != "rate" else 16_000, samples)
    if damage == "junk":
        file.write_bytes(b"RIFFjunk")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:30])
    with pytest.raises(ValueError, match=r"a\.wav .*generate the set again"):
        read_wave(file, 8000)


def test_samples_are_16_bit() -> None:
    assert pcm16(np.array([0.0, 1.0, -1.0, 2.0])) == np.array([0, 32767, -32767, 32767], "<i2").tobytes()
