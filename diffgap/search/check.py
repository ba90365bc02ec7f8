"""How much of the exact answer an approximate index finds, and how fast: measured, for choosing nprobe and efSearch."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from diffgap.search.gallery import Gallery
from diffgap.search.index import SearchIndex
from diffgap.search.vectors import ExactVectors, FaissOptions, FaissVectors, Vectors, write_vectors


class Measured(NamedTuple):
    """One way to search: what it is, its recall of the exact nearest ``k``, and queries per second of wall-clock."""

    name: str
    recall: float
    queries_per_second: float


def check_index(index: SearchIndex, *, queries: int = 256, k: int = 10, seed: int = 0) -> tuple[str, list[Measured]]:
    """Recall@k of an index against exact search, and the speed of both, on queries drawn from the store.

    The queries are rows of the modalities that are bridged to the items, fused; where there are none, items themselves
    (each then has itself as its nearest). Recall is by score: an item that ties with the exact k-th counts as found.

    Returns:
        What the queries were, and a row for exact search and for each of four settings of a faiss index: a quarter of
        its own, its own, 4 and 16 times as much.
    """
    what, drawn = _draw(index, queries, seed)
    with tempfile.TemporaryDirectory() as folder:
        if index.meta.kind == "exact":
            exact: Vectors = index.vectors
        else:
            gallery = Gallery(index.store, index.meta.modality, index.bridge)
            write_vectors("exact", Path(folder), gallery, FaissOptions())
            exact = ExactVectors(Path(folder))
        best, rate = _timed(exact, drawn, k)
        found = [Measured("exact", 1.0, rate)]
        if isinstance(index.vectors, FaissVectors):
            name, own, most = index.vectors.effort
            for value in sorted({max(1, min(most, own * factor // 4)) for factor in (1, 4, 16, 64)}):
                index.vectors.set_effort(value)
                scores, rate = _timed(index.vectors, drawn, k)
                found.append(Measured(f"{index.meta.kind}, {name} {value}", _recall(scores, best), rate))
            index.vectors.set_effort(own)
    return what, found


def check_table(found: list[Measured], k: int = 10) -> Table:
    """The measurements for a terminal."""
    table = Table()
    for column in ("search", f"recall@{k}", "queries/s"):
        table.add_column(column, justify="left" if column == "search" else "right")
    for one in found:
        table.add_row(one.name, f"{one.recall:.3f}", f"{one.queries_per_second:,.0f}")
    return table


def _draw(index: SearchIndex, count: int, seed: int) -> tuple[str, Tensor]:
    generator = np.random.default_rng(seed)
    store, modality = index.store, index.meta.modality
    sources: list[str] = []
    if index.bridge is not None:
        trains = index.bridge.settings.trains
        sources = [name for name in index.query_modalities if name in store.modalities and trains(name, modality)]
    parts = []
    for source in sources or [modality]:
        rows = store.unique_rows(source)
        rows = np.sort(generator.choice(rows, min(len(rows), -(-count // len(sources or [modality]))), replace=False))
        given = index.queries(source, store.embeddings(source, rows), store.lengths(source, rows))
        parts.append(given.plain if given.fused is None else given.fused)
    drawn = torch.cat(parts)
    what = f"rows of {' and '.join(sources)}, bridged" if sources else f"of the {modality} items"
    return f"{len(drawn)} {what}", drawn


def _timed(vectors: Vectors, queries: Tensor, k: int) -> tuple[Tensor, float]:
    """Scores, and queries per second: the median of three searches, after one to warm up."""
    scores = vectors.search(queries, k)[0]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        vectors.search(queries, k)
        seconds.append(time.perf_counter() - start)
    return scores, len(queries) / sorted(seconds)[1]


def _recall(scores: Tensor, best: Tensor) -> float:
    """Share of the found that score no less than the exact k-th, up to rounding."""
    return float((scores >= best[:, -1:] - 1e-5).float().mean())
