"""Retrieval metrics from ranks, with any number of positives a query.

A query's positives are the gallery rows of its id. Sort its positives by score, best first; the j-th has rank

    rank_j = j + (non-positives that score more) + ties                                            1-based

where a tie with a non-positive counts whole (``ties="strict"``) or as the expected rank under random order
(``ties="average"``), so that a model that maps everything to one point scores at chance or below. Per query,
with P positives:

    R@k = [rank_1 <= k]     MRR = 1 / rank_1     mAP@10 = sum_j [rank_j <= 10] j / rank_j / min(P, 10)

The AudioCaps and Clotho protocol (LAION-CLAP ``evaluate_clotho_audiocaps``) is the case of five captions a
clip: text to audio has one positive a query; audio to text takes the best of five ranks for R@k, and all five
for mAP@10.
"""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from diffgap.models.scoring import Candidates
from diffgap.ops.similarity import Ties, similarity_rank_counts

__all__ = [
    "METRICS",
    "caption_retrieval",
    "per_query_metrics",
    "positive_ranks",
    "positive_ranks_from_scores",
    "reranked_positive_ranks",
    "retrieval_metrics",
]

#: Metrics that are means over queries; ``retrieval_metrics`` adds "MedR" and "MeanR".
METRICS = ("R@1", "R@5", "R@10", "mAP@10", "MRR")
_AP_DEPTH = 10

Ids = Tensor | np.ndarray[Any, Any]


def positive_ranks(
    queries: Tensor,
    gallery: Tensor,
    query_ids: Ids,
    gallery_ids: Ids,
    *,
    ties: Ties = "strict",
    normalize: bool = True,
) -> Tensor:
    """Rank of every positive of every query by cosine, or by inner product without ``normalize``.

    No N x M matrix is kept; the cost is two passes over the gallery for every (query, positive) pair.

    Args:
        queries: (N, D) floats. gallery: (M, D), same dtype and device.
        query_ids: (N,) integers. gallery_ids: (M,). Equal ids are positives.

    Returns:
        (N, P) float64, each row ascending, P the most positives a query has; rows with fewer end in inf.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, a query without a positive, unknown ties.
    """
    _check_ties(ties)
    if queries.dim() != 2 or gallery.dim() != 2 or queries.shape[1] != gallery.shape[1]:
        shapes = f"{tuple(queries.shape)} and {tuple(gallery.shape)}"
        raise ValueError(f"queries and gallery must be (N, D) and (M, D); got {shapes}")
    for name, values in (("queries", queries), ("gallery", gallery)):
        _check_finite(name, values)
    pairs, positives, column = _pairs(query_ids, gallery_ids, len(queries), len(gallery))
    if normalize:
        queries, gallery = (torch.nn.functional.normalize(x, dim=1) for x in (queries, gallery))
    device = queries.device
    above, tied, _ = similarity_rank_counts(queries[pairs.to(device)], gallery, positives.to(device))
    return _sorted_ranks(above.cpu(), tied.cpu(), pairs, column, len(queries), ties)


def positive_ranks_from_scores(scores: Tensor, query_ids: Ids, gallery_ids: Ids, *, ties: Ties = "strict") -> Tensor:
    """``positive_ranks`` of a given (N, M) score matrix, higher is better."""
    _check_ties(ties)
    if scores.dim() != 2:
        raise ValueError(f"scores must be (N, M); got {tuple(scores.shape)}")
    _check_finite("scores", scores)
    pairs, positives, column = _pairs(query_ids, gallery_ids, *scores.shape)
    scores = scores.cpu()
    above, tied = torch.empty_like(pairs), torch.empty_like(pairs)
    for part in torch.arange(len(pairs)).split(1024):
        rows = scores[pairs[part]]
        target = rows.gather(1, positives[part, None])
        above[part], tied[part] = (rows > target).sum(1), (rows == target).sum(1) - 1
    return _sorted_ranks(above, tied, pairs, column, len(scores), ties)


def reranked_positive_ranks(
    queries: Tensor, gallery: Tensor, candidates: Candidates, query_ids: Ids, gallery_ids: Ids, *, ties: Ties = "strict"
) -> Tensor:
    """``positive_ranks``, by inner product, of lists whose first places the candidates share by their own scores.

    A positive among the candidates competes with them alone, any other with the whole gallery by inner product.

    Args:
        queries, gallery, query_ids, gallery_ids: As in :func:`positive_ranks`.
        candidates: Of the same queries, from :func:`diffgap.models.scoring.find_candidates` of the same two.

    Raises:
        ValueError: As :func:`positive_ranks`; or a candidate's score is NaN.
    """
    _check_ties(ties)
    for name, values in (("queries", queries), ("gallery", gallery)):
        _check_finite(name, values)
    if candidates.scores.isnan().any():
        raise ValueError("candidates have NaN scores; check the model that re-ranked them")
    pairs, positives, column = _pairs(query_ids, gallery_ids, len(queries), len(gallery))
    above, tied, _ = similarity_rank_counts(queries[pairs], gallery, positives)
    indices, scores = candidates.indices[pairs], candidates.scores[pairs]
    own = scores.masked_fill(indices != positives[:, None], -torch.inf).amax(1, keepdim=True)
    inside = own.squeeze(1).isfinite()
    above = torch.where(inside, (scores > own).sum(1), above)
    tied = torch.where(inside, (scores == own).sum(1) - 1, tied)
    return _sorted_ranks(above, tied, pairs, column, len(queries), ties)


def per_query_metrics(ranks: Tensor) -> dict[str, Tensor]:
    """Each of ``METRICS`` as (N,) float64, and "rank", that of the best positive, from ``positive_ranks``.

    Values lie in 0..1; their means are the metrics, and the bootstrap resamples them.
    """
    best = ranks[:, 0]
    recalls = {f"R@{k}": (best <= k).double() for k in (1, 5, 10)}
    order = torch.arange(1, ranks.shape[1] + 1, dtype=torch.float64)
    precision = torch.where(ranks <= _AP_DEPTH, order / ranks, 0.0)
    positives = ranks.isfinite().sum(1).clamp_max(_AP_DEPTH)
    return {**recalls, "mAP@10": precision.sum(1) / positives, "MRR": 1 / best, "rank": best}


def retrieval_metrics(ranks: Tensor) -> dict[str, float]:
    """``METRICS`` in 0..1, and the median and mean rank of the best positive, "MedR" and "MeanR"."""
    if not len(ranks):
        raise ValueError("ranks has no queries; the split or the modality is empty")
    values = per_query_metrics(ranks)
    best = values.pop("rank")
    means = {name: float(value.mean()) for name, value in values.items()}
    return {**means, "MedR": float(best.quantile(0.5)), "MeanR": float(best.mean())}


def caption_retrieval(audio: Tensor, text: Tensor, clip: Ids, *, ties: Ties = "strict") -> dict[str, dict[str, float]]:
    """The AudioCaps/Clotho protocol: (N, D) clips, (C, D) captions, each caption with the row of its clip.

    Returns ``retrieval_metrics`` under "text_to_audio" (every caption a query, N in the gallery) and
    "audio_to_text" (every clip a query, C captions in the gallery, best of its captions for R@k). Captions a
    clip may differ in number, but each clip needs one. State N beside the numbers: it moves R@1.
    """
    rows, clips = torch.as_tensor(clip), torch.arange(len(audio))
    if rows.shape != (len(text),) or (len(rows) and (rows.min() < 0 or rows.max() >= len(audio))):
        raise ValueError(f"clip must give each of the {len(text)} captions a row of the {len(audio)} clips")
    to_audio = positive_ranks(text, audio, rows, clips, ties=ties)
    to_text = positive_ranks(audio, text, clips, rows, ties=ties)
    return {"text_to_audio": retrieval_metrics(to_audio), "audio_to_text": retrieval_metrics(to_text)}


def _check_ties(ties: str) -> None:
    if ties not in get_args(Ties):
        raise ValueError(f"ties must be one of {', '.join(get_args(Ties))}; got {ties!r}")


def _check_finite(name: str, values: Tensor) -> None:
    bad = int((~values.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {len(values)} rows hold NaN or infinite values; drop them")


def _pairs(query_ids: Ids, gallery_ids: Ids, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every (query, positive) pair, by query: query row, gallery row, number within the query."""
    codes: list[Tensor] = []
    for name, ids, count in (("query_ids", query_ids, n), ("gallery_ids", gallery_ids, m)):
        values = torch.as_tensor(ids).cpu()
        if values.shape != (count,) or values.is_floating_point():
            got = f"{values.dtype} {tuple(values.shape)}"
            raise ValueError(f"{name} must be integers of shape ({count},); got {got}")
        codes.append(values.to(torch.int64))
    sorted_ids, order = codes[1].sort(stable=True)
    first = torch.searchsorted(sorted_ids, codes[0])
    matches = torch.searchsorted(sorted_ids, codes[0], right=True) - first
    lonely = int((matches == 0).sum())
    if lonely:
        raise ValueError(f"{lonely} of {n} queries have no positive in the gallery; drop them")
    pairs = torch.arange(n).repeat_interleave(matches)
    column = torch.arange(len(pairs)) - (matches.cumsum(0) - matches)[pairs]
    return pairs, order[first[pairs] + column], column


def _sorted_ranks(above: Tensor, tied: Tensor, pairs: Tensor, column: Tensor, n: int, ties: Ties) -> Tensor:
    """Ranks (n, P) from the rows above and tied with each positive, *other positives included*.

    Positives with equal ``above`` stand in one block of ties, size m, with t positives. Strictly these take
    its last t places; in random order the i-th of them is expected at i (m + 1) / (t + 1).
    """
    width = int(column.max()) + 1 if len(column) else 1
    start = torch.full((n, width), torch.inf, dtype=torch.float64)
    size = torch.zeros(n, width, dtype=torch.float64)
    start[pairs, column], size[pairs, column] = above.double(), tied.double() + 1
    start, order = start.sort(dim=1)
    size = size.gather(1, order)
    place = torch.arange(width, dtype=torch.float64).expand(n, width).contiguous()
    first = torch.searchsorted(start, start).double()
    mates = torch.searchsorted(start, start, right=True).double() - first
    number = place - first + 1
    ranks = start + (size - mates + number if ties == "strict" else number * (size + 1) / (mates + 1))
    return ranks.where(start.isfinite(), torch.inf)
