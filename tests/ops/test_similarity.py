"""similarity_topk and similarity_ranks against dense oracles, directly and through the registered ops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffgap.ops import similarity
from diffgap.ops.similarity import similarity_rank_counts, similarity_ranks, similarity_topk
from tests.ops.contrastive_cases import LargestTensor, ids_for, take
from tests.ops.routes import ROUTES

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=ROUTES, autouse=True)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take(
        request.param,
        monkeypatch,
        similarity,
        _topk_op="similarity_topk_reference",
        _ranks_op="similarity_ranks_reference",
    )
    return str(request.param)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, ragged at the edges, in small inputs."""
    monkeypatch.setattr(similarity, "_QUERY_ROWS", 5)
    monkeypatch.setattr(similarity, "_GALLERY_ROWS", 7)


def embeddings(rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def integers(rows: int, width: int, seed: int = 0) -> Tensor:
    """Small whole numbers: every score is exact, and many tie."""
    return torch.randint(-1, 2, (rows, width), generator=torch.Generator().manual_seed(seed)).float()


def oracle_topk(scores: Tensor, k: int) -> Tensor:
    """Indices by descending score, then ascending index."""
    return torch.tensor([sorted(range(len(row)), key=lambda j: (-row[j], j))[:k] for row in scores.tolist()])


def oracle_rank(scores: list[float], positive: list[bool], ties: str) -> float:
    """By definition: place the best positive behind its ties, or average its place over their orders."""
    best = max(s for s, p in zip(scores, positive, strict=True) if p)
    above = sum(s > best for s, p in zip(scores, positive, strict=True) if not p)
    tied = sum(s == best for s, p in zip(scores, positive, strict=True) if not p)
    equals = sum(s == best for s, p in zip(scores, positive, strict=True) if p)
    if ties == "strict":
        return above + tied + 1
    # The first of `equals` marked places, in a random order of all that tie, is k with the probability below.
    total = tied + equals
    return above + sum(k * math.comb(total - k, equals - 1) / math.comb(total, equals) for k in range(1, tied + 2))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "gallery", "k"), [(1, 1, 1), (5, 7, 7), (11, 30, 10), (12, 100, 100), (0, 9, 3)])
def test_similarity_topk_matches_the_oracle(queries: int, gallery: int, k: int, dtype: torch.dtype) -> None:
    q, g = embeddings(queries, 100, dtype), embeddings(gallery, 100, dtype, seed=1)
    values, indices = similarity_topk(q, g, k)
    assert values.shape == indices.shape == (queries, k)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert indices.dtype == torch.int64
    scores = q.double() @ g.double().T
    torch.testing.assert_close(values.double(), scores.gather(1, indices), rtol=1e-6, atol=1e-6)
    if queries:
        assert torch.equal(indices, oracle_topk(scores, k))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("k", [1, 7, 23, 60])
def test_similarity_topk_of_equal_scores_puts_the_lower_index_first(k: int) -> None:
    q, g = integers(9, 6), integers(60, 6, seed=1)
    scores = q @ g.T
    assert scores.unique().numel() < 15
    values, indices = similarity_topk(q, g, k)
    assert torch.equal(indices, oracle_topk(scores, k))
    assert torch.equal(values, scores.gather(1, indices))


# A BLAS sums rows of a small or ragged product in different orders, so there equal rows score unequally in
# float32.
COLLAPSED = [(1, 7), (2, 9), (3, 50), (5, 33), (7, 4095), (64, 1001)]


@pytest.mark.parametrize("width", [3, 100, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("queries", "gallery"), COLLAPSED)
def test_similarity_topk_of_equal_rows_keeps_their_order(
    queries: int, gallery: int, dtype: torch.dtype, width: int
) -> None:
    g = embeddings(1, width, dtype).repeat(gallery, 1)
    _, indices = similarity_topk(embeddings(queries, width, dtype, seed=1), g, gallery)
    assert torch.equal(indices, torch.arange(gallery).expand(queries, gallery))


@pytest.mark.parametrize(
    ("queries", "gallery", "width", "k"), [(100, 3000, 7, 1024), (300, 900, 2048, 10), (9, 2000, 3, 100)]
)
def test_similarity_topk_over_many_blocks(queries: int, gallery: int, width: int, k: int) -> None:
    """Whole numbers, so that scores are exact and the order of ties is told too; best rows last, for the worst case."""
    q, g = integers(queries, width), integers(gallery, width, seed=1)
    g[gallery // 2 :] += q[0] * torch.linspace(0, 9, gallery - gallery // 2).round()[:, None]
    values, indices = similarity_topk(q, g, k)
    expected, order = (q @ g.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected[:, :k])
    assert torch.equal(indices, order[:, :k])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("ties", ["strict", "average"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "gallery"), [(1, 1), (5, 7), (12, 30), (30, 12), (0, 9)])
def test_similarity_ranks_matches_the_oracle(queries: int, gallery: int, dtype: torch.dtype, ties: Any) -> None:
    q, g = embeddings(queries, 100, dtype), embeddings(gallery, 100, dtype, seed=1)
    positives = torch.arange(queries) * 5 % gallery
    ranks = similarity_ranks(q, g, positives, ties=ties)
    assert ranks.shape == (queries,)
    assert ranks.dtype == (torch.int64 if ties == "strict" else torch.float64)
    expected = [
        oracle_rank(row.tolist(), [j == p for j in range(gallery)], ties)
        for row, p in zip(q.double() @ g.double().T, positives, strict=True)
    ]
    assert ranks.tolist() == expected


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("ties", ["strict", "average"])
@pytest.mark.parametrize("grouped", [False, True])
def test_similarity_ranks_counts_ties(grouped: bool, ties: Any) -> None:
    q, g = integers(18, 6), integers(40, 6, seed=1)
    ids_q, ids_g = (ids_for(18, 7), ids_for(40, 7, seed=1)) if grouped else (torch.arange(18) * 2, torch.arange(40))
    ranks = similarity_ranks(q, g, (ids_q, ids_g) if grouped else ids_q, ties=ties)
    expected = [oracle_rank(row.tolist(), (ids_g == i).tolist(), ties) for row, i in zip(q @ g.T, ids_q, strict=True)]
    assert ranks.tolist() == pytest.approx(expected)
    _, tied, best = similarity_rank_counts(q, g, (ids_q, ids_g))
    assert tied.max() > 1, "ties are wanted"
    assert (best.max() > 1) == grouped


@pytest.mark.parametrize("width", [3, 100, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "gallery"), COLLAPSED)
def test_similarity_ranks_of_a_collapsed_model_are_at_chance(
    queries: int, gallery: int, dtype: torch.dtype, width: int
) -> None:
    g, q = embeddings(1, width, dtype).repeat(gallery, 1), embeddings(queries, width, dtype, seed=1)
    positives = torch.arange(queries) * 15 % gallery
    assert (similarity_ranks(q, g, positives) == gallery).all()
    assert (similarity_ranks(q, g, positives, ties="average") == (gallery + 1) / 2).all()
    groups = torch.arange(gallery) % 7
    sizes = groups.bincount()[groups[positives]]
    assert torch.equal(similarity_ranks(q, g, (groups[positives], groups)), gallery - sizes + 1)
    average = similarity_ranks(q, g, (groups[positives], groups), ties="average")
    torch.testing.assert_close(average, (gallery + 1) / (sizes.double() + 1))


@pytest.mark.parametrize("groups", [1, 3, 40, 4000])
def test_similarity_ranks_over_many_blocks(groups: int) -> None:
    """From all rows positive to about one each; wide rows, so that kernels cut both sides into several blocks."""
    q, g = integers(250, 2048), integers(700, 2048, seed=1)
    ids_q, ids_g = ids_for(250, groups), ids_for(700, groups, seed=1)
    known = torch.isin(ids_q, ids_g)
    q, ids_q = q[known], ids_q[known]
    above, tied, best = similarity_rank_counts(q, g, (ids_q, ids_g))
    scores, positive = q @ g.T, ids_q[:, None] == ids_g
    target = scores.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    assert torch.equal(above, ((scores > target) & ~positive).sum(1))
    assert torch.equal(tied, ((scores == target) & ~positive).sum(1))
    assert torch.equal(best, ((scores == target) & positive).sum(1))


def test_similarity_ranks_of_a_perfect_model_are_one() -> None:
    g = embeddings(50, 32)
    assert (similarity_ranks(g, g, torch.arange(50)) == 1).all()
    captions = g.repeat_interleave(5, 0)
    ids = torch.arange(50)
    assert (similarity_ranks(g, captions, (ids, ids.repeat_interleave(5))) == 1).all()
    assert (similarity_ranks(captions, g, ids.repeat_interleave(5), ties="average") == 1).all()


def test_similarity_nan_never_ranks_well() -> None:
    q, g = embeddings(4, 16), embeddings(9, 16, seed=1)
    g[3] = math.nan
    q[1] = math.nan
    positives = torch.full((4,), 3)
    assert (similarity_ranks(q, g, positives) == 9).all()
    assert similarity_ranks(q, g, positives, ties="average").tolist() == [9, 5, 9, 9]
    values, indices = similarity_topk(q, g, 9)
    assert (indices[[0, 2, 3], -1] == 3).all()
    assert (values[[0, 2, 3], -1] == -math.inf).all()
    assert not values.isnan().any()


def test_similarity_never_holds_the_whole_matrix(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if route == "registered":
        pytest.skip("a dispatch mode does not see inside an op")
    monkeypatch.setattr(similarity, "_QUERY_ROWS", 8)
    monkeypatch.setattr(similarity, "_GALLERY_ROWS", 16)
    q, g = embeddings(64, 4), embeddings(128, 4, seed=1)
    with LargestTensor() as largest:
        similarity_topk(q, g, 3)
        similarity_ranks(q, g, torch.arange(64))
    assert largest.elements <= 128 * 4


def test_similarity_takes_any_strides_and_detaches() -> None:
    q, g = embeddings(6, 8).requires_grad_(), embeddings(9, 8, seed=1).requires_grad_()
    views = q.T.contiguous().T, g.repeat_interleave(2, 0)[::2]
    values, indices = similarity_topk(*views, 4)
    assert not values.requires_grad
    torch.testing.assert_close((values, indices), similarity_topk(q.detach(), g.detach(), 4))
    positives = torch.arange(6).repeat_interleave(2)[::2]
    assert torch.equal(similarity_ranks(*views, positives), similarity_ranks(q, g, positives.clone()))


def test_similarity_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    q, g, positives = embeddings(6, 8), embeddings(9, 8, seed=1), torch.arange(6)

    def function(q: Tensor, g: Tensor, positives: Tensor) -> tuple[Tensor, ...]:
        return *similarity_topk(q, g, 4), similarity_ranks(q, g, positives, ties="average")

    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(q, g, positives)
    torch.testing.assert_close(actual, function(q, g, positives))


def test_similarity_under_vmap() -> None:
    q, g, ids = (torch.stack(pair) for pair in zip(
        (embeddings(9, 5), embeddings(40, 5), torch.arange(9)),
        (embeddings(9, 5, seed=1), embeddings(40, 5, seed=1), torch.arange(9).flip(0)),
        strict=True,
    ))  # fmt: skip
    for function in (lambda q, g, _: similarity_topk(q, g, 3)[1], similarity_ranks):
        expected = torch.stack([function(*each) for each in zip(q, g, ids, strict=True)])
        assert torch.equal(torch.vmap(function)(q, g, ids), expected)


def test_similarity_ignores_autocast() -> None:
    q, g = embeddings(6, 8), embeddings(9, 8, seed=1)
    expected = similarity_topk(q, g, 9), similarity_ranks(q, g, torch.arange(6))
    with torch.autocast("cpu", torch.bfloat16):
        actual = similarity_topk(q, g, 9), similarity_ranks(q, g, torch.arange(6))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_similarity_ops_pass_opcheck(dtype: torch.dtype, route: str) -> None:
    if route == "reference":
        pytest.skip("the reference is not an op")
    q, g = embeddings(6, 8, dtype), embeddings(9, 8, dtype, seed=1)
    torch.library.opcheck(torch.ops.diffgap.similarity_topk.default, (q, g, 4))
    torch.library.opcheck(torch.ops.diffgap.similarity_ranks.default, (q, g, torch.arange(6), torch.arange(9)))


Q, G, P = torch.zeros(4, 3), torch.zeros(6, 3), torch.arange(4)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "q must be a tensor, got ndarray", (Q.numpy(), G, 1)),
        (ValueError, "one width, got 3 and 2", (Q, torch.zeros(6, 2), 1)),
        (TypeError, "one dtype, got torch.float32 and torch.float64", (Q, G.double(), 1)),
        (ValueError, "k must be between 1 and the gallery's 6 rows, got 7", (Q, G, 7)),
        (ValueError, "k must be between 1 and the gallery's 6 rows, got 0", (Q, G, 0)),
        (TypeError, "k must be an int, got float", (Q, G, 1.0)),
    ],
)
def test_similarity_topk_refuses(error: type[Exception], message: str, arguments: Any) -> None:
    with pytest.raises(error, match=f"^similarity_topk: .*{message}") as caught:
        similarity_topk(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "ties"),
    [
        (ValueError, r"g must be \(rows, width\)", (Q, torch.zeros(3), P), "strict"),
        (ValueError, "ties must be one of strict, average, got 'best'", (Q, G, P), "best"),
        (TypeError, "positives must be int64, got torch.int32", (Q, G, P.int()), "strict"),
        (TypeError, "positives must be an int64 tensor, got list", (Q, G, [0, 1, 2, 3]), "strict"),
        (ValueError, r"positives must be \(4,\), one per row, got shape \(3,\)", (Q, G, P[:3]), "strict"),
        (ValueError, "query 3 has its positive at 6, outside the gallery's 6 rows", (Q, G, P + 3), "strict"),
        (ValueError, "query 0 has its positive at -1", (Q, G, P - 1), "strict"),
        (ValueError, r"pair \(ids_q, ids_g\), got 1", (Q, G, (P,)), "strict"),
        (ValueError, r"ids_g must be \(6,\)", (Q, G, (P, P)), "strict"),
        (
            ValueError,
            "query 2 has id 2, which no gallery row has",
            (Q, G, (P, torch.arange(6) % 2)),
            "average",
        ),
    ],
)
def test_similarity_ranks_refuses(error: type[Exception], message: str, arguments: Any, ties: Any) -> None:
    with pytest.raises(error, match=f"^similarity_ranks: .*{message}") as caught:
        similarity_ranks(*arguments, ties=ties)
    assert "\n" not in str(caught.value)
