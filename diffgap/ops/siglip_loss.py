r"""SigLIP loss: a sigmoid loss on every pair of a batch, with no stored N x M matrix where a kernel runs.

.. math::
    S = \text{logit\_scale} \; a b^\top + \text{logit\_bias}, \qquad
    r_i = -\sum_j \log \sigma(z_{ij} S_{ij}), \qquad L = \frac{1}{N} \sum_i r_i

with z = +1 for positive pairs (the diagonal, or pairs of equal id) and -1 for all others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffgap.ops import _dispatch
from diffgap.ops._contrastive import (
    DTYPES,
    Reduction,
    block_bytes,
    by_rows,
    check_embeddings,
    check_ids,
    check_options,
    compute_dtype,
    pair_ids,
    scalar,
)
from diffgap.ops._native import CPU_MISSING, TRITON_MISSING


def siglip_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    ids_a: Tensor | None = None,
    ids_b: Tensor | None = None,
    reduction: Reduction = "mean",
    memory_budget: int | None = None,
    label_offset: int | None = 0,
) -> Tensor:
    """Pairwise sigmoid loss of two sets of embeddings (see the module's formula).

    Args:
        a: (N, D) embeddings, usually of unit norm; float32, float16, bfloat16 or float64.
        b: (M, D) embeddings of the same dtype and device.
        logit_scale: The factor itself, ``exp`` already taken, as in open_clip's call: a number, or a tensor
            of one element, which then gets a gradient.
        logit_bias: Added to every similarity; as ``logit_scale``. ``None`` is 0.
        ids_a: (N,) int64. With ``ids_b``, every pair of equal id is a positive.
        ids_b: (M,) int64.
        reduction: ``"none"``: (N,), entry i the loss of row i, summed over its M pairs. ``"sum"``: their sum.
            ``"mean"``: their sum divided by N, the number of rows and not of pairs, as in open_clip.
        memory_budget: Bytes of scratch for similarities. The eager reference then works in blocks of rows (at
            least one) and recomputes them in the backward pass; ``None`` lets it hold all N x M. A kernel
            never needs more than a tile.
        label_offset: Row i's positive is row ``i + label_offset`` of ``b``, for a local batch against all
            ranks' embeddings; ``None``: no pair is positive. Without ids.

    Returns:
        0-d, or (N,) for ``"none"``; float32, also for float16 and bfloat16 inputs and inside autocast, which
        does not reach the computation; float64 for float64 inputs. 0 for an empty batch.

    Raises:
        ValueError: shapes, ids or the offset do not fit together, a non-finite scale or bias, an unknown
            reduction.
        TypeError: wrong dtypes or types.

    Source: Zhai et al., arXiv 2303.15343.
    """
    check_embeddings("siglip_loss", ("a", "b"), a, b)
    check_options("siglip_loss", reduction, memory_budget)
    if label_offset is not None or ids_a is not None or ids_b is not None:
        check_ids("siglip_loss", a, b, ids_a, ids_b, label_offset or 0)
    scale = scalar("siglip_loss", "logit_scale", logit_scale, a)
    bias = scalar("siglip_loss", "logit_bias", 0.0 if logit_bias is None else logit_bias, a)

    arguments = (a, b, scale, bias, ids_a, ids_b, label_offset, memory_budget)
    if _dispatch.choose("siglip_loss", a) == "native":
        loss = _registered(reduction != "none", *arguments)
    else:
        rows = siglip_loss_reference(*arguments)
        loss = rows if reduction == "none" else rows.sum()
    return loss / max(a.shape[0], 1) if reduction == "mean" else loss


def siglip_loss_reference(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    ids_a: Tensor | None,
    ids_b: Tensor | None,
    label_offset: int | None,
    memory_budget: int | None,
) -> Tensor:
    """The definition: losses of the rows, (N,)."""
    ids_a, ids_b = pair_ids(a, b, ids_a, ids_b, label_offset)

    def block(scaled: Tensor, ids: Tensor) -> Tensor:
        logits = scaled @ b.T + logit_bias
        positive = torch.eq(ids[:, None], ids_b)
        return -F.logsigmoid(torch.where(positive, logits, -logits)).sum(dim=1)

    with _dispatch.autocast_off(a):
        scaled, b = logit_scale * a.to(compute_dtype(a)), b.to(compute_dtype(b))
        return by_rows(block, scaled, ids_a, block_bytes(a, b.shape[0]), memory_budget)


def _forward_fake(a: Tensor, *rest: Any) -> Tensor:
    return a.new_empty(a.shape[0], dtype=compute_dtype(a))


def _backward(
    grad_rows: Tensor,
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    ids_a: Tensor | None,
    ids_b: Tensor | None,
    label_offset: int | None,
    memory_budget: int | None,
) -> tuple[Tensor, ...]:
    """The row losses, and the gradients of ``(grad_rows * losses).sum()`` in the compute dtype."""
    rows: list[Tensor] = []

    def losses(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        rows.append(siglip_loss_reference(a, b, scale, bias, ids_a, ids_b, label_offset, memory_budget))
        return rows[0]

    inputs = (a.to(grad_rows.dtype), b.to(grad_rows.dtype), logit_scale, logit_bias)
    # This runs inside the forward pass, where autocast would round the products of the gradients.
    with _dispatch.autocast_off(a):
        grads = _dispatch.vjp(losses, inputs, (grad_rows,))
    return rows[0].detach(), *grads


def _backward_fake(
    grad_rows: Tensor, a: Tensor, b: Tensor, logit_scale: Tensor, logit_bias: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    grads = (grad_rows.new_empty(x.shape) for x in (a, b, logit_scale, logit_bias))
    return torch.empty_like(grad_rows), *grads


_TRITON = _dispatch.Native("Triton", DTYPES, TRITON_MISSING)
_dispatch.declare("siglip_loss", cpu=_dispatch.Native("C++", DTYPES, CPU_MISSING), cuda=_TRITON)
_INPUTS = (
    "Tensor a, Tensor b, Tensor logit_scale, Tensor logit_bias, Tensor? ids_a, Tensor? ids_b, "
    "int? label_offset, int? memory_budget"
)
_forward_op = _dispatch.define(f"siglip_loss({_INPUTS}) -> Tensor", siglip_loss_reference, _forward_fake)
_backward_op = _dispatch.define(
    f"siglip_loss_backward(Tensor grad_rows, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_dispatch.implement(_TRITON, "diffgap.kernels.siglip_loss", siglip_loss="forward", siglip_loss_backward="backward")


class _SiglipLoss(torch.autograd.Function):
    """Row losses, or their sum. The sum's gradient is known but for one factor, so one pass gives loss and
    gradients; they wait in the compute dtype, for in float16 they could underflow before a loss scale
    multiplies them. They are multiplied in place: a copy would double the memory of the loss. So a second
    backward pass through a retained graph computes them again."""

    @staticmethod
    def forward(ctx: Any, summed: bool, *arguments: Any) -> Tensor:
        ctx.summed, ctx.options = summed, arguments[6:]
        if not summed:
            ctx.save_for_backward(*arguments[:6])
            return _forward_op(*arguments)
        rows, *grads = _backward_op(_ones(arguments[0]), *arguments)
        # Inside a graph nothing may be kept aside and changed; there the compiler plans the memory.
        graph = torch.compiler.is_compiling()
        ctx.save_for_backward(*arguments[:6], *(grads if graph else ()))
        ctx.grads = None if graph else grads
        return rows.sum()

    @staticmethod
    @_dispatch.first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, kept = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        if not ctx.summed:
            _, *grads = _backward_op(grad.contiguous(), *inputs, *ctx.options)
        elif kept:
            grads = [grad * x for x in kept]
        else:
            grads, ctx.grads = ctx.grads, None
            if grads is None:
                _, *grads = _backward_op(_ones(inputs[0]), *inputs, *ctx.options)
            for x in grads:
                x.mul_(grad)
        for index, x in enumerate(inputs[:4]):
            grads[index] = grads[index].to(x.dtype)  # one by one, each freeing what it converts
        return None, *grads, None, None, None, None


def _ones(a: Tensor) -> Tensor:
    return a.new_ones(a.shape[0], dtype=compute_dtype(a))


def _registered(summed: bool, *arguments: Any) -> Tensor:
    """Row losses, or their sum, through the registered ops; where no gradient is wanted, without its cost."""
    tensors = _dispatch.distinct(*arguments[:6])
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _SiglipLoss.apply(summed, *tensors, *arguments[6:])
    rows: Tensor = _forward_op(*arguments)
    return rows.sum() if summed else rows
