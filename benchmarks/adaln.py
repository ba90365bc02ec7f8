"""The gated residual and the modulated layer norm behind it, against the reference and what inductor makes of it.

No package has this as one kernel with a backward pass, so eager and compiled code are the only peers. The modulation is
one row a sample, as in a denoiser's block.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.cases import DIRECTIONS, DTYPES, Case, Direction, Inputs
from diffgap.ops.adaln import adaln

#: (B, N, D).
SHAPES = {
    "ci": ((8, 16, 512),),
    "full": ((64, 16, 512), (64, 77, 512), (16, 256, 1024)),
}


def cases(size: str) -> Iterator[Case]:
    """The cases of ``--size ci`` or ``full``."""
    for shape in SHAPES[size]:
        for dtype in DTYPES:
            for direction in DIRECTIONS:
                yield adaln_case(direction, shape, dtype)


def adaln_case(direction: Direction, shape: tuple[int, int, int], dtype_name: str) -> Case:
    """``adaln`` of (B, N, D), and in a ``fwd+bwd`` case the gradients of all five inputs from those of y and h."""
    dtype = DTYPES[dtype_name]
    name = f"adaln/{direction}/{'x'.join(map(str, shape))}/{dtype_name}"
    return Case(name, dtype, partial(_inputs, direction, shape, dtype), adaln)


def _inputs(direction: Direction, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Inputs:
    batch, _, width = shape
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": shape, "branch": shape, "gate": (batch, width), "shift": (batch, width), "scale": (batch, width)}
    return {
        name: torch.randn(size, generator=generator).to(device, dtype).requires_grad_(direction == "fwd+bwd")
        for name, size in sizes.items()
    }
