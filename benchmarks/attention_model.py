"""A roofline model of attention in bfloat16 on a named GPU, beside FlashAttention 2, xformers' kernels and plain torch.

    time = sum over kernels of max over pipes (work / published rate)

with the pipes and rates of :mod:`benchmarks.model`, so every time is a lower bound, by the same rules for all:

- HBM is charged once for what a pass is given or gives back, and for every touch of a tensor that L2 does not hold; one
  that does not outlive the pass stays in L2 if it fits. The backward pass finds nothing of the forward pass there.
- Products, exponentials and the arithmetic of a softmax are done for whole tiles, with padding. Shared memory,
  conversions, addresses and a grid's last wave are left out for all. A kernel lasts a launch at least.
- Tensor cores run at their published peak. On an H100 it is WGMMA's, which tiles of fewer than 64 rows and kernels made
  for an A100, flash's and xformers', do not use.
- Our tiles are those of ``kernels/configs.py``; what our programs load twice comes from L2, never from L1.

================  ==============================================  =====================================================
implementation    forward, per (batch, head)                      backward
================  ==============================================  =====================================================
diffgap, short    1 kernel, tile of 16 to 64 rows, pairs packed   1 kernel, 5 products; reads q, k, v, dO
diffgap, long     1 kernel, writes lse                            2 kernels: dq and delta (3 products); dk and dv (4)
sdpa_flash        1 kernel, 128 x 128, writes lse                 3 kernels: delta and zeros; 5 products; dq to bfloat16
xformers_cutlass  1 kernel, 64 x 64                               1 kernel, 64 x 64, 5 products
eager             7 kernels, logits and probabilities in memory   7 kernels
================  ==============================================  =====================================================

Sources. sdpa_flash: FlashAttention 2, Dao-AILab/flash-attention, ``csrc/flash_attn/src/flash_fwd_launch_template.h``,
``flash_bwd_launch_template.h`` (tiles at d = 64) and ``flash_bwd_preprocess_kernel.h``: the float32 accumulator of dq
has its rows rounded up to 128, all of which are cleared, added to and converted. xformers_cutlass: xformers' own
kernels, which PyTorch has as SDPA's efficient backend, ``mem_eff_attention/kernels/generate_kernels.py`` (tiles at d =
64) and ``kernel_backward.h`` (delta in the kernel); left to itself, xformers takes FlashAttention in bfloat16 where it
can (0.0.35, ``ops/fmha/dispatch.py``), and has sdpa_flash's times. eager: ``softmax(s q k^T) v`` on transposed views in
bfloat16, with the copies that batched products make of them; its products are charged without padding.

``python -m benchmarks.attention_model [--chip CHIP ...] [--json FILE]`` prints the tables, all of kind ``modelled``.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from diffgap.kernels.configs import SHORT, Pass, attention_config, is_amd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.cases import DIRECTIONS, Direction
from benchmarks.gpus import OF_CHIP, Gpu
from benchmarks.model import LAUNCH_SECONDS, Implementation, Kernel
from benchmarks.model_options import parse
from benchmarks.plots import _COLOURS, _MARKERS
from benchmarks.report import implementations, section, to_json, write
from benchmarks.runner import Result, Row
from diffgap._files import atomic_file

BATCHES = (256, 1024, 4096)
LENGTHS = (4, 8, 16, 32, 64, 128, 256)
HEADS, HEAD_DIM = 8, 64
_DRAWN_BATCH = 1024
_BF16, _FP32 = 2, 4

#: (queries, keys).
FLASH_TILE, XFORMERS_TILE = (128, 128), (64, 64)
#: Rows that xformers' log-sum-exps are padded to: kAlignLSE in kernel_forward.h.
XFORMERS_LSE_ROWS = 32


class PerLogit(NamedTuple):
    """Lane operations for a logit, from the formulas: exponentials, FP32, and comparisons, which the INT pipe makes."""

    special: int = 0
    fp32: int = 0
    integer: int = 0


#: Maximum; multiply-add of the exponent; sum.
_SOFTMAX = PerLogit(special=1, fp32=2, integer=1)
#: P (dP - delta), delta being P dP summed.
_SOFTMAX_GRADIENT = PerLogit(fp32=3)
#: P from lse, by a multiply-add; P (dP - delta).
_GRADIENT = PerLogit(special=1, fp32=3)
#: The softmax and its normalisation; delta, by a multiply-add; P (dP - delta).
_WHOLE_GRADIENT = PerLogit(special=1, fp32=6, integer=1)


@dataclass(frozen=True)
class Shape:
    """Of self- or cross-attention."""

    batch: int
    n_q: int
    n_k: int

    @property
    def pairs(self) -> int:
        """Of batch and head."""
        return self.batch * HEADS

    @property
    def rows(self) -> int:
        """Of all queries."""
        return self.pairs * self.n_q

    @property
    def q(self) -> int:
        """Elements of q, or of the output."""
        return self.rows * HEAD_DIM

    @property
    def k(self) -> int:
        """Elements of k, or of v."""
        return self.pairs * self.n_k * HEAD_DIM

    def sizes(self) -> dict[str, float]:
        """Bytes of the tensors that every implementation has, by name."""
        of_q, of_k = ("q", "o", "do", "dq"), ("k", "v", "dk", "dv")
        sizes = dict.fromkeys(of_q, float(_BF16 * self.q)) | dict.fromkeys(of_k, float(_BF16 * self.k))
        return sizes | dict.fromkeys(("lse", "delta"), float(_FP32 * self.rows))

    def blocks(self, tile: tuple[int, int]) -> tuple[int, int]:
        """Tiles along the queries and along the keys."""
        return -(-self.n_q // tile[0]), -(-self.n_k // tile[1])

    def again(self, tile: tuple[int, int]) -> tuple[float, float]:
        """Bytes that blocks after the first read: those of queries k and v, those of keys q and dO."""
        query_blocks, key_blocks = self.blocks(tile)
        return (query_blocks - 1) * 2.0 * _BF16 * self.k, (key_blocks - 1) * 2.0 * _BF16 * self.q

    def padded(self, tile: tuple[int, int], packed: int = 1) -> float:
        """Logits of whole tiles, each of which holds ``packed`` pairs."""
        query_blocks, key_blocks = self.blocks(tile)
        return self.pairs / packed * query_blocks * tile[0] * key_blocks * tile[1]


class Passes(NamedTuple):
    """An implementation: the kernels of a forward and of a backward pass, the extra memory of the one, its output
    included, and of both, and the kernels of a forward pass that a backward pass follows, where they are others."""

    name: str
    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...]
    forward_peak: float
    peak: float
    training: tuple[Kernel, ...] | None = None

    def of(self, direction: Direction) -> Implementation:
        if direction == "fwd":
            return Implementation(self.name, self.forward, round(self.forward_peak))
        return Implementation(self.name, (self.training or self.forward) + self.backward, round(self.peak))


class Launch(NamedTuple):
    """One kernel: the names of the tensors that it reads or writes, each as often as it does; products of ``2 * logits
    * HEAD_DIM`` operations; logits with padding, and what else is done for each; bytes read again, from L2."""

    name: str
    touches: str
    products: int = 0
    logits: float = 0.0
    per_logit: PerLogit = PerLogit()
    again: float = 0.0


def kernels(gpu: Gpu, sizes: Mapping[str, float], internal: str, *launches: Launch) -> tuple[Kernel, ...]:
    """The kernels of a pass, from the bytes of its tensors and the names of those that do not outlive it."""
    seen = set(internal.split())
    result = []
    for launch in launches:
        hbm, through_l2 = 0.0, launch.again
        for name in launch.touches.split():
            through_l2 += sizes[name]
            hbm += sizes[name] if name not in seen or sizes[name] > gpu.l2_bytes else 0.0
            seen.add(name)
        flops = launch.products * 2 * launch.logits * HEAD_DIM
        special, fp32, integer = (count * launch.logits for count in launch.per_logit)
        result.append(Kernel(launch.name, flops, special=special, fp32=fp32, integer=integer, l2=through_l2, hbm=hbm))
    return tuple(result)


def ours(gpu: Gpu, shape: Shape) -> Passes:
    """diffgap's Triton kernels."""
    return _short(gpu, shape) if max(shape.n_q, shape.n_k) <= SHORT else _long(gpu, shape)


def _tile(gpu: Gpu, shape: Shape, which: Pass) -> tuple[tuple[int, int], int]:
    """Rows that a program holds, rows that it walks over, and how many pairs share them."""
    config = attention_config(gpu.chip, "half", shape.n_q, shape.n_k, HEAD_DIM, which)
    return (config.block_m, config.block_n), config.pairs


def _short(gpu: Gpu, shape: Shape) -> Passes:
    sizes, (tile, pairs) = shape.sizes(), _tile(gpu, shape, "forward")
    logits = shape.padded(tile, pairs)
    # Inputs of several pairs in a tile are first searched for what is not finite; gradients take q and k once more.
    searched = sizes["q"] + 2 * sizes["k"] if pairs > 1 else 0.0
    again = sizes["q"] + sizes["k"] + (searched + sizes["do"] if pairs > 1 else 0.0)
    forward = Launch("forward", "q k v o", 2, logits, _SOFTMAX, searched)
    backward = Launch("backward", "q k v do dq dk dv", 5, logits, _WHOLE_GRADIENT, again)
    output, gradients = sizes["o"], sizes["dq"] + sizes["dk"] + sizes["dv"]
    passes = kernels(gpu, sizes, "", forward), kernels(gpu, sizes, "", backward)
    return Passes("diffgap", *passes, output, output + gradients)


def _long(gpu: Gpu, shape: Shape) -> Passes:
    sizes, (tile, _), (dq_tile, _) = shape.sizes(), _tile(gpu, shape, "forward"), _tile(gpu, shape, "backward")
    dk_tile = dq_tile[1], dq_tile[0]
    keys, _ = shape.again(tile)
    forward = Launch("forward", "q k v o lse", 2, shape.padded(tile), _SOFTMAX, keys)
    # dO is loaded for delta, and for the products.
    again = shape.again(dq_tile)[0] + sizes["do"]
    dq = Launch("dq", "q k v o do lse delta dq", 3, shape.padded(dq_tile), _GRADIENT, again)
    _, queries = shape.again(dk_tile)
    dk = Launch("dk, dv", "q k v do lse delta dk dv", 4, shape.padded(dk_tile), _GRADIENT, queries)
    output, gradients = sizes["o"] + sizes["lse"], sizes["dq"] + sizes["dk"] + sizes["dv"]
    passes = kernels(gpu, sizes, "", forward), kernels(gpu, sizes, "delta", dq, dk)
    return Passes("diffgap", *passes, output, output + gradients + sizes["delta"])


def sdpa_flash(gpu: Gpu, shape: Shape) -> Passes:
    """FlashAttention 2, as in ``scaled_dot_product_attention``."""
    logits = shape.padded(FLASH_TILE)
    query_blocks, key_blocks = shape.blocks(FLASH_TILE)
    rows = shape.pairs * query_blocks * FLASH_TILE[0]
    sizes = shape.sizes() | {"delta": _FP32 * rows, "sum": _FP32 * rows * HEAD_DIM}
    keys, queries = shape.again(FLASH_TILE)
    forward = kernels(gpu, sizes, "", Launch("forward", "q k v o lse", 2, logits, _SOFTMAX, keys))
    # An addition in memory reads and writes it, once for every block of keys.
    added = " sum" * 2 * key_blocks
    dk = Launch("dk, dv, sum of dq", "q k v do lse delta dk dv" + added, 5, logits, _GRADIENT, queries)
    zeros, dq = Launch("delta, zeros", "o do delta sum"), Launch("dq", "sum dq")
    backward = kernels(gpu, sizes, "delta sum", zeros, dk, dq)
    output, gradients = sizes["o"] + sizes["lse"], sizes["dq"] + sizes["dk"] + sizes["dv"]
    return Passes("sdpa_flash", forward, backward, output, output + gradients + sizes["delta"] + sizes["sum"])


def xformers(gpu: Gpu, shape: Shape) -> Passes:
    """xformers' own kernels; in a forward pass alone they write no log-sum-exps."""
    logits = shape.padded(XFORMERS_TILE)
    query_blocks, key_blocks = shape.blocks(XFORMERS_TILE)
    lse_rows = -(-shape.n_q // XFORMERS_LSE_ROWS) * XFORMERS_LSE_ROWS
    sizes = shape.sizes()
    sizes |= {"lse": _FP32 * shape.pairs * lse_rows, "delta": sizes["lse"]}
    keys, queries = shape.again(XFORMERS_TILE)
    # One program has all blocks of a pair, so that its float32 sum of dq stays in L2.
    sums = (key_blocks - 1) * 2 * _FP32 * shape.pairs * query_blocks * XFORMERS_TILE[0] * HEAD_DIM
    forward = kernels(gpu, sizes, "", Launch("forward", "q k v o", 2, logits, _SOFTMAX, keys))
    training = kernels(gpu, sizes, "", Launch("forward", "q k v o lse", 2, logits, _SOFTMAX, keys))
    touches = "q k v o do lse delta delta dq dk dv"
    backward = kernels(gpu, sizes, "delta", Launch("backward", touches, 5, logits, _GRADIENT, queries + sums))
    output, gradients = sizes["o"], sizes["dq"] + sizes["dk"] + sizes["dv"]
    statistics = sizes["lse"] + sizes["delta"]
    return Passes("xformers_cutlass", forward, backward, output, output + gradients + statistics, training)


def eager(gpu: Gpu, shape: Shape) -> Passes:
    """Plain torch in bfloat16; copies are of the layout that batched products want."""
    q, k, logits = _BF16 * shape.q, _BF16 * shape.k, shape.rows * shape.n_k
    sizes = shape.sizes()
    sizes |= dict.fromkeys(("scaled", "q_copy", "do_copy", "dscaled"), q) | dict.fromkeys(("k_copy", "v_copy"), k)
    sizes |= dict.fromkeys(("s", "p", "ds", "dp"), _BF16 * logits)
    forward = (
        *(Launch("copy", x) for x in ("q scaled", "scaled q_copy", "k k_copy", "v v_copy")),
        Launch("product", "q_copy k_copy s", 1, logits),
        Launch("softmax", "s p", 0, logits, _SOFTMAX),
        Launch("product", "p v_copy o", 1, logits),
    )
    backward = (
        Launch("copy", "do do_copy"),
        *(Launch("product", x, 1, logits) for x in ("do_copy v_copy dp", "p do_copy dv")),
        Launch("softmax", "p dp ds", 0, logits, _SOFTMAX_GRADIENT),
        *(Launch("product", x, 1, logits) for x in ("ds k_copy dscaled", "ds q_copy dk")),
        Launch("scale", "dscaled dq"),
    )
    passes = (
        kernels(gpu, sizes, "scaled q_copy k_copy v_copy s p", *forward),
        kernels(gpu, sizes, "do_copy dp ds dscaled", *backward),
    )
    p = sizes["p"]
    return Passes("eager", *passes, max(2 * q + k + p, 2 * p, p + k + q), 3 * q + 3 * k + 3 * p)


IMPLEMENTATIONS: tuple[Callable[[Gpu, Shape], Passes], ...] = (ours, sdpa_flash, xformers, eager)
CHIPS = tuple(OF_CHIP)


def implementations_on(gpu: Gpu) -> tuple[Callable[[Gpu, Shape], Passes], ...]:
    """All, but on AMD's chips, where torch and xformers have other kernels than the ones above, ours and eager."""
    return (ours, eager) if is_amd(gpu.chip) else IMPLEMENTATIONS


def floor_seconds(gpu: Gpu, shape: Shape, direction: Direction) -> float:
    """Inputs and outputs of every pass once through HBM, or two and seven products at the tensor cores' peak."""
    q, k = _BF16 * shape.q, _BF16 * shape.k
    moved, products = 2 * q + 2 * k, 2
    if direction == "fwd+bwd":
        moved, products = moved + 3 * q + 4 * k, 7
    return max(moved / gpu.hbm, products * 2 * shape.rows * shape.n_k * HEAD_DIM / gpu.bf16)


def model(gpu: Gpu) -> dict[Row, Implementation]:
    """Every case on one GPU, and what each time was computed from."""
    modelled = {}
    for direction in DIRECTIONS:
        for batch, n in product(BATCHES, LENGTHS):
            shape = Shape(batch, n, n)
            case = f"attention/{direction}/{batch}x{n}x{n}x{HEADS}x{HEAD_DIM}/bf16"
            floor = floor_seconds(gpu, shape, direction)
            for implementation in implementations_on(gpu):
                entry = implementation(gpu, shape).of(direction)
                time, peak = entry.seconds(gpu), entry.peak_bytes
                modelled[Row(case, entry.name, time, 0.0, peak, floor, 0, gpu.name, "modelled")] = entry
    return modelled


def details_table(gpu: Gpu, modelled: Mapping[Row, Implementation]) -> list[str]:
    """Launches, bytes and operations, and the pipe that most of the time goes to."""
    lines = ["Launches, bytes through HBM and L2, operations of the products with padding, and what bounds most:", ""]
    lines += ["| case | impl | launches | HBM, MB | L2, MB | Gflop | bound |", "|---|---|---:|---:|---:|---:|---|"]
    for row, entry in modelled.items():
        amounts = (sum(x) for x in zip(*((x.hbm / 1e6, x.l2 / 1e6, x.flops / 1e9) for x in entry.kernels), strict=True))
        cells = [row.case.partition("/")[2], row.impl, str(len(entry.kernels)), *(f"{x:,.2f}" for x in amounts)]
        lines.append("| " + " | ".join([*cells, bound(gpu, entry)]) + " |")
    return [*lines, ""]


def bound(gpu: Gpu, entry: Implementation) -> str:
    """The pipe that is the slowest for the largest part of the time."""
    times: dict[str, float] = defaultdict(float)
    for kernel in entry.kernels:
        pipes = kernel.pipes(gpu)
        times[max(pipes, key=lambda pipe: pipes[pipe])] += kernel.seconds(gpu)
    return max(times, key=lambda pipe: times[pipe])


def draw(path: Path, modelled: Mapping[Gpu, Sequence[Row]]) -> None:
    """Time over the floor by length, a panel for every GPU and direction; markers shrink, so that equal times show."""
    figure = Figure(figsize=(10, 3.6 * len(modelled) + 0.8), layout="constrained")
    grid = figure.subplots(len(modelled), len(DIRECTIONS), squeeze=False, sharex=True, sharey=True)
    panels = ((gpu, rows, direction) for gpu, rows in modelled.items() for direction in DIRECTIONS)
    for (gpu, of_gpu, direction), axes in zip(panels, grid.flat, strict=True):
        rows = [row for row in of_gpu if row.case.startswith(f"attention/{direction}/{_DRAWN_BATCH}x")]
        axes.axhline(1.0, color="0.4", linestyle="--", linewidth=1)
        for index, name in enumerate(implementations(rows)):
            ratios = [row.median_s / row.floor_s for row in rows if row.impl == name]
            style = {"marker": _MARKERS[index], "color": _COLOURS[index], "markersize": 11 - 2 * index}
            axes.plot(LENGTHS, ratios, label=name, linewidth=1.2, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="tokens", ylabel="time / floor", title=f"{gpu.name}, {direction}")
        axes.grid(color="0.9")
        axes.label_outer()
    figure.suptitle(f"Attention in bfloat16, B = {_DRAWN_BATCH}, H = {HEADS}, d = {HEAD_DIM} (modelled)")
    lines, names = grid[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=110, format="png")


def to_markdown(header: Mapping[str, Any], modelled: Mapping[Gpu, Mapping[Row, Implementation]]) -> str:
    """Times and memory beside one another, then what they were computed from."""
    lines = [
        f"# Modelled: attention of short sequences, {header['date']}",
        "",
        f"`{header['command']}`",
        "",
        "No GPU has run any of this. Each time is a lower bound, from published peak rates: the sum over kernels of "
        f"their slowest pipe, a launch of {LAUNCH_SECONDS * 1e6:.1f} µs among them. The floor moves inputs and outputs "
        "once. `256x4x4x8x64` is (B, N_q, N_k, H, d). Assumptions and their sources: `benchmarks/attention_model.py`.",
        "",
    ]
    for gpu, of_gpu in modelled.items():
        lines += section(f"attention on {gpu.name} (modelled)", list(of_gpu), ())
        lines += details_table(gpu, of_gpu)
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Print the tables, and write them with ``--json``."""
    gpus, path, command = parse("benchmarks.attention_model", argv, CHIPS)
    modelled = {gpu: model(gpu) for gpu in gpus}
    header = {"date": date.today().isoformat(), "command": command, "kind": "modelled"}
    document = to_markdown(header, modelled)
    print(document)
    if path is not None:
        rows = Result([row for of_gpu in modelled.values() for row in of_gpu])
        write(path, to_json(header, rows), document)
        with atomic_file(path.with_suffix(".png")) as temporary:
            draw(temporary, {gpu: list(of_gpu) for gpu, of_gpu in modelled.items()})
        print(f"wrote {path}, and .md and .png beside it", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
