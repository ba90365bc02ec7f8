"""Sound effects: the encoder of aiSFX (Ma and Lerch, "Representation Learning for the Automatic Indexing of Sound
Effects Libraries", ISMIR 2022, arXiv 2208.09096), whose weights come inside the package ``aisfx``.

The package pins versions of numpy and librosa of its time and imports them, so it is installed without its dependencies
and only its file of weights is used.
"""

from __future__ import annotations

import _codecs
import io
import os
from collections.abc import Sequence
from functools import cache
from math import ceil
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from diffgap.data.media import Reader, Source
from diffgap.data.media.audio import AudioReader
from diffgap.encoders._input import FloatArray, as_waveform
from diffgap.encoders._packages import fingerprint, package_folder, read_pinned

__all__ = ["AisfxAudio"]

SoundInput: TypeAlias = str | os.PathLike[str] | Source | FloatArray

SAMPLE_RATE = 44_100
_INSTALL = "pip install --no-deps aisfx==0.1.2"
_N_FFT = 2048
_HOP = 1024
_N_MELS = 96
#: Largest log-mel of the training data, from the package's ``preprocessing.spectrogram_normalize``.
_LARGEST = 9.457798957824707
_BLOCK = 100
_BLOCK_HOP = 50
#: Frames and blocks computed at once; bounds the memory that a long recording takes.
_FRAMES_AT_ONCE = 1024
_BLOCKS_AT_ONCE = 16


class AisfxAudio:
    """Sound effects to (n, 512): blocks of 2.3 s through a convolutional network, averaged.

    The waveform at 44.1 kHz is divided by its peak; its :func:`log_mel` (T, 96) is cut into blocks of 100 frames every
    50, the last one filled with zeros; the embedding is the mean of the blocks' embeddings. Weights: CC-BY-4.0.
    Raises ModuleNotFoundError when the package is missing, ValueError when the weights are not those pinned.
    """

    modality = "audio"
    dim = 512
    sequence = False
    normalized = False
    space = ""
    reader: Reader = AudioReader(SAMPLE_RATE, max_seconds=600)
    _SHA256 = "499ea75909c932a2f94c35fa722fa4fabc5bcb7e84917209cc5f7402627b7eb5"

    def __init__(self) -> None:
        file = package_folder("aisfx", "aisfx", _INSTALL) / "models" / "checkpoint.pth"
        weights = read_pinned((file,), self._SHA256, "aisfx", _INSTALL)
        preprocessing = f"{self.reader.description} peak htk{_N_MELS} blocks{_BLOCK}/{_BLOCK_HOP} mean v1"
        self.fingerprint = fingerprint("aisfx", self._SHA256, preprocessing)
        # Beside the weights the file numbers its training sets, with integers of numpy.
        scalar = np.int64(0).__reduce__()[0]
        numbers: list[Any] = [(scalar, "numpy.core.multiarray.scalar"), np.dtype, type(np.dtype("int64"))]
        with torch.serialization.safe_globals([*numbers, _codecs.encode]):
            state, _ = torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)
        self._model = _Network().eval()
        # The rest, fc.*, are the classifiers of the training sets.
        prefix = "embedding_net."
        self._model.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def encode(self, batch: Sequence[SoundInput]) -> FloatArray:
        """Embeds mono waveforms at 44.1 kHz (paths and sources are read), float32 (n, 512).

        Raises MediaError for a file that cannot be read, ValueError for a waveform that is empty, silent or not finite.
        """
        rows = np.empty((len(batch), self.dim), dtype=np.float32)
        with torch.inference_mode():
            for row, item in enumerate(batch):
                blocks = torch.from_numpy(_blocks(log_mel(as_waveform(item, self.reader)))).split(_BLOCKS_AT_ONCE)
                rows[row] = torch.cat([self._model(part) for part in blocks]).mean(dim=0).numpy()
        return rows


def log_mel(wave: FloatArray) -> FloatArray:
    """Log-mel spectrogram (samples,) at 44.1 kHz to (1 + samples // 1024, 96) float32, from 0 to about 1.

    ``log10(1e4 mel + 1) / 9.4578`` of the power spectrum of the wave divided by its peak: Hann window of 2048, hop
    1024, zeros beyond the ends; 96 bands from 0 to 22.05 kHz on HTK's mel scale, each summing to 1. That is the
    package's ``spectrogram_librosa``, with time first as its network takes it.
    """
    padded = np.pad(wave / np.abs(wave).max(), _N_FFT // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, _N_FFT)[::_HOP]
    window = np.hanning(_N_FFT + 1)[:-1].astype(np.float32)
    parts = (frames[at : at + _FRAMES_AT_ONCE] * window for at in range(0, len(frames), _FRAMES_AT_ONCE))
    mel = np.concatenate([np.abs(np.fft.rfft(part, axis=1)) ** 2 @ _filters().T for part in parts])
    return np.asarray(np.log10(1e4 * mel + 1) / _LARGEST, dtype=np.float32)


@cache
def _filters() -> npt.NDArray[np.float64]:
    """(96, 1025) triangles of sum 1 on HTK's scale, mel = 2595 log10(1 + hertz / 700)."""
    mels = np.linspace(0.0, 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700), _N_MELS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    bins = np.fft.rfftfreq(_N_FFT, 1 / SAMPLE_RATE)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return triangles / triangles.sum(axis=1, keepdims=True)


def _blocks(mel: FloatArray) -> FloatArray:
    """(T, 96) to (max(1, ceil((T - 100) / 50) + 1), 100, 96)."""
    number = max(1, ceil((len(mel) - _BLOCK) / _BLOCK_HOP) + 1)
    padded = np.zeros(((number - 1) * _BLOCK_HOP + _BLOCK, _N_MELS), dtype=np.float32)
    padded[: len(mel)] = mel
    return np.stack([padded[at : at + _BLOCK] for at in range(0, number * _BLOCK_HOP, _BLOCK_HOP)])


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu_()
        return self.bn2(self.conv2(x)).relu_()


class _Network(nn.Module):
    """The package's ``EmbeddingNet("max", 3, 1, 64)``, by the same names: (n, T, 96) to (n, 512)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_block1, self.conv_block2 = _Block(1, 64), _Block(64, 128)
        self.conv_block3, self.conv_block4 = _Block(128, 256), _Block(256, 512)

    def forward(self, mel: Tensor) -> Tensor:
        x = mel[:, None]
        for block in (self.conv_block1, self.conv_block2, self.conv_block3):
            x = nn.functional.max_pool2d(block(x), 2)
        return self.conv_block4(x).mean(dim=3).amax(dim=2)
