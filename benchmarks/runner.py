"""Measures a case: check, then memory, then time."""

from __future__ import annotations

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


@dataclass
class Result:
    """What came of a run.

    Attributes:
        rows: The measurements.
        failures: One line for each implementation that raised or was wrong; it has no row.
        missing: The command that installs each peer that is not there, by the peer's name.
    """

    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def extend(self, other: Result) -> None:
        self.rows += other.rows
        self.failures += other.failures
        self.missing |= other.missing


def run_case(case: Case, device: torch.device, clock: Clock, budget: Budget) -> Result:
    """Time every implementation of ``case`` whose outputs match the oracle; nothing if ours do not."""
    result = Result(missing={p.name: f"pip install {p.install}" for p in case.peers if p.missing})
    torch.compiler.reset()
    inputs = case.inputs(device)
    passed = _check(case, inputs, result)
    if "diffgap" not in passed:
        return result
    peaks = {name: peak_bytes(run, device) for name, run in passed.items()}
    probes = _probes(case, inputs, passed["diffgap"], device)
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


def _check(case: Case, inputs: Inputs, result: Result) -> dict[str, Run]:
    """The implementations whose outputs are right; the others go into ``result.failures``."""
    peers = {peer.name: peer for peer in case.peers}
    expected = cases.oracle(case, inputs)
    passed: dict[str, Run] = {}
    eager: Outputs | None = None
    runs = cases.implementations(case, inputs)
    for name in sorted(runs, key=lambda name: name != "eager"):
        try:
            own = cases.peer_oracle(case, peers[name], inputs) if name in peers else None
            outputs = runs[name]()
            under_contract = name in ("diffgap", "compile")
            reason = mismatch(outputs, own or expected, eager if under_contract else None)
        except Exception as error:  # any failure of one implementation leaves the others to be measured
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            eager = outputs if name == "eager" else eager
        if reason is None:
            passed[name] = runs[name]
        else:
            result.failures.append(f"{case.name} {name}: {reason}")
    return {name: passed[name] for name in runs if name in passed}


def _probes(case: Case, inputs: Inputs, run: Run, device: torch.device) -> list[floors.Probe]:
    traffic = floors.traffic_bytes(cases.tensors(inputs), run(), case.dtype)
    probes = [floors.copy_probe(traffic, device)]
    if case.flops:
        probes.append(floors.gemm_probe(case.flops, case.dtype, device))
    return probes
