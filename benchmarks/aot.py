"""Compiles Triton kernels for a GPU that is not there, exactly as a launch function would launch them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product as pairs
from typing import Any, Literal

import torch
import triton
from diffgap.kernels import adaln, attention, clip_loss, siglip_loss, similarity
from diffgap.kernels.configs import (
    CONFIGS,
    SHORT,
    Attention,
    Pass,
    Product,
    Rows,
    Tile,
    adaln_config,
    attention_config,
)
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

#: Chips that every kernel is compiled for.
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}


PASSES: tuple[Pass, ...] = ("forward", "backward")

#: tf32 is float32 where torch multiplies it so.
Dtype = Literal["bf16", "fp16", "fp32", "tf32"]
PRODUCTS: dict[Dtype, Product] = {"bf16": "half", "fp16": "half", "fp32": "ieee", "tf32": "tf32"}
TORCH: dict[Dtype, torch.dtype] = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32
}  # fmt: skip

#: Number of the first device that is not there: Triton keeps kernels by device, and those that are have the first ones.
_ABSENT = 1000


class _Driver:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return _ABSENT + list(TARGETS.values()).index(self._target)

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compiling(target: GPUTarget, compiled: dict[str, Any]) -> Iterator[None]:
    """Inside, a launch compiles its kernel and launches nothing."""
    launch, driver = JITFunction.run, triton.runtime.driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled[self.fn.__name__] = launch(self, *args, grid=grid, warmup=True, **options)
        return compiled[self.fn.__name__]

    triton.runtime.driver.set_active(_Driver(target))
    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = launch
        triton.runtime.driver._active = driver


def compile_launches(target: str, launch: Callable[[], object]) -> dict[str, Any]:
    """Every kernel that ``launch`` would launch, compiled for a chip of :data:`TARGETS`, by name.

    ``launch`` gets CPU tensors of the sizes of interest; their values are never read. Argument types, alignments and
    compile-time constants are thus those of a real call.
    """
    compiled: dict[str, Any] = {}
    with _compiling(TARGETS[target], compiled):
        launch()
    return compiled


@contextmanager
def multiplied_as(product: Product) -> Iterator[None]:
    """Inside, torch's setting is that by which kernels multiply float32 so."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if product == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


#: What makes a tensor of the benchmarks: ``torch.zeros`` to compile, something that has values to run.
Make = Callable[..., Tensor]
Launches = dict[str, Callable[[], Any]]


def contrastive_launches(
    tile: Tile, dtype: torch.dtype, width: int, rows: int = 1024, make: Make = torch.zeros
) -> Launches:
    """The launch functions of the contrastive ops on ``rows`` embeddings a side, by ``op/variant``.

    A variant names the positives: none (a tile of another rank), those of the diagonal, or by ids. Of ``clip_loss`` it
    also says whether only the rows have a loss (``one_sided``), and whether the logits are kept (``logits``).
    """
    a, scale = make(rows, width, dtype=dtype), make(())
    vector, lse, numbers = make(rows), make(rows, 2), torch.arange(rows, device=a.device)
    launches: Launches = {}

    def add(name: str, ids: Tensor | None, offset: int | None, one_sided: bool, kept: bool) -> None:
        weights = (None, None) if ids is None else (vector, vector)
        columns = 0 if one_sided else rows
        factors = (lse, lse[:columns], vector, vector[:columns], vector, vector[:columns])
        variant = "_".join([name, *["one_sided"] * one_sided, *["logits"] * kept])
        launches[f"clip_loss/{variant}"] = lambda: clip_loss.forward(
            a, a, scale, ids, ids, *weights, one_sided, offset, None, kept, tile
        )
        # Logits are made in the launch, so that memory of all pairs is held only while it runs.
        launches[f"clip_loss_backward/{variant}"] = lambda: clip_loss.backward(
            a, a, scale, ids, ids, *factors, make(*((rows, rows) if kept else (0, 0))), offset, None, tile
        )

    positives: dict[str, tuple[Tensor | None, int | None]]
    positives = {"none": (None, None), "diagonal": (None, 0), "ids": (numbers, None)}
    for name, (ids, offset) in positives.items():
        for one_sided, kept in pairs((False, True), repeat=2) if name != "none" else [(False, False)]:
            add(name, ids, offset, one_sided, kept)
        siglip = (a, a, scale, scale, ids, ids, offset, None, tile)
        launches[f"siglip_loss/{name}"] = partial(siglip_loss.forward, *siglip)
        launches[f"siglip_loss_backward/{name}"] = partial(siglip_loss.backward, vector, *siglip)
    launches["similarity_ranks/ids"] = lambda: similarity.ranks(a, a, numbers, numbers, tile)
    launches["similarity_topk/k=10"] = lambda: similarity.topk(a, a, 10, tile)
    return launches


def adaln_launches(config: Rows, dtype: torch.dtype, width: int, make: Make = torch.zeros) -> Launches:
    """The launch functions of ``adaln`` on rows of a width, by ``op/variant``.

    Modulation as the denoiser has it, rows of one tensor, and as many tokens as make the sums go over several chunks.
    """
    x, rows = make(16, 256, width, dtype=dtype), make(16, 6, width, dtype=dtype)
    shift, scale, gate, *_ = rows.unbind(1)
    return {
        "adaln/gated": lambda: adaln.forward(x, x, gate, shift, scale, config),
        "adaln/first": lambda: adaln.forward(x, None, None, shift, scale, config),
        "adaln_backward/gated": lambda: adaln.backward(x, x, x, x, gate, scale, config),
        "adaln_backward/first": lambda: adaln.backward(None, x, x, None, None, scale, config),
        "adaln_backward/per_token": lambda: adaln.backward(x, x, x, x, x, x, config),
    }


def attention_launches(
    forward: Attention,
    backward: Attention,
    dtype: torch.dtype,
    size: tuple[int, int, int],
    batch: int = 16,
    make: Make = torch.zeros,
    plain: bool = False,
) -> Launches:
    """The launch functions of attention for queries, keys and d: with all options, which take the most registers, or
    ``plain``, without any."""
    n_q, n_k, d = size
    q, k = (make(batch, n, 8, d, dtype=dtype) for n in (n_q, n_k))
    weight, mask = make(d), torch.ones(batch, n_k, dtype=torch.bool, device=q.device)
    options = (None, None, None, d**-0.5, False) if plain else (weight, weight, mask, d**-0.5, True)
    saved = (q, make(batch, 8, n_q)) if max(n_q, n_k) > SHORT else (None, None)
    return {
        "attention": lambda: attention.forward(q, k, k, *options, forward),
        "attention_backward": lambda: attention.backward(q, *saved, q, k, k, *options, backward),
    }


def _kernels(target: str, launches: Launches, infix: str = "") -> dict[str, Any]:
    return {
        f"{case}{infix}/{kernel.strip('_').removesuffix('_kernel')}": compiled
        for case, launch in launches.items()
        for kernel, compiled in compile_launches(target, launch).items()
    }


def contrastive_kernels(
    target: str,
    dtype: Dtype,
    rows: int = 1024,
    width: int = 512,
    *,
    launches: Collection[str] = (),
    tile: Tile | None = None,
) -> dict[str, Any]:
    """The kernels of the contrastive ops with the configuration they ship with for a chip, or another, compiled, by
    ``op/variant/kernel``; of all launch functions, or those named."""
    product = PRODUCTS[dtype]
    with multiplied_as(product):
        every = contrastive_launches(tile or CONFIGS[target].contrastive[product], TORCH[dtype], width, rows)
        return _kernels(target, {name: every[name] for name in launches or every})


def adaln_kernels(target: str, dtype: Dtype, width: int, config: Rows | None = None) -> dict[str, Any]:
    """The kernels of ``adaln`` as they ship for rows of a width, or otherwise, compiled, by ``op/variant/kernel``."""
    return _kernels(target, adaln_launches(config or adaln_config(target, width), TORCH[dtype], width))


def attention_kernels(
    target: str,
    dtype: Dtype,
    n_q: int,
    n_k: int,
    d: int,
    *,
    plain: bool = False,
    config: Attention | None = None,
) -> dict[str, Any]:
    """The kernels of attention for one size with the configurations they ship with for a chip, or another, compiled,
    by ``op/variant/kernel``."""
    product = PRODUCTS[dtype]
    forward, backward = (config or attention_config(target, product, n_q, n_k, d, x) for x in PASSES)
    with multiplied_as(product):
        launches = attention_launches(forward, backward, TORCH[dtype], (n_q, n_k, d), plain=plain)
        return _kernels(target, launches, "/plain" if plain else "/all")
