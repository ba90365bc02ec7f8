"""UniPC (Zhao et al. 2023, arXiv 2302.04867): a predictor, and a corrector that reuses the next network call.

In the notation of :mod:`diffgap.diffusion.dpm_solver`, a step from level s to level t has

    x_t = sigma_t / sigma_s x_s - alpha_t (e^-h - 1) m_0 - alpha_t sum_k w_k (m_k - m_0) / r_k

with m_0 the x0 prediction at s, m_k those at r_k = (lambda_k - lambda_s) / h: earlier ones, and for the
corrector also the one at t itself (r = 1). The weights w = B(h) rho match the Taylor expansion up to their
number (theorem 3.1):

    sum_k r_k^(i-1) w_k = i! z phi_(i+1)(z),   i = 1, 2, ...,   z = -h

A single weight is B(h) / 2 instead, where B is ``z`` ("bh1") or ``e^z - 1`` ("bh2"). The corrector of a step
is applied at the start of the next one, once the network has been called there: hence ``corr_last`` and one
row per call.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal, get_args

import torch

from diffgap.diffusion.grids import FinalSigma, Grid, multistep_grid, phi
from diffgap.diffusion.schedule import NoiseSchedule, Spacing
from diffgap.diffusion.table import Row, SolverTable, build_table, x0_row

UniPCType = Literal["bh1", "bh2"]


def unipc(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    order: int = 2,
    solver_type: UniPCType = "bh2",
    spacing: Spacing | None = None,
    steps_offset: int = 0,
    use_karras_sigmas: bool = False,
    final_sigmas_type: FinalSigma = "zero",
    lower_order_final: bool = True,
    disable_corrector: Collection[int] = (),
) -> SolverTable:
    """UniPC-p with its corrector.

    Args:
        schedule: Noise schedule and prediction type.
        num_steps: Number of steps.
        order: p of the predictor: 1, 2 or 3. The corrector adds one order and costs no network call.
        solver_type: B(h): "bh1" or "bh2".
        spacing: Which rows of the schedule are visited, "linspace" if None (not for kind "flow").
        steps_offset: Added to the rows ("leading" only).
        use_karras_sigmas: Levels of Karras et al. 2022 instead of rows at ``spacing`` (not for kind "flow").
        final_sigmas_type: End without noise ("zero") or at the lowest level of training ("sigma_min").
        lower_order_final: Lower the order towards 1 over the last steps; needed to end at "zero".
        disable_corrector: Steps whose result is not corrected; early ones, under strong guidance.

    Raises:
        ValueError: An option is unknown, out of range or does not apply.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order is {order}; use 1, 2 or 3")
    if solver_type not in get_args(UniPCType):
        raise ValueError(f"solver_type is {solver_type!r}; use one of {', '.join(get_args(UniPCType))}")
    if not lower_order_final and final_sigmas_type == "zero" and order > 1:
        raise ValueError("lower_order_final=False cannot end at sigma 0; use final_sigmas_type='sigma_min'")
    grid = multistep_grid(
        schedule,
        num_steps,
        spacing=spacing,
        steps_offset=steps_offset,
        use_karras_sigmas=use_karras_sigmas,
        final_sigmas_type=final_sigmas_type,
        flow_range=(1.0, 1 / schedule.num_train_timesteps),
    )
    steps = len(grid.timesteps)
    rows: list[Row] = []
    previous_order = 0
    for i in range(steps):
        row = x0_row(grid.levels[i], schedule.prediction_type)
        if i > 0 and i - 1 not in disable_corrector:
            row |= corrector(grid, i, previous_order, solver_type)
        previous_order = min(order, i + 1, steps - i if lower_order_final else order)
        rows.append(row | predictor(grid, i, previous_order, solver_type))
    return build_table("unipc", grid.timesteps, grid.levels, rows)


def predictor(grid: Grid, i: int, order: int, solver_type: UniPCType) -> Row:
    """Prediction columns of step ``i``, from ``order`` x0 predictions."""
    alpha, sigma = grid.levels[i + 1]
    h = grid.step(i)
    if h == 0:  # a last step from sigma_min to itself
        return {"pred_corrected": 1.0}
    ratios = _ratios(grid, i, order)
    weights = _weights(ratios, h, solver_type)
    shares = [w / r for w, r in zip(weights, ratios, strict=True)]
    row = {"pred_corrected": sigma / grid.levels[i][1], "pred_x0": -alpha * (math.expm1(-h) - sum(shares))}
    return row | {f"pred_h{k}": -alpha * share for k, share in enumerate(shares, 1)}


def corrector(grid: Grid, i: int, order: int, solver_type: UniPCType) -> Row:
    """Correction columns at row ``i`` for step ``i - 1`` of that ``order``: m_0 is ``h1``, m_k ``h(k+1)``."""
    alpha, sigma = grid.levels[i]
    h = grid.step(i - 1)
    ratios = [*_ratios(grid, i - 1, order), 1.0]
    weights = _weights(ratios, h, solver_type)
    *shares, newest = (w / r for w, r in zip(weights, ratios, strict=True))
    row = {
        "corr_sample": 0.0,
        "corr_last": sigma / grid.levels[i - 1][1],
        "corr_x0": -alpha * newest,
        "corr_h1": -alpha * (math.expm1(-h) - sum(shares) - newest),
    }
    return row | {f"corr_h{k}": -alpha * share for k, share in enumerate(shares, 2)}


def _ratios(grid: Grid, i: int, order: int) -> list[float]:
    """r_k of the ``order - 1`` predictions before step ``i``; negative."""
    h = grid.step(i)
    return [(grid.log_snr(i - k) - grid.log_snr(i)) / h for k in range(1, order)]


def _weights(ratios: list[float], h: float, solver_type: UniPCType) -> list[float]:
    """The weights w of the module's documentation."""
    z = -h
    if not ratios:
        return []
    if len(ratios) == 1:
        return [(z if solver_type == "bh1" else math.expm1(z)) / 2]
    powers = torch.tensor([[r ** (i - 1) for r in ratios] for i in range(1, len(ratios) + 1)], dtype=torch.float64)
    moments = [math.factorial(i) * z * phi(i + 1, z) for i in range(1, len(ratios) + 1)]
    weights: list[float] = torch.linalg.solve(powers, torch.tensor(moments, dtype=torch.float64)).tolist()
    return weights
