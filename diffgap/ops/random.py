"""Counter-based random numbers: the same noise on every device, for any batch size, order and thread count.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a 128-bit counter
and a 64-bit key to four 32-bit words. Here the key is a sample's own seed and the counter is

    (block low, block high, step, stream),    block = element // 4,    lane = element % 4

so that element ``e`` of a sample depends on its seed, the step and ``e`` alone. Words become normals by
Box-Muller in pairs, ``(w0, w1) -> (n0, n1)`` and ``(w2, w3) -> (n2, n3)``:

    u = float32(w0) * 2**-32 + 2**-33          in (0, 1], rounded to float32
    a = (2 * (w1 >> 8) + 1) * 2**-25           in (0, 1), exact in float64
    n0 = sqrt(-2 ln u) cos(2 pi a)
    n1 = sqrt(-2 ln u) sin(2 pi a)

``u`` and ``a`` are the same numbers in every implementation. The reference evaluates the rest in float64 and
rounds to float32; a native kernel evaluates it in float32 and agrees within 2 ulp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffgap.ops import _dispatch
from diffgap.ops._native import CPU_MISSING, CUDA_MISSING

#: Last word of the counter: keeps the numbers one seed gives for different purposes apart.
STREAM_DRAW, STREAM_SOLVER, STREAM_SEEDS = 0, 1, 2

Words = tuple[Tensor, Tensor, Tensor, Tensor]

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``constant * word``, for a constant of at least 2**31."""
    # constant - 2**32 is a negative 31-bit number, so the product fits a signed 64-bit integer; it is short
    # of the true one by word * 2**32, which the high half gets back.
    product = word * (constant - (1 << 32))
    return (product >> 32) + word, product & _MASK


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox4x32-10: four 32-bit words per counter.

    Args:
        counter: Four int64 tensors of 32-bit values in [0, 2**32), broadcast against each other.
        key: Two such tensors.

    Returns:
        Four int64 tensors of 32-bit values in [0, 2**32), of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _split(value: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits of a 64-bit pattern."""
    return value & _MASK, (value >> 32) & _MASK


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    u = radius_word.to(torch.float32) * 2.0**-32 + 2.0**-33
    angle = ((angle_word >> 8) * 2 + 1).to(torch.float64) * (2.0 * math.pi * 2.0**-25)
    radius = torch.sqrt(-2.0 * torch.log(u.to(torch.float64)))
    return (radius * torch.cos(angle)).to(torch.float32), (radius * torch.sin(angle)).to(torch.float32)


def normal_reference(seed: Tensor, count: int, steps: Tensor | None, step: int, stream: int) -> Tensor:
    """Eager definition of :func:`normal` for ``count`` elements per sample: float32 (B, count)."""
    block = torch.arange((count + 3) // 4, device=seed.device)
    low, high = _split(block)
    step_word = (seed.new_full((), step) if steps is None else steps)[..., None] & _MASK
    key_low, key_high = _split(seed[:, None])
    words = philox4x32((low, high, step_word, seed.new_full((), stream)), (key_low, key_high))
    lanes = (*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3]))
    return torch.stack(lanes, dim=-1).reshape(seed.shape[0], 4 * block.shape[0])[:, :count]


def _normal_default(seed: Tensor, count: int, steps: Tensor | None, step: int, stream: int) -> Tensor:
    return normal_reference(seed, count, steps, step, stream).contiguous()


def _normal_fake(seed: Tensor, count: int, steps: Tensor | None, step: int, stream: int) -> Tensor:
    return seed.new_empty((seed.shape[0], count), dtype=torch.float32)


_normal = _dispatch.define(
    "normal(Tensor seed, SymInt count, Tensor? steps, int step, int stream) -> Tensor",
    _normal_default,
    _normal_fake,
)
_DTYPES = (torch.int64, torch.float32)  # seeds go in, float32 comes out
_dispatch.declare(
    "normal",
    cpu=_dispatch.Native("C++", _DTYPES, CPU_MISSING),
    cuda=_dispatch.Native("CUDA C++", _DTYPES, CUDA_MISSING),
)


def check_seed(seed: Tensor, batch: int, device: torch.device) -> None:
    """Raise ValueError or TypeError unless ``seed`` is an int64 tensor of shape (batch,) on ``device``."""
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        got = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"seed: expected an int64 tensor, one seed per sample, got {got}; see sample_seeds()")
    if seed.shape != (batch,):
        raise ValueError(f"seed: expected shape ({batch},), one seed per sample, got {tuple(seed.shape)}")
    if seed.device != device:
        raise ValueError(f"seed: is on {seed.device}, the samples are on {device}; move it with .to()")


def check_index(name: str, index: Tensor, batch: int, device: torch.device, rows: int) -> None:
    """Raise ValueError or TypeError unless ``index`` is int64 (batch,) on ``device``, values in [0, rows).

    Values are checked where :func:`~diffgap.ops._dispatch.readable`.
    """
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{name}: expected an int64 tensor, one value per sample, got {got}")
    if index.shape != (batch,):
        raise ValueError(f"{name}: expected shape ({batch},), one value per sample, got {tuple(index.shape)}")
    if index.device != device:
        raise ValueError(f"{name}: is on {index.device}, the samples are on {device}; move it with .to()")
    if batch > 0 and _dispatch.readable(index):
        low, high = (int(value) for value in index.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(f"{name}: values must lie in [0, {rows}), got {low} to {high}")


def normal(
    seed: Tensor,
    shape: Sequence[int],
    step: int | Tensor = 0,
    dtype: torch.dtype = torch.float32,
    *,
    stream: int = STREAM_DRAW,
) -> Tensor:
    """Standard normal noise, one independent stream per sample.

    Args:
        seed: (B,) int64, the samples' own seeds (any bit pattern).
        shape: Shape of one sample.
        step: 32-bit counter that tells repeated draws of one sample apart; an int, or int64 (B,).
        dtype: Of the result. Every dtype holds the same float32 numbers, rounded or widened.
        stream: 32-bit counter that tells purposes apart.

    Returns:
        (B, *shape). Element ``e`` (row-major) depends on its sample's seed, ``step``, ``stream`` and ``e``.

    Raises:
        TypeError: ``seed`` or ``step`` is of another type; ``dtype`` is not a floating-point type.
        ValueError: ``seed`` is not one-dimensional, ``step`` is of another shape or device or out of range,
            ``stream`` is out of range, or ``shape`` has a negative size.
    """
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        raise TypeError("seed: expected an int64 tensor, one seed per sample; see sample_seeds()")
    if seed.dim() != 1:
        raise ValueError(f"seed: expected shape (B,), got {tuple(seed.shape)}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point type, got {dtype}")
    if any(size < 0 for size in shape):
        raise ValueError(f"shape: sizes must not be negative, got {tuple(shape)}")
    if isinstance(step, Tensor):
        check_index("step", step, seed.shape[0], seed.device, 1 << 32)
    elif not 0 <= step < 1 << 32:
        raise ValueError(f"step: must lie in [0, 2**32), got {step}")
    if not 0 <= stream < 1 << 32:
        raise ValueError(f"stream: must lie in [0, 2**32), got {stream}")
    steps, first = (step, 0) if isinstance(step, Tensor) else (None, step)
    count = math.prod(shape)
    run = _normal if _dispatch.choose("normal", seed) == "native" else normal_reference
    return run(seed, count, steps, first, stream).reshape(seed.shape[0], *shape).to(dtype)


def sample_seeds(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw ``n`` per-sample seeds.

    One 63-bit base seed comes from ``generator`` and advances it; seed ``i`` is a Philox hash of (base, i),
    so it does not depend on ``n``.

    Args:
        n: How many.
        generator: A CPU or CUDA generator; None takes torch's default CPU generator.

    Returns:
        int64 (n,), on the generator's device.

    Raises:
        ValueError: ``n`` is negative.
    """
    if n < 0:
        raise ValueError(f"n: must not be negative, got {n}")
    device = torch.device("cpu") if generator is None else generator.device
    base = torch.empty((), dtype=torch.int64, device=device).random_(generator=generator)
    low, high = _split(torch.arange(n, device=device))
    zero, stream = base.new_zeros(()), base.new_tensor(STREAM_SEEDS)
    first, second, _, _ = philox4x32((low, high, zero, stream), _split(base))
    signed = (second ^ (1 << 31)) - (1 << 31)
    return signed * (1 << 32) + first
