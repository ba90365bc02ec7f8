"""What the losses of ranks must be, from one process that holds the rows of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffgap.ops.clip_loss import clip_loss
from diffgap.ops.siglip_loss import siglip_loss


def from_whole_batch(
    loss: str,
    inputs: Sequence[Tensor],
    ids: tuple[Tensor, Tensor] | None,
    sizes: tuple[list[int], list[int]],
    upstream: Sequence[float],
) -> tuple[list[Tensor], list[Tensor]]:
    """Each rank's ``ring_clip_loss`` or ``ring_siglip_loss`` by its formula, and the gradients of their weighted sum.

    Args:
        loss: ``clip`` or ``siglip``.
        inputs: All ranks' a and b, then the scale and, for SigLIP, the bias.
        ids: All ranks', of a and of b; ``None`` is the diagonal.
        sizes: Rows of a and of b on every rank.
        upstream: The weights, one a rank.
    """
    inputs = [x.detach().requires_grad_() for x in inputs]
    world = len(upstream)
    if loss == "siglip":
        ids_a, ids_b = ids or (None, None)
        each = siglip_loss(*inputs, ids_a=ids_a, ids_b=ids_b, reduction="none", label_offset=None if ids else 0)
        losses = [x.sum() * world / max(len(each), 1) for x in each.split(sizes[0])]
    else:
        a, b, scale = inputs
        id_a, id_b = ids or (torch.arange(len(a)), torch.arange(len(b)))
        means = []
        for (x, y, id_x, id_y), rows in zip(((a, b, id_a, id_b), (b, a, id_b, id_a)), sizes, strict=True):
            side = clip_loss(x, y, scale, ids_a=id_x, ids_b=id_y, one_sided=True, reduction="none")
            count = torch.isin(id_x, id_y).sum().clamp(min=1)
            means.append([part.sum() * world / count for part in side.split(rows)])
        losses = [(rows + columns) / 2 for rows, columns in zip(*means, strict=True)]
    weighted = torch.stack([weight * loss for weight, loss in zip(upstream, losses, strict=True)]).sum()
    return [x.detach() for x in losses], list(torch.autograd.grad(weighted, inputs))
