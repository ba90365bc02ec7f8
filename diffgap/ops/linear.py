"""Linear layers, by oneDNN and our own product where torch's own library is slow.

``linear`` is ``y = x @ weight.T + bias``; ``swiglu`` is ``silu(gate) * up`` with ``[gate | up] = linear(x)`` (Shazeer
2020, arXiv 2002.05202). torch multiplies float32 matrices by MKL, which uses half of the vector width that an AMD CPU
with AVX-512 has; oneDNN, which torch brings too, uses all of it. But it would first transpose what is summed over rows:

    dweight = dy.T @ x,    dbias = sum of the rows of dy

are one operation of our own in C++, which needs no transposed copies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffgap.ops import _dispatch
from diffgap.ops.silu_mul import silu_mul

#: Multiplications below which the time to set up oneDNN's call outweighs its rate.
_WORTHWHILE = 1 << 21


def _missing() -> str | None:
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return "this torch is built without oneDNN"
    cpu = Path("/proc/cpuinfo")
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or "AuthenticAMD" not in (
        cpu.read_text() if cpu.exists() else ""
    ):
        return "MKL is not held back on this CPU"
    return None


_dispatch.declare("linear", cpu=_dispatch.Native("oneDNN", (torch.float32,), _missing()))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, function: str = "none") -> Tensor:
    """``function(x @ weight.T + bias)``; any strides."""
    if bias is not None:
        bias = bias.contiguous()  # oneDNN would read it as if it were
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, function, [], "")
    return result


def _gradients(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return grad.t() @ x, grad.sum(0)


def _gradients_fake(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(grad.shape[1], x.shape[1]), grad.new_empty(grad.shape[1])


_linear_gradients = _dispatch.define(
    "linear_gradients(Tensor grad, Tensor x) -> (Tensor, Tensor)", _gradients, _gradients_fake
)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether it is worth oneDNN's call; what oneDNN does not take (other dtypes, a bias to broadcast) is torch's."""
    return (
        x.numel() * len(weight) >= _WORTHWHILE
        and _dispatch.prefers("linear", x)
        and all(t is None or (t.dtype == x.dtype and t.device == x.device) for t in (weight, bias))
        and weight.shape == (len(weight), x.shape[-1])
        and (bias is None or bias.shape == weight.shape[:1])
        and not torch.compiler.is_compiling()
        and _dispatch.autocast_dtype(x) is None
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @_dispatch.first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        dx = _product(grad, weight.t(), None) if need_x else None
        rows = grad.reshape(-1, len(weight))
        if not need_weight:
            return dx, None, rows.sum(0) if need_bias else None
        dweight, dbias = _linear_gradients(rows, x.reshape(-1, x.shape[-1]))
        return dx, dweight, dbias if need_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, as :func:`torch.nn.functional.linear`.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,).

    Returns:
        (..., out_features).
    """
    if not _by_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        result: Tensor = _Linear.apply(x, weight, bias)
        return result
    return _product(x, weight, bias)


def swiglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``silu(gate) * up`` with ``[gate | up] = x @ weight.T + bias``.

    Args:
        x: (..., in_features).
        weight: (2 * hidden, in_features), the gate's rows first.
        bias: (2 * hidden,).

    Returns:
        (..., hidden).
    """
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    if recorded or len(weight) % 2 or not _by_onednn(x, weight, bias):
        return silu_mul(linear(x, weight, bias))
    (gate_weight, up_weight), (gate_bias, up_bias) = weight.chunk(2), bias.contiguous().chunk(2)
    gate = _product(x, gate_weight, gate_bias, "swish")
    result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, gate, up_weight, up_bias, "mul")
    return result
