"""Checks of a trained bridge in one direction, on pairs of validation data."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from diffgap.diagnose.finding import Finding, judge
from diffgap.diagnose.observe import Errors, Samples
from diffgap.diagnose.statistics import effective_rank
from diffgap.retrieval.bootstrap import bootstrap, paired_bootstrap
from diffgap.retrieval.diagnostics import unpaired_cosine

#: Least gain of the denoising error that counts as use of the condition, see :func:`check_condition`.
LEAST_GAIN = 0.01


def check_trajectory(samples: Samples, direction: str) -> Finding:
    """Whether samples approach their target step by step, at the norm they should have.

    A sample and its target are two draws from one posterior. If the best estimate of x0, the posterior's mean, has
    cosine r with the target, a perfect sample has r^2 with it: only less is drift.
    """
    cosines, centre = samples.cosines, samples.drawn.mean(1)
    lead = paired_bootstrap(_cosine(centre, samples.target), _cosine(centre, samples.target.roll(1, 0)))
    best, final = float(cosines.mean(1).max()), bootstrap(cosines[-1])
    perfect, deviation = max(best, 0.0) ** 2, abs(float(samples.norms[-1]) - 1)
    limit = perfect - min(perfect, 1 - perfect) / 2
    verdict, fix = judge(
        (
            (lead.low <= 0, "bad", "check the pairs, or train longer"),
            (
                deviation > 3 * samples.norm_spread,
                "bad",
                "take scaling 'sqrt_dim', prediction 'sample' or 'v_prediction', or more sampling steps",
            ),
            (final.high < limit, "warn", "take fewer sampling steps, more dropout, or the mean of more samples"),
        )
    )
    return Finding(
        "trajectory", direction, verdict,
        {
            "best_cosine": best, "final_cosine": final.estimate, "drift_limit": limit,
            "lead_over_strangers": lead.estimate, "lead_low": lead.low,
            "final_norm": float(samples.norms[-1]), "norm_spread": samples.norm_spread,
            "largest_norm": float(samples.norms.max()),
        },
        "bad: samples no closer to their own target than to another (95% interval), or their mean norm further from "
        "that of real embeddings than 3 standard deviations of one embedding; warn: final cosine below the square "
        "of the best on the way by more than half of what that square is from 0 or 1 (95% interval)",
        "a sample and its target are two draws of one posterior, and if its mean has cosine r with the target, a "
        "perfect sample has r squared; on the way x may be too long: the sampler puts estimates on the sphere, where "
        "a mean of many is shorter, which on the stamps measured better than leaving them",
        fix,
        curves={
            "cosine": cosines.mean(1).tolist(), "norm of x": samples.norms.tolist(),
            "norm of the estimate": samples.estimate_norms.tolist(),
        },
    )  # fmt: skip


def check_condition(errors: Errors, direction: str, *, null_trained: bool = True) -> Finding:
    """Whether the denoiser uses its condition: error(true) < error(none), error(true) < error(another group's).

    Gains are in units of the mean error under another group's condition at the same noise level, so that all levels
    count alike; noise is the same under all three conditions. Whatever the denoiser predicts, the gain over no
    condition at pure noise is about the share of the target's variance that the condition explains, r^2 of a
    correlation r. :data:`LEAST_GAIN` is that of r = 0.1, which Cohen (Statistical Power Analysis for the Behavioral
    Sciences, 1988, ch. 3) calls small; an interval of many pairs excludes 0 for gains far too small to matter.

    Args:
        null_trained: Whether training ever hid the condition; else the error without one means nothing.
    """
    scale = errors.shuffled.mean(0).clamp_min(torch.finfo(torch.float64).tiny)
    over_shuffled = bootstrap(((errors.shuffled - errors.true) / scale).mean(1))
    over_null = bootstrap(((errors.null - errors.true) / scale).mean(1))
    verdict, fix = judge(
        (
            (
                over_shuffled.low <= 0 or over_shuffled.estimate < LEAST_GAIN,
                "bad",
                "check the pairs, train longer, or raise diffusion_weight",
            ),
            (
                null_trained and (over_null.low <= 0 or over_null.estimate < LEAST_GAIN),
                "warn",
                "train on more pairs, with more head_dropout or for fewer steps; leave guidance_scale at 1: guidance "
                "would add to the error",
            ),
        )
    )
    return Finding(
        "condition", direction, verdict,
        {
            "gain_over_shuffled": over_shuffled.estimate, "gain_over_none": over_null.estimate,
            "gain_over_shuffled_low": over_shuffled.low, "gain_over_none_low": over_null.low,
        },
        "bad: the gain over another group's condition is below 1% of the error, or its 95% interval reaches 0; warn: "
        "that over no condition is or does",
        "a bridge that uses its condition denoises worse with a wrong one; one that does no better than without any on "
        "unseen pairs has learnt the training pairs by heart; at pure noise a gain of 1% is a correlation of 0.1 with "
        "the target, a small effect (Cohen, 1988)",
        fix,
        curves={name: values.mean(0).tolist() for name, values in errors._asdict().items()},
    )  # fmt: skip


def check_collapse(samples: Samples, direction: str) -> Finding:
    """Whether samples are as varied as real embeddings, between conditions and for one condition.

    Spread is 1 - mean pairwise cosine. Between conditions the measure is that of the real targets; for one condition
    the distance of the samples from the truth, from which calibrated samples lie as far as from one another.
    """
    drawn, (rows, count, _) = samples.drawn, samples.drawn.shape
    conditions = np.repeat(np.arange(rows), count)
    across = unpaired_cosine(drawn.flatten(0, 1), drawn.flatten(0, 1), conditions)
    real = unpaired_cosine(samples.target, samples.target, np.arange(rows))
    within = float(((drawn.sum(1).square().sum(-1) - count) / (count * (count - 1))).mean())
    paired = float((drawn * samples.target[:, None]).sum(-1).mean())
    ranks = [effective_rank(x) for x in (drawn[:, 0], samples.translated, samples.target)]
    # Real embeddings without any spread are another check's finding.
    between, inside, rank = (
        part / max(whole, 1e-12) for part, whole in ((1 - across, 1 - real), (1 - within, 1 - paired), ranks[::2])
    )
    narrow = "check the pairs and whether the condition is used; lower the learning rate"
    alike = (
        "for generation take more sampling steps, solver 'sde_dpmpp' or more dropout; for retrieval nothing need change"
    )
    verdict, fix = judge(
        (
            (min(between, rank) < 0.25, "bad", narrow),
            (0.25 <= min(between, rank) < 0.5, "warn", narrow),
            (inside < 0.25, "warn", alike),
        )
    )
    return Finding(
        "collapse", direction, verdict,
        {
            "spread_of_real": between, "rank_of_real": rank, "spread_of_truth": inside, "cosine_across": across,
            "cosine_real": real, "cosine_within": within, "cosine_paired": paired, "effective_rank": ranks[0],
            "effective_rank_bridged": ranks[1], "effective_rank_real": ranks[2],
        },
        "bad: spread or effective rank of samples of different conditions below a quarter of that of as many real "
        "embeddings; warn: below half, or samples of one condition spread less than a quarter of their distance from "
        "the truth",
        "at half the spread a condition more in two gives the answer of another; samples of one condition that lie "
        "closer to one another than to the truth are surer than they should be, which the mean that retrieval uses "
        "bears, and a generator does not",
        fix,
        curves=dict(_spectra(("samples", drawn[:, 0]), ("bridged", samples.translated), ("real", samples.target))),
    )  # fmt: skip


def check_gap(samples: Samples, direction: str, *, seed: int = 0) -> Finding:
    """The modality gap between the source and the target before and after bridging."""
    bridged = samples.translated
    before, after = samples.gaps(seed)
    gain = paired_bootstrap(_cosine(bridged, samples.target), _cosine(samples.source, samples.target))
    # What two halves of one modality are apart: the distance that sampling alone gives.
    order = torch.randperm(len(bridged), generator=torch.Generator().manual_seed(seed))
    one, other = (samples.target[part].mean(0) for part in order.tensor_split(2))
    floor = float((one - other).norm())
    verdict, fix = judge(
        (
            (
                gain.high < 0,
                "bad",
                "average more samples, train longer, or score by the plain cosine",
            ),
            (
                gain.low <= 0 <= gain.high,
                "warn",
                "compare the scorings by `diffgap eval`: the plain cosine may serve as well",
            ),
            (
                after.centroid_distance > before.centroid_distance + floor,
                "warn",
                "train longer, or lower guidance_scale",
            ),
        )
    )
    figures = ("paired_cosine", "unpaired_cosine", "centroid_distance", "relative_gap", "linear_separability")
    values = {
        f"{name}_{when}": float(getattr(gap, name))
        for name in figures
        for when, gap in (("before", before), ("after", after))
    }
    return Finding(
        "gap", direction, verdict,
        {"gain": gain.estimate, "gain_low": gain.low, "gain_high": gain.high, **values, "centroid_floor": floor},
        "bad: the paired cosine falls (95% interval); warn: it does not rise, or the centroid distance grows by more "
        "than two halves of the real targets are apart",
        "bringing an embedding closer to its partner is what a bridge is for; centroids of samples from one set differ "
        "by the distance of its halves",
        fix,
    )  # fmt: skip


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """(N,) cosines of rows."""
    return torch.cosine_similarity(a, b, dim=-1)


def _spectra(*sets: tuple[str, Tensor]) -> Iterator[tuple[str, list[float]]]:
    """Singular values of centred rows over their sum, in descending order."""
    for name, rows in sets:
        singular = torch.linalg.svdvals(rows - rows.mean(0))[: len(rows) - 1]
        yield name, (singular / singular.sum().clamp_min(torch.finfo(rows.dtype).tiny)).tolist()
