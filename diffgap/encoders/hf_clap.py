"""CLAP by transformers, from a local folder: pure torch and transformers, no other package.

Folders: what ``ClapProcessor`` and ``ClapModel`` write by ``save_pretrained``, or a copy of a repository of the Hugging
Face Hub (``laion/clap-htsat-unfused``, ``laion/clap-htsat-fused``, ``laion/larger_clap_general``, ...).

Where the checkpoint's own preprocessing draws random crops of a long recording, this one draws none:

- not fused ("rand_trunc"): windows of the model's length (10 s), half a window apart, each embedded by itself and their
  mean normalised; a shorter recording is repeated and padded ("repeatpad");
- fused ("fusion"): the crops beside the whole spectrogram are the middle ones of their thirds, and only a recording
  that *is* longer than the model's length counts as such (transformers marks one of a batch at random if none is, so
  that an embedding would depend on its neighbours).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from diffgap.data.media.audio import AudioReader
from diffgap.encoders._packages import require
from diffgap.encoders._towers import MAX_SECONDS, FloatArray, Prepared, Tower, fuse_mel
from diffgap.encoders._transformers import (
    INSTALL,
    FolderText,
    features,
    load_model,
    settings_digest,
)

__all__ = ["ClapAudio", "ClapText"]


class Mel(NamedTuple):
    """One row: log-mel spectrograms (C, T, F), C = 4 if fused and else 1, and whether the recording exceeds them."""

    spectrogram: FloatArray
    longer: bool


@dataclass(frozen=True)
class _Spectrogram:
    """Waveforms to rows, by the checkpoint's own extractor where it is deterministic."""

    extractor: Any

    def __call__(self, audio: FloatArray) -> list[Mel]:
        return [self._row(wave) for wave in np.atleast_2d(audio)]

    def _row(self, wave: FloatArray) -> Mel:
        extract, limit = self.extractor, self.extractor.nb_max_samples
        # A limit of the recording's own length keeps the extractor from cropping.
        rows = extract(
            wave, max_length=max(limit, len(wave)), sampling_rate=extract.sampling_rate, return_tensors="np"
        )["input_features"][0]
        frames = limit // extract.hop_length + 1
        if rows.shape[1] <= frames:
            return Mel(rows, False)
        mel = torch.from_numpy(rows[0])

        def shrink(whole: torch.Tensor) -> torch.Tensor:
            size = (frames, whole.shape[1])
            return torch.nn.functional.interpolate(whole[None, None], size=size, mode="bilinear")[0, 0]

        return Mel(fuse_mel(mel, frames, shrink).numpy(), True)


class ClapAudio(Tower):
    """Recordings to unit vectors (n, D): the audio tower of a transformers ``ClapModel``.

    Args:
        folder: The checkpoint.
        device: Where the model runs.

    Raises ModuleNotFoundError without transformers, ValueError for a folder that is not a whole CLAP checkpoint.
    """

    def __init__(self, folder: str | os.PathLike[str], device: str = "cpu") -> None:
        require("transformers", "transformers", INSTALL)
        from transformers import ClapFeatureExtractor

        path = Path(folder)
        self._model, weights = load_model("ClapModel", path, device)
        del self._model.text_model, self._model.text_projection
        extractor = ClapFeatureExtractor.from_pretrained(str(path), local_files_only=True)
        fused = self._model.config.audio_config.enable_fusion
        if fused != (extractor.truncation == "fusion"):
            raise ValueError(
                f"{path}: preprocessor_config.json says truncation {extractor.truncation!r}, but config.json says "
                f"enable_fusion {fused}; copy both from the same checkpoint"
            )
        rate, seconds = extractor.sampling_rate, extractor.max_length_s
        windows = {} if fused else {"window": seconds, "hop": seconds / 2}
        reader = AudioReader(rate, max_seconds=MAX_SECONDS, **windows)
        super().__init__(
            modality="audio",
            dim=self._model.config.projection_dim,
            family="clap",
            weights=weights,
            preparation=settings_digest(path),
            reader=Prepared(reader, _Spectrogram(extractor), "clap log-mel"),
            device=device,
        )

    def _embed(self, rows: Sequence[Any]) -> torch.Tensor:
        mel = torch.from_numpy(np.stack([row.spectrogram for row in rows])).to(self._device)
        longer = torch.tensor([[row.longer] for row in rows], device=self._device)
        return features(self._model.get_audio_features(input_features=mel, is_longer=longer))


class ClapText(FolderText):
    """Texts to unit vectors (n, D): the text tower of a transformers ``ClapModel``.

    Texts are cut at what the model's positions hold (512 tokens for RoBERTa) or the tokenizer's own maximum if that is
    less. Arguments and errors as for :class:`ClapAudio`.
    """

    def __init__(self, folder: str | os.PathLike[str], device: str = "cpu") -> None:
        super().__init__("ClapModel", "clap", Path(folder), device, ("audio_model", "audio_projection"))

    def _positions(self, config: Any) -> int:
        # RoBERTa counts positions from the padding token's id on.
        return int(config.max_position_embeddings - config.pad_token_id - 1)
