"""CLIP by transformers, from a local folder: images, the frames of videos, and texts.

Folders: what ``CLIPProcessor`` and ``CLIPModel`` write by ``save_pretrained``, or a copy of a repository of the Hugging
Face Hub (``openai/clip-vit-base-patch32``, ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``, ...). Pictures are prepared as
the checkpoint's preprocessor_config.json says, by Pillow (torchvision's resampling gives other pixels); what is
transparent is laid on white.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from diffgap.data.media.image import ImageReader
from diffgap.data.media.video import FrameReader
from diffgap.encoders._packages import require
from diffgap.encoders._towers import FloatArray, Prepared, Tower, on_white
from diffgap.encoders._transformers import (
    INSTALL,
    FolderText,
    features,
    load_model,
    settings_digest,
)

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ClipImage", "ClipText", "ClipVideo"]


@dataclass(frozen=True)
class _Pixels:
    """A picture, or a list of frames, to (T, 3, H, W) float32."""

    processor: Any

    def __call__(self, pictures: Image | list[Image]) -> FloatArray:
        images = pictures if isinstance(pictures, list) else [pictures]
        pixels = [self.processor(on_white(image), return_tensors="np")["pixel_values"][0] for image in images]
        return np.stack(pixels).astype(np.float32)


class _Vision(Tower):
    def __init__(
        self, folder: str | os.PathLike[str], device: str, modality: str, reader: Any, sequence: bool = False
    ) -> None:
        require("transformers", "transformers", INSTALL)
        require("PIL", "pillow", "pip install pillow")
        from transformers.models import clip

        path = Path(folder)
        self._model, weights = load_model("CLIPModel", path, device)
        del self._model.text_model, self._model.text_projection
        # Before transformers 5, CLIPImageProcessor itself worked by Pillow.
        processor = getattr(clip, "CLIPImageProcessorPil", None) or clip.CLIPImageProcessor
        super().__init__(
            modality=modality,
            dim=self._model.config.projection_dim,
            family="clip",
            weights=weights,
            preparation=settings_digest(path),
            reader=Prepared(
                reader,
                _Pixels(processor.from_pretrained(str(path), local_files_only=True)),
                "on white, clip pixels by pillow",
            ),
            device=device,
            sequence=sequence,
        )

    def _embed(self, rows: Sequence[Any]) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack(rows)).to(self._device)
        return features(self._model.get_image_features(pixel_values=pixels))


class ClipImage(_Vision):
    """Images to unit vectors (n, D): the vision tower of a transformers ``CLIPModel``.

    Args:
        folder: The checkpoint.
        device: Where the model runs.

    Raises ModuleNotFoundError without transformers or pillow, ValueError for a folder that is not a whole CLIP
    checkpoint.
    """

    def __init__(self, folder: str | os.PathLike[str], device: str = "cpu") -> None:
        super().__init__(folder, device, "image", ImageReader())


class ClipVideo(_Vision):
    """Videos to (n, D), or (n, T, D): the vision tower of a transformers ``CLIPModel`` on frames.

    Args:
        folder, device: As for :class:`ClipImage`.
        fps: Frames a second.
        max_frames: At most so many frames of a video.
        frames: "pooled": the frames' unit vectors are averaged and the mean normalised. "sequence": they are given.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        device: str = "cpu",
        *,
        fps: float = 1.0,
        max_frames: int = 64,
        frames: Literal["pooled", "sequence"] = "pooled",
    ) -> None:
        super().__init__(folder, device, "video", FrameReader(fps, max_frames), frames == "sequence")


class ClipText(FolderText):
    """Texts to unit vectors (n, D): the text tower of a transformers ``CLIPModel``, cut at its 77 positions.

    Arguments and errors as for :class:`ClipImage`.
    """

    def __init__(self, folder: str | os.PathLike[str], device: str = "cpu") -> None:
        super().__init__("CLIPModel", "clip", Path(folder), device, ("vision_model", "visual_projection"))
