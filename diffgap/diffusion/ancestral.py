"""DDPM and DDIM: solvers that step from row to row of the training schedule.

Between a level (alpha_t, sigma_t) and a less noisy one (alpha_s, sigma_s), with a = alpha_t / alpha_s,

    q(x_t | x_s)      has variance  v = sigma_t^2 - a^2 sigma_s^2                (DDPM's beta_t)
    q(x_s | x_t, x0)  has mean      a sigma_s^2 / sigma_t^2 x_t + alpha_s v / sigma_t^2 x0
                      and variance  v sigma_s^2 / sigma_t^2

(Kingma et al. 2021, arXiv 2107.00630, appendix A). For variance-preserving levels these are equations 6 and 7
of DDPM (arXiv 2006.11239); they hold for rectified flow as well.
"""

from __future__ import annotations

import math
from typing import Literal

from diffgap.diffusion.prediction import epsilon_coefficients
from diffgap.diffusion.schedule import NoiseSchedule, Spacing
from diffgap.diffusion.table import Level, Row, SolverTable, build_table, x0_row

_CLEAN: Level = (1.0, 0.0)


def _level(schedule: NoiseSchedule, row: int) -> Level:
    alpha, sigma = schedule.table[row].tolist()
    return alpha, sigma


def _transition(now: Level, following: Level) -> tuple[float, float]:
    """``(a, v)`` of the module's documentation."""
    a = now[0] / following[0]
    return a, max(now[1] ** 2 - (a * following[1]) ** 2, 0.0)


def ddpm(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    spacing: Spacing = "leading",
    steps_offset: int = 0,
    variance_type: Literal["fixed_small", "fixed_large"] = "fixed_small",
) -> SolverTable:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2): the mean of ``q(x_s | x_t, x0)`` plus noise.

    Args:
        schedule: Noise schedule and prediction type.
        num_steps: Number of steps.
        spacing: Which rows of the schedule are visited.
        steps_offset: Added to the rows ("leading" only).
        variance_type: Variance of the noise: that of ``q(x_s | x_t, x0)``, or of ``q(x_t | x_s)``
            ("fixed_large"). There is none at row 0.

    Raises:
        ValueError: An option is out of range, or epsilon is predicted at a row without signal.
    """
    if variance_type not in ("fixed_small", "fixed_large"):
        raise ValueError(f"variance_type is {variance_type!r}; use 'fixed_small' or 'fixed_large'")
    visited = schedule.timesteps(num_steps, spacing, steps_offset=steps_offset)
    levels = [*(_level(schedule, row) for row in visited.tolist()), _CLEAN]
    rows = []
    for i, t in enumerate(visited.tolist()):
        now, following = levels[i], levels[i + 1]
        a, v = _transition(now, following)
        share = (following[1] / now[1]) ** 2
        variance = v * share if variance_type == "fixed_small" else v
        rows.append(
            x0_row(now, schedule.prediction_type)
            | {
                "pred_sample": a * share,
                "pred_x0": following[0] * v / now[1] ** 2,
                "pred_noise": math.sqrt(variance) if t > 0 else 0.0,
            }
        )
    return build_table("ddpm", schedule.times[visited], levels, rows)


def ddim(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    spacing: Spacing = "leading",
    steps_offset: int = 0,
    eta: float = 0.0,
    set_alpha_to_one: bool = True,
    use_clipped_model_output: bool = False,
) -> SolverTable:
    """DDIM (arXiv 2010.02502, eq. 12): ``x_s = alpha_s x0 + sqrt(sigma_s^2 - w^2) epsilon + w noise``.

    ``w`` is ``eta`` times the standard deviation of ``q(x_s | x_t, x0)`` (eq. 16). As in diffusers, each step
    goes from row t to row ``t - T // num_steps``. That is the next row visited for "leading", and for
    "trailing" where ``num_steps`` divides T. Elsewhere, and "linspace" above all, the network is told a time
    slightly off, and ``dpmpp(order=1)``, which is DDIM on an exact grid, is the better choice.

    Args:
        schedule: Noise schedule and prediction type.
        num_steps: Number of steps.
        spacing: Which rows of the schedule are visited.
        steps_offset: Added to the rows ("leading" only).
        eta: 0 is deterministic, 1 has DDPM's noise.
        set_alpha_to_one: The last step goes down to no noise; otherwise to row 0.
        use_clipped_model_output: Take epsilon from x0 after it was clamped or put on the sphere, so that the
            two agree; otherwise epsilon is the network's own.

    Raises:
        ValueError: An option is out of range, or epsilon is predicted at a row without signal.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; use a number in [0, 1]")
    visited = schedule.timesteps(num_steps, spacing, steps_offset=steps_offset)
    stride = schedule.num_train_timesteps // num_steps
    end = _CLEAN if set_alpha_to_one else _level(schedule, 0)
    levels: list[Level] = []
    rows: list[Row] = []
    for t in visited.tolist():
        now = _level(schedule, t)
        following = _level(schedule, t - stride) if t >= stride else end
        _, v = _transition(now, following)
        w = eta * math.sqrt(v) * following[1] / now[1]
        direction = math.sqrt(max(following[1] ** 2 - w**2, 0.0))
        row = x0_row(now, schedule.prediction_type) | {"pred_x0": following[0], "pred_noise": w}
        if use_clipped_model_output:  # epsilon = (x_t - alpha_t x0) / sigma_t
            row["pred_sample"] = direction / now[1]
            row["pred_x0"] -= direction * now[0] / now[1]
        else:
            on_sample, on_output = epsilon_coefficients(*now, schedule.prediction_type)
            row |= {"pred_sample": direction * on_sample, "pred_output": direction * on_output}
        levels.append(now)
        rows.append(row)
    return build_table("ddim", schedule.times[visited], [*levels, following], rows)
