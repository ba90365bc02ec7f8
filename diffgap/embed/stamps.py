"""The bundled stamps from their media, through the same pipeline as any other data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffgap.data.items import ItemList
from diffgap.data.items.heard import HeardItems
from diffgap.data.items.limit import FirstItems
from diffgap.data.items.stamps import EXCLUDED, StampItems, bundled_parts, find_media, scan
from diffgap.data.stamps import STAMPS_FOLDER, project_speech
from diffgap.embed.parts import FloatArray
from diffgap.embed.pipeline import embed_items
from diffgap.embed.report import EmbedReport
from diffgap.encoders import Encoder
from diffgap.encoders.offline import EfficientNetImage, MiniLMText, WhisperSpeech
from diffgap.encoders.registry import build_encoder

__all__ = ["DTYPES", "StampsSpeech", "embed_stamps"]

DTYPES = {"audio": "int8", "text": "float16", "image": "int8"}


class StampsSpeech:
    """``project_speech`` of what :class:`~diffgap.encoders.offline.WhisperSpeech` gives: (n, 1024), as bundled."""

    modality = "audio"
    dim = 1024
    sequence = False
    normalized = False
    space = ""

    def __init__(self) -> None:
        self._whisper = WhisperSpeech()
        self.fingerprint = self._whisper.fingerprint
        self.reader = self._whisper.reader

    def encode(self, batch: Sequence[Any]) -> FloatArray:
        """Embeds waveforms, float32 (n, 1024)."""
        return project_speech(self._whisper.encode(batch))


def embed_stamps(
    media: Path,
    output: str | os.PathLike[str],
    *,
    mel: str | None = None,
    limit: int | None = None,
    **options: Any,
) -> EmbedReport | None:
    """Embeds the recordings, captions and pictures below ``media`` as the bundled set has them.

    Its rows, embeddings and number formats are those of ``diffgap/data/stamps`` (of the first ``limit`` recordings, if
    given), with the split "concept", 0, and spectrograms beside them by the encoder ``mel``, if named. ``options`` are
    those of :func:`~diffgap.embed.embed_items`.

    Raises:
        ValueError: Other media than the package's.
        ModuleNotFoundError: A package of the extra ``offline`` is missing.
    """
    stamps = [stamp for stamp in scan(find_media(media)) if stamp.category != EXCLUDED]
    items: ItemList = StampItems(stamps, bundled_parts() if (STAMPS_FOLDER / "splits.parquet").is_file() else {})
    listed = items if limit is None else FirstItems(items, limit)
    encoders: dict[str, Encoder] = {"audio": StampsSpeech(), "text": MiniLMText(), "image": EfficientNetImage()}
    dtypes = dict(DTYPES)
    if mel is not None:
        listed, encoders["mel"], dtypes["mel"] = HeardItems(listed), build_encoder("mel", mel), "float16"
    # A stamp whose picture cannot be rendered is left out whole.
    return embed_items(listed, encoders, output, dtype=dtypes, min_modalities=len(encoders), **options)
