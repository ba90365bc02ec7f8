"""Noise schedules: how much signal and noise a sample holds at each training step.

    x_t = alpha_t * x0 + sigma_t * epsilon,   t = 0 .. T-1,  noise growing with t

The variance-preserving kinds start from betas, as in DDPM (arXiv 2006.11239), with ``alpha_t^2`` the
product of ``1 - beta_s`` up to t and ``sigma_t^2 = 1 - alpha_t^2``. Rectified flow ("flow", arXiv 2209.03003)
has ``sigma_t = (t + 1) / T``, shifted as in Stable Diffusion 3 (arXiv 2403.03206, eq. 23), and
``alpha_t = 1 - sigma_t``. Everything is float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from diffgap.diffusion.prediction import (
    Prediction,
    check_prediction,
    conversion_coefficients,
    x0_coefficients,
)

__all__ = ["EmbeddingScaling", "NoiseSchedule", "Prediction", "ScheduleKind", "Spacing"]

ScheduleKind = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "flow"]
EmbeddingScaling = Literal["sqrt_dim", "whiten", "none"]
Spacing = Literal["leading", "trailing", "linspace"]


@dataclass(frozen=True)
class NoiseSchedule:
    """A noise schedule and what is predicted under it; plain values only, so it goes into JSON as it is.

    The names and defaults are those of the schedulers of diffusers.

    Attributes:
        kind: Shape of the schedule; "flow" is rectified flow and ignores the betas.
        num_train_timesteps: T, the number of noise levels.
        beta_start: First beta ("linear", "scaled_linear", "sigmoid").
        beta_end: Last beta of the same kinds.
        zero_terminal_snr: Rescale so that the last level holds no signal (arXiv 2305.08891, algorithm 1).
        prediction_type: What the network predicts.
        shift: Shift of the "flow" levels towards noise, ``s * sigma / (1 + (s - 1) * sigma)``.
        embedding_scaling: How embeddings are scaled before noising
            (:class:`diffgap.diffusion.EmbeddingScaler`).

    Raises:
        ValueError: A field is out of its range, or two contradict each other.
    """

    kind: ScheduleKind = "linear"
    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    zero_terminal_snr: bool = False
    prediction_type: Prediction = "epsilon"
    shift: float = 1.0
    embedding_scaling: EmbeddingScaling = "sqrt_dim"

    def __post_init__(self) -> None:
        check_prediction("prediction_type", self.prediction_type)
        for name, allowed in (("kind", ScheduleKind), ("embedding_scaling", EmbeddingScaling)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(get_args(allowed))}")
        if self.num_train_timesteps < 2:
            raise ValueError(f"num_train_timesteps is {self.num_train_timesteps}; use 2 or more")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start {self.beta_start} and beta_end {self.beta_end} must satisfy 0 < start <= end < 1"
            )
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"shift is {self.shift}; use a positive number")
        if self.shift != 1 and self.kind != "flow":
            raise ValueError(f"shift is {self.shift}, but only kind 'flow' has one; kind is {self.kind!r}")
        if self.zero_terminal_snr and self.kind == "flow":
            raise ValueError("zero_terminal_snr: kind 'flow' ends in pure noise already; leave it False")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NoiseSchedule:
        """The inverse of :meth:`to_dict`. Raises :class:`ValueError` for a key that is no field."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            known = ", ".join(field.name for field in fields(cls))
            raise ValueError(f"noise schedule has no field {', '.join(sorted(unknown))}; its fields are {known}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, ready for JSON."""
        return asdict(self)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """``alpha_t^2``, float64 (T,)."""
        if self.kind == "flow":
            return (1 - self.sigmas) ** 2
        cumulative = torch.cumprod(1 - self._betas(), dim=0)
        return _with_zero_terminal_snr(cumulative) if self.zero_terminal_snr else cumulative

    @cached_property
    def alphas(self) -> Tensor:
        """The factor of the signal, float64 (T,)."""
        return 1 - self.sigmas if self.kind == "flow" else self.alphas_cumprod.sqrt()

    @cached_property
    def sigmas(self) -> Tensor:
        """The factor of the noise, float64 (T,)."""
        if self.kind == "flow":
            return self.shifted(torch.arange(1, self.num_train_timesteps + 1).double() / self.num_train_timesteps)
        return (1 - self.alphas_cumprod).sqrt()

    @cached_property
    def table(self) -> Tensor:
        """Columns alpha, sigma; float64 (T, 2): the ``table`` of :func:`diffgap.ops.q_sample.q_sample`."""
        return torch.stack((self.alphas, self.sigmas), dim=1)

    @cached_property
    def times(self) -> Tensor:
        """The time a network is told at each row, float64 (T,): the row's number, or T * sigma for flow."""
        if self.kind == "flow":
            return self.num_train_timesteps * self.sigmas
        return torch.arange(self.num_train_timesteps, dtype=torch.float64)

    @cached_property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio ``alpha^2 / sigma^2``, float64 (T,)."""
        return (self.alphas / self.sigmas) ** 2

    def shifted(self, sigma: Tensor) -> Tensor:
        """The flow level ``sigma`` (any shape, in [0, 1]) moved by :attr:`shift`."""
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def timesteps(
        self, num_steps: int, spacing: Spacing, *, steps_offset: int = 0, reserve_last: bool = False
    ) -> Tensor:
        """Rows of :attr:`table` to visit, int64, decreasing; the spacings of arXiv 2305.08891, table 2.

        Args:
            num_steps: How many.
            spacing: "leading" starts from 0, "trailing" from T - 1, "linspace" has both ends.
            steps_offset: Added to every row ("leading" only).
            reserve_last: Space ``num_steps + 1`` rows and drop the lowest, which stands for the end of
                sampling: what the multistep schedulers of diffusers do. "trailing" never holds that end.

        Raises:
            ValueError: ``num_steps`` outside 1..T, an unknown spacing, or an offset that leaves the table.
        """
        total = self.num_train_timesteps
        if not 1 <= num_steps <= total:
            raise ValueError(f"num_steps is {num_steps}; use 1 to {total} (num_train_timesteps)")
        if spacing not in get_args(Spacing):
            raise ValueError(f"spacing is {spacing!r}; use one of {', '.join(get_args(Spacing))}")
        if steps_offset != 0 and spacing != "leading":
            raise ValueError(f"steps_offset is {steps_offset}, but only spacing 'leading' has one; got {spacing!r}")
        count = num_steps + reserve_last
        if spacing == "trailing":
            # The slice drops the row -1 that rounding adds for some counts (61 of 1000, say).
            rows = np.arange(total, 0, -total / num_steps).round()[:num_steps] - 1
        elif spacing == "leading":
            rows = (np.arange(count) * (total // count) + steps_offset)[::-1]
        else:
            rows = np.linspace(0, total - 1, count).round()[::-1]
        rows = rows.astype(np.int64)
        if spacing != "trailing" and reserve_last:
            rows = rows[:-1]
        if rows[-1] < 0 or rows[0] >= total:
            raise ValueError(f"steps_offset {steps_offset} moves the timesteps outside 0..{total - 1}")
        return torch.from_numpy(rows.copy())

    def convert(self, output: Tensor, sample: Tensor, t: Tensor, target: Prediction) -> Tensor:
        """A network's output as another prediction type, e.g. ``target="sample"`` for x0.

        Args:
            output: The network's output, of type :attr:`prediction_type`, (B, ...).
            sample: The noisy sample it was given, of the same shape.
            t: Rows of :attr:`table`, int64 (B,).
            target: The prediction wanted.

        Returns:
            The prediction, of the shape and dtype of ``output``.
        """
        check_prediction("target", target)
        if output.shape != sample.shape or t.shape != output.shape[:1]:
            raise ValueError(
                f"output {tuple(output.shape)}, sample {tuple(sample.shape)} and t {tuple(t.shape)} must be "
                "(B, ...), the same (B, ...) and (B,)"
            )
        alpha, sigma = self.table[t.cpu()].T
        terms = conversion_coefficients(alpha, sigma, self.prediction_type, target)
        shape = (-1, *(1,) * (output.ndim - 1))
        a, b = (
            term.reshape(shape).to(output.device, torch.promote_types(output.dtype, torch.float32)) for term in terms
        )
        return (a * sample + b * output).to(output.dtype)

    def min_snr_weights(self, gamma: float = 5.0) -> Tensor:
        """Loss weight of each row for the mean squared error of :attr:`prediction_type`, float64 (T,).

        ``min(snr, gamma)`` on the error of x0 (Hang et al. 2023, arXiv 2303.09556), carried over to
        the prediction by ``dx0 = b doutput``: ``min(snr, gamma) / snr`` for epsilon, ``/ (snr + 1)`` for v.
        """
        if not gamma > 0:
            raise ValueError(f"gamma is {gamma}; use a positive number (5 is usual)")
        if self.prediction_type == "epsilon":  # written so that it holds at snr = 0, where b is infinite
            return (gamma / self.snr).clamp(max=1.0)
        _, b = x0_coefficients(self.alphas, self.sigmas, self.prediction_type)
        return self.snr.clamp(max=gamma) * b**2

    def _betas(self) -> Tensor:
        """The betas of a variance-preserving kind, float64 (T,)."""
        start, end, total = self.beta_start, self.beta_end, self.num_train_timesteps
        if self.kind == "linear":
            return torch.linspace(start, end, total, dtype=torch.float64)
        if self.kind == "scaled_linear":  # latent diffusion: linear in sqrt(beta)
            return torch.linspace(start**0.5, end**0.5, total, dtype=torch.float64) ** 2
        if self.kind == "sigmoid":  # GeoDiff (arXiv 2203.02923)
            return torch.sigmoid(torch.linspace(-6, 6, total, dtype=torch.float64)) * (end - start) + start
        # Cosine (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17), betas capped at 0.999.
        edges = torch.arange(total + 1, dtype=torch.float64) / total
        bar = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)


def _with_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """``alpha_t`` moved so that the last is 0 and the first unchanged (arXiv 2305.08891, algorithm 1)."""
    alphas = alphas_cumprod.sqrt()
    first, last = alphas[0], alphas[-1]
    return ((alphas - last) * (first / (first - last))) ** 2
