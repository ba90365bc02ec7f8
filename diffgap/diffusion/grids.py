"""The noise levels that the multistep solvers visit, laid out as the schedulers of diffusers do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from diffgap.diffusion.schedule import NoiseSchedule, Spacing
from diffgap.diffusion.table import Level

FinalSigma = Literal["zero", "sigma_min"]

#: The alpha^2 that stands for no signal at all under zero_terminal_snr: diffusers' choice.
_SMALLEST_SIGNAL = 2.0**-24

#: How far below 1 the first flow level stays, so that its lambda is finite; diffusers' choice too.
_FLOW_MARGIN = 1e-6


@dataclass(frozen=True)
class Grid:
    """Noise levels of the steps.

    Attributes:
        timesteps: Time the network is told at each step, float64 (S,).
        levels: (alpha, sigma) before each step and, last, after the final one.
    """

    timesteps: Tensor
    levels: list[Level]

    def log_snr(self, i: int) -> float:
        """lambda = ln(alpha / sigma) of level ``i``; infinite where sigma is 0."""
        alpha, sigma = self.levels[i]
        return math.inf if sigma == 0 else math.log(alpha) - math.log(sigma)

    def step(self, i: int) -> float:
        """h: the growth of lambda over step ``i``; infinite for a last step down to sigma = 0."""
        return self.log_snr(i + 1) - self.log_snr(i)


def multistep_grid(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    spacing: Spacing | None,
    steps_offset: int,
    use_karras_sigmas: bool,
    final_sigmas_type: FinalSigma,
    flow_range: tuple[float, float],
) -> Grid:
    """The grid of a solver that steps in lambda.

    For a variance-preserving schedule the levels are its rows at ``spacing`` (None: "linspace") or, with
    ``use_karras_sigmas``, those of Karras et al. 2022 (arXiv 2206.00364, eq. 5, rho = 7) between its ends,
    each told to the network as the nearest row. Where zero terminal SNR leaves no signal, alpha^2 is 2^-24,
    for lambda to be finite. For rectified flow, the levels run over ``flow_range`` in equal steps, are then
    shifted, and the time told is T * sigma, not cut to an integer as in diffusers' multistep schedulers.

    Raises:
        ValueError: An option is unknown or does not apply, or there are more steps than distinct levels.
    """
    if final_sigmas_type not in get_args(FinalSigma):
        raise ValueError(f"final_sigmas_type is {final_sigmas_type!r}; use one of {', '.join(get_args(FinalSigma))}")
    if schedule.kind != "flow":
        spacing = spacing or "linspace"
        return _vp_grid(schedule, num_steps, spacing, steps_offset, use_karras_sigmas, final_sigmas_type)
    if spacing is not None or steps_offset or use_karras_sigmas:
        raise ValueError("spacing, steps_offset and use_karras_sigmas do not apply to kind 'flow'; leave them out")
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; use 1 or more")
    sigmas = schedule.shifted(torch.linspace(*flow_range, num_steps + 1, dtype=torch.float64)[:-1])
    sigmas = sigmas.clamp(max=1 - _FLOW_MARGIN)
    last = 0.0 if final_sigmas_type == "zero" else float(schedule.sigmas[0])
    return Grid(schedule.num_train_timesteps * sigmas, flow_levels([*sigmas.tolist(), last]))


def _vp_grid(
    schedule: NoiseSchedule,
    num_steps: int,
    spacing: Spacing,
    steps_offset: int,
    karras: bool,
    final: FinalSigma,
) -> Grid:
    """:func:`multistep_grid` of a variance-preserving schedule."""
    alphas_cumprod = schedule.alphas_cumprod.numpy().copy()
    if schedule.zero_terminal_snr:
        alphas_cumprod[-1] = _SMALLEST_SIGNAL
    ratios = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)  # sigma / alpha of every row, increasing
    rows = schedule.timesteps(num_steps, spacing, steps_offset=steps_offset, reserve_last=True).numpy()
    if karras:
        visited = np.linspace(ratios[-1] ** (1 / 7), ratios[0] ** (1 / 7), num_steps) ** 7
        # The stand-in for no signal can be less noisy than rows before it: look among the increasing ones.
        known = ratios if ratios[-1] > ratios[-2] else ratios[:-1]
        rows = np.interp(np.log(visited), np.log(known), np.arange(len(known))).round()
    else:
        visited = ratios[rows]
    if (np.diff(visited) >= 0).any():
        raise ValueError(
            f"num_steps is {num_steps}, too many for {spacing} spacing: the noise must fall in each; use fewer"
        )
    last = 0.0 if final == "zero" else float(ratios[0])
    levels = [(1 / math.hypot(1, r), r / math.hypot(1, r)) for r in [*visited.tolist(), last]]
    return Grid(torch.from_numpy(rows.astype(np.float64)), levels)


def flow_levels(sigmas: Sequence[float]) -> list[Level]:
    """Levels of rectified flow: alpha = 1 - sigma."""
    return [(1 - sigma, sigma) for sigma in sigmas]


def phi(k: int, z: float) -> float:
    """``phi_k(z) = sum_j z^j / (j + k)!``: phi_1 = (e^z - 1) / z, phi_(k+1) = (phi_k - 1 / k!) / z.

    The functions of exponential integrators (Hochbruck & Ostermann 2010, Acta Numerica 19); by the
    series for small z, where the recursion loses every digit.
    """
    if abs(z) < 1:
        return math.fsum(z**j / math.factorial(j + k) for j in range(20))
    value = math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / z
    return value
