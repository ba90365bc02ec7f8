"""DPM-Solver++ and UniPC."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers.schedulers import scheduling_dpmsolver_multistep, scheduling_unipc_multistep
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffgap.diffusion.dpm_solver import ode_row, sde_row, step_orders
from diffgap.diffusion.grids import Grid, flow_levels
from diffgap.diffusion.table import Level, Row, x0_row
from diffgap.diffusion.unipc import corrector, predictor
from diffgap.integrations.diffusers._table_step import VP_PREDICTIONS, ByIndex

# Untyped, as diffusers' own annotations contradict one another.
_DPM: Any = scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler
_UniPC: Any = scheduling_unipc_multistep.UniPCMultistepScheduler


class _Multistep(ByIndex):
    """DPM-Solver and UniPC: earlier x0 predictions are kept in diffusers' own ``model_outputs``."""

    model_outputs: list[Tensor | None]
    lower_order_nums: int
    last_sample: Tensor | None

    def _grid(self, sigmas: Sequence[float]) -> Grid | None:
        """The levels of the steps, or None where the conventions of diffusers are not those of a table."""
        config = self.config
        predictions = ("epsilon", "sample", "flow_prediction") if config.use_flow_sigmas else VP_PREDICTIONS
        if config.thresholding or config.prediction_type not in predictions or config.solver_order not in (1, 2, 3):
            return None
        if config.use_flow_sigmas:
            levels: list[Level] = flow_levels(sigmas)
        else:
            levels = [(1 / (1 + s**2) ** 0.5, s / (1 + s**2) ** 0.5) for s in sigmas]
        if any(a <= b for a, b in pairwise(sigmas[:-1])) or sigmas[-2] < sigmas[-1] or min(levels)[0] <= 0:
            return None
        return Grid(torch.tensor(self._times, dtype=torch.float64), levels)

    def _history(self) -> list[Tensor]:
        """Earlier x0 predictions, newest first."""
        return [x for x in reversed(self.model_outputs) if x is not None]

    def _remember(self, x0: Tensor) -> None:
        self.model_outputs = [*self.model_outputs[1:], x0]
        self.lower_order_nums = min(self.lower_order_nums + 1, len(self.model_outputs))
        assert self._step_index is not None
        self._step_index += 1


class DPMSolverMultistepScheduler(_Multistep, _DPM):
    """DPM-Solver++ 1, 2M and 3M and its SDE form of order 1 and 2M (arXiv 2211.01095).

    diffusers' own step is used for ``algorithm_type`` "dpmsolver" and "sde-dpmsolver", "sde-dpmsolver++" of order 3,
    ``thresholding``, learned variances, "flow_prediction" without ``use_flow_sigmas`` and "v_prediction" with it, and
    where noise levels repeat.
    """

    @functools.wraps(_DPM.set_timesteps)
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self._start()

    def _table_rows(self, sigmas: Sequence[float], begin: int) -> list[Row] | None:
        config = self.config
        order, stochastic = config.solver_order, config.algorithm_type == "sde-dpmsolver++"
        grid = self._grid(sigmas)
        if (
            grid is None
            or config.algorithm_type not in ("dpmsolver++", "sde-dpmsolver++")
            or (stochastic and order == 3)
            or config.variance_type in ("learned", "learned_range")
        ):
            return None
        orders = step_orders(
            len(self._times), order, config.final_sigmas_type, config.lower_order_final, config.euler_at_final
        )
        build = sde_row if stochastic else ode_row
        rows = []
        for i in range(begin, len(orders)):
            row = build(grid, i, min(orders[i], i - begin + 1), config.solver_type)
            if stochastic:
                row[f"pred_h{order}"] = row.pop("pred_noise")
            rows.append(x0_row(grid.levels[i], config.prediction_type) | row)
        return rows

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """As diffusers'.

        Raises:
            ValueError: More steps than timesteps, or a timestep out of turn (where known without waiting for a GPU).
        """
        if not self._tabled():
            return super().step(model_output, timestep, sample, generator, variance_noise, return_dict)
        table, row = self._locate(timestep, sample)
        order = len(self.model_outputs)
        history = self._history()[: order - 1]
        if self.config.algorithm_type == "sde-dpmsolver++":
            if variance_noise is None:
                variance_noise = randn_tensor(
                    model_output.shape, generator=generator, device=model_output.device, dtype=torch.float32
                )
            # Before there is an earlier prediction its coefficient is 0, and anything can hold its place.
            filler = [sample] * (order - 1 - len(history))
            history = [*history, *filler, variance_noise.to(model_output.device)]
        result = self._apply(table, row, sample, model_output, history)
        self._remember(result.x0)
        # In diffusers that of x0: the output's own where the network predicts x0.
        dtype = model_output.dtype if self.config.prediction_type == "sample" else result.x0.dtype
        following = result.sample.to(dtype)
        return SchedulerOutput(prev_sample=following) if return_dict else (following,)


class UniPCMultistepScheduler(_Multistep, _UniPC):
    """UniPC of order 1, 2 and 3 with its corrector (arXiv 2302.04867).

    diffusers' own step is used for ``predict_x0=False``, ``solver_p``, ``thresholding``, "flow_prediction" without
    ``use_flow_sigmas`` and "v_prediction" with it, ``lower_order_final=False`` down to sigma 0, and where noise levels
    repeat. "bh1" down to sigma 0, NaN in diffusers, is finite here.
    """

    @functools.wraps(_UniPC.set_timesteps)
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self._start()

    def _table_rows(self, sigmas: Sequence[float], begin: int) -> list[Row] | None:
        config = self.config
        order, steps = config.solver_order, len(self._times)
        grid = self._grid(sigmas)
        if (
            grid is None
            or not self.predict_x0
            or self.solver_p is not None
            or (not config.lower_order_final and sigmas[-1] == 0 and order > 1)
        ):
            return None
        rows: list[Row] = []
        used = 0
        for i in range(begin, steps):
            row = x0_row(grid.levels[i], config.prediction_type)
            if i > begin and i - 1 not in self.disable_corrector:
                row |= corrector(grid, i, used, config.solver_type)
            used = min(order, i - begin + 1, steps - i if config.lower_order_final else order)
            rows.append(row | predictor(grid, i, used, config.solver_type))
        return rows

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """As diffusers'.

        Raises:
            ValueError: More steps than timesteps, or a timestep out of turn (where known without waiting for a GPU).
        """
        if not self._tabled():
            return super().step(model_output, timestep, sample, return_dict)
        table, row = self._locate(timestep, sample)
        result = self._apply(table, row, sample, model_output, self._history(), self.last_sample)
        self._remember(result.x0)
        self.last_sample = result.corrected
        following = result.sample.to(sample.dtype)
        return SchedulerOutput(prev_sample=following) if return_dict else (following,)
