"""The sampling loop: for every row of a solver's table, one network call and one :func:`solver_step`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffgap.diffusion.table import SolverTable
from diffgap.ops.random import normal
from diffgap.ops.solver_step import GuidanceForm, StepOutput, solver_step


class Model(Protocol):
    """What the sampler calls: a network with its conditions and the time of every step already in it."""

    def __call__(self, sample: Tensor, step: int) -> Tensor:
        """The prediction for a noisy batch.

        Args:
            sample: (N, \\*shape). With guidance (2 N, \\*shape): the samples for the conditional branch and
                then the same samples for the unconditional one. It is overwritten after the call.
            step: Row of the solver's table, an index into whatever was precomputed for ``solver.timesteps``.

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


class SamplingLoop:
    """A sampling loop for batches of one size, in memory of its own: every step is taken in place.

    Args:
        model: See :class:`Model`.
        solver: Table of the solver (:func:`diffgap.diffusion.build_solver`).
        batch: Samples drawn at a time.
        shape: Shape of one sample.
        device: Where to sample.
        guidance: Classifier-free guidance; both branches are one batch. None: one branch.
        dtype: Of the samples. The arithmetic of a step is in float32 or better.
        x0_clamp: Clamp every x0 prediction to [-x0_clamp, x0_clamp].
        x0_norm: Put every x0 prediction (last dimension) on the sphere of this radius instead.
        steps: Stop after this many rows; None runs them all.

    Raises:
        ValueError: ``steps`` is out of range.
    """

    def __init__(
        self,
        model: Model,
        solver: SolverTable,
        batch: int,
        shape: Sequence[int],
        *,
        device: torch.device,
        guidance: Guidance | None = None,
        dtype: torch.dtype = torch.float32,
        x0_clamp: float | None = None,
        x0_norm: float | None = None,
        steps: int | None = None,
    ) -> None:
        self.steps = len(solver) if steps is None else steps
        if not 1 <= self.steps <= len(solver):
            raise ValueError(f"steps is {steps}; use 1 to {len(solver)}, the rows of the solver's table")
        self.model, self.solver, self.guidance = model, solver, guidance
        self._constraint = {"x0_clamp": x0_clamp, "x0_norm": x0_norm}
        self._table = solver.coefficients.to(device)
        branches = 1 if guidance is None else 2
        self._branches = torch.empty(branches, batch, *shape, dtype=dtype, device=device)
        self._sample = self._branches[0]
        self._x0s = [torch.empty_like(self._sample) for _ in range(max(solver.history, 1))]
        self._corrected = torch.empty_like(self._sample) if solver.corrects else None
        self._seeds = torch.empty(batch, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, seeds: Tensor, initial: Tensor | None = None, callback: Callback | None = None) -> Tensor:
        """Draw a batch.

        Args:
            seeds: (batch,) int64, one a sample.
            initial: (batch, \\*shape) to start from instead of unit normal noise.
            callback: Progress, trajectory, or a reason to stop.

        Returns:
            (batch, \\*shape): the sample after the last row, or, stopped before it, the last x0 prediction. The next
            call overwrites it.

        Raises:
            TypeError: ``seeds`` is not int64.
            ValueError: ``seeds`` or ``initial`` has another shape, or a recorded loop is given what it cannot take.
        """
        if seeds.dtype != torch.int64:
            raise TypeError(f"seeds is {seeds.dtype}; give int64, e.g. from diffgap.ops.random.sample_seeds")
        for name, given, wanted in (("seeds", seeds, self._seeds), ("initial", initial, self._sample)):
            if given is not None and given.shape != wanted.shape:
                raise ValueError(f"{name} is {tuple(given.shape)}; this loop takes {tuple(wanted.shape)}")
        for name, option in (("initial", initial), ("callback", callback)):
            if self._graph is not None and option is not None:
                raise ValueError(f"{name}: a recorded loop takes none; use a loop without capture()")
        self._seeds.copy_(seeds)
        if initial is not None:
            self._sample.copy_(initial)
        if self._graph is None:
            return self._run(callback, draws=initial is None)
        self._graph.replay()
        return self._recorded

    def capture(self) -> None:
        """Record the whole loop as a CUDA graph: calls then replay it, without callback or ``initial``.

        Worth it for several batches where launches cost more than the network computes. The model must not
        synchronise with the host, and what it reads must stay where it is.
        """
        with torch.cuda.device(self._seeds.device):  # a stream of another device would record nothing
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # lets libraries allocate and kernels compile outside the capture
                self._run(None, draws=True)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._recorded = self._run(None, draws=True)
        self._graph = graph

    @torch.no_grad()
    def _run(self, callback: Callback | None, *, draws: bool) -> Tensor:
        if draws:
            noise = normal(self._seeds, self._sample.shape[1:], dtype=self._sample.dtype)
            torch.mul(noise, self.solver.init_sigma, out=self._sample)
        x0s = deque(self._x0s)  # newest first
        if self._corrected is not None:
            self._corrected.copy_(self._sample)
        for x0 in x0s:  # what the first rows have no history for, their zero coefficients leave out
            x0.zero_()
        # x0 is written only where someone reads it.
        whole = self.steps == len(self.solver)
        wanted = self.solver.history > 0 or callback is not None
        for step in range(self.steps):
            last = step + 1 == self.steps
            self._advance(step, x0s, keep=wanted or (last and not whole))
            x0s.rotate(1)
            if callback is not None:
                state = (self._sample, x0s[0], self._sample if self._corrected is None else self._corrected)
                if callback(step, StepOutput(*(x.clone() for x in state))) and not (last and whole):
                    return x0s[0]
        return self._sample if whole else x0s[0]

    def _advance(self, step: int, x0s: Sequence[Tensor], *, keep: bool) -> None:
        """One step in place: the network, then one row of the table."""
        guidance, sample = self.guidance, self._sample
        if guidance is None:
            conditional, unconditional = self.model(sample, step), None
        else:
            self._branches[1].copy_(sample)
            conditional, unconditional = self.model(self._branches.flatten(0, 1), step).chunk(2)
        solver_step(
            sample,
            conditional,
            self._table,
            step,
            unconditional=unconditional,
            guidance_scale=1.0 if guidance is None else guidance.scale,
            guidance_rescale=0.0 if guidance is None else guidance.rescale,
            guidance_form="standard" if guidance is None else guidance.form,
            last_sample=self._corrected,
            history=tuple(x0s)[: self.solver.history],
            seed=self._seeds if self.solver.stochastic else None,
            out=(sample, x0s[-1] if keep else None, self._corrected),
            **self._constraint,
        )


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
) -> Tensor:
    """Draw samples.

    Every sample depends on its own seed only: the initial noise and that of each step are functions of
    (seed, step, element), so neither the batch a sample stands in nor the device changes them.

    Args:
        model: See :class:`Model`; it is called on the flattened batch.
        solver, guidance, dtype, x0_clamp, x0_norm, steps: See :class:`SamplingLoop`, which draws several batches of one
            size, on a GPU as one CUDA graph.
        seeds: int64 (\\*batch) on the device to sample on, e.g. (B, K) for K samples of each of B conditions.
            They are flattened in row-major order for the model.
        shape: Shape of one sample.
        initial: (\\*batch, \\*shape) to start from instead of unit normal noise.
        callback: Progress, trajectory, or a reason to stop.

    Returns:
        (\\*batch, \\*shape): the sample after the last row, or, stopped before it, the last x0 prediction.

    Raises:
        TypeError: ``seeds`` is not int64.
        ValueError: A shape, ``steps`` or an option is out of range.
    """
    if initial is not None and initial.shape != (*seeds.shape, *shape):
        raise ValueError(f"initial is {tuple(initial.shape)}; it must be {(*seeds.shape, *shape)}: seeds and shape")
    loop = SamplingLoop(
        model, solver, seeds.numel(), shape,
        device=seeds.device, guidance=guidance, dtype=dtype, x0_clamp=x0_clamp, x0_norm=x0_norm, steps=steps,
    )  # fmt: skip
    start = None if initial is None else initial.reshape(-1, *shape)
    return loop(seeds.reshape(-1), start, callback).reshape(*seeds.shape, *shape)
