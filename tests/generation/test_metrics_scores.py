"""Scores against the definitions of ``audioldm_eval`` written down anew, torchmetrics, and cases in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from diffgap.generation.metrics import clap_scores, generated_ranks, inception_score, kl_divergences
from diffgap.generation.metrics.scores import EPS
from diffgap.retrieval.metrics import retrieval_metrics


def logits(count: int, classes: int = 12, *, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, classes)) * scale


def inception_score_by_entropies(values: torch.Tensor, splits: int, order: np.ndarray) -> tuple[float, float]:
    """exp(H(mean p) - mean H(p)) of each split: the same number by another road."""
    scores = []
    p = values.double()[order].softmax(1)
    for part in range(splits):
        rows = p[part * len(p) // splits : (part + 1) * len(p) // splits]
        marginal, own = torch.special.entr(rows.mean(0)).sum(), torch.special.entr(rows).sum(1).mean()
        scores.append(float((marginal - own).exp()))
    return float(np.mean(scores)), float(np.std(scores))


class TestInceptionScore:
    @pytest.mark.parametrize(("count", "splits"), [(57, 10), (100, 10), (10, 10), (7, 1), (2, 1), (1, 1)])
    def test_is_that_of_audioldm_eval(self, count: int, splits: int) -> None:
        values = logits(count)
        order = np.random.RandomState(2020).permutation(count)
        expected = inception_score_by_entropies(torch.from_numpy(values), splits, order)
        assert inception_score(values, splits=splits) == pytest.approx(expected, rel=1e-12)

    def test_is_that_of_torchmetrics(self) -> None:
        torchmetrics = pytest.importorskip("torchmetrics.image.inception")
        values = torch.from_numpy(logits(60))
        metric = torchmetrics.InceptionScore(feature=torch.nn.Identity(), splits=1).set_dtype(torch.float64)
        metric.update(values)
        assert inception_score(values, splits=1).mean == pytest.approx(float(metric.compute()[0]), rel=1e-6)

    def test_one_hot_and_uniform(self) -> None:
        assert inception_score(1e4 * np.eye(8), splits=1).mean == pytest.approx(8.0, rel=1e-12)
        assert inception_score(np.zeros((8, 5)), splits=2) == pytest.approx((1.0, 0.0), abs=1e-12)
        assert inception_score(np.tile(logits(1), (20, 1)), splits=2).mean == pytest.approx(1.0, abs=1e-12)

    def test_one_clip_scores_one(self) -> None:
        assert inception_score(logits(1), splits=1).mean == pytest.approx(1.0, abs=1e-12)

    def test_huge_logits(self) -> None:
        values = np.array([[1e300, -1e300, 0.0], [-1e300, 1e300, 0.0]])
        assert inception_score(values, splits=1).mean == pytest.approx(2.0, rel=1e-12)

    def test_shifting_logits_changes_nothing(self) -> None:
        values = logits(40)
        shifted = values + np.random.default_rng(1).normal(size=(40, 1)) * 50
        assert inception_score(shifted) == pytest.approx(inception_score(values), rel=1e-9)

    def test_order_counts_only_without_shuffle(self) -> None:
        values = np.repeat(1e3 * np.eye(4), 5, axis=0)
        assert inception_score(values, splits=4, seed=None).mean == pytest.approx(1.0)
        assert inception_score(values, splits=4).mean > 1.5

    def test_float32_tensors_are_computed_in_float64(self) -> None:
        values = torch.from_numpy(logits(30)).float()
        assert inception_score(values) == inception_score(values.double().numpy())

    @pytest.mark.parametrize(
        ("values", "splits", "message"),
        [
            (logits(9), 10, "splits must be 1 to 9"),
            (logits(9), 0, "splits must be 1 to 9"),
            (np.full((4, 3), np.nan), 1, "logits: 4 of 4 rows hold NaN"),
            (np.array([[np.inf, 0.0]]), 1, "1 of 1 rows"),
            (np.zeros(4), 1, r"must be \(N, D\)"),
            (np.zeros((0, 4)), 1, "has 0 rows"),
        ],
    )
    def test_bad_input(self, values: np.ndarray, splits: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            inception_score(values, splits=splits)


class TestKL:
    @pytest.mark.parametrize("count", [1, 2, 33])
    def test_is_that_of_audioldm_eval(self, count: int) -> None:
        generated, real = torch.from_numpy(logits(count)), torch.from_numpy(logits(count, seed=1))
        softmax = functional.kl_div((generated.softmax(1) + 1e-6).log(), real.softmax(1), reduction="sum") / count
        sigmoid = functional.kl_div((generated.sigmoid() + 1e-6).log(), real.sigmoid(), reduction="sum") / count
        assert kl_divergences(generated, real).mean() == pytest.approx(float(softmax), rel=1e-12)
        assert kl_divergences(generated, real, form="sigmoid").mean() == pytest.approx(float(sigmoid), rel=1e-12)

    def test_known_distributions(self) -> None:
        p, q = np.array([[0.5, 0.5]]), np.array([[0.9, 0.1]])
        expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
        assert kl_divergences(np.log(q), np.log(p))[0] == pytest.approx(expected, abs=1e-5)
        other = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
        assert kl_divergences(np.log(p), np.log(q))[0] == pytest.approx(other, abs=1e-5)

    def test_eps_bounds_a_miss_and_only_on_the_generated_side(self) -> None:
        generated, real = np.array([[1e3, 0.0]]), np.array([[0.0, 1e3]])
        assert kl_divergences(generated, real)[0] == pytest.approx(-math.log(EPS), rel=1e-12)
        assert kl_divergences(real, real)[0] == pytest.approx(-math.log1p(EPS), rel=1e-6)

    def test_sigmoid_sums_presence_only(self) -> None:
        values = kl_divergences(np.zeros((1, 3)), np.full((1, 3), -1e3), form="sigmoid")
        assert values[0] == 0.0  # nothing present in the recording: no term, though the clip claims a half of each
        assert kl_divergences(np.full((1, 3), 9.0), np.zeros((1, 3)), form="sigmoid")[0] < 0

    def test_a_value_a_pair(self) -> None:
        generated, real = logits(5), logits(5, seed=1)
        alone = [kl_divergences(generated[i : i + 1], real[i : i + 1])[0] for i in range(5)]
        assert kl_divergences(generated, real) == pytest.approx(alone, rel=1e-12)

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="paired row by row"):
            kl_divergences(logits(3), logits(4))
        with pytest.raises(ValueError, match="reference: 1 of 3 rows"):
            kl_divergences(logits(3), np.where(np.eye(3, 12) > 0, [[0], [np.nan], [0]], 0.0))
        with pytest.raises(ValueError, match="form must be one of softmax, sigmoid"):
            kl_divergences(logits(3), logits(3), form="tanh")  # type: ignore[arg-type]


class TestConditions:
    def test_clap_score_is_the_cosine(self) -> None:
        audio, text = logits(20), logits(20, seed=1)
        expected = functional.cosine_similarity(torch.from_numpy(audio), torch.from_numpy(text))
        assert clap_scores(audio, text) == pytest.approx(expected.numpy(), rel=1e-12)
        scales = np.random.default_rng(0).uniform(0.1, 100, size=(20, 1))
        assert clap_scores(audio * scales, text) == pytest.approx(expected.numpy(), rel=1e-12)
        assert clap_scores(audio, -audio) == pytest.approx(-np.ones(20))

    def test_zero_rows_are_refused(self) -> None:
        rows = logits(3)
        with pytest.raises(ValueError, match="condition: 1 of 3 rows are zero"):
            clap_scores(rows, rows * [[1], [0], [1]])
        with pytest.raises(ValueError, match="generated: 1 of 3 rows are zero"):
            generated_ranks(rows * [[1], [0], [1]], rows)

    def test_recall_counts_the_own_condition(self) -> None:
        conditions = np.eye(4)
        generated = np.array([[1.0, 0, 0, 0], [1.0, 0.9, 0, 0], [0, 0, 1.0, 0], [0.5, 0.4, 0.3, 0.2]])
        assert generated_ranks(generated, conditions)[:, 0].tolist() == [1, 2, 1, 4]
        assert retrieval_metrics(generated_ranks(generated, conditions))["R@1"] == 0.5

    def test_equal_conditions_are_one(self) -> None:
        conditions = np.array([[1.0, 0], [1.0, 0], [0, 1.0]])
        assert generated_ranks(conditions, conditions)[:, 0].tolist() == [1, 1, 1]
        assert generated_ranks(np.ones((3, 2)), conditions)[:, 0].tolist() == [2, 2, 2]  # a tie counts against it

    def test_ids(self) -> None:
        generated, conditions = np.array([[0.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        assert generated_ranks(generated, conditions, np.array([2]), np.arange(3))[:, 0].tolist() == [2]
        with pytest.raises(ValueError, match="go together"):
            generated_ranks(generated, conditions, ids=np.array([2]))
        with pytest.raises(ValueError, match="no positive"):
            generated_ranks(generated, conditions, np.array([9]), np.arange(3))
