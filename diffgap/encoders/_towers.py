"""What the towers of dual encoders share: digests of checkpoints, batches, pooling and prepared input."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from diffgap.data.media import Reader, Source
from diffgap.encoders import Encoded
from diffgap.encoders._packages import fingerprint

if TYPE_CHECKING:
    from PIL.Image import Image

FloatArray = npt.NDArray[np.float32]

# Texts, frames or windows in one pass: enough to fill the machine, little enough to hold the activations.
ROWS = 32
# Longest recording in seconds: 0.7 GB of samples at 48 kHz, or twice that in overlapping windows.
MAX_SECONDS = 3600.0


def file_digest(files: Iterable[Path]) -> str:
    """sha256, in hexadecimal, of the contents of ``files`` in the order of their names."""
    total = hashlib.sha256()
    for file in sorted(files, key=lambda path: path.name):
        one = hashlib.sha256()
        with open(file, "rb") as content:
            while block := content.read(1 << 22):
                one.update(block)
        total.update(one.digest())
    return total.hexdigest()


@dataclass(frozen=True)
class Prepared:
    """A reader and, still in the worker process, the encoder's own preparation of what it gives.

    A photograph crosses between processes as 600 kB of pixels, not as the 50 MB it was decoded to.
    """

    read: Reader
    prepare: Callable[[Any], Any]
    preparation: str

    @property
    def description(self) -> str:
        return f"{self.read.description}, {self.preparation}"

    def __call__(self, source: Source) -> Any:
        return self.prepare(self.read(source))


class Tower(ABC):
    """One tower of a dual encoder. An item is one or more rows (the windows of a recording, the frames of a video).

    With e_i = v_i / |v_i| for the rows' own embeddings v_i, an item's embedding is m / |m|, m = mean of the e_i; or the
    e_i themselves, (T, D), if ``sequence``.

    Args:
        modality, dim, sequence, reader: As in :class:`~diffgap.encoders.Encoder`.
        family: Kind of checkpoint ("clap", "clip"): towers of one family share a space or are refused together.
        weights: Digest of the checkpoint, the same for both of its towers.
        preparation: Whatever else changes an embedding (configurations, vocabulary, limits).
        device: Where the model runs.
    """

    normalized = True

    def __init__(
        self,
        *,
        modality: str,
        dim: int,
        family: str,
        weights: str,
        preparation: str,
        reader: Reader,
        device: str,
        sequence: bool = False,
    ) -> None:
        self.modality = modality
        self.dim = dim
        self.sequence = sequence
        self.reader = reader
        self._device = device
        self.space = f"{family}:{weights[:32]}"
        pooling = "frames" if sequence else "unit mean"
        self.fingerprint = fingerprint(
            f"{family}-{modality}", weights, f"{preparation} {reader.description} {pooling} v1"
        )

    def _rows(self, item: Any) -> Sequence[Any]:
        """The rows of one item, at least one."""
        return item

    @abstractmethod
    def _embed(self, rows: Sequence[Any]) -> torch.Tensor:
        """(n, D) embeddings of ``rows``, on any device; they need not be normalised."""

    def encode(self, batch: Sequence[Any]) -> Encoded:
        """Embeds what ``reader`` gives: (B, D) float32, or (B, T, D) with lengths (B,) for a sequence."""
        items = [self._rows(item) for item in batch]
        rows = [row for item in items for row in item]
        lengths = np.array([len(item) for item in items], dtype=np.int64)
        vectors = self._unit(rows)
        if self.sequence:
            frames = np.zeros((len(items), lengths.max(initial=0), self.dim), dtype=np.float32)
            frames[np.arange(frames.shape[1]) < lengths[:, None]] = vectors
            return frames, lengths
        ends = np.cumsum(lengths)
        means = np.zeros((len(items), self.dim), dtype=np.float32)
        for row, (end, length) in enumerate(zip(ends, lengths, strict=True)):
            means[row] = vectors[end - length : end].mean(axis=0)
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    @torch.inference_mode()
    def _unit(self, rows: Sequence[Any]) -> FloatArray:
        """(n, D) float32 of norm 1, a few rows at a time."""
        unit = np.empty((len(rows), self.dim), dtype=np.float32)
        for start in range(0, len(rows), ROWS):
            vectors = self._embed(rows[start : start + ROWS])
            unit[start : start + ROWS] = torch.nn.functional.normalize(vectors.float(), dim=1).cpu().numpy()
        return unit


class TextTower(Tower):
    """A tower that takes texts; a row is a text's tokens. Texts of like length share a pass: little is padding."""

    @abstractmethod
    def _tokens(self, texts: list[str]) -> Sequence[Sequence[int]]:
        """The token ids of each text, cut to the model's maximum, without padding."""

    def encode(self, batch: Sequence[str]) -> FloatArray:
        """Embeds texts, float32 (n, D). Raises TypeError for anything but a sequence of strings."""
        if isinstance(batch, str) or not all(isinstance(text, str) for text in batch):
            raise TypeError("batch must be a sequence of strings; pass [text] for one text")
        unit = np.empty((len(batch), self.dim), dtype=np.float32)
        if len(batch):
            tokens = self._tokens(list(batch))
            order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
            unit[order] = self._unit([tokens[row] for row in order])
        return unit


def check_vocabulary(size: int, embeddings: int, origin: str, fix: str) -> None:
    """Refuses a tokenizer of ``size`` tokens for a model of ``embeddings``: it lost its vocabulary. Raises ValueError.

    transformers 5 builds one of 5 tokens, without a word, where it does not find the files: every text then gets the
    same ids. A model's table may hold a few rows that no token uses, hence the tenth.
    """
    if size < 0.9 * embeddings:
        raise ValueError(f"the tokenizer of {origin} has {size:,} tokens, its text tower has {embeddings:,}: {fix}")


def on_white(image: Image) -> Image:
    """``image`` as RGB, what is transparent laid on white: its colour there is arbitrary, and often black."""
    from PIL import Image

    if image.mode == "RGB":
        return image
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


def fuse_mel(mel: torch.Tensor, frames: int, shrink: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The input of CLAP's feature fusion (Wu et al., arXiv 2211.06687): (T, F) log-mel, T > frames, to (4, frames, F).

    First the whole spectrogram, resized by ``shrink``; then one crop each from the first, middle and last third of
    the possible beginnings. LAION draws the crops at random; here each is the middle one of its third.
    """
    thirds = np.array_split(np.arange(len(mel) - frames + 1), 3)
    starts = [int(third[len(third) // 2]) if len(third) else 0 for third in thirds]
    return torch.stack([shrink(mel), *(mel[start : start + frames] for start in starts)])
