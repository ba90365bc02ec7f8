"""Launch configurations of the Triton kernels: one table per chip, and nowhere else.

A row is found by the kernel, by how its dtype is multiplied (:data:`Product`) and by a class of shapes. ``python -m
benchmarks proof`` compiles every row for its chip and fails where one spills, loses its tensor-core instructions or
takes more shared memory than there is; ``python -m benchmarks tune`` times others on a GPU and prints those to paste.
The CUDA kernels have one layout for all chips, ``csrc/cuda/launch.cuh``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import triton
from torch import Tensor

Product = Literal["half", "tf32", "ieee"]
Pass = Literal["forward", "backward"]

#: The most queries and keys of attention's short path, which holds all of a batch and head at once.
SHORT = 64

#: Registers of a thread at most.
_MAXNREG = 255

#: Of a kernel that is launched with as many programs as fit: with all of them ptxas moves so much ahead that it spills.
_PERSISTENT_MAXNREG = 240

#: Features of the widest row of the tables of adaln; wider ones are held in the same way.
WIDEST = 8192


@dataclass(frozen=True)
class Tile:
    """A tile of similarities and how it is computed.

    Attributes:
        block_m: Rows.
        block_n: Columns.
        block_d: Features multiplied at a time.
        programs: How many fit on a multiprocessor.
        maxnreg: Registers of a thread at most, where ptxas, left to itself, spills some so that one program more fits;
            in kernels that are launched with as many programs as fit, nearly all there are.
    """

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    programs: int = 1
    maxnreg: int | None = None

    def for_gradient(self) -> Tile:
        """The tile where S and its gradient stand side by side: at most 64 columns, or registers would spill."""
        return replace(self, block_n=min(self.block_n, 64))

    def options(self, x: Tensor, persistent: bool = False) -> dict[str, Any]:
        """Launch arguments of a kernel that computes tiles of the rows of ``x``; a ``persistent`` one is launched with
        the programs that fit."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_D": self.block_d,
            "PRECISION": input_precision(x),
            "WIDEN": widens(x),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            **({"maxnreg": _PERSISTENT_MAXNREG if persistent else self.maxnreg} if self.maxnreg else {}),
        }


@dataclass(frozen=True)
class Short:
    """How attention's short path computes a tile: columns multiplied at a time, at most, and warps."""

    chunk: int
    num_warps: int


@dataclass(frozen=True)
class Attention:
    """A tile of attention and how it is computed.

    Attributes:
        block_m: On the short path rows of q, on the long one rows of the side that a program holds.
        block_n: Rows of k, or of the side that a program walks over.
        chunk: Columns multiplied at a time, at most.
        pairs: Batches and heads that share a tile of the short path.
        amd: Whose compiler the options are for.
    """

    block_m: int
    block_n: int
    chunk: int
    num_warps: int
    num_stages: int = 1
    pairs: int = 1
    amd: bool = False

    def options(self, q: Tensor) -> dict[str, Any]:
        """Launch arguments."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "CHUNK": self.chunk,
            "BLOCK_D": block_d(q.shape[-1]),
            "PRECISION": input_precision(q),
            "WIDEN": widens(q),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            # Left to itself ptxas spills a few registers so that one program more fits on a multiprocessor.
            **({} if self.amd else {"maxnreg": _MAXNREG}),
        }


@dataclass(frozen=True)
class Rows:
    """How a program of adaln holds rows: ``rows`` of them, ``block_d`` features each, in ``num_warps`` warps.

    ``keeps_sums`` where registers suffice for the sums over a chunk too; else every token is a chunk.
    """

    rows: int
    block_d: int
    num_warps: int
    keeps_sums: bool


@dataclass(frozen=True)
class Table:
    """The rows of one chip.

    Attributes:
        contrastive: By product.
        short: Of attention up to :data:`SHORT` tokens, by product, rows of the larger side (16, 32, 64) and d > 64.
        long: Of longer attention, by product, pass and d > 64.
        adaln: By features, rounded up to a power of two.
    """

    contrastive: Mapping[Product, Tile]
    short: Mapping[tuple[Product, int, bool], Short]
    long: Mapping[tuple[Product, Pass, bool], Attention]
    adaln: Mapping[int, Rows]


def _adaln(warp: int) -> dict[int, Rows]:
    """The rows of adaln with ``warp`` threads a warp.

    A thread holds 8 elements of each tensor, 16 bytes of a 16-bit dtype: the backward pass has nine of them at a time,
    and with more elements would leave registers for too few warps to keep the memory busy. Above 4096 features 512
    threads share a row, since 1024 would have but 64 registers each; then nine do not fit.
    """
    table = {}
    for exponent in range(4, WIDEST.bit_length()):
        width = 1 << exponent
        rows = max(1024 // width, 1)
        threads = min(rows * width // 8, 512)
        table[width] = Rows(rows, width, threads // warp, keeps_sums=rows * width <= 8 * threads)
    return table


# A product takes 16 rows at least; a multiprocessor holds many programs so small, whose loads hide each other's
# latency.
_SHORT: dict[tuple[Product, int, bool], Short] = {
    # One warp on 16 rows spills at d = 128, four on 64 rows at d = 64. Both warp groups of eight take all 64 rows.
    # With 32 columns at a time of 64 rows, two programs of the backward pass share a multiprocessor.
    ("half", 16, False): Short(64, 2),
    ("half", 16, True): Short(128, 2),
    ("half", 32, False): Short(64, 2),
    # A gradient of 128 columns beside its operands takes more registers than two warps have.
    ("half", 32, True): Short(32, 2),
    **{("half", 64, wide): Short(32, 8) for wide in (False, True)},
    # A thread holds its rows of the operands in registers, alone or with its warp: so many columns leave room for them.
    **{
        (product, rows, wide): Short(chunk, warps)
        for product in ("tf32", "ieee")
        for rows, chunk, warps in ((16, 32, 2), (32, 16, 4), (64, 16, 8))
        for wide in (False, True)
    },
}
_LONG: dict[tuple[Product, Pass, bool], Attention] = {
    ("half", "forward", False): Attention(64, 64, 64, 4, 2),
    # A row of 16 a warp at d = 128, where registers hold the sums and the queries.
    ("half", "forward", True): Attention(128, 32, 128, 8, 2),
    # The operands of the held rows stand in registers too.
    ("half", "backward", False): Attention(64, 32, 64, 8, 2),
    ("half", "backward", True): Attention(32, 32, 128, 8, 2),
    # Sums of 32 x 128 in float32 beside operands in registers leave room for few columns of a product.
    **{
        (product, which, wide): Attention(32, 32, 16, 8 if wide or which == "backward" else 4)
        for product in ("tf32", "ieee")
        for which in ("forward", "backward")
        for wide in (False, True)
    },
}

# A tile of similarities of 128 x 128 reads half of what 64 x 64 reads per product. Its exponentials and their sums take
# over 128 registers a thread at 8 warps, the most that lets two programs share a multiprocessor; so one has all of
# them, none spill, and the shared memory goes into stages. IEEE float32 has no tensor core; the operands' blocks stand
# in registers as well.
_SM_8X = Table(
    # 99 KiB of shared memory on 8.6 and 8.9; a stage is 16 KiB, and one stage less is buffered than counted.
    contrastive={
        "half": Tile(128, 128, 32, 8, 4),
        "tf32": Tile(128, 64, 32, 8, 3),
        "ieee": Tile(64, 64, 32, 8, 2, maxnreg=255),
    },
    short=_SHORT,
    long=_LONG,
    adaln=_adaln(32),
)
_SM_90 = replace(
    _SM_8X,
    # 227 KiB, and instructions of a warp group that want 128 bytes a row.
    contrastive={
        "half": Tile(128, 128, 64, 8, 4),
        "tf32": Tile(128, 128, 32, 8, 4),
        "ieee": Tile(64, 64, 32, 8, 2, maxnreg=128),
    },
    # Products are multiplied out of shared memory.
    long=_LONG
    | {
        ("half", "backward", False): Attention(64, 32, 64, 4, 2),
        ("half", "backward", True): Attention(64, 32, 128, 8, 2),
    },
)
_SM_100 = replace(
    _SM_90,
    # A thread reads whole rows of tensor memory, so sums over columns take a register for each: fewer columns.
    contrastive={
        "half": Tile(128, 64, 64, 8, 4),
        "tf32": Tile(128, 64, 32, 8, 4),
        "ieee": Tile(64, 64, 16, 8, 2, maxnreg=128),
    },
    # With 32 columns at a time a d of 32 spills.
    short=_SHORT | {("ieee", 16, False): Short(16, 2)},
)
# 99 KiB, and the instructions of a warp of sm_80.
_SM_120 = replace(
    _SM_8X,
    contrastive={**_SM_8X.contrastive, "ieee": Tile(64, 64, 16, 8, 2, maxnreg=128)},
    # Masks of columns, of a d that is no power of two, take registers.
    long=_LONG
    | {
        ("half", "forward", False): Attention(64, 32, 64, 4, 2),
        ("half", "forward", True): Attention(128, 32, 128, 8, 1),
        ("half", "backward", False): Attention(64, 32, 64, 8, 1),
    },
)
_CDNA = Table(
    # 64 KiB on gfx942, of which two stages take one buffer.
    contrastive={
        "half": Tile(128, 128, 64, 8, 2),
        "tf32": Tile(128, 64, 32, 8, 2),
        "ieee": Tile(64, 64, 32, 8, 2),
    },
    # 64 lanes a warp and 512 registers a lane; matrix cores for float32 too.
    short={
        (product, rows, wide): Short(128, warps)
        for product in ("half", "tf32", "ieee")
        for rows, warps in ((16, 1), (32, 2), (64, 4))
        for wide in (False, True)
    },
    # As many rows as there is no spill with.
    long={
        **{("half", "forward", wide): Attention(64, 64, 128, 4, 2) for wide in (False, True)},
        # With two stages a d of 32 spills.
        ("half", "backward", False): Attention(64, 32, 128, 4, 1),
        ("half", "backward", True): Attention(64, 32, 128, 4, 2),
        **{
            (product, "forward", wide): Attention(64, 32, 128, 4, 2)
            for product in ("tf32", "ieee")
            for wide in (False, True)
        },
        **{
            (product, "backward", wide): Attention(32, 16 if wide else 32, 128, 4, 2)
            for product in ("tf32", "ieee")
            for wide in (False, True)
        },
    },
    adaln=_adaln(64),
)


# 160 KiB, but no TF32, which Triton refuses. With two stages it copies IEEE float32 straight into shared memory, by 4
# bytes a lane instead of 16.
_CDNA4 = Table(
    contrastive={"half": _CDNA.contrastive["half"], "ieee": Tile(64, 64, 32, 8, 1)},
    short={key: row for key, row in _CDNA.short.items() if key[0] != "tf32"},
    long={key: row for key, row in _CDNA.long.items() if key[0] != "tf32"},
    adaln=_CDNA.adaln,
)

#: By chip. What shares a table compiles to the same shapes, but for each chip by itself.
CONFIGS: dict[str, Table] = {
    "sm_80": _SM_8X,
    "sm_86": _SM_8X,
    "sm_89": _SM_8X,
    "sm_90": _SM_90,
    "sm_100": _SM_100,
    "sm_120": _SM_120,
    "gfx942": _CDNA,
    "gfx950": _CDNA4,
}


def is_amd(chip: str) -> bool:
    """Whether the chip has AMD's compiler, warps and instructions."""
    return chip.startswith("gfx")


def chip_of(x: Tensor) -> str:
    """The chip of the tables that the device of ``x`` takes; one that is not there, that with its instructions.

    Raises:
        RuntimeError: a GPU that Triton does not compile for.
    """
    if torch.version.hip is not None:
        name = str(torch.cuda.get_device_properties(x.device).gcnArchName)
        return "gfx950" if name.startswith("gfx950") else "gfx942"
    major, minor = torch.cuda.get_device_capability(x.device)
    if major < 8:
        raise RuntimeError(
            f"the Triton kernels need compute capability 8.0, this GPU has {major}.{minor}; "
            "use diffgap.backend('eager')"
        )
    if major == 8:
        return {0: "sm_80", 9: "sm_89"}.get(minor, "sm_86")
    return {9: "sm_90", 10: "sm_100", 12: "sm_120"}.get(major, "sm_80")


def product_kind(x: Tensor) -> Product:
    """How the rows of ``x`` are multiplied; float32 in TF32 only where torch is told so and the chip has it."""
    if x.dtype != torch.float32:
        return "half"
    # torch.get_float32_matmul_precision() raises once a program has used torch's newer settings; this knows both.
    if torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    lacks = torch.version.hip is not None and x.is_cuda and "tf32" not in CONFIGS[chip_of(x)].contrastive
    return "ieee" if lacks else "tf32"


def input_precision(x: Tensor) -> str:
    """The argument of ``tl.dot``."""
    return "tf32" if product_kind(x) == "tf32" else "ieee"


def widens(x: Tensor) -> bool:
    """Whether kernels compute in float32 what is bfloat16: Triton's interpreter multiplies it wrongly, and truncates
    where it should round."""
    return bool(triton.knobs.runtime.interpret) and x.dtype == torch.bfloat16


def power_of_two(size: int, least: int) -> int:
    """``size`` rounded up to one, and at least ``least``."""
    return max(least, 1 << (size - 1).bit_length())


def block_d(d: int) -> int:
    """Columns of a tile of attention, at least the 16 that a product takes."""
    return power_of_two(d, 16)


def tile_for(x: Tensor) -> Tile:
    """The row of the contrastive kernels for the device and dtype of ``x``.

    Raises:
        RuntimeError: a GPU that Triton does not compile for.
    """
    return CONFIGS[chip_of(x)].contrastive[product_kind(x)]


def attention_config(chip: str, product: Product, n_q: int, n_k: int, d: int, which: Pass) -> Attention:
    """The row of attention for a chip, a dtype and sizes.

    On the short path the smallest tile that holds 16 rows and all tokens of one pair; several pairs of fewer than 16
    tokens.
    """
    if max(n_q, n_k) > SHORT:
        config = CONFIGS[chip].long[product, which, d > 64]
    else:
        rows, columns = power_of_two(n_q, 4), power_of_two(n_k, 4)
        pairs = max(1, 16 // max(rows, columns))
        rows, columns = max(16, rows * pairs), max(16, columns * pairs)
        row = CONFIGS[chip].short[product, max(rows, columns), d > 64]
        config = Attention(rows, columns, row.chunk, row.num_warps, pairs=pairs)
    return replace(config, chunk=min(config.chunk, block_d(d)), amd=is_amd(chip))


def adaln_config(chip: str, width: int) -> Rows:
    """The row of adaln for a chip and rows of ``width`` features."""
    size = power_of_two(width, 16)
    return replace(CONFIGS[chip].adaln[min(size, WIDEST)], block_d=size)
