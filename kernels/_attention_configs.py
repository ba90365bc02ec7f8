"""Tiles of the kernels of attention per chip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from diffgap.kernels._tiles import Product, input_precision, widens
from torch import Tensor

#: The most queries and keys of the short path, which holds all of a batch and head at once.
SHORT = 64

Pass = Literal["forward", "backward"]
Vendor = Literal["nvidia", "amd"]


@dataclass(frozen=True)
class Config:
    """A tile and how it is computed.

    Attributes:
        block_m: On the short path rows of q, on the long one rows of the side that a program holds.
        block_n: Rows of k, or of the side that a program walks over.
        chunk: Columns multiplied at a time.
        pairs: Batches and heads that share a tile of the short path.
        vendor: Whose compiler the options are for.
    """

    block_m: int
    block_n: int
    chunk: int
    num_warps: int
    num_stages: int = 1
    pairs: int = 1
    vendor: Vendor = "nvidia"

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
            **({"maxnreg": 255} if self.vendor == "nvidia" else {}),
        }


def _power_of_two(size: int, least: int) -> int:
    return max(least, 1 << (size - 1).bit_length())


def block_d(d: int) -> int:
    """Columns of a tile, at least the 16 that a product takes."""
    return _power_of_two(d, 16)


# (columns multiplied at a time, warps) by rows of the larger side. A product takes 16 rows at least; a multiprocessor
# holds many programs so small, whose loads hide each other's latency.
_SHORT: dict[tuple[Vendor, Product], dict[int, tuple[int, int]]] = {
    # One warp on 16 rows spills at d = 128, four on 64 rows at d = 64. Both warp groups of eight take all 64 rows.
    # With 32 columns at a time of 64 rows, two programs of the backward pass share a multiprocessor.
    ("nvidia", "half"): {16: (128, 2), 32: (128, 2), 64: (32, 8)},
    # A thread holds its rows of the operands in registers, alone or with its warp: so many columns leave room for them.
    ("nvidia", "ieee"): {16: (32, 2), 32: (16, 4), 64: (16, 8)},
    ("nvidia", "tf32"): {16: (32, 2), 32: (16, 4), 64: (16, 8)},
    # 64 lanes a warp and 512 registers a lane; matrix cores for float32 too.
    ("amd", "half"): {16: (128, 1), 32: (128, 2), 64: (128, 4)},
    ("amd", "ieee"): {16: (128, 1), 32: (128, 2), 64: (128, 4)},
    ("amd", "tf32"): {16: (128, 1), 32: (128, 2), 64: (128, 4)},
}


def short_config(chip: str, product: Product, n_q: int, n_k: int, d: int) -> Config:
    """The smallest tile that holds 16 rows and all tokens of one pair; several pairs of fewer than 16 tokens."""
    vendor: Vendor = "amd" if chip == "gfx942" else "nvidia"
    rows, columns = _power_of_two(n_q, 4), _power_of_two(n_k, 4)
    pairs = max(1, 16 // max(rows, columns))
    rows, columns = max(16, rows * pairs), max(16, columns * pairs)
    chunk, warps = _SHORT[vendor, product][max(rows, columns)]
    if (vendor, product) == ("nvidia", "half") and max(rows, columns) == 32 and d > 64:
        chunk = 32  # a gradient of 128 columns beside its operands takes more registers than two warps have
    return Config(rows, columns, min(chunk, block_d(d)), warps, pairs=pairs, vendor=vendor)


def long_config(chip: str, product: Product, d: int, which: Pass) -> Config:
    """The row of the table of the long path."""
    width, wide, backward = block_d(d), d > 64, which == "backward"
    if chip == "gfx942":
        # 64 KiB of shared memory, 512 registers a lane: as many rows as there is no spill with.
        if product == "half":
            return Config(64, 32 if backward else 64, width, 4, 2, vendor="amd")
        rows, columns = (32, 16 if wide else 32) if backward else (64, 32)
        return Config(rows, columns, width, 4, 2, vendor="amd")
    if product != "half":
        # Sums of 32 x 128 in float32 beside operands in registers leave room for few columns of a product.
        return Config(32, 32, 16, 8 if wide or backward else 4)
    if not backward:
        # A row of 16 a warp at d = 128, where registers hold the sums and the queries.
        return Config(128, 32, width, 8, 2) if wide else Config(64, 64, width, 4, 2)
    # sm_90 and sm_100 multiply out of shared memory; the others hold the operands of the held rows in registers too.
    if chip in ("sm_90", "sm_100"):
        return Config(64, 32, width, 8 if wide else 4, 2)
    return Config(32 if wide else 64, 32, width, 8, 2)


def config_for(chip: str, product: Product, n_q: int, n_k: int, d: int, which: Pass) -> Config:
    """The row of the tables for a chip, a dtype and sizes."""
    if max(n_q, n_k) <= SHORT:
        return short_config(chip, product, n_q, n_k, d)
    return long_config(chip, product, d, which)
