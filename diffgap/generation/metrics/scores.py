"""Scores of generated clips, from a classifier's logits and from embeddings.

With p_i a clip's distribution over the classes:

    IS  = exp(mean_i KL(p_i || mean_j p_j))               Salimans et al., arXiv 1606.03498
    KL  = mean_i sum_c r_ic (log r_ic - log(g_ic + 1e-6))      r: recording, g: generated clip

The constants are those of ``audioldm_eval``: ten splits, a shuffle of seed 2020, 1e-6 inside the logarithm of the
generated side only. Figures of two classifiers live on two scales and do not compare.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from scipy.special import expit, log_softmax, softmax, xlogy
from torch import Tensor

from diffgap.generation.metrics._rows import Floats, Values, as_pairs, as_rows
from diffgap.retrieval.metrics import Ids, positive_ranks

__all__ = ["EPS", "InceptionScore", "clap_scores", "generated_ranks", "inception_score", "kl_divergences"]

#: Added to the generated clip's probabilities before their logarithm.
EPS = 1e-6

Form: TypeAlias = Literal["softmax", "sigmoid"]


class InceptionScore(NamedTuple):
    """Mean and (population) standard deviation over the splits."""

    mean: float
    std: float


def inception_score(logits: Values, *, splits: int = 10, seed: int | None = 2020) -> InceptionScore:
    """Inception score of ``logits`` (N, C): 1 if all clips are classified alike, at most min(C, N / splits).

    Softmax over the classes, though the classifier of the literature (PANNs) has a sigmoid for each. A split's mean
    distribution comes from its own N / splits clips, so the score grows with N and a score without its N says little.

    Args:
        logits: (N, C) before the softmax. splits: Parts of equal size, scored apart.
        seed: Of the shuffle before splitting; None keeps the order.

    Raises:
        ValueError: fewer clips than ``splits``, logits that are not finite.
    """
    rows = as_rows("logits", logits)
    count = len(rows)
    if not 1 <= splits <= count:
        raise ValueError(f"splits must be 1 to {count}, the number of clips; got {splits}")
    if seed is not None:
        # The legacy generator: its stream is frozen, and is the one the literature's figures are shuffled by.
        rows = rows[np.random.RandomState(seed).permutation(count)]
    bounds = [number * count // splits for number in range(splits + 1)]
    scores = [_split_score(rows[start:stop]) for start, stop in pairwise(bounds)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def _split_score(logits: Floats) -> float:
    p, log_p = softmax(logits, axis=1), log_softmax(logits, axis=1)
    with np.errstate(divide="ignore"):
        log_mean = np.log(p.mean(0))
    # Where p underflows to zero its term is zero, whatever the logarithms say.
    terms = np.where(p > 0, p * (log_p - np.where(p > 0, log_mean, 0.0)), 0.0)
    return float(np.exp(terms.sum(1).mean()))


def kl_divergences(generated: Values, reference: Values, *, form: Form = "softmax") -> Floats:
    """KL(reference || generated) of each pair, (N,) float64; the metric is its mean.

    Args:
        generated: (N, C) logits. reference: (N, C) logits of the real recording of each row.
        form: "softmax": one distribution over the classes. "sigmoid": every class by itself, summed; only the terms
            of its presence are (r log r/g, not (1 - r) log (1 - r)/(1 - g)), as in ``audioldm_eval``, so that it is not
            a divergence and may be negative, and it is meaningful only for a multi-label classifier.

    Raises:
        ValueError: shapes that differ, logits that are not finite, unknown form.
    """
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}; got {form!r}")
    logits = as_pairs("generated", generated, "reference", reference)
    g, r = (softmax(x, axis=1) if form == "softmax" else expit(x) for x in logits)
    return np.asarray((xlogy(r, r) - r * np.log(g + EPS)).sum(1))


def clap_scores(audio: Values, condition: Values) -> Floats:
    """Cosine of each clip's embedding with that of its condition, (N,) float64; the CLAP score is its mean.

    Args:
        audio: (N, D) of the generated clips. condition: (N, D) of what each was generated from, from the tower of the
            same checkpoint.

    Raises:
        ValueError: shapes that differ, rows that are zero or not finite.
    """
    rows = as_pairs("audio", audio, "condition", condition)
    norms = [_norms(name, x) for name, x in zip(("audio", "condition"), rows, strict=True)]
    return np.asarray((rows[0] / norms[0] * (rows[1] / norms[1])).sum(1))


def generated_ranks(
    generated: Values, conditions: Values, ids: Ids | None = None, condition_ids: Ids | None = None
) -> Tensor:
    """Rank of each generated clip's own condition among all conditions, by cosine; ties count against the clip.

    For :func:`diffgap.retrieval.metrics.retrieval_metrics` and ``bootstrap_metrics``: recall of the generated audio.

    Args:
        generated: (N, D) embeddings of clips. conditions: (M, D), in the same space: captions, or the recordings.
        ids, condition_ids: Integers (N,) and (M,); equal ones are a clip and its condition. Without them row i belongs
            to row i, and conditions that are equal are one.

    Returns:
        (N, P) float64, as :func:`diffgap.retrieval.metrics.positive_ranks`.

    Raises:
        ValueError: shapes that do not fit, rows that are zero or not finite, a clip without a condition.
    """
    queries, gallery = as_rows("generated", generated), as_rows("conditions", conditions)
    _norms("generated", queries)
    _norms("conditions", gallery)
    if (ids is None) != (condition_ids is None):
        raise ValueError("ids and condition_ids go together; give both or neither")
    if ids is None or condition_ids is None:
        as_pairs("generated", queries, "conditions", gallery)
        gallery, codes = np.unique(gallery, axis=0, return_inverse=True)
        ids, condition_ids = codes.reshape(-1), np.arange(len(gallery))
    return positive_ranks(torch.from_numpy(queries), torch.from_numpy(gallery), ids, condition_ids)


def _norms(name: str, rows: Floats) -> Floats:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not norms.all():
        raise ValueError(f"{name}: {int((norms == 0).sum())} of {len(rows)} rows are zero and have no direction")
    return np.asarray(norms)
