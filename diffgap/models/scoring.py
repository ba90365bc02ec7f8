"""Scores between a query of one modality and a gallery of another, with and without the bridge, and what they cost."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from diffgap.models.likelihood import Side
from diffgap.ops.similarity import similarity_topk

Scoring = Literal["cosine", "bridge", "fusion", "rerank"]

#: Candidates of a query that are re-ranked: DiffusionRet's number (arXiv 2303.09867).
CANDIDATES = 32


class Encoded(NamedTuple):
    """What scoring needs of embeddings.

    Attributes:
        own: (N, width) unit vectors, projected; of a sequence, the mean frame's direction.
        bridged: (N, width) unit vectors, bridged into the other modality.
        frames: (N, T, width) of a sequence, which re-ranking reads.
        mask: (N, T) bool, the frames that are there; all if not given.
    """

    own: Tensor
    bridged: Tensor
    frames: Tensor | None = None
    mask: Tensor | None = None

    def side(self, modality: str) -> Side:
        """The embeddings as :func:`diffgap.models.likelihood.information` takes them."""
        return Side(modality, self.own if self.frames is None else self.frames, self.mask)


class Candidates(NamedTuple):
    """The best R gallery items of each query, best first, as far as the score tells them from the rest.

    Attributes:
        indices: (N, R) int64 rows of the gallery.
        scores: (N, R); minus infinity for an item that is no candidate because it ties with one that was left out.
    """

    indices: Tensor
    scores: Tensor


class Cost(NamedTuple):
    """Denoiser calls, one embedding through the network each: for a query, and beforehand for each item."""

    query: int
    item: int


def score_features(query: Encoded, gallery: Encoded, scoring: Scoring, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """Features whose inner product is the score, so that any streaming search can use them.

        cosine   <q, k>
        bridge   (<q^, k> + <q, k^>) / 2                   q^ the query bridged, k^ the gallery item bridged
        fusion   <q, k> + alpha (<q^, k> + <q, k^>) / 2
        rerank   those of fusion, which finds the candidates; see :func:`find_candidates` and :func:`rerank`

    Returns:
        (N, F) and (M, F).
    """
    if scoring == "cosine":
        return query.own, gallery.own
    if scoring == "bridge":
        return torch.cat((query.bridged, query.own), 1) / 2, torch.cat((gallery.own, gallery.bridged), 1)
    if scoring in ("fusion", "rerank"):
        half = alpha / 2
        return (
            torch.cat((query.own + half * query.bridged, half * query.own), 1),
            torch.cat((gallery.own, gallery.bridged), 1),
        )
    raise ValueError(f"scoring is {scoring!r}; use one of {', '.join(get_args(Scoring))}")


def find_candidates(q: Tensor, g: Tensor, count: int = CANDIDATES) -> Candidates:
    """The ``count`` gallery rows of highest inner product with each query, or all of a smaller gallery.

    Items that tie with the first one left out are no candidates: which of them came in would be chance. So a model that
    scores everything alike has none.

    Args:
        q: (N, F) features. g: (M, F).
        count: 1 or more.
    """
    if count < 1:
        raise ValueError(f"candidates is {count}; use 1 or more")
    kept = min(count, len(g))
    scores, indices = similarity_topk(q, g, min(count + 1, len(g)))
    if len(g) > count:
        scores = scores.masked_fill(scores <= scores[:, count:], -torch.inf)
    return Candidates(indices[:, :kept], scores[:, :kept])


def rerank(candidates: Candidates, information: Tensor, beta: float) -> Candidates:
    """The candidates with score ``s + beta * i``: s found them, i is what query and item tell of each other.

    They stay the candidates: all of them rank above all other items, which keep their order.
    """
    return candidates._replace(scores=candidates.scores + beta * information)


def dense_scores(q: Tensor, g: Tensor, candidates: Candidates) -> Tensor:
    """Scores (N, M) that rank as the re-ranked list does, for galleries that fit in memory.

    Items that are no candidate score <q, g>; candidates keep the differences of their scores and are lifted together,
    the lowest of them to 1 above the highest of the others.
    """
    scores = q @ g.T
    valid = candidates.scores.isfinite()
    rest = scores.scatter(1, candidates.indices, scores.gather(1, candidates.indices).masked_fill(valid, -torch.inf))
    highest = rest.amax(1, keepdim=True)
    lowest = candidates.scores.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    lift = torch.where(highest.isfinite() & lowest.isfinite(), highest - lowest + 1, 0.0)
    return rest.scatter(
        1, candidates.indices, torch.where(valid, candidates.scores + lift, rest.gather(1, candidates.indices))
    )


def scoring_cost(
    scoring: Scoring, *, num_samples: int, evaluations: int, guided: bool, candidates: int, levels: int
) -> Cost:
    """Exact cost of a scoring.

        cosine          0 for a query,  0 for an item
        bridge, fusion  K E G,          K E G
        rerank          K E G + S (2 R + 1),  K E G + S

    Args:
        num_samples: K samples of each embedding.
        evaluations: E network evaluations of a sample: the rows of the solver's table.
        guided: Guidance evaluates the network twice (G = 2).
        candidates: R, no more than there are items in the gallery.
        levels: S noise levels of re-ranking.
    """
    if scoring == "cosine":
        return Cost(0, 0)
    bridged = num_samples * evaluations * (2 if guided else 1)
    if scoring != "rerank":
        return Cost(bridged, bridged)
    return Cost(bridged + levels * (2 * candidates + 1), bridged + levels)
