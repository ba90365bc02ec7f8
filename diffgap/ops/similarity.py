"""Retrieval by inner product, streaming over the gallery: no matrix of all N x M scores ever exists.

``score[i, j] = <q[i], g[j]>``; normalise the rows first for cosines. :func:`similarity_topk` gives the best k
gallery rows of each query, :func:`similarity_ranks` the rank of its best positive, from
:func:`similarity_rank_counts`:

    strict    above + tied + 1                 every tie counts against the positive
    average   above + tied / (best + 1) + 1    expected rank when ties are broken at random

where ``above`` and ``tied`` count the non-positives that score more than, and the same as, the best positive,
and ``best`` the positives that share the best score. A model that maps everything to one point has every
score tied, and so ranks at chance: (M + 1) / 2 on average with one positive, M strictly.

A NaN score counts as minus infinity: it ranks last and never above a number. Not differentiable: inputs are
detached.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from diffgap.ops import _dispatch
from diffgap.ops._contrastive import DTYPES, check_embeddings, check_integers, compute_dtype
from diffgap.ops._native import CPU_MISSING, TRITON_MISSING

Ties = Literal["strict", "average"]
Positives = Tensor | tuple[Tensor, Tensor]

# A tile of scores is at most this large: 8 MiB in float64.
_QUERY_ROWS = 256
_GALLERY_ROWS = 4096


def similarity_topk(q: Tensor, g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k gallery rows of highest inner product with each query, best first.

    Args:
        q: (N, D) queries; float32, float16, bfloat16 or float64.
        g: (M, D) gallery, same dtype and device.
        k: 1 <= k <= M.

    Returns:
        values: (N, k) scores in descending order; float32, or float64 for float64 inputs.
        indices: (N, k) int64 rows of ``g``. Exact; of equal scores the lower index comes first, so equal
            gallery rows keep their order. (Float64 scores of equal rows may differ in the last bit.)

    Raises:
        ValueError: shapes do not fit together or k is out of range.
        TypeError: wrong dtypes or types.
    """
    check_embeddings("similarity_topk", ("q", "g"), q, g)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"similarity_topk: k must be an int, got {type(k).__name__}")
    if not 1 <= k <= g.shape[0]:
        raise ValueError(f"similarity_topk: k must be between 1 and the gallery's {g.shape[0]} rows, got {k}")
    q, g = q.detach(), g.detach()
    if _dispatch.choose("similarity_topk", q) == "eager":
        return similarity_topk_reference(q, g, k)
    return _topk_op(q, g, k)


def similarity_ranks(q: Tensor, g: Tensor, positives: Positives, *, ties: Ties = "strict") -> Tensor:
    """Rank of each query's best positive among all gallery rows by inner product; 1 is best.

    Args:
        q: (N, D) queries; float32, float16, bfloat16 or float64.
        g: (M, D) gallery, same dtype and device.
        positives: (N,) int64, the gallery row that answers each query; or a pair ``(ids_q, ids_g)`` of int64
            (N,) and (M,): every gallery row of the query's id answers it. Other positives never count against
            the best one.
        ties: ``"strict"`` or ``"average"``, see the module's formulas.

    Returns:
        (N,): int64 for ``"strict"``, float64 for ``"average"``.

    Raises:
        ValueError: shapes do not fit together, an index out of range, a query without a positive, unknown
            ``ties``. (Inside ``torch.compile`` values are not looked at, and a query without a positive has
            rank M + 1.)
        TypeError: wrong dtypes or types.
    """
    if ties not in get_args(Ties):
        raise ValueError(f"similarity_ranks: ties must be one of {', '.join(get_args(Ties))}, got {ties!r}")
    above, tied, best = similarity_rank_counts(q, g, positives)
    return above + tied + 1 if ties == "strict" else above + tied / (best.double() + 1) + 1


def similarity_rank_counts(q: Tensor, g: Tensor, positives: Positives) -> tuple[Tensor, Tensor, Tensor]:
    """``above``, ``tied`` and ``best`` of the module's formulas, each (N,) int64: both kinds of rank from one
    pass.

    Arguments and errors as in :func:`similarity_ranks`.
    """
    check_embeddings("similarity_ranks", ("q", "g"), q, g)
    if isinstance(positives, tuple):
        if len(positives) != 2:
            raise ValueError(f"similarity_ranks: positives must be a pair (ids_q, ids_g), got {len(positives)} items")
        ids_q, ids_g = positives
        check_integers("similarity_ranks", "ids_q", ids_q, q)
        check_integers("similarity_ranks", "ids_g", ids_g, g)
        _check_each(torch.isin(ids_q, ids_g), ids_q, "has id {}, which no gallery row has")
    else:
        check_integers("similarity_ranks", "positives", positives, q)
        in_range = (positives >= 0) & (positives < g.shape[0])
        _check_each(in_range, positives, f"has its positive at {{}}, outside the gallery's {g.shape[0]} rows")
        # An index is an id that only one gallery row has.
        ids_q, ids_g = positives, torch.arange(g.shape[0], device=g.device)
    q, g = q.detach(), g.detach()
    if _dispatch.choose("similarity_ranks", q) == "eager":
        return similarity_ranks_reference(q, g, ids_q, ids_g)
    return _ranks_op(q, g, ids_q, ids_g)


def _check_each(valid: Tensor, values: Tensor, problem: str) -> None:
    """Raise with the first query that is not ``valid``; reads the values, so not while compiling or under vmap."""
    if not (torch.compiler.is_compiling() or _dispatch.transformed() or valid.all()):
        row = int(valid.logical_not().nonzero()[0])
        raise ValueError(f"similarity_ranks: query {row} {problem.format(int(values[row]))}")


def _scores(q: Tensor, g: Tensor) -> Tensor:
    """A tile of scores, NaN as -inf.

    Multiplied in float64 and rounded once: a BLAS may sum equal rows in another order depending on where they
    stand in the tile, and their float32 scores would then differ in the last bit instead of tying.
    """
    scores = (q.double() @ g.double().T).to(compute_dtype(q))
    return scores.masked_fill(scores.isnan(), -torch.inf)


def _tiles(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, rows, size))


def similarity_topk_reference(q: Tensor, g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The definition: merge each tile of scores into the best k so far with a stable sort."""
    # Lists, since vmap cannot write its results into a tensor made here.
    values = [q.new_empty((0, k), dtype=compute_dtype(q))]
    indices = [torch.empty((0, k), dtype=torch.int64, device=q.device)]
    for queries in _tiles(q.shape[0], _QUERY_ROWS):
        best = values[0].new_empty((q[queries].shape[0], 0))
        best_index = indices[0].new_empty(best.shape)
        for columns in _tiles(g.shape[0], _GALLERY_ROWS):
            tile = _scores(q[queries], g[columns])
            tile_index = torch.arange(g.shape[0], device=g.device)[columns].expand(tile.shape)
            # Earlier, hence lower, indices stand first, and a stable sort leaves them first among equals.
            best, order = torch.cat([best, tile], dim=1).sort(dim=1, descending=True, stable=True)
            best_index = torch.cat([best_index, tile_index], dim=1).gather(1, order)
            best, best_index = best[:, :k], best_index[:, :k]
        values.append(best)
        indices.append(best_index)
    return torch.cat(values), torch.cat(indices)


def similarity_ranks_reference(q: Tensor, g: Tensor, ids_q: Tensor, ids_g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: find the best positive's score in one pass over the gallery, compare with it in a
    second."""
    counts = [ids_q.new_zeros((3, 0))]
    for queries in _tiles(q.shape[0], _QUERY_ROWS):
        rows, ids = q[queries], ids_q[queries, None]
        target = rows.new_full((rows.shape[0], 1), -torch.inf, dtype=compute_dtype(q))
        for columns in _tiles(g.shape[0], _GALLERY_ROWS):
            scores = _scores(rows, g[columns]).masked_fill(ids != ids_g[columns], -torch.inf)
            target = torch.maximum(target, scores.amax(dim=1, keepdim=True))
        count = ids_q.new_zeros((3, rows.shape[0]))
        for columns in _tiles(g.shape[0], _GALLERY_ROWS):
            scores, positive = _scores(rows, g[columns]), ids == ids_g[columns]
            outcomes = (
                (scores > target) & ~positive,
                (scores == target) & ~positive,
                (scores == target) & positive,
            )
            count = count + torch.stack([outcome.sum(dim=1) for outcome in outcomes])
        counts.append(count)
    above, tied, best = torch.cat(counts, dim=1).unbind()
    return above.clone(), tied.clone(), best.clone()


def _topk_fake(q: Tensor, g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0], k)
    return q.new_empty(shape, dtype=compute_dtype(q)), q.new_empty(shape, dtype=torch.int64)


def _ranks_fake(q: Tensor, g: Tensor, ids_q: Tensor, ids_g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(ids_q), torch.empty_like(ids_q), torch.empty_like(ids_q)


_TRITON = _dispatch.Native("Triton", DTYPES, TRITON_MISSING)
_dispatch.declare("similarity_topk", cpu=_dispatch.Native("C++", DTYPES, CPU_MISSING), cuda=_TRITON)
_topk_op = _dispatch.define(
    "similarity_topk(Tensor q, Tensor g, int k) -> (Tensor, Tensor)", similarity_topk_reference, _topk_fake
)
_dispatch.declare("similarity_ranks", cpu=_dispatch.Native("C++", DTYPES, CPU_MISSING), cuda=_TRITON)
_ranks_op = _dispatch.define(
    "similarity_ranks(Tensor q, Tensor g, Tensor ids_q, Tensor ids_g) -> (Tensor, Tensor, Tensor)",
    similarity_ranks_reference,
    _ranks_fake,
)
_dispatch.implement(_TRITON, "diffgap.kernels.similarity", similarity_topk="topk", similarity_ranks="ranks")
