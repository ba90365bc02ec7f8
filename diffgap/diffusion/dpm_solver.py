"""DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095): multistep exponential integrators of the data prediction.

In lambda = ln(alpha / sigma), from level s to t with h = lambda_t - lambda_s, the probability-flow ODE is

    x_t = sigma_t / sigma_s x_s + alpha_t int_0^h e^(tau - h) x0(lambda_s + tau) dtau            (eq. 8)

and with x0 replaced by its Taylor polynomial, its derivatives from earlier steps (D0 = x0, D1 ~ h x0'),

    x_t = sigma_t / sigma_s x_s + alpha_t h [phi_1(-h) D0 + phi_2(-h) D1 + phi_3(-h) D2]

The SDE form (same paper) damps the sample by another e^-h, has 2h for h in the weights
and adds noise of variance ``sigma_t^2 (1 - e^(-2h))``.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from diffgap.diffusion.grids import FinalSigma, Grid, multistep_grid, phi
from diffgap.diffusion.schedule import NoiseSchedule, Spacing
from diffgap.diffusion.table import Row, SolverTable, build_table, x0_row

SolverType = Literal["midpoint", "heun"]


def dpmpp(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    order: int = 2,
    solver_type: SolverType = "midpoint",
    spacing: Spacing | None = None,
    steps_offset: int = 0,
    use_karras_sigmas: bool = False,
    final_sigmas_type: FinalSigma = "zero",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> SolverTable:
    """DPM-Solver++ 1, 2M or 3M; the first is DDIM.

    3M, as its authors and diffusers compute it, converges with order 2 like 2M, though with a smaller error; UniPC
    of order 2 or 3 has the higher order.

    Args:
        schedule: Noise schedule and prediction type.
        num_steps: Number of steps.
        order: 1, 2 or 3; the first steps have the order their history allows.
        solver_type: How order 2 weighs D1: phi_1 / 2 ("midpoint") or phi_2 ("heun"), equal to second order.
        spacing: Which rows of the schedule are visited, "linspace" if None (not for kind "flow").
        steps_offset: Added to the rows ("leading" only).
        use_karras_sigmas: Levels of Karras et al. 2022 instead of rows at ``spacing`` (not for kind "flow").
        final_sigmas_type: End without noise ("zero") or at the lowest level of training ("sigma_min").
        lower_order_final: Order 1 in the last and at most 2 in the last but one of fewer than 15 steps.
        euler_at_final: Order 1 in the last step, however many there are. A last step to "zero" always has
            order 1.

    Raises:
        ValueError: An option is unknown, out of range or does not apply.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order is {order}; use 1, 2 or 3")
    grid = _grid(schedule, num_steps, spacing, steps_offset, use_karras_sigmas, final_sigmas_type, solver_type)
    orders = step_orders(len(grid.timesteps), order, final_sigmas_type, lower_order_final, euler_at_final)
    rows = [
        x0_row(grid.levels[i], schedule.prediction_type) | ode_row(grid, i, used, solver_type)
        for i, used in enumerate(orders)
    ]
    return build_table("dpmpp", grid.timesteps, grid.levels, rows)


def sde_dpmpp(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    order: int = 2,
    solver_type: SolverType = "midpoint",
    spacing: Spacing | None = None,
    steps_offset: int = 0,
    use_karras_sigmas: bool = False,
    final_sigmas_type: FinalSigma = "zero",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> SolverTable:
    """SDE-DPM-Solver++ 1 or 2M: :func:`dpmpp` for the reverse diffusion, with fresh noise in every step."""
    if order not in (1, 2):
        raise ValueError(f"order is {order}; use 1 or 2")
    grid = _grid(schedule, num_steps, spacing, steps_offset, use_karras_sigmas, final_sigmas_type, solver_type)
    orders = step_orders(len(grid.timesteps), order, final_sigmas_type, lower_order_final, euler_at_final)
    rows = [
        x0_row(grid.levels[i], schedule.prediction_type) | sde_row(grid, i, used, solver_type)
        for i, used in enumerate(orders)
    ]
    return build_table("sde_dpmpp", grid.timesteps, grid.levels, rows)


def _grid(
    schedule: NoiseSchedule,
    num_steps: int,
    spacing: Spacing | None,
    steps_offset: int,
    use_karras_sigmas: bool,
    final_sigmas_type: FinalSigma,
    solver_type: SolverType,
) -> Grid:
    if solver_type not in get_args(SolverType):
        raise ValueError(f"solver_type is {solver_type!r}; use one of {', '.join(get_args(SolverType))}")
    return multistep_grid(
        schedule,
        num_steps,
        spacing=spacing,
        steps_offset=steps_offset,
        use_karras_sigmas=use_karras_sigmas,
        final_sigmas_type=final_sigmas_type,
        flow_range=(1 - 1 / schedule.num_train_timesteps, 0.0),
    )


def step_orders(
    steps: int, order: int, final_sigmas_type: FinalSigma, lower_order_final: bool, euler_at_final: bool
) -> list[int]:
    """The order of each step: what its history allows, lowered towards the end where h is large."""
    orders = [min(order, i + 1) for i in range(steps)]
    short = lower_order_final and steps < 15
    if short and steps >= 2:
        orders[-2] = min(orders[-2], 2)
    if short or euler_at_final or final_sigmas_type == "zero":
        orders[-1] = 1
    return orders


def ode_row(grid: Grid, i: int, order: int, solver_type: SolverType) -> Row:
    """Prediction columns of step ``i``. h = 0 (a last step from sigma_min to itself) gives the identity."""
    (alpha, sigma), h = grid.levels[i + 1], grid.step(i)
    row = {"pred_sample": sigma / grid.levels[i][1], "pred_x0": -alpha * math.expm1(-h)}
    if order == 1:
        return row
    h0 = grid.step(i - 1)
    if order == 2:
        # D1 = (x0 - h1) h / h0
        weight = -alpha * math.expm1(-h) / 2 if solver_type == "midpoint" else alpha * h * phi(2, -h)
        return row | {"pred_x0": row["pred_x0"] + weight * h / h0, "pred_h1": -weight * h / h0}
    # First differences d0 = (x0 - h1) h / h0 and d1 = (h1 - h2) h / h_1 extrapolate to
    #     D1 = d0 + h0 / (h0 + h_1) (d0 - d1),   D2 = h / (h0 + h_1) (d0 - d1).
    # That D2 is h^2 x0'' / 2 rather than the h^2 x0'' of the expansion: half its weight, as in the paper's own code
    # and in diffusers. Hence the convergence of order 2.
    h_1 = grid.step(i - 2)
    weight1, weight2 = alpha * h * phi(2, -h), alpha * h * phi(3, -h)
    on_difference = (weight1 * h0 + weight2 * h) / (h0 + h_1)
    on_d0, on_d1 = (weight1 + on_difference) * h / h0, -on_difference * h / h_1
    return row | {"pred_x0": row["pred_x0"] + on_d0, "pred_h1": on_d1 - on_d0, "pred_h2": -on_d1}


def sde_row(grid: Grid, i: int, order: int, solver_type: SolverType) -> Row:
    """Prediction columns of step ``i`` of the SDE form, order 1 or 2."""
    (alpha, sigma), h = grid.levels[i + 1], grid.step(i)
    spread = -math.expm1(-2 * h)
    row = {
        "pred_sample": sigma / grid.levels[i][1] * math.exp(-h),
        "pred_x0": alpha * spread,
        "pred_noise": sigma * math.sqrt(spread),
    }
    if order == 1:
        return row
    ratio = h / grid.step(i - 1)
    weight = alpha * spread / 2 if solver_type == "midpoint" else alpha * 2 * h * phi(2, -2 * h)
    return row | {"pred_x0": row["pred_x0"] + weight * ratio, "pred_h1": -weight * ratio}
