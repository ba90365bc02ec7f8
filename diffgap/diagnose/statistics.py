"""Statistics that several checks share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def effective_rank(rows: Tensor) -> float:
    """``exp(-sum_i p_i ln p_i)``, p the singular values of the centred rows (N, D) over their sum; 0 for equal rows.

    From 1, all on a line, to min(N - 1, D). Roy and Vetterli, "The effective rank" (EUSIPCO 2007).
    """
    x = rows.double() - rows.double().mean(0)
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    total = float(singular.sum())
    if not total > 0:
        return 0.0
    p = singular / total
    return float(torch.special.entr(p).sum().exp())


def permutation_p_value(similarities: list[Tensor], permutations: int, seed: int) -> float:
    """How often shuffled partners are as similar as true ones: ``(1 + #{shuffled >= true}) / (1 + permutations)``.

    The statistic is the sum of the diagonal of every similarity (n, n); a shuffle permutes the partners of each. The
    ones make it a valid p-value (Phipson and Smyth, 2010).
    """
    generator = np.random.default_rng(seed)
    true = sum(float(s.diagonal().sum()) for s in similarities)
    shuffled = np.zeros(permutations)
    for similarity in similarities:
        values, rows = similarity.numpy(), np.arange(len(similarity))
        for draw in range(permutations):
            shuffled[draw] += values[rows, generator.permutation(len(rows))].sum()
    return float(1 + (shuffled >= true).sum()) / (1 + permutations)
