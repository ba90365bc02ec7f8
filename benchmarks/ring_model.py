"""A paper model of the CLIP loss of 1,048,576 pairs on 1 to 1,024 GPUs, beside open_clip's and Inf-CL's.

W GPUs with n = N / W pairs each, width D, bfloat16. A unit is one n x N x D product, 2 n N D operations.

==========================================  ==========================  ==========================  ===================
per GPU                                     diffgap                     open_clip                   Inf-CL
==========================================  ==========================  ==========================  ===================
units, forward + backward                   1 + 3, bfloat16             2 + 4, bfloat16             2 + 8, TF32
bytes sent, forward                         (W-1) 2nD + W 16n           (W-1) 4nD                   (W-1) 4nD
bytes sent, backward                        (W-1) (2D+16)n + W 4nD      (W-1) 4nD                   (W-1) 4nD + W 8nD
bytes of logits in HBM                                                  36 nN
peak of extra memory                        24nD + 64n                  8nN + 8ND                   20nD
==========================================  ==========================  ==========================  ===================

- diffgap, ``ring_clip_loss``: b and, homeward, the state of its columns (16 bytes) in the forward pass; b, its columns'
  log-sum-exp and factors (16 bytes) and, homeward, its float32 gradient in the backward pass. At the peak b twice in
  bfloat16, its gradient three times and a's twice in float32. Scratch of a tile's kernel not counted.
- open_clip, ``local_loss`` and ``gather_with_grad``: features of both sides gathered, their gradients reduce-scattered.
  Per logit and direction: written, log-softmax read and written, gradient of the likelihood written, three accesses for
  that of log-softmax, two reads by products, 9 in all; logits and log-probabilities of both directions at the peak,
  with the gathered features and their gradients.
- Inf-CL (arXiv 2410.17243; repository DAMO-NLP-SG/Inf-CLIP at d9f2833, inf_cl/ring.py): a ring per direction.

Time. A ring's step takes ``max(operations / rate, hop)``, ``hop = HOP_SECONDS + bytes / link``: compute and transfer
overlap. diffgap's blocks go round a node before all change to the next, over all links at once: W / 8 hops leave a node
(:mod:`diffgap.ring`). Inf-CL's ring leaves it at one rank, at every step. open_clip's kernels and collectives follow
one another: ``operations / rate + HBM bytes / rate + bytes sent / link``, its collectives over all links of a node and
without latency. Kernels run at COMPUTE_UTILISATION of the published peak, memory and links at BYTES_UTILISATION. What
the host needs for its calls is left out for all; for blocks of a few thousand rows it decides, and
:mod:`benchmarks.scaling_model` counts it.

``python -m benchmarks.ring_model [--json FILE]`` prints the tables, all of kind ``modelled``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.gpus import GPUS, Gpu
from benchmarks.report import seconds, section, to_json, write
from benchmarks.runner import Result, Row, Skipped

GLOBAL_BATCH = 1 << 20
WIDTHS = (512, 768, 1024)
GPU_COUNTS = (1, 8, 32, 128, 512, 1024)
GPUS_PER_NODE = 8
#: Assumed, not published: what products reach of the peak, what copies reach of theirs, and a message's latency.
COMPUTE_UTILISATION = 0.6
BYTES_UTILISATION = 0.8
HOP_SECONDS = 10e-6


def collective_rate(gpu: Gpu, gpus: int) -> float:
    """Bytes per second a GPU receives in a collective, which uses all ports of a node."""
    return gpu.nvlink if gpus <= GPUS_PER_NODE else min(gpu.nvlink, GPUS_PER_NODE * gpu.infiniband)


@dataclass(frozen=True)
class Estimate:
    """One implementation, per GPU.

    Attributes:
        impl: Its name.
        operations: Multiplications and additions of the products.
        link_bytes: Bytes sent to other GPUs.
        hbm_bytes: Bytes of logits written and read.
        peak_bytes: Peak of extra memory.
        seconds: Forward and backward pass.
        bound: What most of that time goes to: ``compute``, ``link`` or ``hbm``.
    """

    impl: str
    operations: float
    link_bytes: float
    hbm_bytes: float
    peak_bytes: float
    seconds: float
    bound: str


@dataclass(frozen=True)
class Pass:
    """One way round a ring: per step operations and their peak rate, bytes of a hop, and seconds of calls."""

    operations: float
    rate: float
    hop_bytes: float
    call_seconds: float = 0.0

    def times(self, gpu: Gpu, gpus: int, leaving: int) -> tuple[float, float, float]:
        """Seconds in all, and those of compute and of transfers alone; ``leaving`` of the hops leave the node."""
        compute = max(self.operations / (COMPUTE_UTILISATION * self.rate), self.call_seconds)
        if gpus == 1:
            return compute, compute, 0.0
        near, far = (HOP_SECONDS + self.hop_bytes / (BYTES_UTILISATION * link) for link in (gpu.nvlink, gpu.infiniband))
        staying = gpus - leaving
        total = staying * max(compute, near) + leaving * max(compute, far)
        return total, gpus * compute, staying * near + leaving * far


def ours(
    gpu: Gpu, gpus: int, width: int, batch: int = GLOBAL_BATCH, call_seconds: tuple[float, float] = (0.0, 0.0)
) -> Estimate:
    """``diffgap.ring_clip_loss``; ``call_seconds`` of a step of the forward and of the backward pass, if counted."""
    rows = batch / gpus
    side, tile = rows * width, 2 * rows * rows * width
    sent = (gpus - 1) * (2 * side + 2 * side + 16 * rows) + gpus * (16 * rows + 4 * side)
    passes = (
        Pass(tile, gpu.bf16, 2 * side + 16 * rows, call_seconds[0]),
        Pass(3 * tile, gpu.bf16, 6 * side + 16 * rows, call_seconds[1]),
    )
    leaving = 0 if gpus <= GPUS_PER_NODE else gpus // GPUS_PER_NODE
    return _ring("diffgap", gpu, gpus, leaving, passes, sent, 24 * side + 64 * rows)


def inf_cl(gpu: Gpu, gpus: int, width: int, batch: int = GLOBAL_BATCH) -> Estimate:
    """Inf-CL's ring, once per direction."""
    rows = batch / gpus
    side, tile = rows * width, 2 * rows * rows * width
    sent = (gpus - 1) * (4 * side + 4 * side) + gpus * 8 * side
    passes = (Pass(tile, gpu.tf32, 2 * side), Pass(4 * tile, gpu.tf32, 6 * side)) * 2
    leaving = 0 if gpus <= GPUS_PER_NODE else gpus
    return _ring("inf_cl", gpu, gpus, leaving, passes, sent, 20 * side)


def _ring(impl: str, gpu: Gpu, gpus: int, leaving: int, passes: Sequence[Pass], sent: float, peak: float) -> Estimate:
    total, compute, link = (sum(x) for x in zip(*(p.times(gpu, gpus, leaving) for p in passes), strict=True))
    operations = gpus * sum(p.operations for p in passes)
    sent = sent if gpus > 1 else 0.0
    return Estimate(impl, operations, sent, 0.0, peak, total, "compute" if compute >= link else "link")


def open_clip(gpu: Gpu, gpus: int, width: int, batch: int = GLOBAL_BATCH) -> Estimate:
    """``open_clip.ClipLoss(local_loss=True, gather_with_grad=True)``."""
    rows = batch / gpus
    operations, sent, logits = 6 * 2 * rows * batch * width, (gpus - 1) * 8 * rows * width, 36 * rows * batch
    parts = {
        "compute": operations / (COMPUTE_UTILISATION * gpu.bf16),
        "hbm": logits / (BYTES_UTILISATION * gpu.hbm),
        "link": sent / (BYTES_UTILISATION * collective_rate(gpu, gpus)),
    }
    gathered = 8 * batch * width if gpus > 1 else 0
    peak = 8 * rows * batch + gathered
    return Estimate(
        "open_clip", operations, sent, logits, peak, sum(parts.values()), max(parts, key=lambda part: parts[part])
    )


def estimates(gpu: Gpu, gpus: int, width: int) -> list[Estimate]:
    """Ours and the peers."""
    return [model(gpu, gpus, width) for model in (ours, open_clip, inf_cl)]


def case_name(gpus: int, width: int) -> str:
    """``op/pass/shape/dtype`` of a row, the shape that of the global batch on so many GPUs."""
    return f"ring_clip_loss/fwd+bwd/{GLOBAL_BATCH}x{width}@{gpus}/bf16"


def rows_of(gpu: Gpu) -> tuple[list[Row], list[Skipped]]:
    """What fits in a GPU's memory as rows of a benchmark, and what does not."""
    rows, skipped = [], []
    for width in WIDTHS:
        for gpus in GPU_COUNTS:
            case = case_name(gpus, width)
            floor = 4 * 2 * GLOBAL_BATCH**2 / gpus * width / gpu.bf16
            for found in estimates(gpu, gpus, width):
                if found.peak_bytes > gpu.memory:
                    reason = f"{found.peak_bytes / 1e9:,.0f} GB do not fit in {gpu.memory / 1e9:.0f} GB"
                    skipped.append(Skipped(case, found.impl, reason))
                    continue
                peak = round(found.peak_bytes)
                rows.append(Row(case, found.impl, found.seconds, 0.0, peak, floor, 0, gpu.name, "modelled"))
    return rows, skipped


def details_table(gpu: Gpu, width: int) -> list[str]:
    """Operations, bytes and bound of every implementation."""
    lines = [
        f"Per GPU at D = {width} on {gpu.name}: products, sent to other GPUs, logits through HBM, and the bound.",
        "",
        "| GPUs | impl | Tflop | sent, GB | logits, GB | peak, GB | time | bound |",
        "|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    for gpus in GPU_COUNTS:
        for found in estimates(gpu, gpus, width):
            numbers = (found.operations / 1e12, found.link_bytes / 1e9, found.hbm_bytes / 1e9, found.peak_bytes / 1e9)
            time = seconds(found.seconds) if found.peak_bytes <= gpu.memory else "does not fit"
            cells = [str(gpus), found.impl, *(f"{number:,.2f}" for number in numbers), time, found.bound]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def to_markdown(header: Mapping[str, Any]) -> str:
    """Times and memory beside one another, then what they were computed from."""
    lines = [
        f"# Modelled: the CLIP loss of {GLOBAL_BATCH:,} pairs across GPUs, {header['date']}",
        "",
        f"`{header['command']}`",
        "",
        f"No GPU has run any of this. Published peaks times {COMPUTE_UTILISATION} (products) and {BYTES_UTILISATION} "
        f"(memory, links), {HOP_SECONDS * 1e6:.0f} µs a message; {GPUS_PER_NODE} GPUs a node. Formulas and sources: "
        "`benchmarks/ring_model.py`. The floor is four products at the published peak. `1048576x512@64`: D = 512 on "
        "64 GPUs.",
        "",
    ]
    for gpu in GPUS:
        rows, skipped = rows_of(gpu)
        lines += section(f"ring_clip_loss on {gpu.name} (modelled)", rows, skipped)
        for width in WIDTHS:
            lines += details_table(gpu, width)
    return "\n".join(lines)


def result() -> Result:
    """The rows of :func:`rows_of` for every GPU."""
    merged = Result()
    for gpu in GPUS:
        rows, skipped = rows_of(gpu)
        merged.extend(Result(rows, skipped=skipped))
    return merged


def main(argv: Sequence[str]) -> int:
    """Print the tables, and write them with ``--json``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ring_model", description="Modelled cost across GPUs.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write FILE, and .md beside it")
    path = parser.parse_args(argv).json
    if path is not None and path.suffix != ".json":
        parser.error(f"--json: expected a name that ends in .json, got {path.name}")
    header = {"date": date.today().isoformat(), "command": "python -m benchmarks.ring_model", "kind": "modelled"}
    document = to_markdown(header)
    print(document)
    if path is not None:
        for target in write(path, to_json(header, result()), document):
            print(f"wrote {target}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
