"""Drop-in replacements of open_clip's contrastive losses, on :func:`clip_loss`, :func:`siglip_loss` and their rings.

The same constructor and call as ``open_clip.loss.ClipLoss`` and ``SigLipLoss`` (3.3.0 and main), the same
loss and, under ``DistributedDataParallel``, the same gradients. What differs: the loss is float32 also for
float16 and bfloat16 embeddings and inside autocast, and the gradient of ``ClipLoss``'s ``logit_bias`` is
exactly 0, as it should be.

Both are a ``loss_fn(x, y)`` once a scale is bound, as by ``functools.partial(ClipLoss(), logit_scale=20.0)``: that is
GradCache's ``loss_fn``, and with this scale sentence-transformers' in-batch loss in both directions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffgap.ops._contrastive import block_bytes, check_embeddings
from diffgap.ops.clip_loss import clip_loss
from diffgap.ops.siglip_loss import siglip_loss
from diffgap.ring_loss import ring_clip_loss, ring_siglip_loss

_SIGLIP_EXCHANGES = ("bidir", "shift", "reduce", "gather")


def _check_world(rank: int, world_size: int) -> None:
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in [0, world_size), got rank={rank}, world_size={world_size}")


def _check_group(rank: int, world_size: int) -> None:
    """Raise unless the default process group is the one the loss was built for."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"world_size={world_size} needs torch.distributed: call init_process_group, or set world_size=1"
        )
    if (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
        raise ValueError(
            f"the loss was built for rank {rank} of {world_size}, but the process group says rank "
            f"{dist.get_rank()} of {dist.get_world_size()}"
        )


def _one_dtype(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider dtype: under autocast two towers may end in different ones."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _check_even(image: Tensor, text: Tensor) -> None:
    """Raise, on every rank, unless all have features of one shape: gathering others fails, or never ends."""
    own = torch.tensor([*image.shape, *text.shape], device=image.device)
    gathered = own.new_empty(dist.get_world_size(), len(own))
    dist.all_gather(list(gathered), own)
    first, *others = gathered.tolist()
    for rank, found in enumerate(others, 1):
        if found != first:
            raise ValueError(
                f"ClipLoss: rank 0 has image and text features {first[:2]} and {first[2:]}, rank {rank} "
                f"{found[:2]} and {found[2:]}, but this mode gathers equally many of each; set drop_last=True in the "
                "data loader, or local_loss=True and gather_with_grad=True here"
            )


def _gather(x: Tensor) -> Tensor:
    """Rows of all ranks, without gradient."""
    gathered = x.new_empty((dist.get_world_size() * x.shape[0], *x.shape[1:]))
    dist.all_gather(list(gathered.chunk(dist.get_world_size())), x.detach().contiguous())
    return gathered


class _GatherWithGrad(torch.autograd.Function):
    """Rows of all ranks; the gradients all ranks have for this rank's rows are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # A reduce-scatter, by hand: not every version of gloo has one.
        received = torch.empty_like(grad, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, grad.contiguous())
        return received.unflatten(0, (dist.get_world_size(), -1)).sum(dim=0)


def mean_over_ranks(values: Tensor) -> Tensor:
    r"""This rank's share of the mean of the values (N,) of all ranks of the default process group, N each rank's own.

    .. math::
        L_r = \frac{W}{\sum_q N_q} \sum_i \text{values}_i

    So the mean of :math:`L_r` over the W ranks, which is what ``DistributedDataParallel`` takes of their gradients, is
    that of one process that has all values. Outside a process group it is the mean; of no values 0.
    """
    count, world = torch.full((), len(values), device=values.device), 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        world = dist.get_world_size()
    return values.sum() * (world / count.clamp(min=1))


class ClipLoss(nn.Module):
    """open_clip's ``ClipLoss``.

    Args:
        local_loss: Every rank computes the loss of its own rows against all ranks' embeddings, instead of the
            whole. With ``gather_with_grad`` this is :func:`ring_clip_loss`, which gathers nothing and whose
            memory does not grow with the number of ranks; the other three modes gather the embeddings.
        gather_with_grad: Gradients flow back to the ranks the embeddings came from. Without it a rank
            differentiates only its own rows; with ``local_loss`` too, only as queries.
        cache_labels: Accepted; there are no label tensors to cache.
        rank: This process's rank.
        world_size: Number of processes. Above 1, the default process group is used.
        use_horovod: Only ``False``.

    Raises:
        ValueError: Horovod, a rank outside the world, a process group of another rank or size, or, in the modes that
            gather, ranks of different batches.
        RuntimeError: ``world_size`` above 1 and no process group.

    The ring takes an uneven last batch; the modes that gather need ``drop_last=True`` in the data loader, and tell one
    another their shapes before each gather.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        _check_world(rank, world_size)
        if use_horovod:
            raise ValueError("use_horovod=True is not supported; use torch.distributed")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of (N, D) features of this rank, or ``{"contrastive_loss": loss}``; see
        :func:`clip_loss`."""
        image, text = _one_dtype(image_features, text_features)
        if self.world_size == 1:
            loss = clip_loss(image, text, logit_scale)
        elif self.local_loss and self.gather_with_grad:
            _check_group(self.rank, self.world_size)
            loss = ring_clip_loss(image, text, logit_scale)
        elif self.local_loss:
            all_image, all_text = self._gather_all(image, text)
            first = self.rank * image.shape[0]
            loss = (
                clip_loss(image, all_text, logit_scale, one_sided=True, label_offset=first)
                + clip_loss(text, all_image, logit_scale, one_sided=True, label_offset=first)
            ) / 2
        else:
            loss = clip_loss(*self._gather_all(image, text), logit_scale)
        if isinstance(logit_bias, Tensor):
            # Both softmaxes cancel a bias; in the graph it gets the zero gradient that DDP waits for.
            loss = loss + 0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss

    def _gather_all(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        _check_group(self.rank, self.world_size)
        check_embeddings("ClipLoss", ("image_features", "text_features"), image, text)
        _check_even(image, text)
        return self._gathered(image), self._gathered(text)

    def _gathered(self, x: Tensor) -> Tensor:
        if self.gather_with_grad:
            return _GatherWithGrad.apply(x)
        gathered = _gather(x)
        if self.local_loss:
            return gathered
        first = self.rank * x.shape[0]
        return torch.cat([gathered[:first], x, gathered[first + x.shape[0] :]])


class SigLipLoss(nn.Module):
    """open_clip's ``SigLipLoss``.

    Args:
        cache_labels: Accepted; there are no label tensors to cache.
        rank: This process's rank.
        world_size: Number of processes. Above 1, the default process group is used; ranks may have different
            numbers of rows.
        dist_impl: ``"bidir"``, ``"shift"``, ``"reduce"`` or ``"gather"``, or ``None``: open_clip's ways to
            move the text features. They differ in transfers, not in the loss; here all of them are
            :func:`ring_siglip_loss`.
        chunk_size: Rows of the similarity matrix held at a time where no kernel runs; 0 is all of them. The
            backward pass recomputes them, so unlike open_clip's this bounds the memory of training too.

    Raises:
        ValueError: a rank outside the world, an unknown ``dist_impl``, a negative ``chunk_size``, or a
            process group of another rank or size.
        RuntimeError: ``world_size`` above 1 and no process group.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        _check_world(rank, world_size)
        if dist_impl is not None and dist_impl not in _SIGLIP_EXCHANGES:
            raise ValueError(f"dist_impl must be one of {', '.join(_SIGLIP_EXCHANGES)} or None, got {dist_impl!r}")
        if chunk_size < 0:
            raise ValueError(f"chunk_size must be a number of rows, 0 for all, got {chunk_size}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of (N, D) features of this rank, or ``{"contrastive_loss": loss}``; see
        :func:`siglip_loss`."""
        image, text = _one_dtype(image_features, text_features)
        budget = self.chunk_size * block_bytes(image, text.shape[0]) or None
        if self.world_size == 1:
            loss = siglip_loss(image, text, logit_scale, logit_bias, memory_budget=budget)
        else:
            _check_group(self.rank, self.world_size)
            loss = ring_siglip_loss(image, text, logit_scale, logit_bias, memory_budget=budget)
        return {"contrastive_loss": loss} if output_dict else loss
