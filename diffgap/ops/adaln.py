r"""The gated residual and the adaptive layer norm that follows it, as one operation.

.. math::

    y = x + \text{gate} \odot \text{branch}, \qquad
    h = \frac{y - \mu(y)}{\sqrt{\sigma^2(y) + 10^{-6}}} \odot (1 + \text{scale}) + \text{shift}

with mean and biased variance over the last dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffgap.ops import _dispatch
from diffgap.ops._dispatch import Native
from diffgap.ops._native import CPU_MISSING, TRITON_MISSING

_EPS = 1e-6
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def adaln(x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual stream and modulate its layer norm: ``y = x + gate * branch`` and
    ``h = layer_norm(y) * (1 + scale) + shift``, no affine weights, eps 1e-6.

    Computed in float32 for inputs of lower precision. Under autocast the other inputs are cast to the dtype
    of ``x``, so that a residual stream kept in float32 stays so.

    Args:
        x: (B, N, D) residual stream, float16, bfloat16, float32 or float64; any strides.
        branch: (B, N, D) output of the sub-layer before, or ``None`` together with ``gate``: then ``y = x``.
        gate: (B, D), one row a sample, or (B, N, D), one a token.
        shift: shape of ``gate``; (B, D) or (B, N, D).
        scale: shape of ``shift``.

    Returns:
        ``(y, h)``, both (B, N, D) in the dtype of ``x``. Gradients for all five inputs.

    Raises:
        ValueError: shapes or devices do not fit together, or only one of ``branch`` and ``gate`` is given.
        TypeError: the dtypes differ or are not floating point.

    Source: Peebles & Xie 2023, arXiv 2212.09748 (adaLN-Zero).
    """
    if _dispatch.autocast_dtype(x) is not None:
        branch, gate = (None if t is None else t.to(x.dtype) for t in (branch, gate))
        shift, scale = shift.to(x.dtype), scale.to(x.dtype)
    _check(x, branch, gate, shift, scale)
    if _dispatch.choose("adaln", x) == "eager":
        return adaln_reference(x, branch, gate, shift, scale)
    y, h = _AdaLN.apply(*_dispatch.distinct(x, branch, gate, shift, scale))
    return (x if branch is None else y), h


def adaln_reference(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition of :func:`adaln` in plain, differentiable torch."""
    dtype = x.dtype
    accumulate = torch.promote_types(dtype, torch.float32)
    y = x.to(accumulate)
    if branch is not None and gate is not None:
        y = y + _per_token(gate, accumulate) * branch.to(accumulate)
    normed = F.layer_norm(y, y.shape[-1:], eps=_EPS)
    h = normed * (1 + _per_token(scale, accumulate)) + _per_token(shift, accumulate)
    return (x if branch is None else y.to(dtype)), h.to(dtype)


def _per_token(modulation: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, D) or (B, N, D) -> what broadcasts against (B, N, D)."""
    return (modulation if modulation.ndim == 3 else modulation.unsqueeze(1)).to(dtype)


def _check(x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor) -> None:
    """Raise one clear error for inputs :func:`adaln` cannot take."""
    if x.dtype not in _DTYPES:
        raise TypeError(f"adaln: x has dtype {x.dtype}; use float16, bfloat16, float32 or float64")
    if x.ndim != 3 or x.shape[-1] == 0:
        raise ValueError(f"adaln: x has shape {tuple(x.shape)}; pass (batch, tokens, features)")
    if (branch is None) != (gate is None):
        missing = "branch" if branch is None else "gate"
        raise ValueError(f"adaln: {missing} is None; pass both branch and gate, or neither")
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"adaln: branch has shape {tuple(branch.shape)} but x {tuple(x.shape)}; make them equal")
    per_sample = (x.shape[0], x.shape[2])
    if shift.shape != per_sample and shift.shape != x.shape:
        raise ValueError(
            f"adaln: shift has shape {tuple(shift.shape)}; pass {per_sample}, one row a sample, "
            f"or {tuple(x.shape)}, one a token"
        )
    for name, modulation in (("scale", scale), ("gate", gate)):
        if modulation is not None and modulation.shape != shift.shape:
            raise ValueError(
                f"adaln: {name} has shape {tuple(modulation.shape)} but shift {tuple(shift.shape)}; make them equal"
            )
    for name, other in (("branch", branch), ("gate", gate), ("shift", shift), ("scale", scale)):
        if other is not None and other.dtype != x.dtype:
            raise TypeError(f"adaln: {name} has dtype {other.dtype} but x {x.dtype}; convert one of them")
        if other is not None and other.device != x.device:
            raise ValueError(f"adaln: {name} is on {other.device} but x on {x.device}; move one of them")


def _forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    y, h = adaln_reference(x, branch, gate, shift, scale)
    return (x.new_empty(0) if branch is None else y.contiguous()), h.contiguous()


def _forward_fake(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(0 if branch is None else x.shape), x.new_empty(x.shape)


def _backward(
    grad_y: Tensor | None,
    grad_h: Tensor,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
) -> tuple[Tensor, ...]:
    def outputs(*inputs: Any) -> tuple[Tensor, ...]:
        y, h = adaln_reference(*inputs)
        return (h,) if grad_y is None else (y, h)

    grads = [grad_h] if grad_y is None else [grad_y, grad_h]
    return tuple(_dispatch.vjp(outputs, [x, branch, gate, torch.zeros_like(scale), scale], grads))


def _backward_fake(
    grad_y: Tensor | None,
    grad_h: Tensor,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0 if t is None else t.shape) for t in (x, branch, gate, scale, scale))


# Where branch is None, y (which is x) comes back as an empty tensor, since an op may not return its input,
# and so do the gradients of branch and gate; grad_y is None.
_adaln = _dispatch.define(
    "adaln(Tensor x, Tensor? branch, Tensor? gate, Tensor shift, Tensor scale) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_adaln_backward = _dispatch.define(
    "adaln_backward(Tensor? grad_y, Tensor grad_h, Tensor x, Tensor? branch, Tensor? gate, Tensor scale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TRITON = Native("Triton", _NATIVE_DTYPES, TRITON_MISSING)
_dispatch.declare("adaln", cpu=Native("C++", _NATIVE_DTYPES, CPU_MISSING), cuda=_TRITON)
_dispatch.implement(_TRITON, "diffgap.kernels.adaln", adaln="forward", adaln_backward="backward")


class _AdaLN(torch.autograd.Function):
    """The registered forward and backward ops as one differentiable function; saves only its inputs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # the last norm's y is used by nothing: no zeros to read
        ctx.save_for_backward(x, branch, gate, scale)
        y, h = _adaln(x, branch, gate, shift, scale)
        return y, h

    @staticmethod
    @_dispatch.first_order
    def backward(ctx: Any, grad_y: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
        x, branch, gate, scale = ctx.saved_tensors
        if grad_h is None:
            grad_h = torch.zeros_like(x)
        if branch is None:
            dx, _, _, dshift, dscale = _adaln_backward(None, grad_h, x, None, None, scale)
            return dx, None, None, dshift, dscale
        return tuple(_adaln_backward(grad_y, grad_h, x, branch, gate, scale))
