"""Euler's method for rectified flow (Liu et al. 2022, arXiv 2209.03003)."""

from __future__ import annotations

from itertools import pairwise

import torch

from diffgap.diffusion.grids import flow_levels
from diffgap.diffusion.schedule import NoiseSchedule
from diffgap.diffusion.table import SolverTable, build_table, x0_row


def euler_flow(schedule: NoiseSchedule, num_steps: int, *, stochastic_sampling: bool = False) -> SolverTable:
    """Euler steps along ``d x / d sigma = epsilon - x0 = (x - x0) / sigma`` from sigma = 1 to 0.

    A step to ``sigma'`` is ``x' = sigma'/sigma x + (1 - sigma'/sigma) x0``, so clamping x0 takes effect. The
    levels are those of diffusers: ``num_steps`` equal steps between the ends of the training schedule, then
    shifted.

    Args:
        schedule: Of kind "flow", any prediction type but epsilon, which says nothing about x0 at sigma = 1.
        num_steps: Number of steps.
        stochastic_sampling: Draw fresh noise in every step, ``x' = (1 - sigma') x0 + sigma' noise``.

    Raises:
        ValueError: Another kind of schedule, ``num_steps`` below 1, or prediction type epsilon.
    """
    if schedule.kind != "flow":
        raise ValueError(f"euler_flow needs a schedule of kind 'flow', got {schedule.kind!r}; use 'ddim' or 'dpmpp'")
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; use 1 or more")
    first, last = float(schedule.sigmas[-1]), float(schedule.sigmas[0])
    sigmas = schedule.shifted(torch.linspace(first, last, num_steps, dtype=torch.float64))
    levels = flow_levels([*sigmas.tolist(), 0.0])
    rows = []
    for now, (alpha, sigma) in pairwise(levels):
        keep = sigma / now[1]
        step = (
            {"pred_x0": alpha, "pred_noise": sigma}
            if stochastic_sampling
            else {"pred_sample": keep, "pred_x0": 1 - keep}
        )
        rows.append(x0_row(now, schedule.prediction_type) | step)
    return build_table("euler_flow", schedule.num_train_timesteps * sigmas, levels, rows)
