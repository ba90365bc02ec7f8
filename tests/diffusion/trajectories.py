"""Runs the same solver here and in diffusers, with the same network and the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from diffgap.diffusion.sampler import sample
from diffgap.diffusion.table import SolverTable
from diffgap.ops import _dispatch
from diffgap.ops.random import STREAM_SOLVER, normal
from diffgap.ops.solver_step import StepOutput

DIM, BATCH = 24, 3
SEEDS = torch.tensor([11, -7, 2**62 + 5])


def network(solver: SolverTable) -> Callable[[Tensor, int], Tensor]:
    """A smooth nonlinear network: outputs of unit size that mix coordinates and depend on time."""
    mixing = torch.randn(DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) / DIM**0.5

    def predict(x: Tensor, step: int) -> Tensor:
        return torch.tanh(0.7 * x.double() @ mixing + solver.timesteps[step] / 1000).to(x.dtype)

    return predict


def ours(solver: SolverTable, dtype: torch.dtype, x0_clamp: float | None = None) -> Tensor:
    """Samples after every step, (S, BATCH, DIM)."""
    path: list[Tensor] = []

    def keep(step: int, result: StepOutput) -> None:
        path.append(result.sample)

    sample(network(solver), solver, SEEDS, (DIM,), dtype=dtype, x0_clamp=x0_clamp, callback=keep)
    return torch.stack(path)


@contextmanager
def double_precision() -> Iterator[None]:
    """Let diffusers compute its tables and steps in float64 wherever it asks for float32.

    Its own rounding, up to 2e-4 of a trajectory where alpha or sigma is small, would hide an error of ours.
    """
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(torch, "float32", torch.float64), mock.patch.object(np, "float32", np.float64):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def theirs(
    make: Callable[[], Any], num_steps: int, solver: SolverTable, dtype: torch.dtype, **step_options: Any
) -> tuple[Tensor, Tensor]:
    """Timesteps of a diffusers scheduler and samples after each of its steps, (S,) and (S, BATCH, DIM).

    float64 runs it in :func:`double_precision`. It is given the noise that :func:`solver_step` draws.
    """
    predict = network(solver)
    x = normal(SEEDS, (DIM,), dtype=dtype)
    # float64 steps are the reference's, and so is their noise; a native kernel's may differ by 2 ulp of float32.
    with _dispatch.backend("eager" if dtype == torch.float64 else "auto"):
        noises = [normal(SEEDS, (DIM,), i, dtype, stream=STREAM_SOLVER) for i in range(len(solver))]
    path = []
    with double_precision() if dtype == torch.float64 else nullcontext():
        scheduler = make()
        scheduler.set_timesteps(num_steps)
        if hasattr(scheduler, "set_begin_index"):  # or it looks steps up by time, and fails where two share one
            scheduler.set_begin_index(0)
        module = import_module(type(scheduler).__module__)
        for step, t in enumerate(scheduler.timesteps):
            draw = mock.Mock(return_value=noises[step])
            with mock.patch.object(module, "randn_tensor", draw, create=True):  # UniPC draws none
                x = scheduler.step(predict(x, step), t, x, return_dict=False, **step_options)[0]
            path.append(x)
    return scheduler.timesteps, torch.stack(path)
