"""The contrastive part of a bridge's loss: over every pair of modalities, and over the rows of all processes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from diffgap.models.inputs import pool
from diffgap.models.objective import frames_present
from diffgap.ops import clip_loss, siglip_loss
from diffgap.ring_loss import ring_clip_loss, ring_siglip_loss


def contrastive_loss(
    kind: Literal["clip", "siglip"],
    z: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    scale: Tensor,
    bias: Tensor,
    ids: Tensor | None,
    *,
    across_ranks: bool,
) -> Tensor:
    """Mean over the pairs of modalities of the loss of the rows that have both; 0 for a pair that no row has.

    Sequences are pooled over their frames.

    Args:
        kind: Softmax or sigmoid loss.
        z: Unit embeddings by modality, (B, width) or (B, T, width).
        masks: By modality, (B,) or (B, T) bool, what is there; all of it for a modality without one.
        scale: Logit scale, one element.
        bias: Logit bias, one element; of the sigmoid loss only.
        ids: (B,) int64; rows of equal id are mutual positives. All different if ``None``.
        across_ranks: Against the rows of all processes, by an exact ring: this process's share of the loss of one
            that holds them all, which is the mean of the shares (:mod:`diffgap.ring_loss`). Collective.
    """
    pooled = {name: pool(x, masks.get(name)) for name, x in z.items()}
    present = {name: frames_present(mask) for name, mask in masks.items()}
    losses = []
    for first, second in combinations(z, 2):
        a, b, own = pooled[first], pooled[second], ids
        here = [present[name] for name in (first, second) if name in present]
        if here:
            # Left out and not masked: a row that lacks one of the two is no negative of the others either.
            rows = torch.stack(here).all(0).nonzero().squeeze(1)
            a, b, own = a[rows], b[rows], None if ids is None else ids[rows]
        if kind == "clip":
            clip = ring_clip_loss if across_ranks else clip_loss
            losses.append(clip(a, b, scale, ids_a=own, ids_b=own))
        else:
            siglip = ring_siglip_loss if across_ranks else siglip_loss
            losses.append(siglip(a, b, scale, bias, ids_a=own, ids_b=own))
    return torch.stack(losses).mean()
