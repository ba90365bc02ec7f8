"""The form every solver takes: a table with one row of coefficients per step.

A step of any solver here is one linear combination of the sample, the sample it came from, the network's
output, earlier x0 predictions and noise; :func:`diffgap.ops.solver_step.solver_step` applies it and its
documentation gives the columns. A solver therefore is a function that fills such a table, in float64, before
sampling starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffgap.diffusion.prediction import Prediction, x0_coefficients
from diffgap.ops.solver_step import COLUMNS

Level = tuple[float, float]
"""A noise level: (alpha, sigma)."""

Row = dict[str, float]
"""The coefficients of one step by column name; columns left out are 0."""


@dataclass(frozen=True, eq=False)
class SolverTable:
    """A solver for one schedule and number of steps.

    Attributes:
        name: What built it, e.g. "dpmpp".
        timesteps: Time the network is told at each step, float64 (S,).
        levels: Columns alpha, sigma before each step and, last, after the final one; float64 (S + 1, 2).
        coefficients: float64 (S, len(COLUMNS)).
    """

    name: str
    timesteps: Tensor
    levels: Tensor
    coefficients: Tensor

    init_sigma = 1.0
    """Standard deviation of the initial noise: 1 for every solver here, as in diffusers."""

    def __len__(self) -> int:
        return len(self.coefficients)

    def column(self, name: str) -> Tensor:
        """One column of the coefficients, float64 (S,)."""
        return self.coefficients[:, COLUMNS.index(name)]

    @cached_property
    def history(self) -> int:
        """How many earlier x0 predictions the steps use."""
        used = [j for j in (1, 2, 3) if self._uses(f"corr_h{j}") or self._uses(f"pred_h{j}")]
        return max(used, default=0)

    @cached_property
    def stochastic(self) -> bool:
        """Whether any step adds noise."""
        return self._uses("pred_noise")

    @cached_property
    def corrects(self) -> bool:
        """Whether any step corrects the sample from the one before it (UniPC)."""
        return self._uses("corr_last")

    def _uses(self, column: str) -> bool:
        return bool((self.column(column) != 0).any())


def build_table(name: str, timesteps: Tensor, levels: Sequence[Level], rows: Sequence[Row]) -> SolverTable:
    """A :class:`SolverTable` from named coefficients; rows without correction pass the sample through."""
    coefficients = torch.zeros(len(rows), len(COLUMNS), dtype=torch.float64)
    for i, row in enumerate(rows):
        for column, value in {"corr_sample": 1.0, **row}.items():
            coefficients[i, COLUMNS.index(column)] = value
    if not torch.isfinite(coefficients).all():
        raise ValueError(f"{name}: a coefficient is not finite; the noise levels coincide or leave no signal")
    return SolverTable(name, timesteps.double(), torch.tensor(levels, dtype=torch.float64), coefficients)


def x0_row(level: Level, prediction: Prediction) -> Row:
    """The columns that turn the network's output at ``level`` into x0.

    Raises:
        ValueError: The level holds no signal (zero terminal SNR, the start of a flow) and the prediction is
            epsilon, which then says nothing about x0.
    """
    alpha, sigma = level
    if alpha == 0 and prediction == "epsilon":
        raise ValueError(
            "prediction_type 'epsilon' says nothing about x0 at a step of pure noise; use 'v_prediction', "
            "'sample' or 'flow_prediction', or a schedule or spacing without that step"
        )
    x0_sample, x0_output = x0_coefficients(alpha, sigma, prediction)
    return {"x0_sample": x0_sample, "x0_output": x0_output}
