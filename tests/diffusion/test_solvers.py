from __future__ import annotations

from typing import Any

import pytest
import torch

from diffgap.diffusion import NoiseSchedule, build_solver
from diffgap.diffusion.grids import phi
from diffgap.diffusion.solvers import SOLVERS
from diffgap.ops.solver_step import COLUMNS


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_build_solver_gives_a_table(name: str, steps: int) -> None:
    kind: Any = "flow" if name == "euler_flow" else "linear"
    solver = build_solver(name, NoiseSchedule(kind, prediction_type="v_prediction"), steps)
    assert solver.name == name
    assert len(solver) == steps
    assert solver.coefficients.shape == (steps, len(COLUMNS))
    assert solver.coefficients.dtype == torch.float64
    assert solver.timesteps.dtype == torch.float64
    assert solver.levels.shape == (steps + 1, 2)
    assert (solver.timesteps.diff() < 0).all()
    assert solver.levels[-1].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "options", "history", "stochastic", "corrects"),
    [
        ("ddim", {}, 0, False, False),
        ("ddim", {"eta": 1.0}, 0, True, False),
        ("ddpm", {}, 0, True, False),
        ("dpmpp", {"order": 1}, 0, False, False),
        ("dpmpp", {"order": 3}, 2, False, False),
        ("sde_dpmpp", {}, 1, True, False),
        ("unipc", {"order": 1}, 1, False, True),
        ("unipc", {"order": 3}, 3, False, True),
        ("unipc", {"order": 3, "disable_corrector": range(10)}, 2, False, False),
    ],
)
def test_solver_table_says_what_it_uses(
    name: str, options: dict[str, Any], history: int, stochastic: bool, corrects: bool
) -> None:
    solver = build_solver(name, NoiseSchedule(), 10, **options)
    assert (solver.history, solver.stochastic, solver.corrects) == (history, stochastic, corrects)


@pytest.mark.parametrize("name", ["dpmpp", "unipc", "sde_dpmpp"])
def test_solver_ends_at_sigma_min_without_a_step(name: str) -> None:
    """A Karras grid already visits sigma_min; the last row then passes the sample on."""
    options: dict[str, Any] = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}
    solver = build_solver(name, NoiseSchedule(), 6, **options)
    row = dict(zip(COLUMNS, solver.coefficients[-1].tolist(), strict=True))
    assert row["pred_corrected"] + row["pred_sample"] == pytest.approx(1)
    assert [row[c] for c in ("pred_x0", "pred_h1", "pred_h2", "pred_noise")] == pytest.approx([0] * 4, abs=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_phi_is_continuous_where_its_formula_changes(k: int) -> None:
    assert phi(k, 0.0) == pytest.approx(1 / [1, 1, 2, 6, 24][k])
    for z in (1.0, -1.0):
        assert phi(k, z * (1 - 1e-12)) == pytest.approx(phi(k, z), rel=1e-10)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample", "epsilon"])
@pytest.mark.parametrize("name", ["dpmpp", "unipc"])
def test_solver_takes_zero_terminal_snr(name: str, prediction: Any) -> None:
    schedule = NoiseSchedule("scaled_linear", zero_terminal_snr=True, prediction_type=prediction)
    assert torch.isfinite(build_solver(name, schedule, 8, spacing="trailing").coefficients).all()


@pytest.mark.parametrize(
    ("name", "schedule", "steps", "options", "message"),
    [
        ("euler", {}, 5, {}, "solver 'euler' does not exist; use one of ddpm, ddim"),
        ("ddim", {}, 5, {"order": 2}, "solver 'ddim' has no option order; its options are spacing"),
        ("ddim", {}, 0, {}, "num_steps is 0"),
        ("ddim", {}, 5, {"eta": 1.5}, "eta is 1.5"),
        ("ddpm", {}, 5, {"variance_type": "learned"}, "variance_type is 'learned'"),
        ("dpmpp", {}, 5, {"order": 4}, "order is 4; use 1, 2 or 3"),
        ("sde_dpmpp", {}, 5, {"order": 3}, "order is 3; use 1 or 2"),
        ("dpmpp", {}, 5, {"solver_type": "bh1"}, "solver_type is 'bh1'; use one of midpoint, heun"),
        ("dpmpp", {}, 5, {"final_sigmas_type": "min"}, "final_sigmas_type is 'min'"),
        ("dpmpp", {}, 1000, {}, "num_steps is 1000, too many for linspace"),
        ("dpmpp", {"kind": "flow"}, 5, {"spacing": "leading"}, "do not apply to kind 'flow'"),
        ("dpmpp", {"kind": "flow"}, 0, {}, "num_steps is 0"),
        ("unipc", {}, 5, {"order": 0}, "order is 0"),
        ("unipc", {}, 5, {"solver_type": "heun"}, "solver_type is 'heun'; use one of bh1, bh2"),
        ("unipc", {}, 5, {"lower_order_final": False}, "cannot end at sigma 0"),
        ("euler_flow", {}, 5, {}, "needs a schedule of kind 'flow', got 'linear'"),
        ("euler_flow", {"kind": "flow"}, 5, {}, "'epsilon' says nothing about x0"),
        ("euler_flow", {"kind": "flow", "prediction_type": "sample"}, 0, {}, "num_steps is 0"),
        ("ddim", {"zero_terminal_snr": True}, 5, {"spacing": "trailing"}, "'epsilon' says nothing about x0"),
    ],
)
def test_build_solver_refuses(
    name: str, schedule: dict[str, Any], steps: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_solver(name, NoiseSchedule(**schedule), steps, **options)
