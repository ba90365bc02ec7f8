r"""CLIP loss: symmetric cross-entropy over the similarities of a batch, with no stored N x M matrix where a
kernel runs.

.. math::
    S = \text{logit\_scale} \; a b^\top

.. math::
    r_i = -\frac{1}{|P_i|} \sum_{j \in P_i} \log \operatorname{softmax}_j (S_{ij}), \qquad
    c_j = -\frac{1}{|P_j|} \sum_{i \in P_j} \log \operatorname{softmax}_i (S_{ij})

with P the positives: the diagonal, or the pairs of equal id. Symmetric: ``mean(r) / 2 + mean(c) / 2``;
one-sided: ``mean(r)``. A bias added to S would cancel in both softmaxes, so there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    positive_weights,
    scalar,
)
from diffgap.ops._native import CPU_MISSING, TRITON_MISSING


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
            needs no more than a tile; where all similarities in float32 (4 N M bytes) fit in the budget it keeps
            them for the backward pass, which then needs three matrix products in all instead of four.
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

    if _dispatch.choose("clip_loss", a) == "eager":
        rows, columns = clip_loss_reference(a, b, scale, ids_a, ids_b, one_sided, label_offset, memory_budget)
        weights = positive_weights(ids_a, ids_b, compute_dtype(a))
    else:
        rows, columns, weights = _registered(a, b, scale, ids_a, ids_b, one_sided, label_offset, memory_budget)
    if reduction == "none":
        return rows if one_sided else (rows + columns) / 2
    if reduction == "sum":
        return rows.sum() if one_sided else (rows.sum() + columns.sum()) / 2
    rows_mean = _mean(rows, weights[0])
    return rows_mean if one_sided else (rows_mean + _mean(columns, weights[1])) / 2


def _mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of ``losses`` over the rows that have a positive; 0 if none has."""
    count = max(losses.shape[0], 1) if weights is None else (weights > 0).sum().clamp(min=1)
    return losses.sum() / count


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
    with _dispatch.autocast_off(a):
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


def _blocks(a: Tensor, b: Tensor, budget: int | None) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows that fit in the budget, each with its rows of ``a @ b.T``; the same bits at every call."""
    size = max(1, min(a.shape[0], (budget or 2**62) // max(block_bytes(a, b.shape[0]), 1)))
    for start in range(0, a.shape[0], size):
        rows = slice(start, start + size)
        yield rows, a[rows] @ b.T


def merge_lse(x: Tensor, y: Tensor) -> Tensor:
    """Log-sum-exp over two sets from that over each, as (N, 2): the maximum m and ``log(sum(exp(S - m)))``.

    In two parts, because their sum would round away what a nearly solved batch still has to learn.
    """
    largest = torch.maximum(x[:, 0], y[:, 0])
    rest = torch.logaddexp(*(z[:, 1] + (z[:, 0] - largest).nan_to_num(nan=0.0, neginf=-torch.inf) for z in (x, y)))
    return torch.stack([largest, rest], dim=1)


def _lse(logits: Tensor) -> Tensor:
    """Log-sum-exp of each row in the two parts of :func:`merge_lse`; of an empty row -inf and -inf."""
    if logits.shape[1] == 0:
        return logits.new_full((logits.shape[0], 2), -torch.inf)
    largest = logits.amax(dim=1)
    return torch.stack([largest, (logits - largest[:, None]).exp().sum(dim=1).log()], dim=1)


def _forward(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    ids_a: Tensor | None,
    ids_b: Tensor | None,
    weights_a: Tensor | None,
    weights_b: Tensor | None,
    one_sided: bool,
    label_offset: int | None,
    memory_budget: int | None,
    keep_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses of rows and columns, each one's log-sum-exp as :func:`merge_lse` has it, and the logits or (0, 0).

    ``label_offset=None`` without ids: nothing is positive, and all losses are 0. The weights are those of
    :func:`positive_weights`; kernels need them, the reference counts for itself.
    """
    with _dispatch.autocast_off(a):
        wide_a, wide_b = a.to(compute_dtype(a)), b.to(compute_dtype(b))
        rows_lse = wide_a.new_empty((a.shape[0], 2))
        columns_lse = _lse(wide_b.new_empty((0 if one_sided else b.shape[0], 0)))
        logits = wide_a.new_empty((a.shape[0], b.shape[0]) if keep_logits else (0, 0))
        for block, similarity in _blocks(wide_a, wide_b, memory_budget):
            s = logit_scale * similarity
            rows_lse[block] = _lse(s)
            columns_lse = columns_lse if one_sided else merge_lse(columns_lse, _lse(s.T))
            if keep_logits:
                logits[block] = s
    if label_offset is None and ids_a is None:
        rows, columns = rows_lse.new_zeros(a.shape[0]), columns_lse.new_zeros(columns_lse.shape[0])
        return rows, columns, rows_lse, columns_lse, logits
    rows, columns = clip_loss_reference(a, b, logit_scale, ids_a, ids_b, one_sided, label_offset or 0, memory_budget)
    return rows, columns, rows_lse, columns_lse, logits


def _forward_fake(
    a: Tensor, b: Tensor, logit_scale: Tensor, ids_a: Any, ids_b: Any, weights_a: Any, weights_b: Any,
    one_sided: bool, label_offset: int | None, memory_budget: int | None, keep_logits: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows = a.new_empty(a.shape[0], dtype=compute_dtype(a))
    columns = rows.new_empty(0 if one_sided else b.shape[0])
    logits = rows.new_empty((a.shape[0], b.shape[0]) if keep_logits else (0, 0))
    return rows, columns, rows.new_empty((*rows.shape, 2)), rows.new_empty((*columns.shape, 2)), logits


def _backward(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    ids_a: Tensor | None,
    ids_b: Tensor | None,
    rows_lse: Tensor,
    columns_lse: Tensor,
    softmax_rows: Tensor,
    softmax_columns: Tensor,
    target_rows: Tensor,
    target_columns: Tensor,
    logits: Tensor,
    label_offset: int | None,
    memory_budget: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Gradients of a, b and the scale in the compute dtype, with p the positives as 0 and 1:

    .. math::
        G_{ij} = \text{softmax\_rows}_i \exp(S_{ij} - \text{rows\_lse}_i)
               + \text{softmax\_columns}_j \exp(S_{ij} - \text{columns\_lse}_j)
               - p_{ij} (\text{target\_rows}_i + \text{target\_columns}_j)

    ``grad_a = scale * G b``, ``grad_b = scale * G^T a``, ``grad_scale = sum_ij G_ij <a_i, b_j>``. The vectors
    of the columns have no entries where the loss is one-sided. ``logits`` is S, or (0, 0) to compute it again;
    here it always is.
    """
    ids_a, ids_b = pair_ids(a, b, ids_a, ids_b, label_offset)
    two_sided = columns_lse.shape[0] == b.shape[0]

    def softmax(s: Tensor, lse: Tensor) -> Tensor:
        # Never above 1, though with infinite logits or on other hardware s may differ from the forward pass's.
        return (s - lse[..., 0] - lse[..., 1]).clamp(max=0).exp()

    with _dispatch.autocast_off(a):
        wide_a, wide_b = a.to(compute_dtype(a)), b.to(compute_dtype(b))
        grad_a, grad_b, grad_scale = torch.zeros_like(wide_a), torch.zeros_like(wide_b), wide_a.new_zeros(())
        for rows, similarity in _blocks(wide_a, wide_b, memory_budget):
            s = logit_scale * similarity
            g = softmax_rows[rows, None] * softmax(s, rows_lse[rows, None])
            target = target_rows[rows, None]
            if two_sided:
                g = g + softmax_columns * softmax(s, columns_lse)
                target = target + target_columns
            g = g - torch.where(ids_a[rows, None] == ids_b, target, 0)
            grad_a[rows] = logit_scale * (g @ wide_b)
            grad_b += logit_scale * (g.T @ wide_a[rows])
            grad_scale += (g * similarity).sum()
    return grad_a, grad_b, grad_scale


def _backward_fake(a: Tensor, b: Tensor, logit_scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(a)
    return a.new_empty(a.shape, dtype=dtype), b.new_empty(b.shape, dtype=dtype), torch.empty_like(logit_scale)


_TRITON = _dispatch.Native("Triton", DTYPES, TRITON_MISSING)
_dispatch.declare("clip_loss", cpu=_dispatch.Native("C++", DTYPES, CPU_MISSING), cuda=_TRITON)
_INPUTS = "Tensor a, Tensor b, Tensor logit_scale, Tensor? ids_a, Tensor? ids_b"
_forward_op = _dispatch.define(
    f"clip_loss({_INPUTS}, Tensor? weights_a, Tensor? weights_b, bool one_sided, int? label_offset, "
    "int? memory_budget, bool keep_logits) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = _dispatch.define(
    f"clip_loss_backward({_INPUTS}, Tensor rows_lse, Tensor columns_lse, Tensor softmax_rows, "
    "Tensor softmax_columns, Tensor target_rows, Tensor target_columns, Tensor logits, int? label_offset, "
    "int? memory_budget) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_dispatch.implement(_TRITON, "diffgap.kernels.clip_loss", clip_loss="forward", clip_loss_backward="backward")


def backward_factors(grad: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the gradient of the row losses (or the columns') multiplies: each row's softmax, and its positives."""
    grad = grad.contiguous()  # gradients arrive expanded from the reductions; kernels read them flat
    return (grad, grad) if weights is None else (grad * (weights > 0), grad * weights)


class _ClipLoss(torch.autograd.Function):
    """The registered forward and backward ops as one differentiable function."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        ids_a: Tensor | None,
        ids_b: Tensor | None,
        weights_a: Tensor | None,
        weights_b: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, Tensor]:
        _, label_offset, memory_budget, _ = options
        outputs = _forward_op(a, b, scale, ids_a, ids_b, weights_a, weights_b, *options)
        rows, columns, rows_lse, columns_lse, logits = outputs
        ctx.save_for_backward(a, b, scale, ids_a, ids_b, weights_a, weights_b, rows_lse, columns_lse, logits)
        ctx.options = label_offset, memory_budget
        return rows, columns

    @staticmethod
    @_dispatch.first_order
    def backward(ctx: Any, grad_rows: Tensor, grad_columns: Tensor) -> tuple[Tensor | None, ...]:
        a, b, scale, ids_a, ids_b, weights_a, weights_b, rows_lse, columns_lse, logits = ctx.saved_tensors
        softmax_rows, target_rows = backward_factors(grad_rows, weights_a)
        softmax_columns, target_columns = grad_columns, grad_columns
        if grad_columns.shape[0] > 0:
            softmax_columns, target_columns = backward_factors(grad_columns, weights_b)
        factors = softmax_rows, softmax_columns, target_rows, target_columns
        grad_a, grad_b, grad_scale = _backward_op(
            a, b, scale, ids_a, ids_b, rows_lse, columns_lse, *factors, logits, *ctx.options
        )
        return grad_a.to(a.dtype), grad_b.to(b.dtype), grad_scale, *(None,) * 8


def _registered(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    ids_a: Tensor | None,
    ids_b: Tensor | None,
    one_sided: bool,
    label_offset: int,
    memory_budget: int | None,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """Losses of rows and columns through the registered ops, and the weights of the positives."""
    weights = positive_weights(ids_a, ids_b, compute_dtype(a))
    # In the compute dtype: logits near 100 are off by up to 1/4 in bfloat16 and 1/32 in float16, gradients as much.
    logits_bytes = a.shape[0] * b.shape[0] * torch.finfo(compute_dtype(a)).bits // 8
    learnt = torch.is_grad_enabled() and any(x.requires_grad for x in (a, b, scale))
    keep = learnt and memory_budget is not None and logits_bytes <= memory_budget
    tensors = _dispatch.distinct(a, b, scale, ids_a, ids_b, *weights)
    rows, columns = _ClipLoss.apply(*tensors, one_sided, label_offset, memory_budget, keep)
    return rows, columns, weights
