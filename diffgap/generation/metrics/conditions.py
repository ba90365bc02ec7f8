"""What clips were generated from, as vectors in the space of an audio tower."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffgap.encoders import Encoder
from diffgap.generation.metrics._rows import as_rows

__all__ = ["Conditions"]


@dataclass(frozen=True, eq=False)
class Conditions:
    """A condition vector for each clip, by the clip's name.

    Score a bridged and a plain condition against the *same* conditions, the caption's own embedding say: the one that
    the sound was made from is for the generator.

    Attributes:
        vectors: Name of a clip -> (D,).
        space: That of the encoder (``family:digest``), or the fingerprint of the audio encoder whose space a bridge
            leads to; it must be the backbone's.
        source: Fingerprint of what embedded them.
    """

    vectors: Mapping[str, npt.NDArray[Any]]
    space: str
    source: str

    def __post_init__(self) -> None:
        if not self.vectors:
            raise ValueError("conditions are empty")
        if not self.space or not self.source:
            raise ValueError("conditions need a space and a source: the audio space they live in, and their encoder")
        widths = {np.shape(vector) for vector in self.vectors.values()}
        if len(widths) > 1:
            raise ValueError(f"condition vectors must be of one shape (D,); got {sorted(widths)}")
        as_rows("conditions", np.stack(list(self.vectors.values())))

    @classmethod
    def encode(cls, items: Mapping[str, Any], encoder: Encoder) -> Conditions:
        """Embeds a text (or what else ``encoder`` takes) for each clip's name.

        Raises ValueError for an encoder of sequences, or one that shares its space with no audio tower.
        """
        if encoder.sequence:
            raise ValueError("encoder gives sequences; conditions need one vector each")
        if not encoder.space:
            raise ValueError(
                f"encoder {encoder.fingerprint} shares its space with no audio tower; use CLAP's text tower"
            )
        embedded = encoder.encode(list(items.values()))
        return cls(dict(zip(items, embedded, strict=True)), encoder.space, encoder.fingerprint)

    @property
    def digest(self) -> str:
        """Of names, vectors and their source."""
        content = hashlib.sha256(f"{self.space} {self.source}".encode())
        for name in sorted(self.vectors):
            content.update(name.encode() + b"\0" + np.asarray(self.vectors[name], dtype=np.float64).tobytes())
        return content.hexdigest()
