"""Forward noising: the noised sample and the training target in one pass, with the noise drawn on the way.

With ``[alpha, sigma] = table[t]`` and ``noise = normal(seed, x0.shape[1:])`` (:mod:`diffgap.ops.random`):

    x_t = alpha * x0 + sigma * noise

    target = noise                                   "epsilon"             (arXiv 2006.11239)
             x0                                      "sample"
             alpha * noise - sigma * x0              "v_prediction"        (arXiv 2202.00512)
             noise - x0                              "flow_prediction"     (arXiv 2209.03003)
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffgap.ops import _dispatch
from diffgap.ops._native import CPU_MISSING, CUDA_MISSING
from diffgap.ops.random import STREAM_DRAW, check_index, check_seed, normal_reference

Target = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]

#: The targets; an op's ``target`` argument is an index into this tuple.
TARGETS: tuple[str, ...] = get_args(Target)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _coefficients(table: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """``alpha`` and ``sigma`` of every sample in ``like``'s dtype, shaped to broadcast against it."""
    rows = table[t].to(like.dtype).reshape(-1, 2, *(1,) * (like.dim() - 1))
    return rows[:, 0], rows[:, 1]


def q_sample_reference(
    x0: Tensor, t: Tensor, table: Tensor, seed: Tensor, target: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Eager definition of :func:`q_sample`: ``(x_t, target, noise)``; float32 inside for lower dtypes."""
    clean = x0.to(torch.promote_types(x0.dtype, torch.float32))
    alpha, sigma = _coefficients(table, t, clean)
    noise = normal_reference(seed, math.prod(x0.shape[1:]), None, 0, STREAM_DRAW)
    noise = noise.reshape(x0.shape).to(clean.dtype)
    if TARGETS[target] == "epsilon":
        wanted = noise
    elif TARGETS[target] == "sample":
        wanted = clean
    elif TARGETS[target] == "v_prediction":
        wanted = alpha * noise - sigma * clean
    else:
        wanted = noise - clean
    # Copies where the dtype did not change, so that no result aliases the input or another result.
    return (alpha * clean + sigma * noise).to(x0.dtype), wanted.to(x0.dtype, copy=True), noise.to(x0.dtype)


def _q_sample_default(
    x0: Tensor, t: Tensor, table: Tensor, seed: Tensor, target: int, return_noise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x_t, wanted, noise = q_sample_reference(x0, t, table, seed, target)
    return x_t.contiguous(), wanted.contiguous(), noise.contiguous() if return_noise else x0.new_empty(0)


def _q_sample_fake(
    x0: Tensor, t: Tensor, table: Tensor, seed: Tensor, target: int, return_noise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _dispatch.check_devices("q_sample", x0, t, table, seed)
    return x0.new_empty(x0.shape), x0.new_empty(x0.shape), x0.new_empty(x0.shape if return_noise else 0)


def _backward_default(grad_x_t: Tensor, grad_target: Tensor, t: Tensor, table: Tensor, target: int) -> Tensor:
    """``alpha * grad_x_t`` plus the target's share; the noise is not needed."""
    wide = grad_x_t.to(torch.promote_types(grad_x_t.dtype, torch.float32))
    alpha, sigma = _coefficients(table, t, wide)
    grad = alpha * wide
    if TARGETS[target] == "sample":
        grad = grad + grad_target
    elif TARGETS[target] == "v_prediction":
        grad = grad - sigma * grad_target
    elif TARGETS[target] == "flow_prediction":
        grad = grad - grad_target
    return grad.to(grad_x_t.dtype).contiguous()


def _backward_fake(grad_x_t: Tensor, grad_target: Tensor, t: Tensor, table: Tensor, target: int) -> Tensor:
    return grad_x_t.new_empty(grad_x_t.shape)


_forward = _dispatch.define(
    "q_sample(Tensor x0, Tensor t, Tensor table, Tensor seed, int target, bool return_noise)"
    " -> (Tensor, Tensor, Tensor)",
    _q_sample_default,
    _q_sample_fake,
)
_backward = _dispatch.define(
    "q_sample_backward(Tensor grad_x_t, Tensor grad_target, Tensor t, Tensor table, int target) -> Tensor",
    _backward_default,
    _backward_fake,
)
_dispatch.declare(
    "q_sample",
    cpu=_dispatch.Native("C++", _DTYPES, CPU_MISSING),
    cuda=_dispatch.Native("CUDA C++", _DTYPES, CUDA_MISSING),
)


class _QSample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x0: Tensor, t: Tensor, table: Tensor, seed: Tensor, target: int, return_noise: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_t, wanted, noise = _forward(x0, t, table, seed, target, return_noise)
        ctx.save_for_backward(t, table)
        ctx.target = target
        ctx.mark_non_differentiable(noise, *([wanted] if TARGETS[target] == "epsilon" else []))
        return x_t, wanted, noise

    @staticmethod
    @once_differentiable  # and not first_order: by x0 the gradient is indeed a constant
    def backward(ctx: Any, grad_x_t: Tensor, grad_target: Tensor, _grad_noise: Tensor) -> tuple[Tensor | None, ...]:
        t, table = ctx.saved_tensors
        return _backward(grad_x_t, grad_target, t, table, ctx.target), None, None, None, None, None


def _check(x0: Tensor, t: Tensor, table: Tensor, seed: Tensor) -> None:
    if x0.dim() < 1:
        raise ValueError("x0: expected shape (B, ...), got a scalar")
    if not isinstance(table, Tensor) or not table.is_floating_point() or table.shape[1:] != (2,):
        got = f"{table.dtype} {tuple(table.shape)}" if isinstance(table, Tensor) else type(table).__name__
        raise ValueError(f"table: expected floating-point (T, 2) with columns alpha, sigma, got {got}")
    if table.device != x0.device:
        raise ValueError(f"table: is on {table.device}, x0 is on {x0.device}; move it with .to()")
    check_seed(seed, x0.shape[0], x0.device)
    check_index("t", t, x0.shape[0], x0.device, table.shape[0])


@overload
def q_sample(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    seed: Tensor,
    target: Target = ...,
    *,
    return_noise: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def q_sample(
    x0: Tensor, t: Tensor, table: Tensor, seed: Tensor, target: Target = ..., *, return_noise: Literal[True]
) -> tuple[Tensor, Tensor, Tensor]: ...
def q_sample(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    seed: Tensor,
    target: Target = "epsilon",
    *,
    return_noise: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Noise ``x0`` to timestep ``t`` and give what the denoiser shall predict; the formula heads this module.

    Args:
        x0: (B, ...) clean samples; float64, float32, float16 or bfloat16, any strides.
        t: (B,) int64, each sample's row of ``table``.
        table: (T, 2) floating point, columns ``alpha`` and ``sigma``; never differentiated.
        seed: (B,) int64, each sample's own seed. The noise is ``normal(seed, x0.shape[1:])``: whatever the
            batch, device or dtype, the same seed gives the same noise.
        target: What the denoiser predicts.
        return_noise: Also return the noise.

    Returns:
        ``(x_t, target)`` or ``(x_t, target, noise)``, shape and dtype of ``x0``. Differentiable with respect
        to ``x0``.

    Raises:
        TypeError: An argument has the wrong dtype.
        ValueError: A wrong shape, device, option, or, checked on the CPU, a ``t`` outside the table (on a GPU it makes
            the sample NaN).
        RuntimeError: Backend "native" was asked for and there is no kernel for these inputs.
    """
    if target not in TARGETS:
        raise ValueError(f"target: unknown {target!r}; use one of {', '.join(TARGETS)}")
    if not x0.is_floating_point():
        raise TypeError(f"x0: expected a floating-point tensor, got {x0.dtype}")
    arguments = (x0, t, table, seed, TARGETS.index(target))
    native = _dispatch.choose("q_sample", x0) == "native"
    if native and not torch.compiler.is_compiling():
        # The kernels refuse what they cannot take before they begin; only then is it worth finding out what it is.
        with suppress(RuntimeError, TypeError):
            return _run(arguments, return_noise)
    _check(x0, t, table, seed)
    if native:
        return _run(arguments, return_noise)
    x_t, wanted, noise = q_sample_reference(*arguments)
    return (x_t, wanted, noise) if return_noise else (x_t, wanted)


def _run(
    arguments: tuple[Tensor, Tensor, Tensor, Tensor, int], return_noise: bool
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    # The target "epsilon" is the noise: no need to write it twice.
    extra = return_noise and TARGETS[arguments[-1]] != "epsilon"
    x_t, wanted, noise = _QSample.apply(*arguments, extra)
    if return_noise:
        return x_t, wanted, noise if extra else wanted
    return x_t, wanted
