from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from diffgap.models.scoring import Candidates, dense_scores, find_candidates
from diffgap.retrieval.metrics import (
    caption_retrieval,
    per_query_metrics,
    positive_ranks,
    positive_ranks_from_scores,
    reranked_positive_ranks,
    retrieval_metrics,
)


def brute_force(scores: np.ndarray, query_ids: list[int], gallery_ids: list[int], ties: str) -> list[list[float]]:
    """Ranks by sorting: strict puts non-positives first among equals, average runs over all orders."""
    result = []
    for row, query_id in zip(scores, query_ids, strict=True):
        positive = [g == query_id for g in gallery_ids]
        if ties == "strict":
            order = sorted(range(len(row)), key=lambda j: (-row[j], positive[j]))
            result.append([float(place) for place, j in enumerate(order, 1) if positive[j]])
            continue
        totals, count = np.zeros(sum(positive)), 0
        for order in itertools.permutations(range(len(row))):
            if all(row[a] >= row[b] for a, b in itertools.pairwise(order)):
                totals += [place for place, j in enumerate(order, 1) if positive[j]]
                count += 1
        result.append(list(totals / count))
    return result


@pytest.mark.parametrize("ties", ["strict", "average"])
@pytest.mark.parametrize("seed", range(6))
def test_positive_ranks_from_scores_matches_brute_force(ties: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, size=(5, 7)).astype(np.float64)
    gallery_ids = rng.integers(0, 3, size=7).tolist()
    query_ids = rng.choice(gallery_ids, size=5).tolist()
    expected = brute_force(scores, query_ids, gallery_ids, ties)
    actual = positive_ranks_from_scores(
        torch.from_numpy(scores), torch.tensor(query_ids), torch.tensor(gallery_ids), ties=ties
    )
    assert actual.shape == (5, max(map(len, expected)))
    for row, ranks in zip(actual, expected, strict=True):
        assert row[: len(ranks)].tolist() == pytest.approx(ranks)
        assert row[len(ranks) :].isinf().all()


@pytest.mark.parametrize("ties", ["strict", "average"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_positive_ranks_agrees_with_the_score_matrix(ties: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(40, 6, generator=generator, dtype=dtype)
    # Repeated gallery rows make ties, within and across ids.
    gallery = torch.randn(20, 6, generator=generator, dtype=dtype)[torch.arange(60) % 20]
    ids = torch.randint(0, 7, (60,), generator=generator)
    query_ids = ids[torch.randint(0, 60, (40,), generator=generator)]
    scores = (
        torch.nn.functional.normalize(queries, dim=1).double()
        @ torch.nn.functional.normalize(gallery, dim=1).double().T
    )
    expected = positive_ranks_from_scores(scores.to(dtype), query_ids, ids, ties=ties)
    assert torch.equal(positive_ranks(queries, gallery, query_ids, ids, ties=ties), expected)


def test_positive_ranks_normalizes_unless_told() -> None:
    queries, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.1], [9.0, 9.0]])
    assert positive_ranks(queries, gallery, [0], [0, 1]).item() == 1
    assert positive_ranks(queries, gallery, [0], [0, 1], normalize=False).item() == 2


@pytest.mark.parametrize("positives", [1, 5])
def test_collapsed_model_ranks_at_chance(positives: int) -> None:
    clips = 50
    audio, text = torch.ones(clips, 512) / 3, torch.ones(clips * positives, 512) / 3
    clip = torch.arange(clips).repeat_interleave(positives)
    strict = caption_retrieval(audio, text, clip)
    for metrics in strict.values():
        assert metrics["R@1"] == metrics["R@5"] == metrics["R@10"] == metrics["mAP@10"] == 0
    assert strict["text_to_audio"]["MedR"] == clips
    assert strict["audio_to_text"]["MedR"] == clips * positives - positives + 1
    average = caption_retrieval(audio, text, clip, ties="average")
    assert average["text_to_audio"]["MeanR"] == (clips + 1) / 2
    # The first of t positives among m rows in random order stands at (m + 1) / (t + 1) on average.
    assert average["audio_to_text"]["MeanR"] == pytest.approx((clips * positives + 1) / (positives + 1))


def test_caption_retrieval_worked_by_hand() -> None:
    """Two clips, five captions each: clips are axes, and a caption's coordinates its scores."""
    to_first = [0.9, 0.8, 0.2, 0.5, 0.1, 0.7, 0.3, 0.4, 0.6, 0.05]
    to_second = [0.1, 0.9, 0.3, 0.4, 0.2, 0.8, 0.5, 0.3, 0.7, 0.6]
    text = torch.tensor([to_first, to_second]).T
    clip = [0] * 5 + [1] * 5
    ranks = positive_ranks(torch.eye(2), text, [0, 1], clip, normalize=False)
    # First clip: captions .9 .8 | .7 .6 | .5 | .4 .3 | .2 .1, own at 1, 2, 5, 8, 9. Second: .9 | .8 .7 .6 |
    # .5 .4 | .3 .3, one own and one of the first clip, which counts against it: 8.
    assert ranks.tolist() == [[1, 2, 5, 8, 9], [2, 3, 4, 5, 8]]
    values = per_query_metrics(ranks)
    assert values["R@1"].tolist() == [1, 0] and values["R@5"].tolist() == [1, 1]
    assert values["mAP@10"].tolist() == pytest.approx(
        [(1 / 1 + 2 / 2 + 3 / 5 + 4 / 8 + 5 / 9) / 5, (1 / 2 + 2 / 3 + 3 / 4 + 4 / 5 + 5 / 8) / 5]
    )
    # Text to audio: a caption is right where its own clip scores more.
    to_audio = positive_ranks(text, torch.eye(2), clip, [0, 1], normalize=False)
    assert to_audio[:, 0].tolist() == [1, 2, 2, 1, 2, 1, 1, 2, 1, 1]
    assert retrieval_metrics(to_audio)["R@1"] == 0.6
    assert retrieval_metrics(to_audio)["mAP@10"] == retrieval_metrics(to_audio)["MRR"] == pytest.approx(0.8)


def test_caption_retrieval_uses_cosines_and_uneven_captions() -> None:
    audio = torch.eye(3)
    text = torch.tensor([[5.0, 1, 0], [0, 0.1, 0], [0, 3, 1], [0, 0, 2], [1, 0, 1.1], [0, 1, 0.9]])
    result = caption_retrieval(audio, text, [0, 1, 1, 2, 2, 2])
    assert result["text_to_audio"]["R@1"] == pytest.approx(5 / 6)
    assert result["audio_to_text"]["R@1"] == 1


def test_retrieval_metrics_by_hand() -> None:
    ranks = torch.tensor([[1.0], [3.0], [12.0], [6.0]], dtype=torch.float64)
    metrics = retrieval_metrics(ranks)
    assert metrics == pytest.approx(
        {
            "R@1": 0.25,
            "R@5": 0.5,
            "R@10": 0.75,
            "mAP@10": (1 + 1 / 3 + 1 / 6) / 4,
            "MRR": (1 + 1 / 3 + 1 / 12 + 1 / 6) / 4,
            "MedR": 4.5,
            "MeanR": 5.5,
        }
    )


def test_average_precision_with_more_positives_than_its_depth() -> None:
    ranks = torch.arange(1, 16, dtype=torch.float64)[None]
    assert per_query_metrics(ranks)["mAP@10"].item() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_ids": torch.tensor([0, 7])}, "1 of 2 queries have no positive in the gallery"),
        ({"query_ids": torch.tensor([0])}, r"query_ids must be integers of shape \(2,\)"),
        ({"gallery_ids": torch.rand(3)}, r"gallery_ids must be integers of shape \(3,\); got torch.float32"),
        ({"ties": "lucky"}, "ties must be one of strict, average; got 'lucky'"),
        ({"gallery": torch.ones(3, 5)}, r"must be \(N, D\) and \(M, D\); got \(2, 4\) and \(3, 5\)"),
        ({"queries": torch.full((2, 4), torch.nan)}, "queries: 2 of 2 rows hold NaN"),
    ],
)
def test_positive_ranks_bad_input(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "queries": torch.randn(2, 4),
        "gallery": torch.randn(3, 4),
        "query_ids": torch.tensor([0, 1]),
        "gallery_ids": torch.tensor([0, 1, 1]),
    }
    with pytest.raises(ValueError, match=message):
        positive_ranks(**{**arguments, **change})  # type: ignore[arg-type]


def test_scores_must_be_finite_and_queries_present() -> None:
    with pytest.raises(ValueError, match="scores: 1 of 2 rows hold NaN"):
        positive_ranks_from_scores(torch.tensor([[1.0, torch.nan], [0, 1]]), [0, 1], [0, 1])
    with pytest.raises(ValueError, match="ranks has no queries"):
        retrieval_metrics(positive_ranks(torch.ones(0, 3), torch.ones(2, 3), torch.ones(0).long(), [0, 1]))
    with pytest.raises(ValueError, match="clip must give each of the 2 captions"):
        caption_retrieval(torch.eye(2), torch.eye(2), [0, 2])


@pytest.mark.parametrize("ties", ["strict", "average"])
@pytest.mark.parametrize("count", [2, 5, 100])
def test_reranked_ranks_are_those_of_the_whole_matrix(ties: str, count: int) -> None:
    """Of small integers, so that many scores tie, and exactly; positives among the candidates and beyond."""
    generator = torch.Generator().manual_seed(count)
    queries, gallery = (torch.randint(-3, 4, (n, 6), generator=generator).float() for n in (30, 40))
    ids = torch.randint(0, 6, (40,), generator=generator)
    query_ids = ids[torch.randint(0, 40, (30,), generator=generator)]
    found = find_candidates(queries, gallery, count)
    shuffled = torch.randint(-2, 3, found.scores.shape, generator=generator).float()
    listed = Candidates(found.indices, torch.where(found.scores.isfinite(), shuffled, found.scores))
    actual = reranked_positive_ranks(queries, gallery, listed, query_ids, ids, ties=ties)
    expected = positive_ranks_from_scores(dense_scores(queries, gallery, listed), query_ids, ids, ties=ties)
    torch.testing.assert_close(actual, expected)
    plain = positive_ranks(queries, gallery, query_ids, ids, normalize=False, ties=ties)
    assert (actual != plain).any()
    torch.testing.assert_close(reranked_positive_ranks(queries, gallery, found, query_ids, ids, ties=ties), plain)


def test_candidates_with_nan_scores_are_refused() -> None:
    found = Candidates(torch.tensor([[0]]), torch.tensor([[torch.nan]]))
    with pytest.raises(ValueError, match="candidates have NaN scores"):
        reranked_positive_ranks(torch.ones(1, 2), torch.ones(2, 2), found, [0], [0, 1])
