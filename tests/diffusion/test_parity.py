"""Solvers against the schedulers of diffusers: the same timesteps, and whole trajectories step by step.

In float64 (:func:`double_precision`) the two must agree to rounding. In float32, ours must be within 1e-5 of
that, and of the scheduler as it comes but for the error its own float32 tables make.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from diffgap.diffusion import NoiseSchedule, SolverTable, build_solver
from tests.diffusion.trajectories import ours, theirs
from tests.helpers import FLOAT32_RTOL, relative_l2

diffusers = pytest.importorskip("diffusers", reason="diffusers is the peer: pip install diffusers")

STEPS = (1, 2, 3, 5, 10, 20, 50)
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
KINDS: dict[str, dict[str, float]] = {
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012},
    "linear": {},
    "squaredcos_cap_v2": {},
}

DDIM, DDPM, DPM, UNIPC = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
SDE = {"algorithm_type": "sde-dpmsolver++"}
ENDS = {"final_sigmas_type": "sigma_min", "lower_order_final": False}
KARRAS = {"use_karras_sigmas": True}
# name: (solver, its options, scheduler, its options where they differ, options of its step)
SOLVERS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], dict[str, Any]]] = {
    "ddim": ("ddim", {}, DDIM, {"clip_sample": False}, {}),
    "ddim_eta": ("ddim", {"eta": 0.7}, DDIM, {"clip_sample": False}, {"eta": 0.7}),
    "ddim_row0": (
        "ddim",
        {"set_alpha_to_one": False},
        DDIM,
        {"clip_sample": False, "set_alpha_to_one": False},
        {},
    ),
    "ddpm": ("ddpm", {}, DDPM, {"clip_sample": False}, {}),
    "ddpm_large": (
        "ddpm",
        {"variance_type": "fixed_large"},
        DDPM,
        {"clip_sample": False, "variance_type": "fixed_large"},
        {},
    ),
    "dpmpp_1": ("dpmpp", {"order": 1}, DPM, {"solver_order": 1}, {}),
    "dpmpp_2m": ("dpmpp", {}, DPM, {}, {}),
    "dpmpp_2m_heun": ("dpmpp", {"solver_type": "heun"} | ENDS, DPM, {"solver_type": "heun"} | ENDS, {}),
    "dpmpp_2m_euler": ("dpmpp", {"euler_at_final": True}, DPM, {"euler_at_final": True}, {}),
    "dpmpp_2m_karras": ("dpmpp", KARRAS, DPM, KARRAS, {}),
    "dpmpp_3m": ("dpmpp", {"order": 3}, DPM, {"solver_order": 3}, {}),
    "dpmpp_3m_karras": ("dpmpp", {"order": 3} | KARRAS, DPM, {"solver_order": 3} | KARRAS, {}),
    "dpmpp_3m_min": ("dpmpp", {"order": 3} | ENDS, DPM, {"solver_order": 3} | ENDS, {}),
    "sde_dpmpp_1": ("sde_dpmpp", {"order": 1}, DPM, {"solver_order": 1} | SDE, {}),
    "sde_dpmpp_2m": ("sde_dpmpp", {}, DPM, SDE, {}),
    "sde_dpmpp_2m_heun": (
        "sde_dpmpp",
        {"solver_type": "heun"} | KARRAS,
        DPM,
        {"solver_type": "heun"} | SDE | KARRAS,
        {},
    ),
    "unipc_1": ("unipc", {"order": 1}, UNIPC, {"solver_order": 1}, {}),
    "unipc_2": ("unipc", {}, UNIPC, {}, {}),
    "unipc_2_bh1": (  # diffusers' bh1 gives NaN in a last step to sigma 0
        "unipc",
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        UNIPC,
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        {},
    ),
    "unipc_3": ("unipc", {"order": 3}, UNIPC, {"solver_order": 3}, {}),
    "unipc_3_karras": ("unipc", {"order": 3} | KARRAS, UNIPC, {"solver_order": 3} | KARRAS, {}),
    "unipc_3_min": ("unipc", {"order": 3} | ENDS, UNIPC, {"solver_order": 3} | ENDS, {}),
    "unipc_2_partial": ("unipc", {"disable_corrector": [0, 2]}, UNIPC, {"disable_corrector": [0, 2]}, {}),
}


def cases() -> list[Any]:
    """Every solver with every number of steps and prediction; spacing, schedule and zero-SNR go round and round."""
    found = []
    for i, (name, (j, steps), (k, prediction)) in enumerate(product(SOLVERS, enumerate(STEPS), enumerate(PREDICTIONS))):
        if steps >= 20 and (i // 21 + j) % 3 != k:  # the long ones once each
            continue
        kind = list(KINDS)[(i // 3 + k) % 3]
        spacing = SPACINGS[(j + 2 * k + i // 63) % 3]
        # epsilon says nothing about x0 at zero SNR, which DPM-Solver and UniPC only come near
        zero_snr = (j + k) % 2 == 1 and not (prediction == "epsilon" and name.startswith("dd"))
        label = f"{name}-{steps}-{prediction}-{spacing}-{kind}{'-zsnr' * zero_snr}"
        found.append(pytest.param(name, steps, prediction, spacing, kind, zero_snr, id=label))
    return found


def worst(actual: Tensor, expected: Tensor) -> float:
    """Largest relative error over the steps of a trajectory."""
    return max(relative_l2(a, b) for a, b in zip(actual, expected, strict=True))


def check(make: Callable[[], Any], steps: int, solver: SolverTable, **step_options: Any) -> Tensor:
    """Compare trajectories; returns the timesteps of diffusers."""
    exact = theirs(make, steps, solver, torch.float64, **step_options)[1]
    timesteps, single = theirs(make, steps, solver, torch.float32, **step_options)
    # DDPM in diffusers adds noise of standard deviation 1e-10 where the variance is 0.
    assert worst(ours(solver, torch.float64), exact) <= (2e-9 if solver.name == "ddpm" else 1e-12)
    rounded = ours(solver, torch.float32)
    assert worst(rounded, exact) <= FLOAT32_RTOL
    assert worst(rounded, single) <= FLOAT32_RTOL + worst(single, exact)
    return timesteps


@pytest.mark.parametrize(("name", "steps", "prediction", "spacing", "kind", "zero_snr"), cases())
def test_build_solver_follows_diffusers(
    name: str, steps: int, prediction: Any, spacing: str, kind: Any, zero_snr: bool
) -> None:
    solver_name, options, scheduler, scheduler_options, step_options = SOLVERS[name]
    schedule = NoiseSchedule(kind, zero_terminal_snr=zero_snr, prediction_type=prediction, **KINDS[kind])
    solver = build_solver(solver_name, schedule, steps, spacing=spacing, **options)
    make = partial(
        getattr(diffusers, scheduler),
        beta_schedule=kind,
        rescale_betas_zero_snr=zero_snr,
        prediction_type=prediction,
        timestep_spacing=spacing,
        **KINDS[kind],
        **scheduler_options,
    )
    timesteps = check(make, steps, solver, **step_options)
    # Karras grids look a row up by noise level; on the cosine schedule diffusers' DPM-Solver cuts it off where we
    # and UniPC round it, and float32 tables can move either by one.
    distance = (solver.timesteps - timesteps).abs().max()
    assert distance <= (1 if "use_karras_sigmas" in options and kind == "squaredcos_cap_v2" else 0)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "dpmpp_3m", "sde_dpmpp_2m", "unipc_2", "unipc_3"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_build_solver_matches_stock_float32(name: str, steps: int, prediction: Any) -> None:
    """The project's promise as a user meets it: diffusers as it comes, Stable Diffusion's schedule, 1e-5."""
    solver_name, options, scheduler, scheduler_options, step_options = SOLVERS[name]
    schedule = NoiseSchedule("scaled_linear", prediction_type=prediction, **KINDS["scaled_linear"])
    solver = build_solver(solver_name, schedule, steps, spacing="trailing", **options)
    make = partial(
        getattr(diffusers, scheduler),
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        timestep_spacing="trailing",
        **KINDS["scaled_linear"],
        **scheduler_options,
    )
    timesteps, path = theirs(make, steps, solver, torch.float32, **step_options)
    assert torch.equal(solver.timesteps.long(), timesteps)
    assert worst(ours(solver, torch.float32), path) <= FLOAT32_RTOL


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("stochastic", [False, True])
def test_euler_flow_follows_diffusers(steps: int, shift: float, stochastic: bool) -> None:
    schedule = NoiseSchedule("flow", prediction_type="flow_prediction", shift=shift)
    solver = build_solver("euler_flow", schedule, steps, stochastic_sampling=stochastic)
    make = partial(diffusers.FlowMatchEulerDiscreteScheduler, shift=shift, stochastic_sampling=stochastic)
    timesteps = check(make, steps, solver)
    torch.testing.assert_close(solver.timesteps.float(), timesteps)


@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_3m", "sde_dpmpp_2m", "unipc_2", "unipc_3"])
def test_multistep_solvers_follow_diffusers_on_a_flow(name: str, shift: float, steps: int) -> None:
    solver_name, options, scheduler, scheduler_options, _ = SOLVERS[name]
    schedule = NoiseSchedule("flow", prediction_type="flow_prediction", shift=shift)
    solver = build_solver(solver_name, schedule, steps, **options)
    make = partial(
        getattr(diffusers, scheduler),
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        **scheduler_options,
    )
    timesteps = check(make, steps, solver)
    assert ((solver.timesteps - timesteps).abs() < 1).all()  # diffusers cuts T * sigma off to an integer


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_with_clamped_x0_follows_diffusers(clipped: bool, eta: float) -> None:
    schedule = NoiseSchedule(prediction_type="epsilon")
    solver = build_solver("ddim", schedule, 10, eta=eta, use_clipped_model_output=clipped)
    make = partial(diffusers.DDIMScheduler, clip_sample=True, clip_sample_range=0.8)
    _, path = theirs(make, 10, solver, torch.float64, eta=eta, use_clipped_model_output=clipped)
    assert worst(ours(solver, torch.float64, x0_clamp=0.8), path) <= 1e-12


@pytest.mark.parametrize("kind", [*KINDS, "sigmoid"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_schedule_alphas_follow_diffusers(kind: Any, zero_snr: bool) -> None:
    options = KINDS.get(kind, {})
    peer = diffusers.DDPMScheduler(beta_schedule=kind, rescale_betas_zero_snr=zero_snr, **options)
    schedule = NoiseSchedule(kind, zero_terminal_snr=zero_snr, **options)
    assert relative_l2(schedule.alphas_cumprod, peer.alphas_cumprod) <= 1e-6
    if zero_snr:
        assert schedule.alphas[-1] == 0
        assert schedule.sigmas[-1] == 1
