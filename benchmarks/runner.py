"""Measures a case: check, then memory, then time."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from benchmarks import cases, floors
from benchmarks.cases import Case, Inputs, Outputs, Run
from benchmarks.check import mismatch
from benchmarks.memory import peak_bytes
from benchmarks.timing import Budget, Clock, Timing, time_interleaved

OURS = "diffgap"
Kind = Literal["measured", "modelled"]


@dataclass(frozen=True)
class Row:
    """One implementation of one case; the fields are the keys of a JSON row.

    Attributes:
        case: ``op/pass/shape/dtype``.
        impl: ``diffgap``, ``eager``, ``compile`` or a peer.
        median_s: Median seconds per call.
        iqr_s: Interquartile range of the samples, seconds per call.
        peak_bytes: Peak extra memory of one call, results included; ``None`` where it cannot be measured.
        floor_s: Seconds the machine needs at least, from the probes timed in the same rounds.
        threads: CPU threads.
        device: ``cpu`` or ``cuda`` for a measured row, the name of the GPU for a modelled one.
        kind: ``measured``, or ``modelled`` for times computed for hardware that is not here.
    """

    case: str
    impl: str
    median_s: float
    iqr_s: float
    peak_bytes: int | None
    floor_s: float
    threads: int
    device: str
    kind: Kind = "measured"


@dataclass(frozen=True)
class Skipped:
    """An implementation that cannot sensibly run a case, and why."""

    case: str
    impl: str
    reason: str


@dataclass
class Result:
    """What came of a run.

    Attributes:
        rows: The measurements.
        failures: One line for each implementation that raised or was wrong; it has no row.
        missing: The command that installs each peer that is not there, by the peer's name.
        skipped: The implementations that were not run on purpose.
    """

    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)

    def extend(self, other: Result) -> None:
        self.rows += other.rows
        self.failures += other.failures
        self.missing |= other.missing
        self.skipped += other.skipped


def run_case(case: Case, device: torch.device, clock: Clock, budget: Budget) -> Result:
    """Time every implementation of ``case`` whose outputs match the oracle; nothing if ours do not."""
    case = case.on(device)
    result = Result(missing={p.name: f"pip install {p.install}" for p in case.peers if p.missing})
    result.skipped += [Skipped(case.name, name, reason) for name, reason in case.infeasible(device).items()]
    torch.compiler.reset()
    inputs = case.inputs(device)
    passed, traffic = _check(case, inputs, device, result)
    if OURS not in passed:
        return result
    peaks = {name: peak_bytes(run, device) for name, run in passed.items()}
    probes = [floors.copy_probe(traffic, device)]
    if case.flops:
        probes.append(floors.gemm_probe(case.flops, case.dtype, device))
    timed: dict[tuple[str, str], Callable[[], object]] = {("impl", name): run for name, run in passed.items()}
    timed |= {("probe", probe.name): probe.call for probe in probes}
    timings: dict[tuple[str, str], Timing] = time_interleaved(timed, clock, budget)
    floor = max(probe.units * timings["probe", probe.name].median_s for probe in probes)
    for name in passed:
        timing = timings["impl", name]
        result.rows.append(
            Row(
                case=case.name,
                impl=name,
                median_s=timing.median_s,
                iqr_s=timing.iqr_s,
                peak_bytes=peaks[name],
                floor_s=floor,
                threads=torch.get_num_threads(),
                device=device.type,
            )
        )
    gc.collect()
    return result


def in_one_line(error: Exception) -> str:
    """What a failure says of it."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _check(case: Case, inputs: Inputs, device: torch.device, result: Result) -> tuple[dict[str, Run], int]:
    """The implementations whose outputs are right, and the bytes ours must read and write.

    The others go into ``result.failures``.
    """
    peers = {peer.name: peer for peer in case.peers}
    expected = cases.oracle(case, inputs) if case.gate is None else ()
    # Peers share a gate, and what it takes to build one can take seconds.
    gate_of = functools.cache(lambda build: build(**inputs))
    runs = cases.implementations(case, inputs, without=case.infeasible(device))
    passed: dict[str, Run] = {}
    traffic = 0
    # Where eager code cannot run, rounding the oracle is what a low-precision result is held against.
    eager: Outputs = expected
    for name in sorted(runs, key=lambda name: name != "eager"):
        peer = peers.get(name)
        try:
            own = None if peer is None else cases.peer_oracle(case, peer, inputs)
            outputs = runs[name]()
            gate = (peer and peer.gate) or case.gate
            if gate is not None:
                reason = gate_of(gate)(outputs)
            else:
                contract = eager if name in (OURS, "compile") else None
                reason = mismatch(outputs, own or expected, contract, case.dtype)
        except Exception as error:  # any failure of one implementation leaves the others to be measured
            reason = in_one_line(error)
        else:
            eager = outputs if name == "eager" else eager
            traffic = floors.traffic_bytes(cases.tensors(inputs), outputs, case.dtype) if name == OURS else traffic
        if reason is None:
            passed[name] = runs[name]
        else:
            result.failures.append(f"{case.name} {name}: {reason}")
    return {name: passed[name] for name in runs if name in passed}, traffic
