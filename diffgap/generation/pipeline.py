"""From a query to sound: encoder, bridge, generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from diffgap.data.media import Source
from diffgap.encoders import Encoder
from diffgap.generation.generator import Generator
from diffgap.generation.space import AudioSpace

__all__ = ["How", "condition", "embed_query", "generate"]

FloatArray = npt.NDArray[np.float32]
How = Literal["bridged", "sampled", "raw", "none"]


def embed_query(encoder: Encoder, source: Source, space: AudioSpace) -> tuple[Tensor, Tensor | None]:
    """Reads and embeds one query: (1, D) or (1, T, D), and the length of the latter.

    Args:
        encoder: Of the query's modality.
        source: The query.
        space: Where it is to be brought.

    Raises:
        MediaError: It cannot be read.
        ValueError: The encoder is not the one that the bridge was trained on.
    """
    known = space.encoder if encoder.modality == space.modality else space.others.get(encoder.modality, "")
    if known and known != encoder.fingerprint:
        trained = "the conditions are" if space.bridge is None else "the bridge was trained on"
        raise ValueError(
            f"the {encoder.modality} encoder has fingerprint {encoder.fingerprint or 'unknown'}, but {trained} "
            f"embeddings of {known}; name that encoder"
        )
    if space.bridge is not None:
        space.bridge.inputs.known(encoder.modality)
        dim = space.bridge.inputs.dims[encoder.modality]
        if encoder.dim != dim:
            raise ValueError(f"the {encoder.modality} encoder gives width {encoder.dim}; the bridge takes {dim}")
    encoded = encoder.encode([encoder.reader(source)])
    values, lengths = encoded if isinstance(encoded, tuple) else (encoded, None)
    return torch.from_numpy(np.ascontiguousarray(values)), None if lengths is None else torch.from_numpy(lengths)


@torch.no_grad()
def condition(
    space: AudioSpace,
    how: How,
    modality: str,
    x: Tensor,
    lengths: Tensor | None = None,
    *,
    num_samples: int = 1,
    seed: int = 0,
) -> Tensor | None:
    """What to generate from: (B, K, D) unit vectors, or None.

    Args:
        space: Where to.
        how: "bridged", the bridge's translation q^ (the mean direction of what the query may sound like); "sampled", K
            draws of it; "raw", the query's own vector q in the contrastive space, as a text drives AudioLDM; "none".
        modality: Of the query.
        x: (B, D) or (B, T, D) embeddings of the queries.
        lengths: (B,) frames of sequences.
        num_samples: K.
        seed: Of the bridge's noise.

    Raises:
        ValueError: Bridging is asked for, and there is no bridge, or the query is on the audio side already.
    """
    if how == "none":
        return None
    bridge, target = space.bridge, space.modality
    if how in ("bridged", "sampled"):
        if bridge is None:
            raise ValueError(f"how is {how!r}, but there is no bridge; name one, or use 'raw'")
        if modality == target:
            raise ValueError(f"how is {how!r}, but the query is {modality}, the bridge's target; use 'raw'")
        options: dict[str, Any] = {"lengths": lengths, "seed": seed, modality: x}
        if how == "sampled":
            drawn = bridge.sample(target, num_samples=num_samples, **options)
            return F.normalize(drawn.mean(2), dim=-1) if drawn.dim() == 4 else drawn
        z = bridge.translate(target, **options)
        z = F.normalize(z.mean(1), dim=-1) if z.dim() == 3 else z
    else:
        own = AudioSpace(bridge, modality, "")
        z = own.project(x, lengths)
    return z.unsqueeze(1).expand(-1, num_samples, -1)


def generate(
    generator: Generator,
    conditions: Tensor | None,
    seconds: Sequence[float],
    *,
    num_samples: int = 1,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    captions: Sequence[str] | None = None,
) -> list[list[FloatArray]]:
    """B x K waveforms of conditions (B, K, D), or of none. Sound k of row i has noise of its own."""
    count = len(seconds)
    each = [one for one in seconds for _ in range(num_samples)]
    said = None if captions is None else [caption for caption in captions for _ in range(num_samples)]
    waves = generator.generate(
        None if conditions is None else conditions.flatten(0, 1), each, steps=steps, guidance_scale=guidance_scale,
        seed=[seed + number for number in range(count * num_samples)], captions=said,
    )  # fmt: skip
    return [[one[0] for one in waves[row * num_samples : (row + 1) * num_samples]] for row in range(count)]
