"""A roofline model of ``clip_loss`` forward and backward on a named GPU, beside open_clip's and Inf-CL's.

    time = sum over kernels of max over pipes (work / published rate)

The pipes are the tensor cores, the special function unit (exponentials), FP32, INT (comparisons too), load/store, L2,
HBM and launches. All rates are peaks, so every time is a lower bound, by the same rules for all:

- Matrix products are counted in units of ``2 N M D``: ours 4 (one for both log-sum-exps, one to recompute, two
  gradients), open_clip 6 (two for either direction's logits, two gradients each), Inf-CL 10 (per direction one for the
  log-sum-exp and two for either gradient).
- Our other instructions are counted in the SASS of the kernels compiled for the GPU: those in the product loop, which
  stand beside its tensor instructions, and once a tile all others, branches that most tiles do not take included. The
  peers' arithmetic is counted in their formulas, and their shared memory is left out.
- A tile of ``m x n`` logits reads ``(m + n) D`` elements through L2. HBM is charged once for what fits in L2 while it
  is in use, else for every pass. The gradient rows that Inf-CL loads, adds to and stores for every 64 x 64 tile fit.

``python -m benchmarks.model [--chip CHIP ...] [--json FILE]`` prints the tables, all of kind ``modelled``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from typing import Any, Literal

import torch
from diffgap.kernels import clip_loss
from diffgap.kernels._tiles import WORKSPACE_BYTES
from diffgap.kernels.configs import CONFIGS, Tile

from benchmarks.aot import compile_launches
from benchmarks.gpus import Gpu
from benchmarks.model_options import parse
from benchmarks.report import seconds, section, to_json, write
from benchmarks.runner import Result, Row, Skipped
from benchmarks.sass import LoopCounts, loop_counts, rest_counts, sass

#: Whose tensor instructions are counted here: those of a warp or of a warp group.
CHIPS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
BATCHES = (32768, 131072)
WIDTHS = (512, 768, 1024)
LANES = 32
#: Of the 128-byte path to L1 and shared memory. In the product loop all are taken to move 16 bytes a lane, as the
#: operands do, elsewhere 4.
LOOP_CLOCKS, REST_CLOCKS = 4, 1
#: "2.5 us + ~1 ns per node" from the CPU: NVIDIA's blog, "Constant Time Launch for Straight-Line CUDA Graphs".
LAUNCH_SECONDS = 2.5e-6
#: The tile of cuBLAS's large products.
BLAS_TILE = (128, 256)
#: Inf-CL's, inf_cl 1.2.1, flash.py; one program of eight warps holds a multiprocessor's shared memory.
INF_CL_BLOCK = 64


def multiply_adds(gpu: Gpu, tile: Tile) -> int:
    """Of one tensor instruction of one warp in bfloat16: HMMA.16816, or a quarter of HGMMA.64xNx16."""
    return 64 * tile.block_n * 16 // 4 if gpu.chip == "sm_90" else 16 * 8 * 16


@dataclass(frozen=True)
class Kernel:
    """What all launches of one kernel do in all: flops, lane operations, clocks of the load/store path, and bytes."""

    name: str
    flops: float = 0.0
    precision: Literal["bf16", "tf32", "fp32"] = "bf16"
    special: float = 0.0
    fp32: float = 0.0
    integer: float = 0.0
    load_store_clocks: float = 0.0
    l2: float = 0.0
    hbm: float = 0.0
    launches: float = 1.0

    def pipes(self, gpu: Gpu) -> dict[str, float]:
        """Seconds that each pipe alone needs."""
        clocks = gpu.multiprocessors * gpu.clock
        return {
            "tensor": self.flops / {"bf16": gpu.bf16, "tf32": gpu.tf32, "fp32": gpu.matrix_fp32}[self.precision]
            if self.flops
            else 0.0,
            "special": self.special / (gpu.special * clocks),
            "fp32": self.fp32 / (gpu.fp32 * clocks),
            "integer": self.integer / (gpu.integer * clocks),
            "load/store": self.load_store_clocks / clocks,
            "l2": self.l2 / (gpu.l2_bytes_per_clock * gpu.clock),
            "hbm": self.hbm / gpu.hbm,
            "launch": self.launches * LAUNCH_SECONDS,
        }

    def seconds(self, gpu: Gpu) -> float:
        """The slowest pipe."""
        return max(self.pipes(gpu).values())


@dataclass(frozen=True)
class Counts:
    """Instructions of one warp: in one pass of the product loop, and once a tile."""

    loop: LoopCounts
    rest: LoopCounts


@dataclass(frozen=True)
class Implementation:
    """The kernels of one call, and the peak of extra memory."""

    name: str
    kernels: tuple[Kernel, ...]
    peak_bytes: int

    def seconds(self, gpu: Gpu) -> float:
        """Kernels follow one another."""
        return sum(kernel.seconds(gpu) for kernel in self.kernels)


def ours(gpu: Gpu, rows: int, width: int, counts: Mapping[str, Counts]) -> Implementation:
    """diffgap's Triton kernels; ``counts`` of ``_forward_kernel`` and ``_gradient_kernel``."""
    tile = CONFIGS[gpu.chip].contrastive["half"]
    logits, side = float(rows) ** 2, rows * width  # side: elements of a, and of b
    unit = 2 * logits * width
    gradient_tile = tile.for_gradient()
    column_groups = int((gpu.multiprocessors * tile.programs) ** 0.5)
    passes = 1.0 if 4 * side <= gpu.l2_bytes else rows / (column_groups * tile.block_n)
    macro = int((WORKSPACE_BYTES / 2) ** 0.5) // gradient_tile.block_n * gradient_tile.block_n
    per_side = max(1.0, rows / macro)  # macro tiles along a side, the last one in part

    def through_l2(tile: Tile) -> float:
        return logits * width * 2 * (1 / tile.block_m + 1 / tile.block_n)

    forward = Kernel(
        "forward", unit, l2=through_l2(tile) + 16 * logits / tile.block_n, hbm=2 * side * (passes + 1), launches=3
    )
    gradient = Kernel(
        "gradient of the logits",
        unit,
        l2=through_l2(gradient_tile) + 2 * logits,
        hbm=2 * logits + 4 * side * per_side,
        launches=per_side**2,
    )
    # Either reads G and a macro tile's embeddings, and adds to float32 gradients.
    products = Kernel(
        "products",
        2 * unit,
        l2=2 * _blas_l2(rows, width),
        hbm=2 * (2 * logits + (2 + 8) * side * per_side),
        launches=2 * per_side**2,
    )
    # Zeros, scaling and rounding of both float32 gradients.
    elementwise = Kernel("elementwise", hbm=2 * side * (4 + 8 + 6), launches=6)
    counted = (
        _with_instructions(forward, counts["_forward_kernel"], gpu, tile, rows, width),
        _with_instructions(gradient, counts["_gradient_kernel"], gpu, gradient_tile, rows, width),
    )
    # A macro tile of G, and the gradients in float32 and then in bfloat16.
    return Implementation("diffgap", (*counted, products, elementwise), 2 * min(macro, rows) ** 2 + (4 + 2) * 2 * side)


def open_clip(gpu: Gpu, rows: int, width: int) -> Implementation:
    """``open_clip.ClipLoss`` on bfloat16 features: per direction logits, log-softmax and their gradients in memory."""
    logits, side = float(rows) ** 2, rows * width
    unit, stored = 2 * logits * width, 2 * logits
    product = Kernel("product", 2 * unit, l2=2 * _blas_l2(rows, width), hbm=2 * (stored + 4 * side), launches=2)
    softmax = Kernel("log-softmax", special=2 * logits, fp32=8 * logits, integer=2 * logits, hbm=4 * stored, launches=2)
    negative = Kernel("gradient of the likelihood", hbm=2 * stored, launches=4)
    gradient = Kernel("gradient of log-softmax", special=2 * logits, fp32=6 * logits, hbm=6 * stored, launches=2)
    products = Kernel(
        "gradient products", 4 * unit, l2=4 * _blas_l2(rows, width), hbm=4 * (stored + 4 * side), launches=4
    )
    features = Kernel("features", hbm=20 * side, launches=8)
    # Both directions' logits and log-probabilities; in the backward pass as much again in gradients.
    kernels = (product, softmax, negative, gradient, products, features)
    return Implementation("open_clip", kernels, int(4 * stored))


def inf_cl(gpu: Gpu, rows: int, width: int) -> Implementation:
    """``inf_cl.cal_inf_loss`` both ways: float32 inputs, TF32 products, gradient rows updated for every tile."""
    logits, side = float(rows) ** 2, rows * width
    unit = 2 * logits * width
    read = 4 * logits * width / INF_CL_BLOCK  # one operand for every tile, float32
    waves = max(1.0, rows / INF_CL_BLOCK / gpu.multiprocessors)
    streamed = 4 * side * (1 + (1.0 if 8 * side <= gpu.l2_bytes else waves))
    in_use = 4 * INF_CL_BLOCK * width * gpu.multiprocessors
    updates = 8 * side if in_use <= gpu.l2_bytes else 2 * read
    updated = width / INF_CL_BLOCK  # elements of a gradient row per logit
    forward = Kernel(
        "log-sum-exp, both directions",
        2 * unit,
        "tf32",
        special=2 * logits,
        fp32=6 * logits,
        integer=4 * logits,
        l2=2 * 2 * read,
        hbm=2 * streamed,
        launches=2,
    )
    backward = Kernel(
        "both gradients, both directions",
        8 * unit,
        "tf32",
        special=4 * logits,
        fp32=4 * (3 + updated) * logits,
        integer=4 * (2 + updated) * logits,
        l2=4 * (3 + 2) * read,
        hbm=4 * (streamed + updates),
        launches=4,
    )
    features = Kernel("features", hbm=2 * 40 * side, launches=24)
    # Per direction both inputs in float32 and its two gradients, then those in bfloat16.
    return Implementation("inf_cl", (forward, backward, features), 2 * 2 * 8 * side + 4 * side)


def _blas_l2(rows: int, width: int) -> float:
    """Bytes a bfloat16 product of one unit reads through L2."""
    return 2.0 * rows * rows * width * sum(1 / size for size in BLAS_TILE)


def _with_instructions(kernel: Kernel, counts: Counts, gpu: Gpu, tile: Tile, rows: int, width: int) -> Kernel:
    """``kernel`` with all instructions but the tensor ones, for one unit of products."""
    loop, rest = counts.loop, counts.rest
    passes = float(rows) ** 2 * width / (loop.tensor * multiply_adds(gpu, tile))  # of all warps
    tiles = float(rows) ** 2 / (tile.block_m * tile.block_n) * tile.num_warps
    return replace(
        kernel,
        special=LANES * (passes * loop.mufu + tiles * rest.mufu),
        fp32=LANES * (passes * loop.fp32 + tiles * rest.fp32),
        integer=LANES * (passes * loop.integer + tiles * rest.integer),
        load_store_clocks=passes * loop.load_store * LOOP_CLOCKS + tiles * rest.load_store * REST_CLOCKS,
    )


def compiled_counts(gpu: Gpu, width: int = 512) -> dict[str, Counts]:
    """The instructions of our two kernels, compiled for ``gpu``."""
    tile = CONFIGS[gpu.chip].contrastive["half"]
    n = 2 * tile.block_m
    a, b = torch.zeros(2, n, width, dtype=torch.bfloat16)
    scale, lse, factor = torch.zeros(()), torch.zeros(n, 2), torch.zeros(n)

    def launch() -> None:
        clip_loss.forward(a, b, scale, None, None, None, None, False, 0, None, False, tile=tile)
        factors = (factor,) * 4
        clip_loss.backward(a, b, scale, None, None, lse, lse, *factors, torch.zeros(0, 0), 0, None, tile=tile)

    kernels = compile_launches(gpu.chip, launch)
    texts = {name: sass(kernels[name]) for name in ("_forward_kernel", "_gradient_kernel")}
    return {name: Counts(loop_counts(text), rest_counts(text)) for name, text in texts.items()}


def floor_seconds(gpu: Gpu, rows: int, width: int) -> float:
    """Four products at the tensor cores' peak, or inputs and gradients once through HBM."""
    return max(4 * 2.0 * rows * rows * width / gpu.bf16, 4 * 2.0 * rows * width / gpu.hbm)


def implementations(gpu: Gpu, rows: int, width: int, counts: Mapping[str, Counts]) -> Iterator[Implementation]:
    """Ours and the peers."""
    yield ours(gpu, rows, width, counts)
    yield open_clip(gpu, rows, width)
    yield inf_cl(gpu, rows, width)


@dataclass
class Modelled:
    """Of one GPU: the rows, and by case what they were computed from."""

    result: Result = field(default_factory=Result)
    details: dict[str, list[Implementation]] = field(default_factory=dict)


def model(gpu: Gpu, counts: Mapping[str, Counts]) -> Modelled:
    """Every case on one GPU."""
    modelled = Modelled()
    for rows in BATCHES:
        for width in WIDTHS:
            case = f"clip_loss/fwd+bwd/{rows}x{width}/bf16"
            floor = floor_seconds(gpu, rows, width)
            for entry in implementations(gpu, rows, width, counts):
                if entry.peak_bytes > gpu.memory:
                    reason = f"{entry.peak_bytes / 1e9:.0f} GB do not fit in {gpu.memory / 1e9:.0f} GB"
                    modelled.result.skipped.append(Skipped(case, entry.name, reason))
                    continue
                time, peak = entry.seconds(gpu), entry.peak_bytes
                row = Row(case, entry.name, time, 0.0, peak, floor, threads=0, device=gpu.name, kind="modelled")
                modelled.result.rows.append(row)
                modelled.details.setdefault(case, []).append(entry)
    return modelled


def to_markdown(header: Mapping[str, Any], modelled: Mapping[Gpu, Modelled]) -> str:
    """Times beside one another, then what each pipe alone would need."""
    lines = [
        f"# Modelled times, {header['date']}",
        "",
        f"`{header['command']}`; triton {header['versions']['triton']}",
        "",
        "No GPU has run any of this. Each time is a lower bound, from published peak rates: the sum over kernels of "
        "their slowest pipe. The floor is four matrix products at the tensor cores' peak.",
        "",
    ]
    for gpu, of_gpu in modelled.items():
        lines += section(f"clip_loss on {gpu.name} (modelled)", of_gpu.result.rows, of_gpu.result.skipped)
        lines += _pipes_table(of_gpu.details, gpu)
    return "\n".join(lines)


def _pipes_table(details: Mapping[str, list[Implementation]], gpu: Gpu) -> list[str]:
    names = list(Kernel("").pipes(gpu))
    lines = ["What each pipe alone would need; the time takes the slowest of each kernel:", ""]
    lines += ["| case | impl | " + " | ".join(names) + " | time |", "|---|---|" + "---:|" * (len(names) + 1)]
    for case, entries in details.items():
        for entry in entries:
            sums = [sum(kernel.pipes(gpu)[name] for kernel in entry.kernels) for name in names]
            cells = [case.partition("/")[2], entry.name, *(seconds(value) if value else "" for value in sums)]
            lines.append("| " + " | ".join([*cells, seconds(entry.seconds(gpu))]) + " |")
    return [*lines, ""]


def main(argv: Sequence[str]) -> int:
    """Print the tables, and write them with ``--json``."""
    gpus, path, command = parse("benchmarks.model", argv, CHIPS)
    import triton

    counts = {gpu: compiled_counts(gpu) for gpu in gpus}
    modelled = {gpu: model(gpu, counts[gpu]) for gpu in gpus}
    header = {
        "date": date.today().isoformat(),
        "command": command,
        "versions": {"triton": triton.__version__, "torch": torch.__version__},
        "gpus": {gpu.name: {name: asdict(entry) for name, entry in counts[gpu].items()} for gpu in gpus},
    }
    document = to_markdown(header, modelled)
    print(document)
    if path is not None:
        merged = Result()
        for of_gpu in modelled.values():
            merged.extend(of_gpu.result)
        for target in write(path, to_json(header, merged), document):
            print(f"wrote {target}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
