"""The noise schedule: forward noising and solver steps, against diffusers' schedulers.

A step is timed as a sampler takes it, in place: ``next`` over the sample, ``x0`` over the oldest of the history,
``corrected`` over the last sample. Eager code and the peers return new tensors, as is their way; one case of ours does
so too, ``_functional``.

The eager reference draws its noise by Philox in 64-bit integer arithmetic, because it is the definition and not a fast
path. Where there is noise, ``diffusers``, ``torch`` (plain ``torch.randn`` and the formula) and ``torch_compile``
(that, compiled) are the rivals to beat.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, Case, Gate, Inputs, Outputs, Peer, Run
from benchmarks.check import mismatch
from diffgap.diffusion import NoiseSchedule, SolverTable, build_solver
from diffgap.diffusion.schedule import Prediction
from diffgap.ops._dispatch import selected
from diffgap.ops.q_sample import q_sample
from diffgap.ops.solver_step import COLUMNS, StepOutput, solver_step

#: Rows, width and dtype.
STEP_SHAPES = {
    "ci": ((256, 512, "fp32"),),
    "full": (
        (64, 512, "fp32"),
        (256, 512, "fp32"),
        (4096, 512, "fp32"),
        (4096, 1024, "fp32"),
        (4096, 1024, "bf16"),
    ),
}
NOISING_SHAPES = {
    "ci": ((256, 512, "fp32"),),
    "full": ((256, 512, "fp32"), (4096, 1024, "fp32"), (4096, 1024, "bf16")),
}
_SCHEDULE = NoiseSchedule()  # linear betas, the default of diffusers' schedulers
_STEPS, _STEP = 20, 10
_GUIDANCE = 3.0


@dataclass(frozen=True)
class Solver:
    """A solver as a case: our table, and the diffusers scheduler that takes the same step.

    Attributes:
        name: In the case's name.
        builder: Of our table, by its name.
        scheduler: The class in diffusers.
        prediction: What the output is. The timed calls repeat one step in place with the same output: the sample grows
            with every call if that is epsilon, and settles with these, where diffusers has no more arithmetic to do.
        options: For the scheduler's constructor.
        step_options: For the scheduler's ``step``.
        table_options: For the builder.
        noise_dtype: Of the scheduler's noise; None: the case's.
        guided: Whether the step combines a conditional and an unconditional output.
        in_place: Whether ours overwrites its state.
        on_sphere: Whether x0, which must be what is predicted, is scaled to the norm that a bridge's has.
    """

    name: str
    builder: str
    scheduler: str
    prediction: Prediction = "v_prediction"
    options: dict[str, Any] = field(default_factory=dict)
    step_options: dict[str, Any] = field(default_factory=dict)
    table_options: dict[str, Any] = field(default_factory=dict)
    noise_dtype: torch.dtype | None = None
    guided: bool = False
    in_place: bool = True
    on_sphere: bool = False

    @property
    def table(self) -> SolverTable:
        """Its coefficients."""
        schedule = replace(_SCHEDULE, prediction_type=self.prediction)
        return build_solver(self.builder, schedule, _STEPS, **self.table_options)

    def with_guidance(self) -> Solver:
        """The solver's step with classifier-free guidance."""
        return replace(self, name=f"{self.name}_cfg", guided=True)


_UNCLIPPED = {"clip_sample": False}
_ETA = {"eta": 1.0}
_DDIM = Solver("ddim", "ddim", "DDIMScheduler", "sample", _UNCLIPPED)
_DPMPP = Solver("dpmpp_2m", "dpmpp", "DPMSolverMultistepScheduler")
_SDE = Solver(
    "sde_dpmpp_2m",
    "sde_dpmpp",
    "DPMSolverMultistepScheduler",
    options={"algorithm_type": "sde-dpmsolver++"},
    noise_dtype=torch.float32,
)
_UNIPC = Solver("unipc", "unipc", "UniPCMultistepScheduler", "sample")

SOLVERS = (
    *(solver.with_guidance() for solver in (_DPMPP, _DDIM, _UNIPC, _SDE)),
    replace(_DPMPP, name="dpmpp_2m_cfg_sphere", prediction="sample", guided=True, on_sphere=True),
    replace(_DPMPP, name="dpmpp_2m_cfg_functional", guided=True, in_place=False),
    *(_DPMPP, _DDIM, _UNIPC, _SDE),
    replace(_DDIM, name="ddim_eta1", step_options=_ETA, table_options=_ETA),
    Solver("ddpm", "ddpm", "DDPMScheduler", options=_UNCLIPPED),
)


def cases(size: str) -> Iterator[Case]:
    """The cases of ``--size ci`` or ``full``."""
    for shape in NOISING_SHAPES[size]:
        yield noising_case(*shape)
    for shape in STEP_SHAPES[size]:
        for solver in SOLVERS:
            yield step_case(solver, *shape)


def noising_case(rows: int, width: int, dtype_name: str) -> Case:
    """``q_sample`` with its noise, which the target "epsilon" is."""
    return Case(
        f"q_sample/fwd/{rows}x{width}/{dtype_name}",
        DTYPES[dtype_name],
        partial(_noising_inputs, rows, width, DTYPES[dtype_name]),
        q_sample,
        (
            Peer("diffusers", _diffusers_noising, "diffusers", _noising_oracle),
            Peer("torch", _torch_noising, "torch", _noising_oracle),
            Peer("torch_compile", _compiled_noising, "torch", module="torch", gate=_noised),
        ),
    )


def _noising_inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x0": torch.randn(rows, width, generator=generator).to(dtype),
        "t": torch.randint(_SCHEDULE.num_train_timesteps, (rows,), generator=generator),
        "table": _SCHEDULE.table,
        "seed": torch.randint(2**62, (rows,), generator=generator),
    }
    return {name: value.to(device) for name, value in inputs.items()}


def _plain_noising(x0: Tensor, t: Tensor, coefficients: Tensor) -> Outputs:
    noise = torch.randn_like(x0)
    alpha, sigma = coefficients[t].unbind(1)
    return alpha[:, None] * x0 + sigma[:, None] * noise, noise


def _torch_noising(x0: Tensor, t: Tensor, table: Tensor, seed: Tensor) -> Run:
    return partial(_plain_noising, x0, t, table.to(x0.dtype))


def _compiled_noising(x0: Tensor, t: Tensor, table: Tensor, seed: Tensor) -> Run:
    compiled = torch.compile(_plain_noising, fullgraph=True, dynamic=False)
    return partial(compiled, x0, t, table.to(x0.dtype))


def _diffusers_noising(x0: Tensor, t: Tensor, table: Tensor, seed: Tensor) -> Run:
    import diffusers

    scheduler: Any = diffusers.DDPMScheduler()

    def run() -> Outputs:
        noise = torch.randn_like(x0)
        return scheduler.add_noise(x0, noise, t), noise

    return run


def _noising_oracle(x0: Tensor, t: Tensor, table: Tensor, seed: Tensor, draw_dtype: torch.dtype) -> Outputs:
    return _noised_with(torch.randn_like(x0, dtype=draw_dtype), x0, t, table)


def _noised_with(noise: Tensor, x0: Tensor, t: Tensor, table: Tensor) -> Outputs:
    alpha, sigma = table[t].unbind(1)
    return alpha[:, None] * x0.double() + sigma[:, None] * noise.double(), noise.double()


def _noised(x0: Tensor, t: Tensor, table: Tensor, seed: Tensor) -> Gate:
    """Judges noise of a stream that only its compiler knows: as standard normal, and as what the samples hold."""

    def gate(outputs: Outputs) -> str | None:
        noise = outputs[1].double()
        # Six standard deviations of either estimate.
        spread = 6 / noise.numel() ** 0.5
        mean, square = noise.mean().item(), noise.square().mean().item()
        if not (abs(mean) < spread and abs(square - 1) < 2**0.5 * spread):
            return f"the noise has mean {mean:.2e} and mean square {square:.4f}, not 0 and 1"
        return mismatch(outputs, _noised_with(noise, x0, t, table), None, x0.dtype)

    return gate


def step_case(solver: Solver, rows: int, width: int, dtype_name: str) -> Case:
    """One step from the middle of the way."""
    draws = partial(_step_oracle, solver) if solver.table.stochastic else None
    return Case(
        f"solver_step/{solver.name}/{rows}x{width}/{dtype_name}",
        DTYPES[dtype_name],
        partial(_step_inputs, solver, rows, width, DTYPES[dtype_name]),
        _step,
        (Peer("diffusers", partial(_diffusers_step, solver), "diffusers", draws),),
    )


class InPlace:
    """A step that overwrites its state, which it has copies of its own of."""

    def __init__(self, sample: Tensor, history: tuple[Tensor, ...], last_sample: Tensor | None, **fixed: Any) -> None:
        self.sample = sample.clone()
        self.history = tuple(x.clone() for x in history)
        self.last_sample = None if last_sample is None else last_sample.clone()
        self.fixed = fixed

    def __call__(self) -> Outputs:
        oldest = self.history[-1] if self.history else None
        written = solver_step(
            self.sample,
            last_sample=self.last_sample,
            history=self.history,
            out=(self.sample, oldest, self.last_sample),
            **self.fixed,
        )
        if oldest is not None:
            self.history = (oldest, *self.history[:-1])
        return tuple(x for x in written if x is not None)


def _kept(result: StepOutput, history: tuple[Tensor, ...], last_sample: Tensor | None) -> Outputs:
    """What a sampler keeps of a step: x0 only for a solver with history, the corrected sample only for a corrector."""
    return (
        result.sample,
        *((result.x0,) if history else ()),
        *((result.corrected,) if last_sample is not None else ()),
    )


def _step(in_place: InPlace | None, history: tuple[Tensor, ...], last_sample: Tensor | None, **inputs: Any) -> Outputs:
    if in_place is not None and selected() != "eager":
        return in_place()
    return _kept(solver_step(history=history, last_sample=last_sample, **inputs), history, last_sample)


def _step_inputs(solver: Solver, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def tensor() -> Tensor:
        return torch.randn(rows, width, generator=generator).to(device, dtype)

    table = solver.table
    inputs: Inputs = {
        "sample": tensor(),
        "output": tensor(),
        "step": _STEP,
        "table": table.coefficients.to(device),
        "history": tuple(tensor() for _ in range(table.history)),
        "last_sample": tensor() if table.corrects else None,
    }
    if solver.guided:
        inputs |= {"unconditional": tensor(), "guidance_scale": _GUIDANCE}
    if solver.on_sphere:
        inputs["x0_norm"] = width**0.5
    if table.stochastic:
        inputs["seed"] = torch.randint(2**62, (rows,), generator=generator).to(device)
    return inputs | {"in_place": InPlace(**inputs) if solver.in_place else None}


def _diffusers_step(
    solver: Solver,
    *,
    sample: Tensor,
    output: Tensor,
    step: int,
    history: tuple[Tensor, ...],
    last_sample: Tensor | None,
    unconditional: Tensor | None = None,
    guidance_scale: float = 1.0,
    x0_norm: float | None = None,
    **_: Any,
) -> Run:
    import diffusers

    options = {"prediction_type": solver.prediction, **solver.options}
    scheduler = getattr(diffusers, solver.scheduler)(**options)
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
        if x0_norm is not None:
            guided = guided * (x0_norm / guided.norm(dim=-1, keepdim=True))
        following = scheduler.step(guided, timestep, sample, return_dict=False, **solver.step_options)[0]
        return (following,)

    return run


def _step_oracle(solver: Solver, *, draw_dtype: torch.dtype, **inputs: Any) -> Outputs:
    """The step with the noise that diffusers draws."""
    noise = torch.randn_like(inputs["sample"], dtype=solver.noise_dtype or draw_dtype).double()
    # Without the noise column, the step is the mean to which diffusers adds noise of its own.
    table = inputs["table"].clone()
    column = COLUMNS.index("pred_noise")
    scale = table[inputs["step"], column].item()
    table[:, column] = 0.0
    del inputs["in_place"]
    mean = solver_step(**(inputs | {"table": table})).sample
    return (mean + scale * noise,)
