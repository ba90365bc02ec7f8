"""Spectrograms as an encoder gives them."""

from __future__ import annotations

import numpy as np
import pytest

from diffgap.encoders.mel import LogMel
from diffgap.encoders.registry import build_encoder
from diffgap.generation.mel import MelSettings

pytest.importorskip("librosa", reason="librosa is not installed (extra generation)")


def waves(*counts: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal(count).astype(np.float32) for count in counts]


def test_each_recording_is_its_own_spectrogram_whatever_is_in_the_batch() -> None:
    encoder = LogMel(MelSettings(sample_rate=8000, n_fft=256, hop=80, bands=8, high=4000))
    batch = waves(799, 800, 81)
    values, lengths = encoder.encode(batch)
    assert (values.shape, values.dtype, lengths.tolist()) == ((3, 11, 8), np.float32, [10, 11, 2])
    for row, length, wave in zip(values, lengths, batch, strict=True):
        np.testing.assert_array_equal(row[:length], encoder.settings.log_mel(wave))
        assert not row[length:].any()
    assert encoder.encode([])[0].shape == (0, 0, 8)


def test_a_spec_says_which_spectrograms() -> None:
    assert build_encoder("mel", "log-mel").fingerprint == f"log-mel:{MelSettings().description}"
    assert build_encoder("mel", "log-mel:vocos").dim == 100
    changed = build_encoder("mel", "log-mel?bands=80&htk=true&low=20&max_seconds=3")
    assert MelSettings.parse(changed.fingerprint.partition(":")[2]) == MelSettings(bands=80, htk=True, low=20.0)
    assert changed.reader.max_seconds == 3.0


@pytest.mark.parametrize(
    ("modality", "spec", "message"),
    [
        ("audio", "log-mel", "no audio tower"),
        ("mel", "log-mel:bigvgan", "no preset 'bigvgan'"),
        ("mel", "log-mel?bands=many", "many"),
        ("mel", "log-mel?htk=yes", "neither true nor false"),
        ("mel", "log-mel?power=2", "no option 'power'"),
        ("mel", "log-mel?high=9000", r"within 0\.\.8000 Hz"),
    ],
)
def test_a_wrong_spec_is_refused(modality: str, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_encoder(modality, spec)
