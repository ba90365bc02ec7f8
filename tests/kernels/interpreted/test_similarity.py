"""The kernels of similarity_ranks and similarity_topk against their definitions: equal integers, not close ones."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from diffgap.kernels import configs
from diffgap.kernels import similarity as kernels
from torch import Tensor
from torch.nn import functional as F

from diffgap.ops.similarity import (
    similarity_ranks,
    similarity_ranks_reference,
    similarity_topk,
    similarity_topk_reference,
)
from tests.kernels.interpreted.kernels_as_ops import TILE, use_kernels
from tests.ops.contrastive_cases import ids_for

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, "similarity")


def integers(rows: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers: every score is exact, and many tie."""
    return torch.randint(-1, 2, (rows, width), generator=torch.Generator().manual_seed(seed)).to(dtype)


def unit_vectors(rows: int, width: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "gallery", "width"), [(1, 1, 8), (7, 63, 100), (50, 17, 6), (40, 100, 33)])
def test_similarity_ranks_with_ids_and_ties(queries: int, gallery: int, width: int, dtype: torch.dtype) -> None:
    q, g = integers(queries, width, dtype=dtype), integers(gallery, width, 1, dtype)
    ids_q, ids_g = ids_for(queries, 6), ids_for(gallery, 6, seed=1)
    assert queries == 1 or (ids_q[:, None] == ids_g).sum(1).max() > 1
    expected = similarity_ranks_reference(q, g, ids_q, ids_g)
    for actual, wanted in zip(kernels.ranks(q, g, ids_q, ids_g, TILE), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_similarity_ranks_where_one_program_walks_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "program_slots", lambda q, tile: 1)
    monkeypatch.setattr(kernels, "_ROUNDS", 1)
    q, g = integers(20, 12), integers(120, 12, 1)
    ids_q, ids_g = torch.arange(20) % 2, torch.arange(120) % 2
    expected = similarity_ranks_reference(q, g, ids_q, ids_g)
    for actual, wanted in zip(kernels.ranks(q, g, ids_q, ids_g, TILE), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("ties", ["strict", "average"])
def test_similarity_ranks_of_rows(ties: str) -> None:
    q, g = integers(30, 12), integers(80, 12, 1)
    positives = torch.randint(80, (30,), generator=torch.Generator().manual_seed(2))
    scores = q @ g.T
    mine = scores.gather(1, positives[:, None])
    above, equal = (scores > mine).sum(1), (scores == mine).sum(1)
    wanted = above + equal if ties == "strict" else above + (equal + 1) / 2
    assert similarity_ranks(q, g, positives, ties=ties).double().equal(wanted.double())


def test_similarity_ranks_of_a_collapsed_model_are_at_chance() -> None:
    row = unit_vectors(1, 100)
    ranks = similarity_ranks(row.expand(40, -1), row.expand(90, -1), torch.arange(40), ties="average")
    assert ranks.eq(45.5).all()


def test_similarity_ranks_of_equal_rows_tie_wherever_they_stand() -> None:
    # In multiples of 2^-7, whose products sum exactly: the interpreter's BLAS, unlike a tensor core, sums in an order
    # that depends on the place in the tile.
    q, distinct = (unit_vectors(rows, 100, seed).mul(128).round() / 128 for rows, seed in ((33, 0), (20, 1)))
    g = distinct.repeat(5, 1)  # a row's copies stand in different tiles, at different places of them
    above, tied, best = kernels.ranks(q, g, torch.arange(33) % 20, torch.arange(100), TILE)
    once, _, _ = kernels.ranks(q, distinct, torch.arange(33) % 20, torch.arange(20), TILE)
    assert torch.equal(above, 5 * once) and tied.eq(4).all() and best.eq(1).all()


def test_similarity_ranks_puts_nan_last() -> None:
    q, g = integers(20, 8), integers(40, 8, 1)
    g[::3] = math.nan
    q[5] = math.nan
    ids_q, ids_g = torch.arange(20), torch.arange(40) % 20
    expected = similarity_ranks_reference(q, g, ids_q, ids_g)
    for actual, wanted in zip(kernels.ranks(q, g, ids_q, ids_g, TILE), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize(("queries", "gallery"), [(5, 30), (0, 30), (5, 0)])
def test_similarity_ranks_of_queries_without_a_positive(queries: int, gallery: int) -> None:
    q, g = integers(queries, 8), integers(gallery, 8, 1)
    counts = kernels.ranks(q, g, torch.arange(queries), torch.arange(gallery) + 100, TILE)
    assert (counts[0] + counts[1]).tolist() == [gallery] * queries
    assert counts[2].tolist() == [0] * queries


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("queries", "gallery", "width", "k"), [(1, 1, 8, 1), (7, 63, 100, 10), (20, 70, 6, 70), (33, 100, 33, 3)]
)
def test_similarity_topk_with_ties(queries: int, gallery: int, width: int, k: int, dtype: torch.dtype) -> None:
    q, g = integers(queries, width, dtype=dtype), integers(gallery, width, 1, dtype)
    values, indices = similarity_topk(q, g, k)
    expected_values, expected_indices = similarity_topk_reference(q, g, k)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(values, expected_values)


def test_similarity_topk_of_real_scores() -> None:
    q, g = unit_vectors(20, 100), unit_vectors(90, 100, seed=1)
    values, indices = similarity_topk(q, g, 12)
    scores = q.double() @ g.double().T
    torch.testing.assert_close(values.double(), scores.topk(12).values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores.gather(1, indices), scores.topk(12).values, rtol=1e-6, atol=1e-6)


def test_similarity_topk_of_equal_rows_keeps_their_order() -> None:
    row = unit_vectors(1, 100)
    values, indices = similarity_topk(row.expand(5, -1), row.expand(200, -1), 40)
    assert torch.equal(indices, torch.arange(40).expand(5, -1))
    assert values.unique().numel() == 1


def test_similarity_topk_of_more_than_a_thousand() -> None:
    q, g = integers(3, 8), integers(1100, 8, 1)
    values, indices = similarity_topk(q, g, 1024)
    expected_values, expected_indices = similarity_topk_reference(q, g, 1024)
    assert torch.equal(indices, expected_indices) and torch.equal(values, expected_values)


def test_similarity_topk_orders_infinities_zeros_and_nan() -> None:
    g = torch.tensor([[-0.0], [math.nan], [0.0], [math.inf], [-1.0], [-math.inf], [1.0]])
    values, indices = similarity_topk(torch.ones(1, 1), g, 7)
    assert indices.tolist() == [[3, 6, 0, 2, 4, 1, 5]]
    assert values.tolist() == [[math.inf, 1.0, 0.0, 0.0, -1.0, -math.inf, -math.inf]]


@triton.jit
def _keys_of(p_scores, p_keys, SIZE: tl.constexpr):
    o_n = tl.arange(0, SIZE)
    tl.store(p_keys + o_n[None, :], kernels._keys(tl.load(p_scores + o_n)[None, :], o_n))


def test_keys_are_ordered_as_scores_and_columns_are() -> None:
    # Minus zero among them, which a product gives only where it underflows.
    scores = torch.tensor([-0.0, 0.0, 1e-40, -1e-40, 3.5, -3.5, math.inf, -math.inf])
    keys = torch.empty(1, 8, dtype=torch.int64)
    _keys_of[(1,)](scores, keys, SIZE=8)
    assert keys[0].argsort(descending=True).tolist() == [6, 4, 2, 0, 1, 3, 5, 7]
    values, columns = kernels._decode(keys)
    assert values[0].tolist() == scores.tolist() and columns[0].tolist() == list(range(8))


def test_similarity_topk_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    q, g = integers(40, 8), integers(60, 8, 1)
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", 1)
    assert torch.equal(similarity_topk(q, g, 5)[1], similarity_topk_reference(q, g, 5)[1])
    assert similarity_topk(q[:0], g, 5)[0].shape == (0, 5)


def test_scores_are_multiplied_as_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    single, half = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    for setting, kind in [("none", "ieee"), ("ieee", "ieee"), ("tf32", "tf32")]:
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=setting))
        assert configs.product_kind(single) == kind and configs.product_kind(half) == "half"
        assert TILE.options(single)["PRECISION"] == kind


def test_an_old_gpu_is_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(RuntimeError, match=r"8\.0, this GPU has 7\.0; use diffgap\.backend\('eager'\)"):
        configs.tile_for(torch.zeros(1))
