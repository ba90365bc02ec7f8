"""A paper model of a whole training step of a bridge on 1 to 1,024 GPUs, both losses trained at once.

W GPUs with n rows each, P parameters. Products of the bridge and its calls are counted by running the step itself on a
CPU (:func:`count_step`); the contrastive ring is that of :mod:`benchmarks.ring_model`, whose rates and assumptions
apply here too, with the calls of its steps. A step takes

    bridge + ring + what the bridge's backward pass does not hide of the all-reduce + optimizer

==========  ==========================================================================================================
bridge      products outside of the contrastive loss / (COMPUTE_UTILISATION * bf16 peak), or CALL_SECONDS for every call
            if that is longer, as it is for a small bridge: without a CUDA graph the host starts every kernel
ring        ``ring_clip_loss`` of W n rows with ids, forward and backward, for every pair of modalities; of its W steps
            each takes the longest of compute, transfer and calls, and nothing else overlaps it
all-reduce  float32 gradients: 2 (W-1)/W 4P bytes sent by each GPU over all links of its node, and 2 log2(W) messages;
            ``DistributedDataParallel`` cuts it into buckets, which leave during the backward pass
optimizer   40 P bytes: AdamW reads 4 and writes 3 float32 a parameter, the moving average reads 2 and writes 1
==========  ==========================================================================================================

Weak scaling keeps the rows of a GPU, strong scaling those of all GPUs. Efficiency is rows per second and GPU as a share
of what one GPU makes. Under weak scaling the work itself grows: every row is compared with W n others. So "products" is
the share of the time that products take, the ring's included. The memory of activations is not modelled.

``python -m benchmarks.scaling_model [--json FILE]`` prints the tables, all of kind ``modelled``.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import diffgap
from benchmarks import ring_model
from benchmarks.gpus import GPUS, Gpu
from benchmarks.report import seconds, to_json, write
from benchmarks.ring_model import BYTES_UTILISATION, COMPUTE_UTILISATION, GPU_COUNTS, HOP_SECONDS, collective_rate
from benchmarks.runner import Result, Row
from diffgap.models.bridge import DiffGAP
from diffgap.models.settings import BridgeSettings

#: Widths of CLAP's embeddings.
MODALITIES = {"audio": 512, "text": 512}
#: All trained together, which is the most that one step does.
BRIDGES = {
    "recommended": BridgeSettings(heads_first=0.0),
    "large": BridgeSettings(
        heads_first=0.0, width=1024, tokens=16, denoiser_width=1024, depth=16, heads=16, mlp_ratio=4.0
    ),
}
ROWS_PER_GPU = 1024
ROWS_OF_ALL = 1 << 16
#: Assumed, not published: what a call of PyTorch takes on the host, of which the launch is 2.5 (benchmarks.model).
CALL_SECONDS = 5e-6
#: Of one step of the ring with ids, forward and backward; counted by tests/test_ring.py.
RING_CALLS = (108, 22)
OPTIMIZER_BYTES = 40
#: Of the products outside of the contrastive loss, those of the backward pass: two for every one of the forward pass.
BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True)
class Work:
    """What a step of a bridge is made of, whatever the number of GPUs.

    Attributes:
        operations: Multiplications and additions of products, a row, without the contrastive loss.
        calls: Kernels of a forward and backward pass.
        parameters: That get a gradient.
        width: Of the contrastive space.
        pairs: Of modalities.
    """

    operations: float
    calls: int
    parameters: int
    width: int
    pairs: int


@dataclass(frozen=True)
class Step:
    """Seconds of one step, and of its parts; ``exchange`` is what the backward pass does not hide.

    Attributes:
        products: Of which all products take, at COMPUTE_UTILISATION of the peak.
        floor: Of which all products take at the peak.
    """

    bridge: float
    ring: float
    exchange: float
    optimizer: float
    products: float
    floor: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.bridge + self.ring + self.exchange + self.optimizer


class Calls(TorchDispatchMode):
    """Counts the calls that start a kernel: all that make a tensor which is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@cache
def count_step(settings: BridgeSettings) -> Work:
    """Run a step of a bridge over :data:`MODALITIES` on a few rows, and count."""
    rows = 8
    bridge = DiffGAP(MODALITIES, settings).train()
    batch: dict[str, Any] = {"embeddings": {name: torch.randn(rows, dim) for name, dim in MODALITIES.items()}}
    batch["seeds"] = torch.arange(rows)
    products = FlopCounterMode(display=False)
    # The references are made of torch's products, which the counter knows; calls are counted as the kernels have them.
    with diffgap.backend("eager"), products:
        bridge(**batch)["loss"].backward()
    with Calls() as calls:
        bridge(**batch)["loss"].backward()
    pairs = math.comb(len(MODALITIES), 2)
    contrastive = pairs * 3 * 2 * rows * rows * settings.width  # one product, and two for its gradients
    parameters = sum(p.numel() for p in bridge.parameters() if p.requires_grad)
    operations = (products.get_total_flops() - contrastive) / rows
    return Work(operations, calls.count, parameters, settings.width, pairs)


def all_reduce_seconds(gpu: Gpu, gpus: int, parameters: int) -> float:
    """Of float32 gradients."""
    if gpus == 1:
        return 0.0
    sent = 2 * (gpus - 1) / gpus * 4 * parameters
    return sent / (BYTES_UTILISATION * collective_rate(gpu, gpus)) + 2 * math.log2(gpus) * HOP_SECONDS


def step(gpu: Gpu, gpus: int, work: Work, rows: float) -> Step:
    """One step with ``rows`` rows on each GPU."""
    operations = work.operations * rows
    bridge = max(operations / (COMPUTE_UTILISATION * gpu.bf16), work.calls * CALL_SECONDS)
    # One GPU has no ring: its loss is among the bridge's calls.
    forward, backward = (calls * CALL_SECONDS if gpus > 1 else 0.0 for calls in RING_CALLS)
    ring = ring_model.ours(gpu, gpus, work.width, round(rows * gpus), (forward, backward))
    exchange = all_reduce_seconds(gpu, gpus, work.parameters)
    operations += work.pairs * ring.operations
    return Step(
        bridge=bridge,
        ring=work.pairs * ring.seconds,
        exchange=max(0.0, exchange - BACKWARD_SHARE * bridge),
        optimizer=OPTIMIZER_BYTES * work.parameters / (BYTES_UTILISATION * gpu.hbm),
        products=operations / (COMPUTE_UTILISATION * gpu.bf16),
        floor=operations / gpu.bf16,
    )


def rows_on(scaling: str, gpus: int) -> float:
    """Rows on each GPU under ``weak`` or ``strong`` scaling."""
    return ROWS_PER_GPU if scaling == "weak" else ROWS_OF_ALL / gpus


def efficiency(gpu: Gpu, gpus: int, work: Work, scaling: str) -> float:
    """Rows per second and GPU, as a share of one GPU's."""
    alone, together = (rows_on(scaling, count) / step(gpu, count, work, rows_on(scaling, count)).seconds
                       for count in (1, gpus))  # fmt: skip
    return together / alone


def rows_of(gpu: Gpu, works: Mapping[str, Work]) -> list[Row]:
    """Rows of a benchmark; ``works`` by the bridge's name."""
    found = []
    for scaling in ("weak", "strong"):
        for name, work in works.items():
            for gpus in GPU_COUNTS:
                took = step(gpu, gpus, work, rows_on(scaling, gpus))
                case = f"training_step/{scaling}/{name}-{rows_on(scaling, gpus):.0f}@{gpus}/bf16"
                found.append(Row(case, "diffgap", took.seconds, 0.0, None, took.floor, 0, gpu.name, "modelled"))
    return found


def table(gpu: Gpu, name: str, work: Work, scaling: str) -> list[str]:
    """Time, its parts and the efficiency of one bridge by the number of GPUs."""
    kept = f"{ROWS_PER_GPU:,} rows a GPU" if scaling == "weak" else f"{ROWS_OF_ALL:,} rows in all"
    lines = [
        f"### {name} bridge, {scaling} scaling, {kept}, on {gpu.name} (modelled)",
        "",
        "| GPUs | rows a GPU | step | bridge | ring | all-reduce, not hidden | optimizer | products | efficiency |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for gpus in GPU_COUNTS:
        rows = rows_on(scaling, gpus)
        took = step(gpu, gpus, work, rows)
        parts = (took.seconds, took.bridge, took.ring, took.exchange, took.optimizer)
        shares = took.products / took.seconds, efficiency(gpu, gpus, work, scaling)
        cells = [str(gpus), f"{rows:,.0f}", *map(seconds, parts), *(f"{share:.0%}" for share in shares)]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def to_markdown(header: Mapping[str, Any]) -> str:
    """What was counted, which the header has, then every table."""
    works = {name: Work(**counts) for name, counts in header["counted"].items()}
    lines = [
        f"# Modelled: a training step across GPUs, {header['date']}",
        "",
        f"`{header['command']}`",
        "",
        f"No GPU has run any of this. Published peaks times {COMPUTE_UTILISATION} (products) and {BYTES_UTILISATION} "
        f"(memory, links), {HOP_SECONDS * 1e6:.0f} µs a message, {CALL_SECONDS * 1e6:.0f} µs a call; "
        f"{ring_model.GPUS_PER_NODE} GPUs a node. Formulas and sources: `benchmarks/scaling_model.py`.",
        "",
        "| bridge | parameters | Gflop a row | calls a step |",
        "|---|---:|---:|---:|",
    ]
    for name, work in works.items():
        lines.append(f"| {name} | {work.parameters:,} | {work.operations / 1e9:.3f} | {work.calls:,} |")
    lines.append("")
    for gpu in GPUS:
        lines += [f"## {gpu.name}", ""]
        for name, work in works.items():
            for scaling in ("weak", "strong"):
                lines += table(gpu, name, work, scaling)
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Print the tables, and write them with ``--json``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling_model", description="Modelled training steps.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write FILE, and .md beside it")
    path = parser.parse_args(argv).json
    if path is not None and path.suffix != ".json":
        parser.error(f"--json: expected a name that ends in .json, got {path.name}")
    works = {name: count_step(settings) for name, settings in BRIDGES.items()}
    header = {
        "date": date.today().isoformat(),
        "command": "python -m benchmarks.scaling_model",
        "kind": "modelled",
        "counted": {name: asdict(work) for name, work in works.items()},
    }
    document = to_markdown(header)
    print(document)
    if path is not None:
        rows = Result([row for gpu in GPUS for row in rows_of(gpu, works)])
        for target in write(path, to_json(header, rows), document):
            print(f"wrote {target}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
