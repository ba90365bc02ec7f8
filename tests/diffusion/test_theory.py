"""Solvers against what is known exactly: a Gaussian target, whose best denoiser and probability flow are closed forms.

For x0 ~ N(m, s^2) the best prediction of x0 is linear in x_t, and the flow carries the standard score of a sample
along unchanged: x_t = alpha m + sqrt(alpha^2 s^2 + sigma^2) z.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffgap.diffusion import NoiseSchedule, SolverTable, build_solver, sample

MEAN, STD = 0.7, 0.6


def gain(alpha: float, sigma: float) -> float:
    """d E[x0 | x_t] / d x_t."""
    return alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)


def flow_error(solver: SolverTable) -> float:
    """Distance of the solver's result from the exact flow, for standard scores from -2 to 2."""

    def model(x: Tensor, step: int | Tensor) -> Tensor:
        alpha, sigma = solver.levels[step].tolist()
        return MEAN + gain(alpha, sigma) * (x - alpha * MEAN)

    def exact(alpha: float, sigma: float) -> Tensor:
        return alpha * MEAN + math.hypot(alpha * STD, sigma) * torch.linspace(-2, 2, 9).double()[:, None]

    start, end = (exact(*solver.levels[i].tolist()) for i in (0, -1))
    result = sample(model, solver, torch.arange(9), (1,), initial=start, dtype=torch.float64)
    return float((result - end).norm())


def schedule(kind: Any = "scaled_linear") -> NoiseSchedule:
    return NoiseSchedule(kind, beta_start=0.00085, beta_end=0.012, prediction_type="sample")


SMOOTH: dict[str, Any] = {
    "use_karras_sigmas": True,
    "final_sigmas_type": "sigma_min",
    "lower_order_final": False,
}


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("dpmpp", {"order": 1}, 1),
        ("dpmpp", {"order": 2}, 2),
        ("dpmpp", {"order": 2, "solver_type": "heun"}, 2),
        ("dpmpp", {"order": 3}, 2),
        *(("unipc", {"order": p, "solver_type": b}, p + 1) for p in (1, 2, 3) for b in ("bh1", "bh2")),
        *(("unipc", {"order": p, "disable_corrector": range(1000)}, p) for p in (1, 2, 3)),
    ],
)
def test_solver_converges_with_its_order(name: str, options: dict[str, Any], order: int) -> None:
    coarse, fine = (flow_error(build_solver(name, schedule(), steps, **SMOOTH, **options)) for steps in (80, 160))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def test_third_order_multistep_beats_second() -> None:
    second, third = (flow_error(build_solver("dpmpp", schedule(), 40, order=p, **SMOOTH)) for p in (2, 3))
    assert third < second / 4


@pytest.mark.parametrize("name", ["euler_flow", "ddim"])
def test_solver_converges_on_a_rectified_flow(name: str) -> None:
    options = {"spacing": "trailing"} if name == "ddim" else {}
    coarse, fine = (flow_error(build_solver(name, schedule("flow"), steps, **options)) for steps in (50, 100))
    assert math.log2(coarse / fine) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("prediction", ["sample", "flow_prediction", "v_prediction"])
def test_euler_flow_equals_ddim(prediction: Any) -> None:
    """On a rectified flow both make the same step; their grids coincide where every row is visited."""
    flow = NoiseSchedule("flow", num_train_timesteps=20, prediction_type=prediction)
    euler, ddim = (build_solver(name, flow, 20) for name in ("euler_flow", "ddim"))

    def model(x: Tensor, step: int | Tensor) -> Tensor:
        return torch.tanh(x)

    results = [sample(model, table, torch.arange(4), (8,), dtype=torch.float64) for table in (euler, ddim)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def moments(solver: SolverTable) -> tuple[float, float]:
    """Exact mean and variance of what the solver samples, with the best denoiser: every step is linear."""
    mean = torch.zeros(4, dtype=torch.float64)  # of (x, h1, h2, h3)
    covariance = torch.diag(torch.tensor([1.0, 0, 0, 0], dtype=torch.float64))
    for i in range(len(solver)):
        alpha, sigma = solver.levels[i].tolist()
        c = {name: float(solver.column(f"pred_{name}")[i]) for name in ("sample", "output", "x0", "h1", "h2", "noise")}
        k = gain(alpha, sigma)
        on_x0 = c["output"] + c["x0"]  # the network predicts x0
        move = torch.zeros(4, 4, dtype=torch.float64)
        move[0] = torch.tensor([c["sample"] + on_x0 * k, c["h1"], c["h2"], 0])
        move[1, 0], move[2, 1], move[3, 2] = k, 1, 1
        shift = MEAN * (1 - k * alpha) * torch.tensor([on_x0, 1, 0, 0])
        mean = move @ mean + shift
        covariance = move @ covariance @ move.T
        covariance[0, 0] += c["noise"] ** 2
    return float(mean[0]), float(covariance[0, 0])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddpm", {"num_steps": 1000}),
        ("ddim", {"num_steps": 1000, "eta": 1.0}),
        ("sde_dpmpp", {"num_steps": 100, "order": 2, "use_karras_sigmas": True}),
    ],
)
def test_stochastic_solver_reaches_the_target(name: str, options: dict[str, Any]) -> None:
    solver = build_solver(name, NoiseSchedule(prediction_type="sample"), **options)
    assert solver.stochastic
    mean, variance = moments(solver)
    assert mean == pytest.approx(MEAN, rel=0.01)
    assert variance == pytest.approx(STD**2, rel=0.02)


@pytest.mark.parametrize("order", [1, 2])
def test_sde_solver_converges_weakly_with_its_order(order: int) -> None:
    errors = []
    for steps in (150, 300):
        solver = build_solver("sde_dpmpp", schedule(), steps, order=order, **SMOOTH)
        alpha, sigma = solver.levels[-1].tolist()
        errors.append(abs(moments(solver)[1] - (alpha * STD) ** 2 - sigma**2))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_ddpm_noise_is_the_posterior_variance() -> None:
    """Equation 7 of DDPM, step by step, from the betas themselves."""
    alphas_cumprod = schedule().alphas_cumprod
    before = torch.cat((torch.ones(1), alphas_cumprod[:-1])).double()
    beta = 1 - alphas_cumprod / before
    noise = build_solver("ddpm", schedule(), 1000).column("pred_noise").flip(0)
    torch.testing.assert_close(noise**2, (1 - before) / (1 - alphas_cumprod) * beta, rtol=1e-9, atol=1e-15)
    large = build_solver("ddpm", schedule(), 1000, variance_type="fixed_large").column("pred_noise").flip(0)
    torch.testing.assert_close(large[1:] ** 2, beta[1:], rtol=1e-9, atol=0)
