"""The weights of scores, chosen on validation data: one alpha and one beta serve all directions of a run.

On 60 validation concepts the best weight of a single direction was anything from 0 to 4, and what the bridge gains was
lost in that choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from diffgap.data.store import EmbeddingStore
from diffgap.models.bridge import DiffGAP
from diffgap.retrieval.options import ScoringOptions
from diffgap.retrieval.tasks import (
    EncodedPair,
    Scores,
    directions,
    encode_pairs,
    rank_direction,
    rank_shortlist,
    shortlist,
)

#: Fusion weights tried on validation data; 0 is the plain cosine.
ALPHAS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)

#: Weights of the likelihood ratio tried on validation data; 0 leaves the candidates in their order.
BETAS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)


class Weights(NamedTuple):
    """Weights of the bridged cosines and of the likelihood ratio; None where no scoring asks for it."""

    alpha: float
    beta: float | None


def given_weights(options: ScoringOptions) -> Weights | None:
    """The weights, where all that the scorings ask for are given."""
    reranks = "rerank" in options.scorings
    if options.alpha is None or (reranks and options.beta is None):
        return None
    return Weights(options.alpha, options.beta if reranks else None)


def choose_weights(
    model: DiffGAP, val: EmbeddingStore, options: ScoringOptions, bridging: Mapping[str, Any]
) -> Weights:
    """The weights that are given, and the best on validation data for those that are not.

    Args:
        val: The validation split.
        bridging: How embeddings are bridged, as options of :meth:`DiffGAP.translate`; its seed is re-ranking's too.

    Raises:
        ValueError: A weight is to be chosen, and no group of ``val`` has two modalities.
    """
    given = given_weights(options)
    if given is not None:
        return given
    pairs = encode_pairs(model, val, **bridging)
    alpha = choose_alpha(pairs) if options.alpha is None else options.alpha
    if "rerank" not in options.scorings:
        return Weights(alpha, None)
    if options.beta is not None:
        return Weights(alpha, options.beta)
    return Weights(alpha, choose_beta(model, pairs, count=options.candidates, alpha=alpha, seed=bridging["seed"]))


def choose_alpha(pairs: Sequence[EncodedPair]) -> float:
    """The fusion weight with the best MRR, mean over all directions."""
    return max(ALPHAS, key=lambda alpha: _mean_mrr(rank_direction(*one, "fusion", alpha) for one in directions(pairs)))


def choose_beta(model: DiffGAP, pairs: Sequence[EncodedPair], *, count: int, alpha: float, seed: int) -> float:
    """The weight of the likelihood ratio with the best MRR, mean over all directions, given alpha."""
    lists = [(one, shortlist(model, *one, count=count, alpha=alpha, seed=seed)) for one in directions(pairs)]
    return max(BETAS, key=lambda beta: _mean_mrr(rank_shortlist(*one, listed, beta) for one, listed in lists))


def _mean_mrr(scores: Iterable[Scores]) -> float:
    found = [float(each.values["MRR"].mean()) for each in scores]
    return sum(found) / len(found)
