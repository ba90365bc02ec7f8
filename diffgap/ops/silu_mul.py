r"""The activation of a gated MLP, as one operation (SwiGLU; Shazeer 2020, arXiv 2002.05202).

.. math::

    y = \text{silu}(g) \odot u = \frac{g}{1 + e^{-g}} \odot u, \qquad [g \mid u] = \text{pair}
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffgap.ops import _dispatch
from diffgap.ops._dispatch import Native
from diffgap.ops._native import CPU_MISSING


def silu_mul(pair: Tensor) -> Tensor:
    """``silu(gate) * up`` with ``[gate | up] = pair``; keeps nothing but ``pair`` for the backward pass.

    Args:
        pair: (..., 2 * hidden), floating point, any strides. float32, float16 and bfloat16 have a native kernel on the
            CPU, which computes in float32; others take the eager reference.

    Returns:
        (..., hidden) in the dtype of ``pair``.

    Raises:
        ValueError: the last dimension is odd, or there is none.
        TypeError: ``pair`` is not floating point.
    """
    if pair.ndim == 0 or pair.shape[-1] % 2:
        raise ValueError(f"silu_mul: pair has shape {tuple(pair.shape)}; pass (..., 2 * hidden), the gate's half first")
    if not pair.is_floating_point():
        raise TypeError(f"silu_mul: pair has dtype {pair.dtype}; use a floating-point one")
    if not _dispatch.prefers("silu_mul", pair):
        return silu_mul_reference(pair)
    result: Tensor = _SiluMul.apply(pair)
    return result


def silu_mul_reference(pair: Tensor) -> Tensor:
    """The definition of :func:`silu_mul` in plain, differentiable torch."""
    gate, up = pair.chunk(2, -1)
    return F.silu(gate) * up


def _forward(pair: Tensor) -> Tensor:
    return silu_mul_reference(pair)


def _forward_fake(pair: Tensor) -> Tensor:
    return pair.new_empty((*pair.shape[:-1], pair.shape[-1] // 2))


def _backward(grad: Tensor, pair: Tensor) -> Tensor:
    return _dispatch.vjp(silu_mul_reference, [pair], [grad])[0]


def _backward_fake(grad: Tensor, pair: Tensor) -> Tensor:
    return pair.new_empty(pair.shape)


_silu_mul = _dispatch.define("silu_mul(Tensor pair) -> Tensor", _forward, _forward_fake)
_silu_mul_backward = _dispatch.define(
    "silu_mul_backward(Tensor grad, Tensor pair) -> Tensor", _backward, _backward_fake
)
_dispatch.declare("silu_mul", cpu=Native("C++", (torch.float32, torch.float16, torch.bfloat16), CPU_MISSING))


class _SiluMul(torch.autograd.Function):
    """The registered forward and backward ops as one differentiable function."""

    @staticmethod
    def forward(ctx: Any, pair: Tensor) -> Tensor:
        ctx.save_for_backward(pair)
        result: Tensor = _silu_mul(pair)
        return result

    @staticmethod
    @_dispatch.first_order
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (pair,) = ctx.saved_tensors
        result: Tensor = _silu_mul_backward(grad, pair)
        return result
