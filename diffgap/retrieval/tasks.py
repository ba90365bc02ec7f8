"""Retrieval tasks: what is searched with what, encoded by a bridge, and the ranks of the right answers.

A direction "text -> audio" has the distinct text embeddings of the split as queries, its distinct audio embeddings as
gallery, and rows of equal group as positives. A row that lacks a modality gives that side nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations, permutations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffgap.data.store import EmbeddingStore
from diffgap.models.bridge import DiffGAP
from diffgap.models.inputs import frame_mask, hidden
from diffgap.models.likelihood import information
from diffgap.models.scoring import Candidates, Encoded, Scoring, find_candidates, rerank, score_features
from diffgap.retrieval.metrics import per_query_metrics, positive_ranks, reranked_positive_ranks


class Items(NamedTuple):
    """Distinct embeddings of one modality, the group of each, and the frames of each where it is a sequence."""

    embeddings: Tensor
    groups: np.ndarray
    lengths: Tensor | None = None

    def pooled(self) -> Tensor:
        """(N, D): the mean over the frames of each sequence, a vector as it is."""
        if self.lengths is None:
            return self.embeddings
        here = frame_mask(self.lengths, self.embeddings.shape[1])
        return hidden(self.embeddings, here).sum(1) / self.lengths[:, None]


class Scores(NamedTuple):
    """Per-query metrics (N,) by name, and each query's group."""

    values: dict[str, Tensor]
    groups: np.ndarray


class Shortlist(NamedTuple):
    """What re-ranking needs of a direction.

    Attributes:
        features: Of queries and gallery; their inner product is the score of the first stage.
        candidates: The best items of each query by it.
        information: (N, R), what each query and each of its candidates tell of one another.
    """

    features: tuple[Tensor, Tensor]
    candidates: Candidates
    information: Tensor


class EncodedPair(NamedTuple):
    """Two modalities of a split: their items, their encodings, and the seconds that bridging each side took."""

    sides: dict[str, Items]
    encoded: dict[str, Encoded]
    seconds: dict[str, float]


def items(store: EmbeddingStore, modality: str, rows: np.ndarray | None = None) -> Items:
    """Embeddings of index rows; by default the distinct ones, each with the group of the first row that holds it."""
    rows = store.unique_rows(modality) if rows is None else rows
    groups = store.column("group")[rows].astype(str)
    return Items(store.embeddings(modality, rows), groups, store.lengths(modality, rows))


def paired_items(store: EmbeddingStore, modalities: tuple[str, ...]) -> Iterator[dict[str, Items]]:
    """The items of every pair of modalities of which some group has both."""
    sides = {name: items(store, name) for name in modalities}
    for a, b in combinations(modalities, 2):
        if np.isin(sides[a].groups, sides[b].groups).any():
            yield {a: sides[a], b: sides[b]}


def codes(*groups: np.ndarray) -> list[Tensor]:
    """Integer codes of group names, equal across the arguments where the names are."""
    flat = np.unique(np.concatenate(groups), return_inverse=True)[1]
    return [torch.from_numpy(part) for part in np.split(flat, np.cumsum([len(g) for g in groups])[:-1])]


def rank(
    queries: Tensor,
    gallery: Tensor,
    query_groups: np.ndarray,
    gallery_groups: np.ndarray,
    candidates: Candidates | None = None,
) -> Scores:
    """Strict-rank metrics of every query that has a positive in the gallery, by inner product.

    With ``candidates``, those of every query stand first, in the order of their own scores.
    """
    kept = np.isin(query_groups, gallery_groups)
    if not kept.any():
        raise ValueError("no query has a positive in the gallery; check the groups of the store")
    ids, rows = codes(query_groups[kept], gallery_groups), torch.from_numpy(kept)
    if candidates is None:
        ranks = positive_ranks(queries[rows], gallery, *ids, normalize=False)
    else:
        chosen = Candidates(candidates.indices[rows], candidates.scores[rows])
        ranks = reranked_positive_ranks(queries[rows], gallery, chosen, *ids)
    return Scores(per_query_metrics(ranks), query_groups[kept])


def encode_pair(model: DiffGAP, sides: Mapping[str, Items], **options: Any) -> EncodedPair:
    """Both sides of a pair of modalities, each bridged to the other; options as in :meth:`DiffGAP.translate`.

    A direction that was not trained (``BridgeSettings.directions``) gives zeros, so that scores use its reverse alone;
    where neither was, nothing is bridged: the embeddings stay as they are.
    """
    a, b = sides
    trained = {a: model.settings.trains(a, b), b: model.settings.trains(b, a)}
    found = EncodedPair(dict(sides), {}, {})
    for name, other in ((a, b), (b, a)):
        start = time.perf_counter()
        side = model.encode(name, sides[name].embeddings, other, **sequence_options(sides, name, other), **options)
        found.seconds[name] = time.perf_counter() - start
        if not trained[name]:
            side = side._replace(bridged=torch.zeros_like(side.own) if any(trained.values()) else side.own)
        found.encoded[name] = side
    return found


def encode_pairs(model: DiffGAP, store: EmbeddingStore, **options: Any) -> list[EncodedPair]:
    """Every pair of modalities of which some group of the store has both; options as in :meth:`DiffGAP.translate`.

    Raises:
        ValueError: There is none.
    """
    pairs = [encode_pair(model, sides, **options) for sides in paired_items(store, model.modalities)]
    if not pairs:
        parts = ", ".join(map(repr, sorted(set(store.column("split").tolist()))))
        raise ValueError(
            f"no group of split {parts} has two of {', '.join(model.modalities)}; check the store's groups and splits"
        )
    return pairs


def directions(pairs: Iterable[EncodedPair]) -> Iterator[tuple[EncodedPair, str, str]]:
    """Each pair either way round: (pair, query, gallery)."""
    for pair in pairs:
        for query, gallery in permutations(pair.sides):
            yield pair, query, gallery


def rank_direction(pair: EncodedPair, query: str, gallery: str, scoring: Scoring, alpha: float = 1.0) -> Scores:
    """:func:`rank` by a scoring of one stage (:func:`score_features`)."""
    features = score_features(pair.encoded[query], pair.encoded[gallery], scoring, alpha)
    return rank(*features, pair.sides[query].groups, pair.sides[gallery].groups)


def shortlist(
    model: DiffGAP, pair: EncodedPair, query: str, gallery: str, *, count: int, alpha: float, seed: int
) -> Shortlist:
    """The best ``count`` items of each query by "fusion", and the likelihood ratio of each."""
    features = score_features(pair.encoded[query], pair.encoded[gallery], "rerank", alpha)
    found = find_candidates(*features, count)
    asked, searched = (pair.encoded[name].side(name) for name in (query, gallery))
    return Shortlist(features, found, information(model.diffusion, asked, searched, found.indices, seed=seed))


def rank_shortlist(pair: EncodedPair, query: str, gallery: str, listed: Shortlist, beta: float) -> Scores:
    """:func:`rank` by "rerank"."""
    reordered = rerank(listed.candidates, listed.information, beta)
    return rank(*listed.features, pair.sides[query].groups, pair.sides[gallery].groups, reordered)


def sequence_options(sides: Mapping[str, Items], source: str, target: str) -> dict[str, Any]:
    """What sampling needs to know of sequences: how many frames the sources have and the samples are to have.

    A sample has the gallery's typical number: that of its true pair would give the answer away.
    """
    lengths = sides[target].lengths
    return {"frames": None if lengths is None else int(lengths.median()), "lengths": sides[source].lengths}


def example_pairs(query_groups: np.ndarray, gallery_groups: np.ndarray) -> tuple[Tensor, Tensor]:
    """Rows of one query and one gallery item of every group that has both: the first of it on each side.

    Raises:
        ValueError: Fewer than two groups have both.
    """
    gallery_first = {group: row for row, group in reversed(list(enumerate(gallery_groups)))}
    query_first = {group: row for row, group in reversed(list(enumerate(query_groups))) if group in gallery_first}
    if len(query_first) < 2:
        raise ValueError(f"the split has {len(query_first)} group with both; retrieval needs two or more")
    rows = sorted((row, gallery_first[group]) for group, row in query_first.items())
    q, g = (torch.tensor(side) for side in zip(*rows, strict=True))
    return q, g
