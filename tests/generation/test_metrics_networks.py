"""PANNs and VGGish against the forward passes of their own packages, with random weights in the published layouts."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffgap.data.media import MediaError, Source
from diffgap.encoders._checkpoint import read_state_dict
from diffgap.generation.metrics import build_backbone
from diffgap.generation.metrics.backbone import describe
from diffgap.generation.metrics.networks import NETWORKS, Panns, Vggish, _panns_models

ALIAS = "diffgap_panns_inference"


def noise(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(round(seconds * rate))).astype(np.float32)


def forget(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        monkeypatch.delitem(sys.modules, name)


def cnn14(rate: int) -> Any:
    pytest.importorskip("torchlibrosa")
    pytest.importorskip("matplotlib")
    if importlib.util.find_spec("panns_inference") is None:
        pytest.skip("panns_inference is not installed")
    window, hop, high = {32_000: (1024, 320, 14_000), 16_000: (512, 160, 8_000)}[rate]
    torch.manual_seed(0)
    model = _panns_models().Cnn14(rate, window, hop, 64, 50, high, 527)
    with torch.no_grad():
        model.bn0.running_mean.fill_(-30.0)
        model.fc_audioset.bias[0] = 50.0
    return model.eval()


@pytest.fixture(scope="module")
def panns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    model, file = cnn14(16_000), tmp_path_factory.mktemp("panns") / "Cnn14_16k.pth"
    # As published: the order of the training sampler beside the weights, a numpy array.
    sampler = {"indexes": np.arange(5), "pointer": 3}
    torch.save({"iteration": 7, "model": model.state_dict(), "sampler": sampler}, file)
    yield model, file
    file.unlink()


@pytest.fixture(scope="module")
def vggish(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, Path]]:
    pytest.importorskip("torchvggish")
    package = importlib.import_module("torchvggish.torchvggish")
    examples = importlib.import_module("torchvggish.vggish_input").waveform_to_examples
    torch.manual_seed(0)
    model, file = package.VGG(package.make_layers(), False).eval(), tmp_path_factory.mktemp("vggish") / "vggish.pth"
    torch.save(model.state_dict(), file)
    yield model, examples, file
    file.unlink()


class TestPanns:
    def test_says_what_the_package_says_of_each_clip_alone(self, panns: tuple[Any, Path]) -> None:
        model, file = panns
        backbone = build_backbone(f"panns:{file}")
        assert (backbone.name, backbone.sample_rate) == ("panns-cnn14-16k", 16_000)
        waves = [noise(0.5, 16_000), noise(1.3, 16_000, seed=1)]
        for wave, said in zip(waves, describe(backbone, waves, ["short", "long"]), strict=True):
            with torch.no_grad():
                wanted = model(torch.from_numpy(wave)[None])
            np.testing.assert_allclose(said["features"], wanted["embedding"], rtol=1e-5, atol=1e-6)
            assert said["features"].std() > 0
            probabilities = torch.from_numpy(said["logits"]).sigmoid()
            torch.testing.assert_close(probabilities, wanted["clipwise_output"][0], rtol=1e-5, atol=1e-6)
            assert 40 < said["logits"][0] < 60  # its probability is 1, of which no logit can be had

    def test_the_checkpoint_says_the_rate(self, tmp_path: Path) -> None:
        # One number for each tensor, spread over its shape, keeps the file small.
        state = {
            key: value.flatten()[0].clone().expand(value.shape) for key, value in cnn14(32_000).state_dict().items()
        }
        torch.save({"model": state}, tmp_path / "Cnn14.pth")
        backbone = Panns(tmp_path / "Cnn14.pth")
        assert (backbone.name, backbone.sample_rate, backbone.reader.sample_rate) == ("panns-cnn14-32k", 32_000, 32_000)
        assert backbone([noise(0.32, 32_000)])[0]["features"].shape == (2048,)

    def test_reads_what_it_can_hear(self, panns: tuple[Any, Path], tmp_path: Path) -> None:
        soundfile = pytest.importorskip("soundfile")
        backbone = Panns(panns[1])
        soundfile.write(tmp_path / "short.wav", noise(0.31, 44_100), 44_100)
        soundfile.write(tmp_path / "shortest.wav", noise(0.32, 44_100), 44_100)
        with pytest.raises(MediaError, match=r"under 0\.32 s"):
            backbone.reader(Source(tmp_path / "short.wav"))
        assert backbone([backbone.reader(Source(tmp_path / "shortest.wav"))])[0]["logits"].shape == (527,)

    def test_importing_it_downloads_no_classes(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        cnn14(16_000)
        forget(monkeypatch, ALIAS, "panns_inference")
        monkeypatch.setenv("HOME", str(tmp_path))
        _panns_models()
        assert not list(tmp_path.iterdir())


class TestVggish:
    def test_says_what_the_package_says_before_its_last_relu(self, vggish: tuple[Any, Any, Path]) -> None:
        model, examples, file = vggish
        backbone = build_backbone(f"vggish:{file}")
        waves = [noise(0.975, 16_000), noise(33 * 0.96 + 0.1, 16_000, seed=1)]
        for wave, rows, said in zip(waves, (1, 33), describe(backbone, waves, ["one", "many"]), strict=True):
            with torch.no_grad():
                wanted = model(examples(wave, 16_000))
            assert said["features"].shape == wanted.shape == (rows, 128)
            assert said["features"].min() < 0
            np.testing.assert_allclose(np.maximum(said["features"], 0), wanted, rtol=1e-4, atol=1e-6)

    def test_reads_what_it_can_hear(self, vggish: tuple[Any, Any, Path], tmp_path: Path) -> None:
        soundfile = pytest.importorskip("soundfile")
        backbone = Vggish(vggish[2])
        soundfile.write(tmp_path / "short.wav", noise(0.97, 44_100), 44_100)
        soundfile.write(tmp_path / "shortest.wav", np.resize(noise(1.0, 44_100), 42_998), 44_100)
        with pytest.raises(MediaError, match=r"under 0\.975 s"):
            backbone.reader(Source(tmp_path / "short.wav"))
        assert backbone([backbone.reader(Source(tmp_path / "shortest.wav"))])[0]["features"].shape == (1, 128)


class TestBadInput:
    @pytest.mark.parametrize("network", sorted(NETWORKS))
    def test_a_package_that_is_absent(self, network: str, monkeypatch: pytest.MonkeyPatch) -> None:
        package = {"panns": "panns_inference", "vggish": "torchvggish"}[network]
        forget(monkeypatch, ALIAS, package)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ModuleNotFoundError, match=f"{package}, which is not installed; run: pip install"):
            build_backbone(f"{network}:weights.pth")

    @pytest.mark.parametrize("spec", ["panns", "panns:", "vggish"])
    def test_no_checkpoint_named(self, spec: str) -> None:
        with pytest.raises(ValueError, match=r"must name its checkpoint, as in (panns|vggish):FILE"):
            build_backbone(spec)

    def test_the_fingerprint_is_that_of_the_file(self, vggish: tuple[Any, Any, Path], tmp_path: Path) -> None:
        state = torch.load(vggish[2], weights_only=True)
        state["embeddings.4.bias"] += 1
        torch.save(state, tmp_path / "other.pth")
        first, again, other = (Vggish(file) for file in (vggish[2], vggish[2], tmp_path / "other.pth"))
        assert first.fingerprint == again.fingerprint != other.fingerprint

    @pytest.mark.parametrize("make", [Panns, Vggish])
    def test_files_that_are_not_its_own(self, make: Callable[[Path], Any], tmp_path: Path) -> None:
        for package in {Panns: ("panns_inference", "torchlibrosa"), Vggish: ("torchvggish",)}[make]:
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed")
        torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "other.pth")
        torch.save({"weight": torch.zeros(2)}, tmp_path / "bare.pth")
        (tmp_path / "text.pth").write_text("no weights")
        for name, message in (
            ("absent.pth", "absent.pth does not exist"),
            ("text.pth", "text.pth cannot be read as weights alone"),
            ("bare.pth", "bare.pth holds (no Cnn14; give|the weights of another network: Error)"),
            ("other.pth", "other.pth holds (no Cnn14; give|no state_dict of tensors)"),
        ):
            with pytest.raises(ValueError, match=message):
                make(tmp_path / name)


class TestReadStateDict:
    def test_numpy_beside_the_weights_but_nothing_that_runs(self, tmp_path: Path) -> None:
        state = {"weight": torch.arange(3.0)}
        torch.save({"model": state, "best": np.float64(0.4), "order": np.arange(4)}, tmp_path / "published.pth")
        torch.testing.assert_close(read_state_dict(tmp_path / "published.pth", "model")["weight"], torch.arange(3.0))
        # Of a numpy before 2, whose module had another name, and a torch before zip files: what is published is so old.
        file = tmp_path / "published.pth"
        torch.save({"model": state, "order": np.arange(4)}, file, _use_new_zipfile_serialization=False)
        file.write_bytes(file.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core."))
        assert b"cnumpy.core.multiarray\n_reconstruct" in file.read_bytes()
        torch.testing.assert_close(read_state_dict(file, "model")["weight"], torch.arange(3.0))
        torch.save({"model": state, "run": hashlib.sha256}, tmp_path / "code.pth")
        with pytest.raises(ValueError, match=r"not run as code: .*save its state_dict alone.*'model'"):
            read_state_dict(tmp_path / "code.pth", "model")
