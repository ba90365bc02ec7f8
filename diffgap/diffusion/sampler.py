"""The sampling loop: for every row of a solver's table, one network call and one :func:`solver_step`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from diffgap.diffusion.table import SolverTable
from diffgap.ops.random import normal
from diffgap.ops.solver_step import GuidanceForm, StepOutput, solver_step


class Model(Protocol):
    """What the sampler calls: a network with its conditions and the time of every step already in it."""

    def __call__(self, sample: Tensor, step: int | Tensor) -> Tensor:
        """The prediction for a noisy batch.

        Args:
            sample: (N, \\*shape). With guidance (2 N, \\*shape): the samples for the conditional branch and
                then the same samples for the unconditional one.
            step: Row of the solver's table, an index into whatever was precomputed for ``solver.timesteps``.
                Under ``cuda_graph`` it is an int64 tensor (1,) on the device: ``rows.index_select(0, step)``.

        Returns:
            The prediction, of the sample's shape, of the schedule's ``prediction_type``.
        """
        ...


Callback = Callable[[int, StepOutput], "bool | None"]
"""Called after every step with its row and result; a true value ends the sampling."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598).

    Attributes:
        scale: g in ``unconditional + g (conditional - unconditional)``.
        rescale: phi of arXiv 2305.08891, section 3.4; 0 is off.
        form: "standard", the formula above, or "offset": ``conditional + g (conditional - unconditional)``.
    """

    scale: float
    rescale: float = 0.0
    form: GuidanceForm = "standard"


class _State(NamedTuple):
    """What one step hands to the next."""

    sample: Tensor
    last_sample: Tensor | None
    history: tuple[Tensor, ...]


@torch.no_grad()
def sample(
    model: Model,
    solver: SolverTable,
    seeds: Tensor,
    shape: Sequence[int],
    *,
    guidance: Guidance | None = None,
    initial: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    x0_clamp: float | None = None,
    x0_norm: float | None = None,
    steps: int | None = None,
    callback: Callback | None = None,
    cuda_graph: bool = False,
) -> Tensor:
    """Draw samples.

    Every sample depends on its own seed only: the initial noise and that of each step are functions of
    (seed, step, element), so neither the batch a sample stands in nor the device changes them.

    Args:
        model: See :class:`Model`; it is called on the flattened batch.
        solver: Table of the solver (:func:`diffgap.diffusion.build_solver`).
        seeds: int64 (\\*batch) on the device to sample on, e.g. (B, K) for K samples of each of B conditions.
            They are flattened in row-major order for the model.
        shape: Shape of one sample.
        guidance: Classifier-free guidance; both branches are one batch. None: one branch.
        initial: (\\*batch, \\*shape) to start from instead of unit normal noise.
        dtype: Of the samples. The arithmetic of a step is in float32 or better.
        x0_clamp: Clamp every x0 prediction to [-x0_clamp, x0_clamp].
        x0_norm: Put every x0 prediction (last dimension) on the sphere of this radius instead
            (:attr:`EmbeddingScaler.radius`).
        steps: Stop after this many rows; None runs them all.
        callback: Progress, trajectory, or a reason to stop.
        cuda_graph: Capture the step as a CUDA graph and replay it. Worth it where launches cost more than the
            network computes; the model must not synchronise with the host.

    Returns:
        (\\*batch, \\*shape): the sample after the last row, or, stopped before it, the last x0 prediction.

    Raises:
        TypeError: ``seeds`` is not int64.
        ValueError: A shape, ``steps`` or an option is out of range, or ``cuda_graph`` off a GPU.
    """
    total = len(solver) if steps is None else steps
    if not 1 <= total <= len(solver):
        raise ValueError(f"steps is {steps}; use 1 to {len(solver)}, the rows of the solver's table")
    if seeds.dtype != torch.int64:
        raise TypeError(f"seeds is {seeds.dtype}; give int64, e.g. from diffgap.ops.random.sample_seeds")
    if initial is not None and initial.shape != (*seeds.shape, *shape):
        raise ValueError(f"initial is {tuple(initial.shape)}; it must be {(*seeds.shape, *shape)}: seeds and shape")
    if cuda_graph and seeds.device.type != "cuda":
        raise ValueError(f"cuda_graph: the seeds are on {seeds.device}, not on a GPU; leave it False")

    flat_seeds = seeds.reshape(-1)
    if initial is None:
        start = normal(flat_seeds, shape, dtype=dtype) * solver.init_sigma
    else:
        start = initial.reshape(-1, *shape).to(seeds.device, dtype)
    table = solver.coefficients.to(seeds.device)

    def advance(state: _State, step: int | Tensor) -> StepOutput:
        """One step: the network, then one row of the table."""
        if guidance is None:
            conditional, unconditional = model(state.sample, step), None
        else:
            conditional, unconditional = model(torch.cat((state.sample, state.sample)), step).chunk(2)
        return solver_step(
            state.sample,
            conditional,
            table,
            step if isinstance(step, int) else step.expand(len(state.sample)),
            unconditional=unconditional,
            guidance_scale=1.0 if guidance is None else guidance.scale,
            guidance_rescale=0.0 if guidance is None else guidance.rescale,
            guidance_form="standard" if guidance is None else guidance.form,
            last_sample=state.last_sample,
            history=state.history,
            seed=flat_seeds if solver.stochastic else None,
            x0_clamp=x0_clamp,
            x0_norm=x0_norm,
        )

    # All rows see state of one shape: what a warm-up row has no history for, its zero coefficients leave out.
    state = _State(start, start if solver.corrects else None, (torch.zeros_like(start),) * solver.history)
    run = _Captured(advance, state) if cuda_graph else None
    for step in range(total):
        if run is None:
            result = advance(state, step)
            state = _following(state, result)
        else:
            result = run.replay()
        if callback is not None and callback(step, result):
            total = step + 1
            break
    final = result.sample if total == len(solver) else result.x0
    return final.reshape(*seeds.shape, *shape)


def _following(state: _State, result: StepOutput) -> _State:
    """The state after a step: the newest x0 goes to the front of the history."""
    last_sample = None if state.last_sample is None else result.corrected
    return _State(result.sample, last_sample, (result.x0, *state.history)[: len(state.history)])


def _overwrite(state: _State, following: _State) -> None:
    """Copy ``following`` into the tensors of ``state``, oldest history first, as its tensors shift by one."""
    for old, new in zip(reversed(state.history), reversed(following.history), strict=True):
        old.copy_(new)
    if state.last_sample is not None and following.last_sample is not None:
        state.last_sample.copy_(following.last_sample)
    state.sample.copy_(following.sample)


class _Captured:
    """A step as a CUDA graph: fixed buffers for the state, and a counter on the device for the row."""

    def __init__(self, advance: Callable[[_State, Tensor], StepOutput], start: _State) -> None:
        own = (x.clone() for x in start.history)
        last_sample = None if start.last_sample is None else start.last_sample.clone()
        self.state = _State(start.sample.clone(), last_sample, tuple(own))
        self.step = torch.zeros(1, dtype=torch.int64, device=start.sample.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # lets libraries allocate and kernels compile outside the capture
            for _ in range(2):
                advance(self.state, self.step)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = self.advance_in_place(advance, self.state, self.step)

    @staticmethod
    def advance_in_place(advance: Callable[[_State, Tensor], StepOutput], state: _State, step: Tensor) -> StepOutput:
        """One step that leaves the next state in the tensors of ``state`` and the next row in ``step``."""
        result = advance(state, step)
        _overwrite(state, _following(state, result))
        step += 1
        return result

    def replay(self) -> StepOutput:
        """Run the next step. Its tensors are overwritten by the one after."""
        self.graph.replay()
        return self.result
