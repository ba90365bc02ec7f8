"""Networks of the published figures, with the architectures of their own packages and weights from a local file.

PANNs' Cnn14 (https://arxiv.org/abs/1912.10211, package ``panns_inference``) and VGGish
(https://arxiv.org/abs/1609.09430, package ``torchvggish``), as ``audioldm_eval`` uses them. Nothing is downloaded.
Each waveform is heard by itself, at its own length: nothing is padded.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from diffgap.data.media import Reader
from diffgap.data.media.audio import AudioReader
from diffgap.encoders._checkpoint import read_state_dict
from diffgap.encoders._packages import fingerprint, package_folder
from diffgap.encoders._towers import file_digest
from diffgap.generation.metrics.backbone import Backbone, Output

__all__ = ["NETWORKS", "Panns", "Vggish"]

FloatArray = npt.NDArray[np.float32]

_PANNS_INSTALL = "pip install panns-inference==0.1.1"
_VGGISH_INSTALL = "pip install torchvggish==0.2"
#: Sample rate, hop in samples and upper edge in Hz of each published Cnn14, by its window in samples.
_CNN14 = {1024: (32_000, 320, 14_000), 512: (16_000, 160, 8_000)}
#: Patches of 0.96 s that VGGish takes at once, which bounds its memory for a long recording.
_PATCHES = 32


class Panns:
    """PANNs' Cnn14: an embedding, (2048,), and the logits of AudioSet's 527 classes, before the sigmoid.

    Args:
        weights: ``Cnn14_mAP=0.431.pth``, which hears 32 kHz, or ``Cnn14_16k_mAP=0.438.pth``, which hears 16 kHz: the
            checkpoint says which. ``audioldm_eval`` takes the latter.
        device: Where it runs.

    Raises:
        ValueError: ``weights`` is not there, cannot be read or is another network's.
        ModuleNotFoundError: ``panns_inference`` or what it needs is not installed.
    """

    space = ""
    outputs: frozenset[Output] = frozenset({"features", "logits"})

    def __init__(self, weights: str | Path, device: str = "cpu") -> None:
        file = Path(weights)
        models = _imported("panns-inference", _PANNS_INSTALL, _panns_models)
        state = read_state_dict(file, "model")
        basis = state.get("spectrogram_extractor.stft.conv_real.weight")
        window = 0 if basis is None else basis.shape[-1]
        if window not in _CNN14:
            raise ValueError(f"{file} holds no Cnn14; give Cnn14_mAP=0.431.pth or Cnn14_16k_mAP=0.438.pth of PANNs")
        rate, hop, high = _CNN14[window]
        model = models.Cnn14(
            sample_rate=rate, window_size=window, hop_size=hop, mel_bins=64, fmin=50, fmax=high, classes_num=527
        )
        self._model = _loaded(model, state, file, device)
        self._device = device
        self.name, self.sample_rate = f"panns-cnn14-{rate // 1000}k", rate
        # Five poolings halve the frames of 10 ms: fewer than 32 leave none.
        self.reader: Reader = AudioReader(rate, min_seconds=0.32)
        self.fingerprint = fingerprint(self.name, file_digest([file]), self.reader.description)

    def __call__(self, waveforms: Sequence[FloatArray]) -> list[dict[str, FloatArray]]:
        """As of :class:`~diffgap.generation.metrics.backbone.Backbone`; a waveform lasts 0.32 s or more."""
        logits: list[torch.Tensor] = []
        # The model gives probabilities, in which the logits of sure classes are rounded away.
        hook = self._model.fc_audioset.register_forward_hook(lambda module, given, made: logits.append(made[0]))
        try:
            with torch.inference_mode():
                features = [self._model(_batch(wave, self._device))["embedding"][0] for wave in waveforms]
        finally:
            hook.remove()
        return [
            {"features": feature.cpu().numpy(), "logits": logit.cpu().numpy()}
            for feature, logit in zip(features, logits, strict=True)
        ]


class Vggish:
    """VGGish: a row of features for every whole 0.96 s, (T, 128), without PCA and before the last ReLU.

    Args:
        weights: ``vggish-10086976.pth`` of https://github.com/harritaylor/torchvggish.
        device: Where it runs.

    Raises:
        ValueError: ``weights`` is not there, cannot be read or is another network's.
        ModuleNotFoundError: ``torchvggish`` or what it needs is not installed.
    """

    name, sample_rate, space = "vggish", 16_000, ""
    outputs: frozenset[Output] = frozenset({"features"})

    def __init__(self, weights: str | Path, device: str = "cpu") -> None:
        file = Path(weights)
        package = _imported("torchvggish", _VGGISH_INSTALL, lambda: importlib.import_module("torchvggish.torchvggish"))
        self._patches = importlib.import_module("torchvggish.vggish_input").waveform_to_examples
        model = package.VGG(package.make_layers(), postprocess=False)
        self._model = _loaded(model, read_state_dict(file, "state_dict"), file, device)
        self._model.embeddings = self._model.embeddings[:-1]
        self._device = device
        # A patch is 96 frames of 25 ms, 10 ms apart: 0.975 s.
        self.reader: Reader = AudioReader(self.sample_rate, min_seconds=0.975)
        self.fingerprint = fingerprint(
            self.name, file_digest([file]), f"{self.reader.description} without PCA, before the last ReLU"
        )

    def __call__(self, waveforms: Sequence[FloatArray]) -> list[dict[str, FloatArray]]:
        """As of :class:`~diffgap.generation.metrics.backbone.Backbone`; a waveform lasts 0.975 s or more."""
        return [{"features": self._rows(wave)} for wave in waveforms]

    def _rows(self, wave: FloatArray) -> FloatArray:
        with torch.inference_mode():
            patches = self._patches(wave, self.sample_rate)
            rows = [self._model(some.to(self._device)).cpu() for some in patches.split(_PATCHES)]
        return np.asarray(torch.cat(rows).numpy(), dtype=np.float32)


#: What the command line calls them, as in ``panns:FILE``.
NETWORKS: Mapping[str, Callable[[str, str], Backbone]] = {"panns": Panns, "vggish": Vggish}


def _panns_models() -> Any:
    """``panns_inference.models``. Importing the package itself downloads a table of classes into the home folder, so
    its folder is imported under another name, without its ``__init__``."""
    alias = "diffgap_panns_inference"
    if alias not in sys.modules:
        package = ModuleType(alias)
        package.__path__ = [str(package_folder("panns_inference", "panns-inference", _PANNS_INSTALL))]
        sys.modules[alias] = package
    return importlib.import_module(f"{alias}.models")


def _imported(distribution: str, install: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{distribution} needs the module {error.name}, which is not installed; run: {install}", name=error.name
        ) from error


def _loaded(model: Any, state: Mapping[str, torch.Tensor], file: Path, device: str) -> Any:
    """``model`` with the weights ``state``, in evaluation mode. Raises ValueError if they are not its own."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} holds the weights of another network: {reason}") from error
    return model.eval().to(device)


def _batch(wave: FloatArray, device: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(wave))[None].to(device)
