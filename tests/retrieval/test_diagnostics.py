from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from diffgap.retrieval.diagnostics import modality_gap


def pairs(count: int = 120, gap: float = 0.0, noise: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(count, 12, generator=generator)
    b = a + noise * torch.randn(count, 12, generator=generator)
    return a + gap * torch.eye(12)[0], b - gap * torch.eye(12)[0]


def test_modality_gap_matches_brute_force() -> None:
    a, b = pairs(60, gap=0.7)
    groups = np.arange(60) // 3
    gap = modality_gap(a, b, groups)
    u, v = (normalize(t.double(), dim=1).numpy() for t in (a, b))
    other = groups[:, None] != groups[None]
    distance = 1 - (u * v).sum(1).mean()
    within = 1 - ((u @ u.T)[other].mean() + (v @ v.T)[other].mean()) / 2
    assert gap.pairs == 60
    assert gap.centroid_distance == pytest.approx(np.linalg.norm(u.mean(0) - v.mean(0)))
    assert gap.paired_cosine == pytest.approx((u * v).sum(1).mean())
    assert gap.unpaired_cosine == pytest.approx((u @ v.T)[other].mean())
    assert gap.relative_gap == pytest.approx(distance / (within + distance))


def test_linear_separability_sees_a_gap_and_only_a_gap() -> None:
    assert modality_gap(*pairs(gap=3.0)).linear_separability > 0.98
    assert 0.35 < modality_gap(*pairs(400)).linear_separability < 0.65


def test_modality_gap_of_identical_and_of_centred_rows() -> None:
    a, b = pairs(gap=2.0, noise=0.0)
    same = modality_gap(a, a.clone())
    assert same.centroid_distance == same.relative_gap == pytest.approx(0, abs=1e-12)
    assert same.paired_cosine == pytest.approx(1)
    before = modality_gap(a, b)
    after = modality_gap(a - a.mean(0), b - b.mean(0))
    assert after.centroid_distance < 0.1 * before.centroid_distance
    assert after.paired_cosine > before.paired_cosine and after.relative_gap < before.relative_gap


def test_modality_gap_is_deterministic_with_a_subset() -> None:
    a, b = pairs(200, gap=0.2)
    assert modality_gap(a, b, max_pairs=80) == modality_gap(a, b, max_pairs=80)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(9, 3), torch.ones(9, 4)), r"pairs of one width; got \(9, 3\) and \(9, 4\)"),
        ((torch.ones(3, 3), torch.ones(3, 3)), "folds=5 needs 2 folds or more and as many groups; got 3"),
        ((torch.ones(9, 3), torch.ones(9, 3), np.arange(8)), r"groups has shape \(8,\); expected \(9,\)"),
        ((torch.ones(9, 3), torch.full((9, 3), torch.nan)), "a or b holds NaN"),
    ],
)
def test_modality_gap_bad_input(arguments: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        modality_gap(*arguments)  # type: ignore[arg-type]
