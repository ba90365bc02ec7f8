"""DDIM and DDPM, whose table has a row for every timestep of training."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffgap.diffusion.prediction import epsilon_coefficients, x0_coefficients
from diffgap.integrations.diffusers._table_step import VP_PREDICTIONS, TableStep
from diffgap.ops.solver_step import COLUMNS

# Untyped, as diffusers' own annotations contradict one another.
_DDIM: Any = scheduling_ddim.DDIMScheduler
_DDPM: Any = scheduling_ddpm.DDPMScheduler


class _ByTime(TableStep):
    """DDIM and DDPM: no counter, the timestep is the row of the table."""

    config: Any
    alphas_cumprod: Tensor
    #: alpha^2 of every row, float64 on the CPU; ``add_noise`` moves diffusers' own to the GPU.
    _cumulative: Tensor

    def _start(self) -> bool:
        """Take over timesteps and noise levels; whether they make a table."""
        self._times = tuple(self.timesteps.tolist())
        self._cumulative = self.alphas_cumprod.double().cpu()
        config = self.config
        # Some counts under "trailing" (61 of 1000) get a timestep -1 by rounding, which is no row.
        return not config.thresholding and config.prediction_type in VP_PREDICTIONS and min(self._times) >= 0

    def _levels(self, rows: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, float64, at rows of the training schedule; those below 0 are at ``end``."""
        cumulative = torch.where(rows >= 0, self._cumulative[rows.clamp(min=0)], end.double())
        return cumulative.sqrt(), (1 - cumulative).sqrt()

    def _row(self, timestep: float | Tensor, sample: Tensor) -> int | Tensor:
        value = self._host_value(timestep)
        if value is None:
            assert isinstance(timestep, Tensor)
            return timestep.to(sample.device, torch.int64).expand(len(sample))
        if torch.compiler.is_compiling():  # an int would have every timestep compiled anew
            return torch.full((len(sample),), value, dtype=torch.int64, device=sample.device)
        return int(value)

    def _clamp(self) -> float | None:
        return self.config.clip_sample_range if self.config.clip_sample else None


def _columns(**columns: Tensor) -> Tensor:
    """A table (S, len(COLUMNS)) from columns (S,); rows without correction pass the sample through."""
    columns = {"corr_sample": torch.ones_like(columns["x0_output"]), **columns}
    nothing = torch.zeros_like(columns["x0_output"])
    return torch.stack([columns.get(name, nothing) for name in COLUMNS], dim=1)


class DDIMScheduler(_ByTime, _DDIM):
    """DDIM (arXiv 2010.02502).

    diffusers' own step is used for ``thresholding``, before ``set_timesteps``, and for the few numbers of steps where
    rounding under "trailing" adds a timestep -1.
    """

    #: By ``eta`` and ``use_clipped_model_output``.
    _tables: dict[tuple[float, bool], Tensor]

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """As diffusers', and builds the table of ``eta = 0``; others are built when ``step`` first asks for them."""
        super().set_timesteps(num_inference_steps, device)
        self._tables = {}
        self._table = self._tabulated(0.0, False, self.timesteps.device) if self._start() else None

    def _tabulated(self, eta: float, clipped: bool, device: torch.device) -> Tensor:
        table = self._tables.get((eta, clipped))
        if table is None:
            table = self._build(eta, clipped)
        if table.device != device:
            table = table.to(device, non_blocking=True)
        self._tables[eta, clipped] = table
        return table

    def _build(self, eta: float, clipped: bool) -> Tensor:
        """``x_s = alpha_s x0 + sqrt(sigma_s^2 - w^2) epsilon + w noise`` (eq. 12) at every row of training.

        ``w = eta sigma_s / sigma_t sqrt(1 - (alpha_t / alpha_s)^2)`` (eq. 16); s is ``T // num_inference_steps`` below.
        """
        total = self.config.num_train_timesteps
        rows = torch.arange(total)
        alpha, sigma = self._levels(rows, self.final_alpha_cumprod)
        next_alpha, next_sigma = self._levels(rows - total // self.num_inference_steps, self.final_alpha_cumprod)
        w = eta * next_sigma / sigma * (1 - (alpha / next_alpha) ** 2).clamp(min=0).sqrt()
        direction = (next_sigma**2 - w**2).clamp(min=0).sqrt()
        x0_sample, x0_output = x0_coefficients(alpha, sigma, self.config.prediction_type)
        columns = {"x0_sample": x0_sample, "x0_output": x0_output, "pred_x0": next_alpha, "pred_h1": w}
        if clipped:  # epsilon = (x_t - alpha_t x0) / sigma_t
            columns |= {"pred_sample": direction / sigma, "pred_x0": next_alpha - direction * alpha / sigma}
        else:
            on_sample, on_output = epsilon_coefficients(alpha, sigma, self.config.prediction_type)
            columns |= {"pred_sample": direction * on_sample, "pred_output": direction * on_output}
        return _columns(**columns)

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> scheduling_ddim.DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """As diffusers'."""
        if self._table is None:
            return super().step(
                model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict
            )
        history: tuple[Tensor, ...] = ()
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise ValueError("generator and variance_noise: give one of the two, as the noise comes from either")
            if variance_noise is None:
                variance_noise = randn_tensor(
                    model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
                )
            history = (variance_noise,)
        table = self._tabulated(eta, use_clipped_model_output, sample.device)
        row = self._row(timestep, sample)
        result = self._apply(table, row, sample, model_output, history, x0_clamp=self._clamp())
        if not return_dict:
            return result.sample, result.x0
        return scheduling_ddim.DDIMSchedulerOutput(prev_sample=result.sample, pred_original_sample=result.x0)


class DDPMScheduler(_ByTime, _DDPM):
    """DDPM (arXiv 2006.11239).

    diffusers' own step is used where :class:`DDIMScheduler` uses it, for learned variances and for "fixed_large_log".
    Where only the GPU knows the timestep, noise is drawn at timestep 0 as well, with coefficient 0.
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """As diffusers', and builds the table."""
        super().set_timesteps(num_inference_steps, device, timesteps)
        tabled = self._start() and self.variance_type in ("fixed_small", "fixed_small_log", "fixed_large")
        self._table = self._build().to(self.timesteps.device) if tabled else None

    def _build(self) -> Tensor:
        """The mean of ``q(x_s | x_t, x0)`` plus noise, as in :mod:`diffgap.diffusion.ancestral`; NaN elsewhere."""
        visited = torch.tensor(self._times, dtype=torch.int64)
        following = torch.cat((visited[1:], torch.tensor([-1])))
        alpha, sigma = self._levels(visited, self.one)
        next_alpha, next_sigma = self._levels(following, self.one)
        kept = alpha / next_alpha
        beta = 1 - kept**2
        share = (next_sigma / sigma) ** 2
        # diffusers' smallest variance, which it takes the logarithm of.
        variance = beta if self.variance_type == "fixed_large" else (share * beta).clamp(min=1e-20)
        x0_sample, x0_output = x0_coefficients(alpha, sigma, self.config.prediction_type)
        table = torch.full((self.config.num_train_timesteps, len(COLUMNS)), torch.nan, dtype=torch.float64)
        table[visited] = _columns(
            x0_sample=x0_sample,
            x0_output=x0_output,
            pred_sample=kept * share,
            pred_x0=next_alpha * beta / sigma**2,
            pred_h1=torch.where(visited > 0, variance.sqrt(), 0.0),
        )
        return table

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> scheduling_ddpm.DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """As diffusers'.

        Raises:
            ValueError: The timestep is not one of ``timesteps`` (where that is known without waiting for a GPU).
        """
        if self._table is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        if self._table.device != sample.device:
            self._table = self._table.to(sample.device, non_blocking=True)
        value = self._host_value(timestep)
        if value is not None and not torch.compiler.is_compiling() and value not in self._times:
            raise ValueError(f"timestep: {value} is not one of the scheduler's timesteps; call set_timesteps")
        history: tuple[Tensor, ...] = ()
        if value is None or value > 0:
            noise = randn_tensor(
                model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
            )
            history = (noise,)
        row = self._row(timestep, sample)
        result = self._apply(self._table, row, sample, model_output, history, x0_clamp=self._clamp())
        if not return_dict:
            return result.sample, result.x0
        return scheduling_ddpm.DDPMSchedulerOutput(prev_sample=result.sample, pred_original_sample=result.x0)
