"""The rows of multistep solvers against the integral that they approximate, for x0 a polynomial of lambda.

docs/mathematics/diffusion.md derives them: a step from s to t adds ``alpha_t int_0^h n e^(n (tau - h)) x0 dtau`` to the
sample, with n = 1 along the probability flow and n = 2 for the reverse diffusion.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from diffgap.diffusion import NoiseSchedule, SolverTable, build_solver

STEP = 12


def column(solver: SolverTable, name: str, row: int) -> float:
    return float(solver.column(name)[row])


def monomial(solver: SolverTable, start: int, degree: int, level: int) -> float:
    """``(tau / h)^degree`` at a level, for the step from ``start``."""
    alpha, sigma = solver.levels.unbind(1)
    log_snr = (alpha / sigma).log().tolist()
    return float(((log_snr[level] - log_snr[start]) / (log_snr[start + 1] - log_snr[start])) ** degree)


def integral(solver: SolverTable, start: int, degree: int, n: int) -> float:
    """The exact one, by Gauss-Legendre quadrature."""
    (alpha0, sigma0), (alpha, sigma) = solver.levels[start].tolist(), solver.levels[start + 1].tolist()
    h = math.log(alpha / sigma) - math.log(alpha0 / sigma0)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    u = (nodes + 1) / 2
    return float(alpha * (weights / 2 * h * n * np.exp(n * h * (u - 1)) * u**degree).sum())


@pytest.mark.parametrize(
    ("name", "options", "shares"),
    [
        # The share of the exact integral that the row has, for x0 of degree 0, 1, ...
        ("dpmpp", {"order": 1}, [1]),
        ("dpmpp", {"order": 2, "solver_type": "heun"}, [1, 1]),
        ("dpmpp", {"order": 3}, [1, 1, 0.5]),  # half of the second derivative's weight
        ("sde_dpmpp", {"order": 1}, [1]),
        ("sde_dpmpp", {"order": 2, "solver_type": "heun"}, [1, 1]),
        ("unipc", {"order": 3}, [1, 1, 1]),
    ],
)
def test_step_integrates_polynomials(name: str, options: dict[str, Any], shares: list[float]) -> None:
    solver = build_solver(name, NoiseSchedule(prediction_type="sample"), 20, **options)
    n = 2 if name == "sde_dpmpp" else 1
    for degree, share in enumerate(shares):
        terms = [column(solver, "pred_x0", STEP) * monomial(solver, STEP, degree, STEP)]
        terms += [
            column(solver, f"pred_h{j}", STEP) * monomial(solver, STEP, degree, STEP - j) for j in range(1, len(shares))
        ]
        assert sum(terms) == pytest.approx(share * integral(solver, STEP, degree, n), rel=1e-9)


@pytest.mark.parametrize("order", [2, 3])
def test_corrector_integrates_polynomials_of_one_degree_more(order: int) -> None:
    solver = build_solver("unipc", NoiseSchedule(prediction_type="sample"), 20, order=order)
    start = STEP - 1  # corrected at the call of row STEP: h1 is the prediction at `start`
    for degree in range(order + 1):
        terms = [column(solver, "corr_x0", STEP) * monomial(solver, start, degree, STEP)]
        terms += [
            column(solver, f"corr_h{j}", STEP) * monomial(solver, start, degree, STEP - j) for j in range(1, order + 1)
        ]
        assert sum(terms) == pytest.approx(integral(solver, start, degree, 1), rel=1e-9)
    sigmas = solver.levels[:, 1].tolist()
    assert column(solver, "corr_last", STEP) == pytest.approx(sigmas[STEP] / sigmas[start])


def test_reverse_diffusion_damps_the_sample_and_adds_the_variance_lost() -> None:
    solver = build_solver("sde_dpmpp", NoiseSchedule(prediction_type="sample"), 20)
    (alpha0, sigma0), (alpha, sigma) = solver.levels[STEP].tolist(), solver.levels[STEP + 1].tolist()
    damping = sigma / sigma0 * (alpha0 / sigma0) / (alpha / sigma)  # sigma_t / sigma_s e^-h
    assert column(solver, "pred_sample", STEP) == pytest.approx(damping)
    assert column(solver, "pred_noise", STEP) ** 2 == pytest.approx(sigma**2 - (damping * sigma0) ** 2)


@pytest.mark.parametrize(
    ("name", "solver_type", "error"),
    [
        ("unipc", "bh1", 1 / 3),
        ("unipc", "bh2", -1 / 6),
        ("dpmpp", "midpoint", -1 / 6),
        ("sde_dpmpp", "midpoint", -1 / 3),
    ],
)
def test_weight_that_stands_for_the_exact_one_differs_by_a_multiple_of_h(
    name: str, solver_type: str, error: float
) -> None:
    """B / 2 of UniPC and phi_1 / 2 of "midpoint" for phi_2: equal but for a term of h, so order 2 is kept."""
    solver = build_solver(name, NoiseSchedule(prediction_type="sample"), 400, solver_type=solver_type)
    i = 240
    log_snr = (solver.levels[:, 0] / solver.levels[:, 1]).log().tolist()
    exact = integral(solver, i, 1, 2 if name == "sde_dpmpp" else 1)
    share = column(solver, "pred_h1", i) * monomial(solver, i, 1, i - 1) / exact
    assert (share - 1) / (log_snr[i + 1] - log_snr[i]) == pytest.approx(error, rel=0.02)
