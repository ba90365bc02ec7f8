"""Encoders: media or text in, embeddings out.

An encoder of your own is a class with these members; :mod:`diffgap.encoders.registry` finds it as
``module:Class``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from diffgap.data.media import Reader

__all__ = ["Encoded", "Encoder"]

Encoded: TypeAlias = "npt.NDArray[np.float32] | tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]"


class Encoder(Protocol):
    """What every encoder offers.

    Attributes:
        modality: The store's name for what it embeds.
        dim: Width D.
        sequence: Whether an item gives frames (T, D) instead of one vector (D,).
        normalized: Whether the embeddings have norm 1.
        fingerprint: Changes whenever the weights, the preparation of the input or the pooling do, so that embeddings
            of two encoders are never mixed.
        space: ``family:digest`` of the checkpoint whose towers share one space ("clap:3f2a..."), "" for an encoder that
            shares its space with no other. Towers of one family but of different checkpoints look alike and have
            nothing to do with one another.
        reader: Turns a :class:`~diffgap.data.media.Source` into what ``encode`` takes, in a worker process.
    """

    modality: str
    dim: int
    sequence: bool
    normalized: bool
    fingerprint: str
    space: str
    reader: Reader

    def encode(self, batch: Sequence[Any]) -> Encoded:
        """(B, D) float32; for a sequence encoder (B, T, D) and lengths (B,), zeros beyond them.

        ``batch`` holds what ``reader`` gives. An embedding depends on its own item alone, up to the rounding of a
        batched product.
        """
        ...
