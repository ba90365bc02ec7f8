r"""CLIP loss: symmetric cross-entropy over the similarities of a batch, with no stored N x M matrix where a
kernel runs.

.. math::
    S = \text{logit\_scale} \; a b^\top, \qquad
    r_i = -\frac{1}{|P_i|} \sum_{j \in P_i} \log \operatorname{softmax}_j (S_{ij}), \qquad
    c_j = -\frac{1}{|P_j|} \sum_{i \in P_j} \log \operatorname{softmax}_i (S_{ij})

with P the positives: the diagonal, or the pairs of equal id. Symmetric: ``mean(r) / 2 + mean(c) / 2``;
one-sided: ``mean(r)``. A bias added to S would cancel in both softmaxes, so there is none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from diffgap.ops import _dispatch
from diffgap.ops._contrastive import (
    Reduction,
    block_bytes,
    by_rows,
    check_embeddings,
    check_ids,
    check_options,
    compute_dtype,
    scalar,
)


def clip_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    *,
    ids_a: Tensor | None = None,
    ids_b: Tensor | None = None,
    reduction: Reduction = "mean",
    memory_budget: int | None = None,
    one_sided: bool = False,
    label_offset: int = 0,
) -> Tensor:
    """Contrastive cross-entropy of two sets of embeddings (see the module's formula).

    Args:
        a: (N, D) embeddings, usually of unit norm; float32, float16, bfloat16 or float64.
        b: (M, D) embeddings of the same dtype and device. M = N without ids, unless ``one_sided``.
        logit_scale: The factor itself, ``exp`` already taken, as in open_clip's call: a number, or a tensor
            of one element, which then gets a gradient.
        ids_a: (N,) int64. With ``ids_b``, every pair of equal id is a positive and the target is uniform over
            a row's positives (UniCL; SupCon's "out" form): several captions of one clip.
        ids_b: (M,) int64.
        reduction: ``"mean"``: over the rows that have a positive, each side by itself, the two halves added.
            ``"sum"``: half the sum over rows plus half that over columns. ``"none"``: (N,), entry i half the
            loss of row i plus half that of column i; needs N = M.
        memory_budget: Bytes of scratch for similarities. The eager reference then works in blocks of rows (at
            least one) and recomputes them in the backward pass; ``None`` lets it hold all N x M. A kernel
            never needs more than a tile, and may use the budget to keep what it would recompute.
        one_sided: Only the rows' loss, ``"none"`` giving it as (N,). For a local batch against all ranks'
            embeddings.
        label_offset: Row i's positive is row ``i + label_offset`` of ``b``; one-sided, without ids.

    Returns:
        0-d, or (N,) for ``"none"``; float32, also for float16 and bfloat16 inputs and inside autocast, which
        does not reach the computation; float64 for float64 inputs. A row without a positive has loss 0 and no
        gradient; a batch without any, an empty one included, has loss 0.

    Raises:
        ValueError: shapes, ids or the offset do not fit together, a non-finite ``logit_scale``, an unknown
            reduction.
        TypeError: wrong dtypes or types.

    Source: Radford et al., arXiv 2103.00020; UniCL, arXiv 2204.03610; SupCon, arXiv 2004.11362.
    """
    check_embeddings("clip_loss", ("a", "b"), a, b)
    check_options("clip_loss", reduction, memory_budget)
    if label_offset != 0 and not one_sided:
        raise ValueError(f"clip_loss: label_offset={label_offset} needs one_sided=True")
    check_ids("clip_loss", a, b, ids_a, ids_b, label_offset)
    if not one_sided and a.shape[0] != b.shape[0] and (ids_a is None or reduction == "none"):
        raise ValueError(
            f"clip_loss: a has {a.shape[0]} rows and b has {b.shape[0]}, but without ids, or with "
            "reduction='none', row i of a pairs with row i of b; give ids, or set one_sided=True"
        )
    scale = scalar("clip_loss", "logit_scale", logit_scale, a)

    arguments = (a, b, scale, ids_a, ids_b, one_sided, label_offset, memory_budget)
    eager = _dispatch.choose("clip_loss", a) == "eager"
    rows, columns = clip_loss_reference(*arguments) if eager else _registered(*arguments)
    if reduction == "none":
        return rows if one_sided else (rows + columns) / 2
    if reduction == "sum":
        return rows.sum() if one_sided else (rows.sum() + columns.sum()) / 2
    rows_mean = _mean(rows, ids_a, ids_b)
    return rows_mean if one_sided else (rows_mean + _mean(columns, ids_b, ids_a)) / 2


def _mean(losses: Tensor, ids: Tensor | None, other_ids: Tensor | None) -> Tensor:
    """Mean of ``losses`` over the rows that have a positive; 0 if none has."""
    if ids is None or other_ids is None:
        return losses.sum() / max(losses.shape[0], 1)
    return losses.sum() / torch.isin(ids, other_ids).sum().clamp(min=1)


def clip_loss_reference(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    ids_a: Tensor | None,
    ids_b: Tensor | None,
    one_sided: bool,
    label_offset: int,
    memory_budget: int | None,
) -> tuple[Tensor, Tensor]:
    """The definition: losses of the rows (N,) and of the columns (M,), or (0,) if ``one_sided``."""
    with torch.autocast(a.device.type, enabled=False):
        scaled, b = logit_scale * a.to(compute_dtype(a)), b.to(compute_dtype(b))
        labels = torch.arange(a.shape[0], device=a.device) + label_offset
        a_targets, b_targets = (labels if ids is None else ids for ids in (ids_a, ids_b))
        if memory_budget is None and not one_sided:
            logits = scaled @ b.T  # one product serves both sides
            return _cross_entropy(logits, a_targets, ids_b), _cross_entropy(logits.T, b_targets, ids_a)
        rows = _rows_loss(scaled, b, a_targets, ids_b, memory_budget)
        columns = rows.new_empty(0) if one_sided else _rows_loss(b, scaled, b_targets, ids_a, memory_budget)
        return rows, columns


def _rows_loss(x: Tensor, y: Tensor, targets: Tensor, ids_y: Tensor | None, budget: int | None) -> Tensor:
    """Cross-entropy of each row of ``x @ y.T``, in blocks of rows."""

    def block(x: Tensor, targets: Tensor) -> Tensor:
        return _cross_entropy(x @ y.T, targets, ids_y)

    return by_rows(block, x, targets, block_bytes(x, y.shape[0]), budget)


def _cross_entropy(logits: Tensor, targets: Tensor, column_ids: Tensor | None) -> Tensor:
    """(N,) from (N, M) logits; a row's target is its positive column, or its id where columns have ids."""
    if column_ids is None:
        return F.cross_entropy(logits, targets, reduction="none")
    positive = targets[:, None] == column_ids
    # Minus the mean log-probability of the positives, as a masked sum: weights of 0 would turn -inf into NaN.
    log_probability = logits.log_softmax(dim=1).masked_fill(~positive, 0)
    return -log_probability.sum(dim=1) / positive.sum(dim=1).clamp(min=1)


def _log_sum_exp(x: Tensor, y: Tensor, budget: int | None) -> Tensor:
    """(N,) log-sum-exp of each row of ``x @ y.T``, in blocks of rows."""
    return by_rows(lambda x, _: (x @ y.T).logsumexp(dim=1), x, x[:, :0], block_bytes(x, y.shape[0]), budget)


def _forward(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    ids_a: Tensor | None,
    ids_b: Tensor | None,
    one_sided: bool,
    label_offset: int,
    memory_budget: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of rows and columns, and each one's log-sum-exp, from which a backward kernel gets softmaxes."""
    rows, columns = clip_loss_reference(a, b, logit_scale, ids_a, ids_b, one_sided, label_offset, memory_budget)
    with torch.autocast(a.device.type, enabled=False):
        scaled, b = logit_scale * a.to(rows.dtype), b.to(rows.dtype)
        rows_lse = _log_sum_exp(scaled, b, memory_budget)
        columns_lse = rows.new_empty(0) if one_sided else _log_sum_exp(b, scaled, memory_budget)
    return rows, columns, rows_lse, columns_lse


def _forward_fake(
    a: Tensor, b: Tensor, logit_scale: Tensor, ids_a: Any, ids_b: Any, one_sided: bool, *options: Any
) -> tuple[Tensor, ...]:
    rows = a.new_empty(a.shape[0], dtype=compute_dtype(a))
    columns = rows.new_empty(0 if one_sided else b.shape[0])
    return rows, columns, torch.empty_like(rows), torch.empty_like(columns)


def _backward(
    grad_rows: Tensor,
    grad_columns: Tensor,
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    ids_a: Tensor | None,
    ids_b: Tensor | None,
    rows_lse: Tensor,
    columns_lse: Tensor,
    one_sided: bool,
    label_offset: int,
    memory_budget: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and the scale; differentiates the reference, so the log-sum-exps are not needed."""

    def losses(a: Tensor, b: Tensor, logit_scale: Tensor) -> tuple[Tensor, ...]:
        both = clip_loss_reference(a, b, logit_scale, ids_a, ids_b, one_sided, label_offset, memory_budget)
        return both[:1] if one_sided else both

    grads = (grad_rows,) if one_sided else (grad_rows, grad_columns)
    grad_a, grad_b, grad_scale = _dispatch.vjp(losses, (a, b, logit_scale), grads)
    return grad_a, grad_b, grad_scale


def _backward_fake(
    grad_rows: Tensor, grad_columns: Tensor, a: Tensor, b: Tensor, logit_scale: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape), torch.empty_like(logit_scale)


_dispatch.declare("clip_loss")
_INPUTS = "Tensor a, Tensor b, Tensor logit_scale, Tensor? ids_a, Tensor? ids_b"
_OPTIONS = "bool one_sided, int label_offset, int? memory_budget"
_forward_op = _dispatch.define(
    f"clip_loss({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)", _forward, _forward_fake
)
_backward_op = _dispatch.define(
    f"clip_loss_backward(Tensor grad_rows, Tensor grad_columns, {_INPUTS}, "
    f"Tensor rows_lse, Tensor columns_lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _ClipLoss(torch.autograd.Function):
    """The registered forward and backward ops as one differentiable function."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        rows, columns, rows_lse, columns_lse = _forward_op(*arguments)
        ctx.save_for_backward(*arguments[:5], rows_lse, columns_lse)
        ctx.options = arguments[5:]
        return rows, columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_columns: Tensor) -> tuple[Tensor | None, ...]:
        # Gradients arrive expanded from the reductions; kernels read them flat.
        grads = _backward_op(grad_rows.contiguous(), grad_columns.contiguous(), *ctx.saved_tensors, *ctx.options)
        return *grads, None, None, None, None, None


def _registered(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Losses of rows and columns through the registered ops."""
    rows, columns = _ClipLoss.apply(*_dispatch.distinct(*arguments[:5]), *arguments[5:])
    return rows, columns
