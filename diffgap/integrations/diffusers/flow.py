"""Euler's method for rectified flow."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers.schedulers import scheduling_flow_match_euler_discrete as peer
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffgap.diffusion.table import Row
from diffgap.integrations.diffusers._table_step import ByIndex

# Untyped, as diffusers' own annotations contradict one another.
_FlowMatchEuler: Any = peer.FlowMatchEulerDiscreteScheduler
_Output: Any = peer.FlowMatchEulerDiscreteSchedulerOutput


class FlowMatchEulerDiscreteScheduler(ByIndex, _FlowMatchEuler):
    """Euler's method for rectified flow (arXiv 2209.03003), all of its noise levels and ``stochastic_sampling``.

    diffusers' own step is used for ``per_token_timesteps`` and before ``set_timesteps``.
    """

    @functools.wraps(_FlowMatchEuler.set_timesteps)
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self._start()

    def _table_rows(self, sigmas: Sequence[float], begin: int) -> list[Row] | None:
        """``x' = x + (sigma' - sigma) output``, or ``(1 - sigma') x0 + sigma' noise``, ``x0 = x - sigma output``."""
        rows: list[Row] = []
        for now, following in pairwise(sigmas[begin:]):
            row: Row = {"x0_sample": 1.0, "x0_output": -now}
            if self.config.stochastic_sampling:
                row |= {"pred_x0": 1 - following, "pred_h1": following}
            else:
                row |= {"pred_sample": 1.0, "pred_output": following - now}
            rows.append(row)
        return rows

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> peer.FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """As diffusers', which ignores ``s_churn``, ``s_tmin``, ``s_tmax`` and ``s_noise`` too.

        Raises:
            ValueError: More steps than timesteps, or a timestep out of turn (where known without waiting for a GPU).
        """
        counted = isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point())
        if counted or per_token_timesteps is not None or not self._tabled():  # diffusers refuses the first
            return super().step(
                model_output,
                timestep,
                sample,
                s_churn,
                s_tmin,
                s_tmax,
                s_noise,
                generator,
                per_token_timesteps,
                return_dict,
            )
        table, row = self._locate(timestep, sample)
        history: tuple[Tensor, ...] = ()
        if self.config.stochastic_sampling:
            history = (randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32),)
        following = self._apply(table, row, sample, model_output, history).sample.to(model_output.dtype)
        assert self._step_index is not None
        self._step_index += 1
        return _Output(prev_sample=following) if return_dict else (following,)
