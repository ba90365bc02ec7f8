"""What makes sound of an embedding: the contract between the bridge and a generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from diffgap.generation.space import AudioSpace

__all__ = ["AudioSpace", "Generator"]

FloatArray = npt.NDArray[np.float32]


class Generator(Protocol):
    """Unit vectors of an audio-side space in, waveforms out.

    Attributes:
        sample_rate: Of what comes out, in Hz.
        dim: Width of a condition.
        seconds: Length of a sound where none is asked for.
    """

    sample_rate: int
    dim: int
    seconds: float

    def check(self, space: AudioSpace) -> None:
        """Raises ValueError, naming both, if conditions of ``space`` are not what this generator was trained on."""
        ...

    def generate(
        self,
        conditions: Tensor | None,
        seconds: Sequence[float],
        *,
        num_samples: int = 1,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        captions: Sequence[str] | None = None,
    ) -> list[list[FloatArray]]:
        """For each of ``seconds`` (B of them) ``num_samples`` waveforms (n,) in -1..1.

        A sound depends on its condition, length, seed and number only, not on what else is generated with it.

        Args:
            conditions: (B, dim) unit vectors; None for sounds of no condition.
            seconds: Length of each.
            steps, guidance_scale: The generator's own by default.
            seed: Of the noise, one for all or one for each.
            captions: (B,) the queries in words, for a generator that reads them beside the conditions (AudioLDM2).

        Raises:
            ValueError: Another shape, or a length that is not positive or that the generator cannot make.
        """
        ...
