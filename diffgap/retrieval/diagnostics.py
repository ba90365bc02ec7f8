"""How far apart two modalities lie: the modality gap, before and after bridging.

For unit rows a_i, b_i of N pairs and the distance d = 1 - cosine:

    centroid distance      |mean(a) - mean(b)|                         "Mind the Gap" (NeurIPS 2022)
    paired cosine          mean_i <a_i, b_i>
    unpaired cosine        mean <a_i, b_j> over pairs of different groups
    relative gap           d(a_i, b_i) / (mean d within a modality + d(a_i, b_i)); 0.5 where a partner is as far as a
                           random row of its own modality              "Two Effects, One Trigger" (ICLR 2025)
    linear separability    cross-validated accuracy of a logistic regression that tells a from b; 0.5 means no gap
                           that it can see
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffgap.retrieval.metrics import Ids

__all__ = ["ModalityGap", "modality_gap", "unpaired_cosine"]


@dataclass(frozen=True)
class ModalityGap:
    """The figures of the module's docstring, over ``pairs`` pairs."""

    pairs: int
    centroid_distance: float
    paired_cosine: float
    unpaired_cosine: float
    relative_gap: float
    linear_separability: float


def modality_gap(
    a: Tensor, b: Tensor, groups: Ids | None = None, *, folds: int = 5, max_pairs: int = 1000, seed: int = 0
) -> ModalityGap:
    """Gap between paired rows ``a`` and ``b``, both (N, D).

    ``groups`` (N,): rows of equal group are no negatives of each other and share a fold, so that the
    classifier is tested on concepts it has not seen. ``max_pairs`` pairs, drawn with ``seed``, train and test
    the classifier; all serve the rest. Raises ValueError for shapes that differ, values that are not finite,
    or fewer groups than ``folds``.
    """
    if a.dim() != 2 or a.shape != b.shape:
        raise ValueError(f"a and b must be pairs of one width; got {tuple(a.shape)} and {tuple(b.shape)}")
    codes = np.arange(len(a)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if codes.shape != (len(a),):
        raise ValueError(f"groups has shape {codes.shape}; expected ({len(a)},), one a pair")
    if folds < 2 or len(np.unique(codes)) < folds:
        raise ValueError(f"folds={folds} needs 2 folds or more and as many groups; got {len(np.unique(codes))}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("a or b holds NaN or infinite values; drop those rows")
    a, b = (normalize(t.detach().cpu().double(), dim=1) for t in (a, b))
    paired = float((a * b).sum(1).mean())
    within = (unpaired_cosine(a, a, codes) + unpaired_cosine(b, b, codes)) / 2
    distance = 1 - paired
    return ModalityGap(
        pairs=len(a),
        centroid_distance=float((a.mean(0) - b.mean(0)).norm()),
        paired_cosine=paired,
        unpaired_cosine=unpaired_cosine(a, b, codes),
        relative_gap=distance / max(1 - within + distance, 1e-12),
        linear_separability=_separability(a, b, codes, folds, max_pairs, seed),
    )


def unpaired_cosine(a: Tensor, b: Tensor, codes: np.ndarray) -> float:
    """Mean of ``<a_i, b_j>`` over i, j of different groups: (sum a . sum b - that within groups) / count.

    Args:
        a, b: Unit rows (N, D), float64.
        codes: (N,) group of row i of both, integers from 0 on; two groups or more.
    """
    rows = torch.from_numpy(codes)
    counts = torch.bincount(rows).double()
    sums = [torch.zeros(len(counts), t.shape[1], dtype=t.dtype).index_add_(0, rows, t) for t in (a, b)]
    total = a.sum(0) @ b.sum(0) - (sums[0] * sums[1]).sum()
    return float(total / (len(a) ** 2 - counts.square().sum()))


def _separability(a: Tensor, b: Tensor, codes: np.ndarray, folds: int, max_pairs: int, seed: int) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    kept = np.sort(np.random.default_rng(seed).permutation(len(a))[:max_pairs])
    values = torch.cat([a[kept], b[kept]]).numpy()
    labels = np.repeat([0, 1], len(kept))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    scores = cross_val_score(model, values, labels, groups=np.tile(codes[kept], 2), cv=GroupKFold(folds))
    return float(scores.mean())
