"""The noise schedule: forward noising and solver steps, against diffusers' schedulers.

The eager reference draws its noise by Philox in 64-bit integer arithmetic, because it is the definition and
not a fast path. Where there is noise, ``diffusers`` and ``torch`` (plain ``torch.randn`` and the formula)
are the rivals to beat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Outputs, Peer, Run
from diffgap.diffusion import NoiseSchedule, SolverTable, build_solver
from diffgap.ops.q_sample import q_sample
from diffgap.ops.solver_step import COLUMNS, solver_step

Build = Callable[[torch.device], Inputs]

SHAPES = {
    "ci": (((256, 512), torch.float32),),
    "full": (
        ((256, 512), torch.float32),
        ((4096, 512), torch.float32),
        ((4096, 1024), torch.float32),
        ((4096, 1024), torch.bfloat16),
    ),
}
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_SCHEDULE = NoiseSchedule()  # linear betas, epsilon: the defaults of diffusers' schedulers
_STEPS, _STEP = 20, 10
_GUIDANCE = 3.0


@dataclass(frozen=True)
class Solver:
    """A solver as a case: our table, and the diffusers scheduler that takes the same step.

    Attributes:
        name: In the case's name.
        table: Its coefficients.
        scheduler: The class in diffusers.
        options: For the scheduler's constructor.
        step_options: For the scheduler's ``step``.
        guided: Whether the step combines a conditional and an unconditional output.
    """

    name: str
    table: SolverTable
    scheduler: str
    options: dict[str, Any] = field(default_factory=dict)
    step_options: dict[str, Any] = field(default_factory=dict)
    guided: bool = False


_DDIM = build_solver("ddim", _SCHEDULE, _STEPS)
_DDIM_ETA1 = build_solver("ddim", _SCHEDULE, _STEPS, eta=1.0)
_DDPM = build_solver("ddpm", _SCHEDULE, _STEPS)
_DPMPP = build_solver("dpmpp", _SCHEDULE, _STEPS)
_UNIPC = build_solver("unipc", _SCHEDULE, _STEPS)
_UNCLIPPED = {"clip_sample": False}

SOLVERS = (
    Solver("ddim", _DDIM, "DDIMScheduler", _UNCLIPPED),
    Solver("ddim_eta1", _DDIM_ETA1, "DDIMScheduler", _UNCLIPPED, step_options={"eta": 1.0}),
    Solver("ddpm", _DDPM, "DDPMScheduler", _UNCLIPPED),
    Solver("dpmpp_2m", _DPMPP, "DPMSolverMultistepScheduler"),
    Solver("dpmpp_2m_cfg", _DPMPP, "DPMSolverMultistepScheduler", guided=True),
    Solver("unipc", _UNIPC, "UniPCMultistepScheduler"),
)


def cases(size: str) -> Iterator[Case]:
    """The cases of ``--size ci`` or ``full``."""
    for (rows, width), dtype in SHAPES[size]:
        suffix = f"{rows}x{width}/{_DTYPES[dtype]}"
        yield Case(
            f"q_sample/fwd/{suffix}",
            dtype,
            _noising_inputs(rows, width, dtype),
            q_sample,
            (
                Peer("diffusers", _diffusers_noising, "diffusers", _noising_oracle),
                Peer("torch", _torch_noising, "torch", _noising_oracle),
            ),
        )
        for solver in SOLVERS:
            yield Case(
                f"solver_step/{solver.name}/{suffix}",
                dtype,
                _step_inputs(solver, rows, width, dtype),
                solver_step,
                (_diffusers_step(solver),),
            )


def _noising_inputs(rows: int, width: int, dtype: torch.dtype) -> Build:
    def build(device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        inputs = {
            "x0": torch.randn(rows, width, generator=generator).to(dtype),
            "t": torch.randint(_SCHEDULE.num_train_timesteps, (rows,), generator=generator),
            "table": _SCHEDULE.table,
            "seed": torch.randint(2**62, (rows,), generator=generator),
        }
        return {name: value.to(device) for name, value in inputs.items()}

    return build


def _torch_noising(x0: Tensor, t: Tensor, table: Tensor, seed: Tensor) -> Run:
    coefficients = table.to(x0.dtype)

    def run() -> Outputs:
        noise = torch.randn_like(x0)
        alpha, sigma = coefficients[t].unbind(1)
        return alpha[:, None] * x0 + sigma[:, None] * noise, noise

    return run


def _diffusers_noising(x0: Tensor, t: Tensor, table: Tensor, seed: Tensor) -> Run:
    import diffusers

    scheduler: Any = diffusers.DDPMScheduler()

    def run() -> Outputs:
        noise = torch.randn_like(x0)
        return scheduler.add_noise(x0, noise, t), noise

    return run


def _noising_oracle(x0: Tensor, t: Tensor, table: Tensor, seed: Tensor, draw_dtype: torch.dtype) -> Outputs:
    noise = torch.randn_like(x0, dtype=draw_dtype).double()
    alpha, sigma = table[t].unbind(1)
    return alpha[:, None] * x0 + sigma[:, None] * noise, noise


def _step_inputs(solver: Solver, rows: int, width: int, dtype: torch.dtype) -> Build:
    def build(device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def tensor() -> Tensor:
            return torch.randn(rows, width, generator=generator).to(device, dtype)

        inputs: Inputs = {"sample": tensor(), "output": tensor(), "step": _STEP}
        inputs["table"] = solver.table.coefficients.to(device)
        inputs["history"] = tuple(tensor() for _ in range(solver.table.history))
        if solver.guided:
            inputs |= {"unconditional": tensor(), "guidance_scale": _GUIDANCE}
        if solver.table.corrects:
            inputs["last_sample"] = tensor()
        if solver.table.stochastic:
            inputs["seed"] = torch.randint(2**62, (rows,), generator=generator).to(device)
        return inputs

    return build


def _diffusers_step(solver: Solver) -> Peer:
    def prepare(
        sample: Tensor,
        output: Tensor,
        step: int,
        table: Tensor,
        history: tuple[Tensor, ...],
        unconditional: Tensor | None = None,
        guidance_scale: float = 1.0,
        last_sample: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> Run:
        import diffusers

        scheduler = getattr(diffusers, solver.scheduler)(**solver.options)
        scheduler.set_timesteps(_STEPS, device=sample.device)
        timestep = scheduler.timesteps[step]
        # The scheduler's memory of earlier steps, put back before each call: a few assignments of references.
        order = scheduler.config.get("solver_order", 0)
        outputs: list[Tensor | None] = [*(None,) * (order - len(history)), *reversed(history)]
        times = [scheduler.timesteps[i] for i in range(step - order, step)]
        state = {"_step_index": step, "lower_order_nums": order, "this_order": order}

        def run() -> Outputs:
            vars(scheduler).update(state, model_outputs=outputs.copy(), timestep_list=times.copy())
            scheduler.last_sample = last_sample
            guided = output
            if unconditional is not None:
                guided = unconditional + guidance_scale * (output - unconditional)
            following = scheduler.step(guided, timestep, sample, return_dict=False, **solver.step_options)[0]
            return (following,)

        return run

    def oracle(*, draw_dtype: torch.dtype, **inputs: Any) -> Outputs:
        noise = torch.randn_like(inputs["sample"], dtype=draw_dtype).double()
        # Without the noise column, the step is the mean to which diffusers adds noise of its own.
        table = inputs["table"].clone()
        column = COLUMNS.index("pred_noise")
        scale = table[inputs["step"], column].item()
        table[:, column] = 0.0
        mean = solver_step(**(inputs | {"table": table})).sample
        return (mean + scale * noise,)

    return Peer("diffusers", prepare, "diffusers", oracle if solver.table.stochastic else None)
