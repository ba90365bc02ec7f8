"""What each compiled kernel does in a call of a benchmark's size, and so how long each pipe of a GPU needs for it.

    time = max over pipes (work / published rate)

with the pipes of :class:`benchmarks.model.Kernel`; every time is a lower bound.

- Instructions are those of the machine code: what is outside all loops once a warp, what is in a loop as often as the
  launch goes round it. Branches that few tiles take are included.
- Products are counted for whole tiles, padding included.
- HBM is charged once for what a launch is given or gives back; for embeddings that L2 does not hold, once a pass.
- L2 is charged for every tile that a program loads.

Shapes are those of the benchmarks: 8192 x 512 for the losses (8191 where the size that is compiled is odd too), 4096 x
50000 x 512 for retrieval, 16 x 256 x D for adaln, and for attention the 1024 samples of 8 heads that
:mod:`benchmarks.attention_model` draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

from diffgap.kernels import adaln
from diffgap.kernels._tiles import macros
from diffgap.kernels.configs import CONFIGS, SHORT, Tile, adaln_config, attention_config, block_d, is_amd

from benchmarks.aot import PRODUCTS, TORCH
from benchmarks.compiled import Case, Compiled
from benchmarks.gpus import Gpu
from benchmarks.model import LOOP_CLOCKS, REST_CLOCKS, Kernel
from benchmarks.sass import LoopCounts

ROWS = 8192
QUERIES, GALLERY = 4096, 50000
BATCH, HEADS = 1024, 8
SAMPLES, TOKENS = 16, 256
_FP32 = 4


@dataclass(frozen=True)
class Work:
    """Of one kernel in one call.

    Attributes:
        shape: Of the call, as in the name of a case.
        programs: Blocks of threads, of all launches.
        trips: How often a program goes round its outermost loop, round the one within it for each turn of that, ...
        flops: Of products.
        hbm: Bytes.
        l2: Bytes.
    """

    shape: str
    programs: float
    trips: tuple[float, ...] = ()
    flops: float = 0.0
    hbm: float = 0.0
    l2: float = 0.0
    launches: float = 1.0


def kernel_of(compiled: Compiled, work: Work, gpu: Gpu) -> Kernel:
    """The kernel of the model: all that its launches do in a call."""
    warps, lanes = work.programs * compiled.warps, 64 if is_amd(compiled.case.chip) else 32
    times = [prod(work.trips[:depth]) for depth in range(len(compiled.counts))]
    product_loop = _product_loop(compiled.counts) if work.flops else -1

    def total(pipe: str) -> float:
        return warps * sum(t * getattr(level, pipe) for t, level in zip(times, compiled.counts, strict=True))

    def clocks(depth: int, level: LoopCounts) -> float:
        return level.load_store * (LOOP_CLOCKS if depth == product_loop > 0 else REST_CLOCKS) * lanes / 32

    load_store = sum(t * clocks(depth, x) for depth, (t, x) in enumerate(zip(times, compiled.counts, strict=True)))
    # Without a tensor core the products are among the instructions.
    in_tensor_cores = compiled.code.tensor_instructions > 0
    return Kernel(
        compiled.kernel,
        work.flops if in_tensor_cores else 0.0,
        "bf16" if compiled.case.dtype == "fp16" else compiled.case.dtype,  # at the same rate
        special=lanes * total("mufu"),
        fp32=lanes * total("fp32"),
        integer=lanes * total("integer"),
        load_store_clocks=warps * load_store,
        l2=work.l2,
        hbm=work.hbm,
        launches=work.launches,
    )


def _product_loop(counts: tuple[LoopCounts, ...]) -> int:
    """The depth of the products' loop: the innermost with tensor instructions, or without a tensor core of all."""
    return max((depth for depth, level in enumerate(counts) if level.tensor), default=len(counts) - 1)


def work_of(compiled: Compiled, gpu: Gpu) -> Work:
    """What a kernel does in the call of its benchmark."""
    return {"attention": _attention, "adaln": _adaln, "contrastive": _contrastive}[compiled.case.family](compiled, gpu)


def _itemsize(compiled: Compiled) -> int:
    return TORCH[compiled.case.dtype].itemsize


def loss_rows(case: Case) -> int:
    """Embeddings a side of the losses' call for a size that is compiled; 16 divides both or neither."""
    return ROWS if case.size[0] % 16 == 0 else ROWS - 1


def _contrastive(compiled: Compiled, gpu: Gpu) -> Work:
    op, variant, kernel = compiled.kernel.split("/")
    _, width = compiled.case.size
    tile = CONFIGS[compiled.case.chip].contrastive[PRODUCTS[compiled.case.dtype]]
    size = _itemsize(compiled)
    if op.startswith("similarity"):
        return _retrieval(kernel, tile, width, size, gpu)
    gradient, logits = op.endswith("_backward"), variant.endswith("_logits")
    if gradient or logits:
        tile = tile.for_gradient()
    rows = loss_rows(compiled.case)
    shape, side = f"{rows}x{width}", rows * width
    row_blocks, column_blocks = ceil(rows / tile.block_m), ceil(rows / tile.block_n)
    row_groups, column_groups = _groups(tile, gpu, row_blocks, column_blocks)
    if kernel == "merge":
        return Work(shape, ceil(rows / 128), (column_groups,), hbm=_FP32 * rows * (3 * column_groups + 3))
    pairs, steps = float(row_blocks * tile.block_m * column_blocks * tile.block_n), width / tile.block_d
    kept = _FP32 * float(rows) ** 2 if logits else 0.0
    if kernel == "forward":
        trips = (column_blocks / column_groups, row_blocks / row_groups, steps)
        passes = 1.0 if 2 * side * size <= gpu.l2_bytes else trips[0]
        hbm = size * (side * passes + side) + kept
        l2 = _tiles_read(tile, pairs, width, size) + kept
        return Work(shape, row_groups * column_groups, trips, 2 * pairs * width, hbm, l2)
    height, wide, _ = macros(rows, rows, tile, size, None)
    launches = ceil(rows / height) * ceil(rows / wide)
    stored = size * pairs if gradient else 0.0
    programs = pairs / (tile.block_m * tile.block_n)
    if logits:
        return Work(shape, programs, (), 0.0, kept + stored, 0.0, launches)
    embeddings = size * side * (ceil(rows / wide) + 1)
    l2 = _tiles_read(tile, pairs, width, size) + stored
    return Work(shape, programs, (steps,), 2 * pairs * width, embeddings + stored, l2, launches)


def _groups(tile: Tile, gpu: Gpu, row_blocks: int, column_blocks: int) -> tuple[int, int]:
    """Programs along the rows and along the columns of the losses' forward pass, as ``clip_loss.forward`` has them."""
    slots = gpu.multiprocessors * tile.programs
    row_groups = min(row_blocks, max(int(slots**0.5), slots // column_blocks))
    return row_groups, min(column_blocks, slots // row_groups)


def _tiles_read(tile: Tile, pairs: float, width: int, size: int) -> float:
    """Bytes of embeddings that the programs of all tiles load."""
    return pairs * width * size * (1 / tile.block_m + 1 / tile.block_n)


def _retrieval(kernel: str, tile: Tile, width: int, size: int, gpu: Gpu) -> Work:
    shape = f"{QUERIES}x{GALLERY}x{width}"
    row_blocks, column_blocks, steps = ceil(QUERIES / tile.block_m), ceil(GALLERY / tile.block_n), width / tile.block_d
    padded = float(row_blocks * tile.block_m * column_blocks * tile.block_n)
    embeddings = size * width * (QUERIES + GALLERY)
    l2 = _tiles_read(tile, padded, width, size)
    if kernel == "best_positive":
        # One positive a query, so that the positives of a block of queries are as many columns.
        tiles = row_blocks * ceil(tile.block_m / tile.block_n)
        flops = 2.0 * tiles * tile.block_m * tile.block_n * width
        return Work(shape, tiles, (1.0, steps), flops, 2.0 * size * width * QUERIES)
    if kernel == "compare":
        groups = min(column_blocks, ceil(4 * gpu.multiprocessors * tile.programs / row_blocks))
        hbm = embeddings + 2.0 * _FP32 * groups * QUERIES
        return Work(shape, row_blocks * groups, (column_blocks / groups, steps), 2 * padded * width, hbm, l2)
    kept = 8 * column_blocks if kernel == "best_of_group" else 8 * 10 * tile.block_n + _FP32 * column_blocks
    return Work(shape, row_blocks * column_blocks, (steps,), 2 * padded * width, embeddings + kept * QUERIES, l2)


def _adaln(compiled: Compiled, gpu: Gpu) -> Work:
    _, variant, kernel = compiled.kernel.split("/")
    (width,) = compiled.case.size
    config, size, shape = adaln_config(compiled.case.chip, width), _itemsize(compiled), f"{SAMPLES}x{TOKENS}x{width}"
    tensor = float(size * SAMPLES * TOKENS * width)
    modulation = float(size * SAMPLES * width)
    chunk = adaln._chunk(SAMPLES, TOKENS, config.rows)
    pieces = ceil(TOKENS / chunk) if config.keeps_sums else TOKENS
    if kernel == "forward":
        gated = variant == "gated"
        hbm = (4 if gated else 2) * tensor + (3 if gated else 2) * modulation
        return Work(shape, ceil(SAMPLES * TOKENS / config.rows), hbm=hbm)
    if kernel == "merge":
        programs = SAMPLES * ceil(width / adaln._MERGE_BLOCK)
        return Work(shape, programs, (pieces,), hbm=_FP32 * SAMPLES * pieces * width + modulation)
    # Of (SAMPLES, TOKENS, width), read and written; sums of the modulation's gradients.
    tensors, sums = {"gated": (6, 3), "first": (3, 2), "per_token": (11, 0)}[variant]
    hbm = tensors * tensor + sums * _FP32 * SAMPLES * pieces * width
    return Work(shape, SAMPLES * ceil(TOKENS / chunk), (chunk / config.rows,), hbm=hbm)


def _attention(compiled: Compiled, gpu: Gpu) -> Work:
    kernel = compiled.kernel.split("/")[-1]
    n_q, n_k, d = compiled.case.size
    chip, dtype = compiled.case.chip, compiled.case.dtype
    which = "forward" if kernel.endswith("forward") else "backward"
    config = attention_config(chip, PRODUCTS[dtype], n_q, n_k, d, which)
    shape, pairs, size = f"{BATCH}x{n_q}x{n_k}x{HEADS}x{d}", BATCH * HEADS, _itemsize(compiled)
    q, k, statistics = (float(pairs * n) for n in (size * n_q * d, size * n_k * d, _FP32 * n_q))
    chunks = block_d(d) / config.chunk
    logits = float(config.block_m * config.block_n)
    if max(n_q, n_k) <= SHORT:
        hbm, products = (2 * q + 2 * k, 2) if which == "forward" else (3 * q + 4 * k, 5)
        programs = ceil(pairs / config.pairs)
        return Work(shape, programs, (chunks,), products * 2 * programs * logits * block_d(d), hbm, hbm)
    # Products, bytes through HBM, and whether a program holds rows of q.
    products, hbm, holds_q = {
        "long_forward": (2, 2 * q + 2 * k + statistics, True),
        "long_backward_queries": (3, 4 * q + 2 * k + 2 * statistics, True),
        "long_backward_keys": (4, 2 * q + 4 * k + 2 * statistics, False),
    }[kernel]
    held, walked, walked_bytes = (n_q, n_k, 2 * k) if holds_q else (n_k, n_q, 2 * q)
    blocks, turns = ceil(held / config.block_m), ceil(walked / config.block_n)
    flops = products * 2 * pairs * blocks * turns * logits * block_d(d)
    return Work(shape, pairs * blocks, (turns, chunks), flops, hbm, hbm + (blocks - 1) * walked_bytes)
