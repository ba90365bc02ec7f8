"""Schedulers to compare, the same trajectory through each, and its float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffgap.integrations import diffusers as ours
from diffgap.integrations.diffusers import ancestral, flow, multistep
from tests.diffusion.trajectories import double_precision
from tests.helpers import relative_l2

DDIM, DDPM, DPM, UNIPC, FLOW = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
)
SHAPE = (2, 3, 4, 5)
SINGLE = torch.float32  # itself, while double_precision puts float64 in its place
STEPS = (1, 2, 5, 20)
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SDE = {"algorithm_type": "sde-dpmsolver++"}
ENDS = {"final_sigmas_type": "sigma_min", "lower_order_final": False}
FLOWING = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

# name: (class, configuration, options of step)
NOISE_LEVELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddim": (DDIM, {}, {}),
    "ddim_eta": (DDIM, {"clip_sample": False}, {"eta": 0.6}),
    "ddim_clipped": (DDIM, {"set_alpha_to_one": False}, {"eta": 1.0, "use_clipped_model_output": True}),
    "ddim_range": (DDIM, {"clip_sample_range": 0.4, "steps_offset": 1}, {}),
    "ddpm": (DDPM, {}, {}),
    "ddpm_log": (DDPM, {"variance_type": "fixed_small_log", "clip_sample": False}, {}),
    "ddpm_large": (DDPM, {"variance_type": "fixed_large", "beta_schedule": "sigmoid"}, {}),
    "dpm_1": (DPM, {"solver_order": 1}, {}),
    "dpm_2": (DPM, {}, {}),
    "dpm_2_heun": (DPM, {"solver_type": "heun"} | ENDS, {}),
    "dpm_2_euler": (DPM, {"euler_at_final": True, "beta_schedule": "squaredcos_cap_v2"}, {}),
    "dpm_2_lu": (DPM, {"use_lu_lambdas": True}, {}),
    "dpm_3": (DPM, {"solver_order": 3}, {}),
    "dpm_3_karras": (DPM, {"solver_order": 3, "use_karras_sigmas": True}, {}),
    "dpm_3_beta": (DPM, {"solver_order": 3, "use_beta_sigmas": True}, {}),
    "dpm_2_exponential": (DPM, {"use_exponential_sigmas": True} | ENDS, {}),
    "sde_1": (DPM, {"solver_order": 1} | SDE, {}),
    "sde_2": (DPM, SDE, {}),
    "sde_2_heun": (DPM, {"solver_type": "heun", "use_karras_sigmas": True} | SDE, {}),
    "unipc_1": (UNIPC, {"solver_order": 1}, {}),
    "unipc_2": (UNIPC, {}, {}),
    "unipc_2_bh1": (UNIPC, {"solver_type": "bh1"} | ENDS, {}),
    "unipc_2_partial": (UNIPC, {"disable_corrector": [0, 2]}, {}),
    "unipc_3": (UNIPC, {"solver_order": 3}, {}),
    "unipc_3_karras": (UNIPC, {"solver_order": 3, "use_karras_sigmas": True} | ENDS, {}),
    "unipc_3_beta": (UNIPC, {"solver_order": 3, "use_beta_sigmas": True}, {}),
    "unipc_2_exponential": (UNIPC, {"use_exponential_sigmas": True}, {}),
}
FLOWS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dpm_2_flow": (DPM, FLOWING, {}),
    "dpm_3_flow": (DPM, {"solver_order": 3} | FLOWING, {}),
    "sde_2_flow": (DPM, SDE | FLOWING, {}),
    "unipc_2_flow": (UNIPC, FLOWING, {}),
    "unipc_3_flow": (UNIPC, {"solver_order": 3} | FLOWING, {}),
    "flow": (FLOW, {}, {}),
    "flow_shift": (FLOW, {"shift": 3.0}, {}),
    "flow_stochastic": (FLOW, {"shift": 3.0, "stochastic_sampling": True}, {}),
    "flow_inverted": (FLOW, {"invert_sigmas": True}, {}),
    "flow_karras": (FLOW, {"use_karras_sigmas": True}, {}),
    "flow_beta": (FLOW, {"use_beta_sigmas": True}, {}),
    "flow_exponential": (FLOW, {"use_exponential_sigmas": True}, {}),
}
SPACINGS = ("leading", "trailing", "linspace")
ONE_OF_EACH = ("ddim", "ddim_eta", "ddpm", "dpm_2", "dpm_3", "sde_2", "unipc_3", "flow_shift", "flow_stochastic")


def cases() -> list[Any]:
    """(class, configuration, step options): every solver with every prediction; spacings go round."""
    found = []
    predictions = ("epsilon", "sample", "v_prediction")
    for i, (name, (k, prediction)) in enumerate(product(NOISE_LEVELS, enumerate(predictions))):
        scheduler, config, options = NOISE_LEVELS[name]
        base = {**LATENT, "prediction_type": prediction, "timestep_spacing": SPACINGS[(i // 3 + k) % 3]}
        found.append(pytest.param(scheduler, base | config, options, id=f"{name}-{prediction}"))
        if prediction != "epsilon" and name in ("ddim", "ddpm", "dpm_2", "sde_2", "unipc_2"):
            found.append(pytest.param(scheduler, base | ZERO_SNR, options, id=f"{name}-{prediction}-zero_snr"))
    return found + [pytest.param(*case, id=name) for name, case in FLOWS.items()]


def case(name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    return (NOISE_LEVELS | FLOWS)[name]


def outputs(count: int) -> Tensor:
    """What a network gives at each step, and before it the initial noise; exact in every dtype."""
    values = torch.randn(count + 1, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=SINGLE)
    return values.bfloat16().to(SINGLE)


def trajectory(
    scheduler: Any, dtype: torch.dtype = torch.float32, times: Sequence[Any] | None = None, **options: Any
) -> Tensor:
    """The samples after each step."""
    times = scheduler.timesteps if times is None else times
    x, *predicted = outputs(len(times)).to(dtype)
    if type(scheduler).__name__ != UNIPC:
        options["generator"] = torch.Generator().manual_seed(5)
    path = []
    for t, output in zip(times, predicted, strict=True):
        x = scheduler.step(output, t, x, **options).prev_sample
        path.append(x)
    return torch.stack(path)


@contextmanager
def plain_noise() -> Iterator[None]:
    """Noise that is the same in every dtype."""

    def draw(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> Tensor:
        noise = torch.empty(shape, dtype=torch.bfloat16)
        return noise.normal_(generator=generator).to(dtype)

    peers = diffusers.schedulers
    modules = (
        peers.scheduling_ddim,
        peers.scheduling_ddpm,
        peers.scheduling_dpmsolver_multistep,
        peers.scheduling_flow_match_euler_discrete,
    )
    with ExitStack() as stack:
        for module in (*modules, ancestral, flow, multistep):
            stack.enter_context(mock.patch.object(module, "randn_tensor", draw))
        yield


def exact(name: str, config: dict[str, Any], steps: int, **options: Any) -> Tensor:
    """diffusers' trajectory from the same float32 noise levels, everything after them in float64."""
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(steps)
    for attribute in ("alphas_cumprod", "final_alpha_cumprod", "one", "sigmas"):
        if hasattr(scheduler, attribute):
            setattr(scheduler, attribute, getattr(scheduler, attribute).double())
    with double_precision():
        return trajectory(scheduler, torch.float64, **options)


def pair(name: str, config: dict[str, Any], steps: int) -> tuple[Any, Any]:
    """Our scheduler and diffusers', ready for their first steps."""
    schedulers = [getattr(library, name)(**config) for library in (ours, diffusers)]
    for scheduler in schedulers:
        scheduler.set_timesteps(steps)
    assert torch.equal(schedulers[0].timesteps, schedulers[1].timesteps)
    return schedulers[0], schedulers[1]


def worst(actual: Tensor, expected: Tensor) -> float:
    """Largest relative error over the steps."""
    return max(relative_l2(a, b) for a, b in zip(actual, expected, strict=True))


class Calls(TorchDispatchMode):
    """The operations below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))
