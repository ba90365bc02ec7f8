"""open_clip's models, any of its architectures: images, the frames of videos, and texts.

Weights come from a file (.pt or .safetensors) or, through open_clip's own download, by a published tag; a model without
weights is not offered. Which preparation of the picture and which activation a checkpoint was trained with, its file
does not say. A tag knows both, and where open_clip only warns that the activation is another, it is set here. For a
file they are those of the tag given as ``like``; else the preparation is that of the architecture's published tags, if
they agree, and the activation is QuickGELU if the architecture's name says so ("ViT-B-32-quickgelu"). What is
transparent in a picture is laid on white.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from diffgap.data.media.image import ImageReader
from diffgap.data.media.text import TextReader
from diffgap.data.media.video import FrameReader
from diffgap.encoders._packages import require
from diffgap.encoders._towers import FloatArray, Prepared, TextTower, Tower, check_vocabulary, file_digest, on_white

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["OpenClipImage", "OpenClipText", "OpenClipVideo"]

INSTALL = "pip install open-clip-torch"
_PREPARATION = ("mean", "std", "interpolation", "resize_mode")


def _published(architecture: str, pretrained: str, like: str | None) -> dict[str, Any]:
    """What is known of the checkpoint: the tag's own record, or for a file the one that its tags agree on."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    tag = like or pretrained
    if record := open_clip.get_pretrained_cfg(architecture, tag):
        return dict(record)
    if like or not Path(pretrained).is_file():
        what = f"tag {like!r}" if like else f"pretrained {pretrained!r} (no such file)"
        raise ValueError(
            f"{what} of {architecture} is unknown; give a file or one of the tags {', '.join(tags) or 'none'}"
        )
    records = [open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]
    prepared = {tuple(str(record.get(key)) for key in _PREPARATION) for record in records}
    if len(prepared) > 1:
        raise ValueError(
            f"checkpoints of {architecture} differ in how pictures are prepared; say which published one "
            f"{pretrained} is or was trained like: ?like=TAG, one of {', '.join(tags)}"
        )
    return {key: value for key, value in records[0].items() if key in _PREPARATION} if records else {}


def _load(architecture: str, pretrained: str, like: str | None, device: str) -> tuple[Any, Any, str]:
    """The model in evaluation mode, the preparation of a picture, and the digest of the weights."""
    require("open_clip", "open-clip-torch", INSTALL)
    import open_clip

    if architecture not in open_clip.list_models():
        raise ValueError(f"open_clip has no architecture {architecture!r}; open_clip.list_models() names them")
    if not pretrained:
        raise ValueError(
            f"No pretrained weights: give open-clip:{architecture}:/path/to/weights, or a tag for the path"
        )
    record = _published(architecture, pretrained, like)
    file = pretrained if Path(pretrained).is_file() else open_clip.download_pretrained(record)
    if not file:
        raise ValueError(f"No pretrained weights: open_clip knows no file for {architecture}:{pretrained}")
    try:
        model, _, prepare = open_clip.create_model_and_transforms(
            architecture,
            pretrained=str(file),
            force_quick_gelu=record.get("quick_gelu", False),
            device=device,
            **{f"image_{key}": record.get(key) for key in _PREPARATION},
        )
    except (RuntimeError, KeyError, UnpicklingError) as error:
        raise ValueError(f"{file} does not hold the weights of {architecture}: {str(error).splitlines()[0]}") from error
    return model.eval().requires_grad_(False), prepare, file_digest([Path(file)])


@dataclass(frozen=True)
class _Pixels:
    """A picture, or a list of frames, to (T, 3, H, W) float32."""

    prepare: Any

    def __call__(self, pictures: Image | list[Image]) -> FloatArray:
        images = pictures if isinstance(pictures, list) else [pictures]
        return np.stack([self.prepare(on_white(image)).numpy() for image in images])


def _width(model: Any, embed: Any, example: torch.Tensor) -> int:
    """Width of the embeddings; architectures keep it in different places."""
    with torch.inference_mode():
        return int(embed(example.to(next(model.parameters()).device)).shape[1])


class _Vision(Tower):
    def __init__(
        self,
        architecture: str,
        pretrained: str,
        device: str,
        like: str | None,
        modality: str,
        reader: Any,
        sequence: bool = False,
    ) -> None:
        self._model, prepare, weights = _load(architecture, pretrained, like, device)
        pixels = self._model.visual.preprocess_cfg
        side = pixels["size"] if isinstance(pixels["size"], tuple | list) else (pixels["size"],) * 2
        super().__init__(
            modality=modality,
            dim=_width(self._model, self._model.encode_image, torch.zeros(1, 3, *side)),
            family="clip",
            weights=weights,
            preparation=f"{architecture} {self._model.visual.preprocess_cfg}",
            reader=Prepared(reader, _Pixels(prepare), f"on white, {prepare}"),
            device=device,
            sequence=sequence,
        )

    def _embed(self, rows: Sequence[Any]) -> torch.Tensor:
        return self._model.encode_image(torch.from_numpy(np.stack(rows)).to(self._device))


class OpenClipImage(_Vision):
    """Images to unit vectors (n, D): the vision tower of an open_clip model.

    Args:
        architecture: A name of ``open_clip.list_models()``.
        pretrained: A file, or a tag of ``open_clip.list_pretrained()``.
        device: Where the model runs.
        like: The tag that a file is a copy of, or was trained like.

    Raises ModuleNotFoundError without open_clip, ValueError without weights or with those of another architecture.
    """

    def __init__(
        self, architecture: str, pretrained: str | os.PathLike[str], device: str = "cpu", *, like: str | None = None
    ) -> None:
        super().__init__(architecture, os.fspath(pretrained), device, like, "image", ImageReader())


class OpenClipVideo(_Vision):
    """Videos to (n, D), or (n, T, D): the vision tower of an open_clip model on frames.

    Args:
        architecture, pretrained, device, like: As for :class:`OpenClipImage`.
        fps: Frames a second.
        max_frames: At most so many frames of a video.
        frames: "pooled": the frames' unit vectors are averaged and the mean normalised. "sequence": they are given.
    """

    def __init__(
        self,
        architecture: str,
        pretrained: str | os.PathLike[str],
        device: str = "cpu",
        *,
        like: str | None = None,
        fps: float = 1.0,
        max_frames: int = 64,
        frames: Literal["pooled", "sequence"] = "pooled",
    ) -> None:
        reader = FrameReader(fps, max_frames)
        super().__init__(architecture, os.fspath(pretrained), device, like, "video", reader, frames == "sequence")


class OpenClipText(TextTower):
    """Texts to unit vectors (n, D): the text tower of an open_clip model, with the architecture's own tokenizer.

    Arguments and errors as for :class:`OpenClipImage`.
    """

    def __init__(
        self, architecture: str, pretrained: str | os.PathLike[str], device: str = "cpu", *, like: str | None = None
    ) -> None:
        self._model, _, weights = _load(architecture, os.fspath(pretrained), like, device)
        import open_clip

        self._tokenizer = open_clip.get_tokenizer(architecture)
        del self._model.visual
        if (inner := getattr(self._tokenizer, "tokenizer", None)) is not None:
            table = next(module for module in self._model.modules() if isinstance(module, torch.nn.Embedding))
            fix = "open_clip takes it from the Hugging Face Hub: run once with a network, or fill the cache (HF_HOME)"
            check_vocabulary(len(inner), table.num_embeddings, architecture, fix)
        super().__init__(
            modality="text",
            dim=_width(self._model, self._model.encode_text, self._tokenizer(["width"])),
            family="clip",
            weights=weights,
            preparation=f"{architecture} {self._tokenizer.context_length} tokens",
            reader=TextReader(),
            device=device,
        )

    def _tokens(self, texts: list[str]) -> Sequence[Any]:
        return list(self._tokenizer(texts))

    def _embed(self, rows: Sequence[Any]) -> torch.Tensor:
        return self._model.encode_text(torch.stack(list(rows)).to(self._device))
