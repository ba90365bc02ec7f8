"""Scores between a query of one modality and a gallery of another, with and without the bridge."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Scoring = Literal["cosine", "bridge", "fusion"]


class Encoded(NamedTuple):
    """Unit vectors (N, width) of embeddings: ``own``, projected, and ``bridged`` into the other modality."""

    own: Tensor
    bridged: Tensor


def score_features(query: Encoded, gallery: Encoded, scoring: Scoring, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """Features whose inner product is the score, so that any streaming search can use them.

        cosine   <q, k>
        bridge   (<q^, k> + <q, k^>) / 2                   q^ the query bridged, k^ the gallery item bridged
        fusion   <q, k> + alpha (<q^, k> + <q, k^>) / 2

    Returns:
        (N, F) and (M, F).
    """
    if scoring == "cosine":
        return query.own, gallery.own
    if scoring == "bridge":
        return torch.cat((query.bridged, query.own), 1) / 2, torch.cat((gallery.own, gallery.bridged), 1)
    if scoring == "fusion":
        half = alpha / 2
        return (
            torch.cat((query.own + half * query.bridged, half * query.own), 1),
            torch.cat((gallery.own, gallery.bridged), 1),
        )
    raise ValueError(f"scoring is {scoring!r}; use one of {', '.join(get_args(Scoring))}")
