"""Schedulers of diffusers whose ``step`` is one call of :func:`diffgap.ops.solver_step.solver_step`.

Each class subclasses diffusers' class of the same name and keeps its configuration, timesteps and noise levels, so
any pipeline takes it:

    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

``set_timesteps`` turns the levels into a float64 table of coefficients (:mod:`diffgap.diffusion.table`), and ``step``
applies one row of it in one pass over memory. Noise comes from diffusers' generator and is one more term of the row:
it takes the place of the first earlier x0 prediction that the solver has no use for. Results agree with diffusers' to
the rounding of its float32 coefficients.

``step`` does not wait for a GPU where the timestep is a number, a CPU tensor or an element of ``scheduler.timesteps``,
as in every pipeline. Configurations without a table take diffusers' own ``step``; each class lists them. For
``torch.compile(fullgraph=True)`` of a multistep ``step``, call ``set_begin_index`` first, as diffusers finds its first
step by comparing timesteps otherwise.
"""

from __future__ import annotations

from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin

from diffgap.integrations.diffusers.ancestral import DDIMScheduler, DDPMScheduler
from diffgap.integrations.diffusers.flow import FlowMatchEulerDiscreteScheduler
from diffgap.integrations.diffusers.multistep import DPMSolverMultistepScheduler, UniPCMultistepScheduler

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "UniPCMultistepScheduler",
]

# A saved pipeline names its scheduler's module, and diffusers looks there for the class and for SchedulerMixin.
for _scheduler in (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
):
    _scheduler.__module__ = __name__
