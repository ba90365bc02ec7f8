"""Exact search against brute force, and faiss against exact search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffgap.data.store import EmbeddingStore, write_store
from diffgap.search.gallery import Gallery
from diffgap.search.index import SearchIndex, build_index
from diffgap.search.vectors import FaissOptions


def make(count: int, dim: int, *, seed: int = 0, **index: object) -> EmbeddingStore:
    generator = torch.Generator().manual_seed(seed)
    return EmbeddingStore.from_arrays({"audio": torch.randn(count, dim, generator=generator)}, index or None)


def indexed(folder: Path, store: EmbeddingStore, dtype: str | None = None, **options: object) -> SearchIndex:
    write_store(folder / "store", store, dtype=dtype)
    build_index(folder / "store", folder / "index", modality="audio", **options)  # type: ignore[arg-type]
    return SearchIndex.open(folder / "index")


def brute_force(embeddings: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All float64 cosines, best first, and the rows; equal rows in their order."""
    distinct, which = torch.unique(embeddings, dim=0, return_inverse=True)
    units = torch.nn.functional.normalize(distinct.double(), dim=1)
    # Multiplied by distinct rows, so that equal rows tie whatever the product's order of summation is.
    scores = (torch.nn.functional.normalize(queries.double(), dim=1) @ units.T)[:, which]
    return scores.sort(dim=1, descending=True, stable=True)


def query_vectors(count: int, dim: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(99))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize(("count", "dim", "k"), [(2, 3, 1), (37, 5, 10), (1031, 33, 10), (300, 64, 300)])
def test_exact_is_brute_force(tmp_path: Path, count: int, dim: int, k: int, dtype: str) -> None:
    index = indexed(tmp_path, make(count, dim), dtype)
    queries = query_vectors(7, dim)
    found = index.search(index.queries("audio", queries).plain, k)
    scores, rows = brute_force(index.store.embeddings("audio"), queries)
    torch.testing.assert_close(found.scores, scores[:, :k].float(), rtol=0, atol=1e-6)
    # Row by row, as two items whose scores differ by less than float32 tells may change places.
    of_rows = scores.gather(1, rows.argsort(1)).gather(1, found.rows)
    torch.testing.assert_close(of_rows, scores[:, :k], rtol=0, atol=1e-6)
    assert all(len(set(one)) == k for one in found.rows.tolist())


def test_equal_items_keep_their_order(tmp_path: Path) -> None:
    few = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    which = torch.randint(0, 5, (700,), generator=torch.Generator().manual_seed(2))
    index = indexed(tmp_path, EmbeddingStore.from_arrays({"audio": few[which]}))
    queries = query_vectors(4, 9)
    found = index.search(index.queries("audio", queries).plain, 400)
    assert torch.equal(found.rows, brute_force(few[which], queries)[1][:, :400])


@pytest.mark.parametrize("kind", ["exact", "ivf", "hnsw"])
def test_more_results_than_items(tmp_path: Path, kind: str) -> None:
    if kind != "exact":
        pytest.importorskip("faiss")
    index = indexed(tmp_path, make(45, 8), kind=kind, options=FaissOptions(ef_search=64))
    found = index.search(query_vectors(3, 8), 100)
    assert found.scores.shape == found.rows.shape == (3, 45)
    assert all(sorted(rows) == list(range(45)) for rows in found.rows.tolist())


def test_rows_that_lack_the_modality_are_no_items(tmp_path: Path) -> None:
    rows = [-1, 0, 1, -1, 1, 2, -1, 3]
    store = EmbeddingStore.from_arrays({"audio": query_vectors(4, 6)}, {"id": list("abcdefgh"), "row_audio": rows})
    index = indexed(tmp_path, store)
    found = index.search(index.queries("audio", query_vectors(4, 6)).plain, 1)
    assert found.rows[:, 0].tolist() == [1, 2, 5, 7]  # an embedding of several rows is the first row's
    assert len(index.vectors) == 4


def test_one_split_is_searched(tmp_path: Path) -> None:
    store = make(40, 6, split=["train", "test"] * 20, id=[f"r{i}" for i in range(40)])
    index = indexed(tmp_path, store, split="test")
    found = index.search(store.embeddings("audio", [5, 7]), 1)
    assert [index.store.column("id")[row] for row in found.rows[:, 0]] == ["r5", "r7"]


def test_sequences_are_searched_by_the_direction_of_their_mean_frame(tmp_path: Path) -> None:
    frames = torch.randn(30, 7, 5, generator=torch.Generator().manual_seed(3))
    lengths = torch.arange(30) % 7 + 1
    store = EmbeddingStore.from_arrays({"audio": frames}, lengths={"audio": lengths})
    index = indexed(tmp_path, store)
    means = torch.stack([frame[:length].mean(0) for frame, length in zip(frames, lengths, strict=True)])
    found = index.search(index.queries("audio", query_vectors(4, 5)).plain, 30)
    assert torch.equal(found.rows, brute_force(means, query_vectors(4, 5))[1])


def test_inverted_file_is_exact_when_every_list_is_looked_at(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    store = make(500, 16)
    exact = indexed(tmp_path / "exact", store)
    queries = query_vectors(20, 16)
    truth = exact.search(queries, 10)
    full = indexed(tmp_path / "full", store, kind="ivf", options=FaissOptions(nlist=9, nprobe=9))
    found = full.search(queries, 10)
    assert torch.equal(found.rows, truth.rows)
    torch.testing.assert_close(found.scores, truth.scores, rtol=1e-5, atol=1e-5)
    one = indexed(tmp_path / "one", store, kind="ivf", options=FaissOptions(nlist=9, nprobe=1))
    assert not torch.equal(one.search(queries, 10).rows, truth.rows)  # and the options reach faiss
    assert (full.meta.options, one.meta.options) == ({"nlist": 9, "nprobe": 9}, {"nlist": 9, "nprobe": 1})


def test_hnsw_is_exact_when_it_keeps_every_candidate(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    store = make(400, 12)
    queries = query_vectors(20, 12)
    truth = indexed(tmp_path / "exact", store).search(queries, 10)
    options = FaissOptions(m=16, ef_search=400)
    found = indexed(tmp_path / "hnsw", store, kind="hnsw", options=options).search(queries, 10)
    assert torch.equal(found.rows, truth.rows)


def test_faiss_that_finds_too_few_says_so_by_minus_one(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    index = indexed(tmp_path, make(60, 6), kind="ivf", options=FaissOptions(nlist=10, nprobe=1))
    found = index.search(query_vectors(5, 6), 60)
    missing = found.rows < 0
    assert missing.any() and not missing[:, 0].any()
    assert torch.equal(missing, found.scores.isinf())
    assert (missing.int().diff(dim=1) >= 0).all()  # they stand last


def test_vectors_are_made_a_chunk_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffgap.search.gallery._CHUNK", 64)
    taken: list[int] = []
    take = Gallery.take

    def counted(self: Gallery, numbers: np.ndarray) -> torch.Tensor:
        taken.append(len(numbers))
        return take(self, numbers)

    monkeypatch.setattr(Gallery, "take", counted)
    store = make(101, 8)
    index = indexed(tmp_path, store)
    assert taken == [8] * 12 + [5]
    queries = query_vectors(3, 8)
    found = index.search(index.queries("audio", queries).plain, 101)
    assert torch.equal(found.rows, brute_force(store.embeddings("audio"), queries)[1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nlist": 0}, "nlist is 0"),
        ({"nprobe": -1}, "nprobe is -1"),
        ({"nlist": 4, "nprobe": 5}, "no more than nlist"),
        ({"m": 1}, "2 links or more"),
        ({"ef_search": 0}, "ef_search is 0"),
    ],
)
def test_options_out_of_range(options: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FaissOptions(**options)


def test_more_lists_than_vectors(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="nlist is 41, of 40 vectors"):
        indexed(tmp_path, make(40, 4), kind="ivf", options=FaissOptions(nlist=41))
    assert not (tmp_path / "index").exists()
