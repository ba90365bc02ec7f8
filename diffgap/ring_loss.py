r"""CLIP and SigLIP losses of a batch that lies on several ranks: exact, in O(n D) memory per rank.

Rank r keeps its n rows :math:`a_r`, and the blocks :math:`b_q` of all ranks pass it (:mod:`diffgap.ring`). Each tile
:math:`a_r b_q^\top` is one call of an op that stores nothing of its size; the state of the tile's columns, or their
gradient, follows the block home. Nothing is gathered. Ranks may have different numbers of rows, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffgap.ops import _dispatch
from diffgap.ops._contrastive import (
    DTYPES,
    check_embeddings,
    check_ids,
    check_options,
    compute_dtype,
    positive_weights,
    scalar,
)
from diffgap.ops.clip_loss import _backward as _clip_backward
from diffgap.ops.clip_loss import _backward_op as _clip_backward_op
from diffgap.ops.clip_loss import _forward as _clip_forward
from diffgap.ops.clip_loss import _forward_op as _clip_forward_op
from diffgap.ops.clip_loss import backward_factors, clip_loss, merge_lse
from diffgap.ops.siglip_loss import _backward as _siglip_backward
from diffgap.ops.siglip_loss import _backward_op as _siglip_backward_op
from diffgap.ops.siglip_loss import _forward_op as _siglip_forward_op
from diffgap.ops.siglip_loss import siglip_loss, siglip_loss_reference
from diffgap.ring import Ring, ranks_per_node


def ring_clip_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    *,
    ids_a: Tensor | None = None,
    ids_b: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    r"""This rank's share of :func:`diffgap.ops.clip_loss` of the rows of all ranks.

    .. math::
        L_r = \frac{W}{2} \Big( \frac{1}{R} \sum_{i \in \text{rank } r} r_i
            + \frac{1}{C} \sum_{j \in \text{rank } r} c_j \Big)

    with :math:`r_i` and :math:`c_j` as in ``clip_loss`` over the global batch, and R rows and C columns in it that have
    a positive. So the mean of :math:`L_r` over ranks is the loss of one process that holds the batch. Without ids and
    with as many rows on each rank it is open_clip's ``ClipLoss(local_loss=True, gather_with_grad=True)``.

    Forward and backward pass are collective: every rank of the group calls both, with the same ``logit_scale``, or all
    wait for the one that does not.

    Args:
        a: (N, D) embeddings of this rank; float32, float16, bfloat16 or float64. N and M may differ between ranks.
        b: (M, D) embeddings of this rank, of the same dtype and device; M = N without ids.
        logit_scale: The factor itself, ``exp`` already taken: a number, or a tensor of one element.
        ids_a: (N,) int64. With ``ids_b``, every pair of equal id is a positive, on whichever ranks its two sides are.
        ids_b: (M,) int64.
        group: The ranks; ``None`` is the default group. With one rank, or without a process group, this is
            ``clip_loss``.
        memory_budget: Bytes of scratch for the similarities of a tile, as in ``clip_loss``.

    Returns:
        0-d, in the dtype ``clip_loss`` returns. Its gradients for ``a`` and ``b`` are those of :math:`\sum_r L_r`. That
        for ``logit_scale`` is this rank's part of a sum over ranks. After ``DistributedDataParallel``'s averaging all
        parameters have the gradient of one process.

    Raises:
        ValueError: as ``clip_loss``, and on every rank where the ranks' widths, dtypes or options do not agree.
        TypeError: as ``clip_loss``.

    Source: Radford et al., arXiv 2103.00020; the ring: Cheng et al. (Inf-CL), arXiv 2410.17243.
    """
    tensors = a, b, logit_scale
    options: dict[str, Any] = {"ids_a": ids_a, "ids_b": ids_b, "memory_budget": memory_budget}
    ring, _ = _ring_of("ring_clip_loss", tensors, group, **options)
    if ring is None:
        return clip_loss(a, b, logit_scale, **options)
    scale = scalar("ring_clip_loss", "logit_scale", logit_scale, a)
    loss: Tensor = _RingClipLoss.apply(a, b, scale, ids_a, ids_b, ring, memory_budget)
    return loss


def ring_siglip_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    ids_a: Tensor | None = None,
    ids_b: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    r"""This rank's share of :func:`diffgap.ops.siglip_loss` of the rows of all ranks.

    .. math::
        L_r = \frac{W}{R} \sum_{i \in \text{rank } r} r_i

    with :math:`r_i` as in ``siglip_loss`` over the columns of all ranks, and R the rows of all W ranks. So the mean of
    :math:`L_r` over ranks is the loss of one process that holds the batch. Without ids and with as many rows on each
    rank it is open_clip's ``SigLipLoss``.

    Forward and backward pass are collective: every rank of the group calls both, with the same ``logit_scale`` and
    ``logit_bias``, or all wait for the one that does not.

    Args:
        a: (N, D) embeddings of this rank; float32, float16, bfloat16 or float64. N and M may differ between ranks.
        b: (M, D) embeddings of this rank, of the same dtype and device; M = N without ids.
        logit_scale: The factor itself, ``exp`` already taken: a number, or a tensor of one element.
        logit_bias: Added to every similarity; as ``logit_scale``. ``None`` is 0.
        ids_a: (N,) int64. With ``ids_b``, every pair of equal id is a positive, on whichever ranks its two sides are.
        ids_b: (M,) int64.
        group: The ranks; ``None`` is the default group. With one rank, or without a process group, this is
            ``siglip_loss``.
        memory_budget: Bytes of scratch for the similarities of a tile, as in ``siglip_loss``.

    Returns:
        0-d, in the dtype ``siglip_loss`` returns. Its gradients for ``a`` and ``b`` are those of :math:`\sum_r L_r`;
        those for ``logit_scale`` and ``logit_bias`` are those of :math:`L_r`. After ``DistributedDataParallel``'s
        averaging all parameters have the gradient of one process.

    Raises:
        ValueError: as ``siglip_loss``, and on every rank where the ranks' widths, dtypes or options do not agree.
        TypeError: as ``siglip_loss``.

    Source: Zhai et al., arXiv 2303.15343.
    """
    tensors = a, b, logit_scale, logit_bias
    options: dict[str, Any] = {"ids_a": ids_a, "ids_b": ids_b, "memory_budget": memory_budget}
    ring, rows = _ring_of("ring_siglip_loss", tensors, group, **options)
    if ring is None:
        return siglip_loss(a, b, logit_scale, logit_bias, **options)
    scale = scalar("ring_siglip_loss", "logit_scale", logit_scale, a)
    bias = scalar("ring_siglip_loss", "logit_bias", 0.0 if logit_bias is None else logit_bias, a)
    arguments, share = (a, b, scale, bias, ids_a, ids_b, ring, memory_budget), ring.world / rows
    if _wants_gradient(tensors):
        loss: Tensor = _RingSiglipLoss.apply(share, *arguments)
        return loss
    return share * _siglip_ring(None, *arguments)[0].sum()


def _wants_gradient(tensors: Sequence[object]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


def _ring_of(
    op: str,
    tensors: Sequence[Any],
    group: dist.ProcessGroup | None,
    ids_a: Tensor | None,
    ids_b: Tensor | None,
    memory_budget: int | None,
) -> tuple[Ring | None, int]:
    """The ring, unless there is one rank or no pair, and the rows of a on all ranks.

    Raises where arguments are wrong or ranks disagree.
    """
    a, b = tensors[:2]
    check_embeddings(op, ("a", "b"), a, b)
    check_options(op, "mean", memory_budget)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return None, len(a)
    if dist.get_rank(group) < 0:
        raise ValueError(f"{op}: this process is not in the group")
    # Before the checks that only some ranks might fail: the others would wait for them in the ring.
    with_ids, learnt = ids_a is not None or ids_b is not None, _wants_gradient(tensors)
    ring, rows = _agreed_ring(op, a, b, with_ids, learnt, group)
    check_ids(op, a, b, ids_a, ids_b, 0)
    if ids_a is None and a.shape[0] != b.shape[0]:
        raise ValueError(f"{op}: a has {a.shape[0]} rows and b has {b.shape[0]}; give ids, or as many of each")
    return ring if rows and sum(ring.rows) and a.shape[1] else None, rows


def _agreed_ring(
    op: str, a: Tensor, b: Tensor, with_ids: bool, learnt: bool, group: dist.ProcessGroup | None
) -> tuple[Ring, int]:
    """The ring, and the rows of a on all ranks; raises on every rank unless they agree in width, dtype and options."""
    dtypes = (*DTYPES, torch.float64)
    facts = [a.shape[1], dtypes.index(a.dtype), with_ids, learnt, len(a), len(b), ranks_per_node(group)]
    own = torch.tensor(facts, device=a.device)
    gathered = own.new_empty(dist.get_world_size(group), len(own))
    dist.all_gather(list(gathered), own, group=group)
    ranks = gathered.tolist()

    def describe(rank: int) -> str:
        width, dtype, with_ids, learnt, rows_a, rows_b, _ = ranks[rank]
        options = f"{'with' if with_ids else 'no'} ids, {'with' if learnt else 'no'} gradient"
        return f"rank {rank} has a ({rows_a}, {width}) and b ({rows_b}, {width}), {dtypes[dtype]}, {options}"

    for rank, found in enumerate(ranks):
        if found[:4] != ranks[0][:4]:
            raise ValueError(
                f"{op}: the ranks must agree in all but the rows, but {describe(0)}, and {describe(rank)}; "
                "call it alike on all ranks"
            )
    *_, rows_a, rows_b, sizes = zip(*ranks, strict=True)
    world = len(ranks)
    even = len(set(sizes)) == 1 and world % min(sizes) == 0
    return Ring(group, dist.get_rank(group), rows_b, min(sizes) if even else world), sum(rows_a)


def _merge_states(x: Tensor, y: Tensor) -> Tensor:
    r"""State of rows over two sets of columns from that over each.

    A state is (N, 4): the log-sum-exp l in the two parts of :func:`merge_lse`, the loss and the number P of
    positives. Losses stay relative, l less the mean positive logit, so none of a nearly solved batch's is lost:

    .. math::
        r = \sum_{q \in \{x, y\}} \frac{P_q}{P} \big( r_q + (l - l_q) \big), \qquad P = P_x + P_y
    """
    lse, count = merge_lse(x[:, :2], y[:, :2]), x[:, 3] + y[:, 3]
    # l_q is -inf where q has no columns.
    known = (torch.where(z[:, 3] > 0, z[:, 2] + (lse - z[:, :2]).sum(dim=1), 0) for z in (x, y))
    from_x, from_y = (losses * z[:, 3] / count.clamp(min=1) for losses, z in zip(known, (x, y), strict=True))
    return torch.cat([lse, torch.stack([from_x + from_y, count], dim=1)], dim=1)


def _state(losses: Tensor, lse: Tensor, weights: Tensor | None, own: bool) -> Tensor:
    """State of rows or columns over one tile; without ids (no weights) each has one positive, in the own tile."""
    count = torch.full_like(losses, own) if weights is None else _reciprocal(weights).round()
    return torch.cat([lse, torch.stack([losses, count], dim=1)], dim=1)


def _reciprocal(x: Tensor) -> Tensor:
    """1 / x, 0 where x is 0: weights of positives from their number, and back."""
    return torch.where(x > 0, 1 / x, 0)


class _RingClipLoss(torch.autograd.Function):
    """Forward: states of rows and columns. Backward: the ring again, with the global log-sum-exps."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        ids_a: Tensor | None,
        ids_b: Tensor | None,
        ring: Ring,
        memory_budget: int | None,
    ) -> Tensor:
        forward = _clip_forward_op if _dispatch.choose("clip_loss", a) == "native" else _clip_forward

        def tile(own: bool, b: Tensor, ids_b: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
            weights = positive_weights(ids_a, ids_b, compute_dtype(a))
            rows, columns, rows_lse, columns_lse, _ = forward(
                a, b, scale, ids_a, ids_b, *weights, False, _label_offset(own, ids_a), memory_budget, False
            )
            return [_state(rows, rows_lse, weights[0], own)], [_state(columns, columns_lse, weights[1], own)]

        (rows,), (columns,) = ring.circulate([b] if ids_b is None else [b, ids_b], tile, _merge_states)
        counts = torch.stack([(x[:, 3] > 0).sum() for x in (rows, columns)])
        dist.all_reduce(counts, group=ring.group)
        shares = ring.world / 2 / counts.clamp(min=1).to(rows.dtype)
        ctx.save_for_backward(a, b, scale, ids_a, ids_b, rows, columns, shares)
        ctx.options = ring, memory_budget
        return (shares * torch.stack([rows[:, 2].sum(), columns[:, 2].sum()])).sum()  # a product would obey autocast

    @staticmethod
    @_dispatch.first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, scale, ids_a, ids_b, rows, columns, shares = ctx.saved_tensors
        ring, memory_budget = ctx.options
        backward = _clip_backward_op if _dispatch.choose("clip_loss", a) == "native" else _clip_backward
        (softmax_rows, target_rows), column_factors = (
            backward_factors((grad * share).expand(len(x)), None if ids_a is None else _reciprocal(x[:, 3]))
            for share, x in zip(shares, (rows, columns), strict=True)
        )
        rows_lse, columns_lse = (x[:, :2].contiguous() for x in (rows, columns))
        no_logits = rows.new_empty(0, 0)

        def tile(
            own: bool, b: Tensor, columns_lse: Tensor, softmax_columns: Tensor, target_columns: Tensor, *ids_b: Tensor
        ) -> tuple[list[Tensor], list[Tensor]]:
            grad_a, grad_b, grad_scale = backward(
                *(a, b, scale, ids_a, ids_b[0] if ids_b else None, rows_lse, columns_lse),
                *(softmax_rows, softmax_columns, target_rows, target_columns, no_logits),
                *(_label_offset(own, ids_a), memory_budget),
            )
            return [grad_a, grad_scale], [grad_b]

        block = [b, columns_lse, *column_factors, *([] if ids_b is None else [ids_b])]
        (grad_a, grad_scale), (grad_b,) = ring.circulate(block, tile, Tensor.add_)
        return grad_a.to(a.dtype), grad_b.to(b.dtype), grad_scale, None, None, None, None


def _label_offset(own: bool, ids: Tensor | None) -> int | None:
    """The op's ``label_offset``: the diagonal of the own tile is positive, no pair of the others, unless by id."""
    return 0 if own or ids is not None else None


def _siglip_ring(
    grad_rows: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    ids_a: Tensor | None,
    ids_b: Tensor | None,
    ring: Ring,
    memory_budget: int | None,
) -> list[Tensor]:
    """Losses of this rank's rows; with ``grad_rows`` also the gradients of a, b, scale and bias.

    Those for a, scale and bias are of this rank's ``(grad_rows * losses).sum()``, that for b of its sum over ranks.
    """
    native = _dispatch.choose("siglip_loss", a) == "native"
    forward = _siglip_forward_op if native else siglip_loss_reference
    backward = _siglip_backward_op if native else _siglip_backward

    def tile(own: bool, b: Tensor, ids_b: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        arguments = a, b, scale, bias, ids_a, ids_b, _label_offset(own, ids_a), memory_budget
        if grad_rows is None:
            return [forward(*arguments)], []
        losses, grad_a, grad_b, grad_scale, grad_bias = backward(grad_rows, *arguments)
        return [losses, grad_a, grad_scale, grad_bias], [grad_b]

    found, columns = ring.circulate([b] if ids_b is None else [b, ids_b], tile, Tensor.add_)
    return [*found[:2], *columns, *found[2:]]


class _RingSiglipLoss(torch.autograd.Function):
    """Loss and gradients in one ring: the loss is a sum over pairs, so a tile's gradient needs that tile alone."""

    @staticmethod
    def forward(ctx: Any, share: float, *arguments: Any) -> Tensor:
        a = arguments[0]
        ctx.share, ctx.options = share, arguments[6:]
        shares = a.new_full((len(a),), share, dtype=compute_dtype(a))
        losses, *grads = _siglip_ring(shares, *arguments)
        ctx.save_for_backward(*arguments[:6], *grads)
        return share * losses.sum()

    @staticmethod
    @_dispatch.first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        arguments, grads = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        ring, _ = ctx.options
        upstream = grad.new_empty(ring.world, 1)
        dist.all_gather(list(upstream), grad.reshape(1), group=ring.group)
        if bool((upstream == upstream[0]).all()):
            grads = [grad * x for x in grads]
        else:  # b's gradient has summed the ranks' losses with equal weights
            shares = (grad * ctx.share).expand(len(arguments[0])).contiguous()
            _, *grads = _siglip_ring(shares, *arguments, *ctx.options)
        casted = (x.to(argument.dtype) for x, argument in zip(grads, arguments, strict=False))
        return None, *casted, None, None, None, None
