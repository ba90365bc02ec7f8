"""All solvers by name. Each only builds a table; see :mod:`diffgap.diffusion.table`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from diffgap.diffusion.ancestral import ddim, ddpm
from diffgap.diffusion.dpm_solver import dpmpp, sde_dpmpp
from diffgap.diffusion.flow import euler_flow
from diffgap.diffusion.schedule import NoiseSchedule
from diffgap.diffusion.table import SolverTable
from diffgap.diffusion.unipc import unipc

__all__ = ["SOLVERS", "build_solver", "ddim", "ddpm", "dpmpp", "euler_flow", "sde_dpmpp", "unipc"]

#: Builders by name.
SOLVERS: MappingProxyType[str, Callable[..., SolverTable]] = MappingProxyType(
    {builder.__name__: builder for builder in (ddpm, ddim, dpmpp, sde_dpmpp, unipc, euler_flow)}
)


def build_solver(name: str, schedule: NoiseSchedule, num_steps: int, **options: Any) -> SolverTable:
    """The table of a solver for a schedule.

    Args:
        name: A key of :data:`SOLVERS`.
        schedule: Noise schedule and prediction type.
        num_steps: Number of steps, one network call each.
        options: The solver's own keyword arguments.

    Raises:
        ValueError: An unknown name or option, or what the solver itself refuses.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver {name!r} does not exist; use one of {', '.join(SOLVERS)}")
    builder = SOLVERS[name]
    known = [p.name for p in inspect.signature(builder).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"solver {name!r} has no option {', '.join(unknown)}; its options are {', '.join(known)}")
    return builder(schedule, num_steps, **options)
