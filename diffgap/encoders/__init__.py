"""Encoders: media or text in, embeddings out. ``diffgap.encoders.offline`` has the small ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Encoder"]


class Encoder(Protocol):
    """What every encoder offers.

    ``modality`` is the store's name for what it embeds and ``dim`` the width; ``fingerprint`` changes
    whenever the weights, the preparation of the input or the pooling do, so that embeddings of two encoders
    are never mixed.
    """

    modality: str
    dim: int
    fingerprint: str

    def encode(self, batch: Sequence[Any]) -> npt.NDArray[np.float32]:
        """(n, dim) float32 embeddings; each depends on its own item alone."""
        ...
