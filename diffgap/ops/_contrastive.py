"""Argument checks and row blocking shared by the contrastive ops (clip_loss, siglip_loss, similarity)."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffgap.ops._dispatch import is_finite, readable

Reduction = Literal["mean", "sum", "none"]

#: What the kernels take; float64 is for the eager references.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Tensors of the block's size that live at once while its loss is differentiated: the logits, their
# log-probabilities and the gradients of both.
_LIVE_TENSORS = 4


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, else float32: what similarities are accumulated and returned in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_embeddings(op: str, names: tuple[str, str], x: Tensor, y: Tensor) -> None:
    """Raise unless ``x`` (N, D) and ``y`` (M, D) are floating-point, of one dtype, device and width."""
    for name, value in zip(names, (x, y), strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
        if value.ndim != 2:
            raise ValueError(f"{op}: {name} must be (rows, width), got shape {tuple(value.shape)}")
        if value.dtype not in (*DTYPES, torch.float64):
            raise TypeError(f"{op}: {name} must be float32, float16, bfloat16 or float64, got {value.dtype}")
    x_name, y_name = names
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{op}: {x_name} and {y_name} must have one width, got {x.shape[1]} and {y.shape[1]}")
    if x.dtype != y.dtype:
        raise TypeError(f"{op}: {x_name} and {y_name} must have one dtype, got {x.dtype} and {y.dtype}; cast one")
    if x.device != y.device:
        raise ValueError(f"{op}: {x_name} and {y_name} must be on one device, got {x.device} and {y.device}")


def check_integers(op: str, name: str, values: Tensor, rows: Tensor) -> None:
    """Raise unless ``values`` is an int64 vector with one entry per row of ``rows``, on its device."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{op}: {name} must be an int64 tensor, got {type(values).__name__}")
    if values.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {values.dtype}")
    if values.shape != rows.shape[:1]:
        raise ValueError(f"{op}: {name} must be ({rows.shape[0]},), one per row, got shape {tuple(values.shape)}")
    if values.device != rows.device:
        raise ValueError(f"{op}: {name} must be on {rows.device}, got {values.device}")


def check_ids(op: str, a: Tensor, b: Tensor, ids_a: Tensor | None, ids_b: Tensor | None, offset: int) -> None:
    """Raise unless the positives are well defined: both ids and no offset, or a diagonal within (N, M)."""
    if (ids_a is None) != (ids_b is None):
        missing = "ids_a" if ids_a is None else "ids_b"
        raise ValueError(f"{op}: {missing} is missing; give ids_a and ids_b together")
    if ids_a is not None and ids_b is not None:
        check_integers(op, "ids_a", ids_a, a)
        check_integers(op, "ids_b", ids_b, b)
        if offset != 0:
            raise ValueError(f"{op}: label_offset={offset} has no meaning with ids; leave it out")
    elif not 0 <= offset <= b.shape[0] - a.shape[0]:
        raise ValueError(
            f"{op}: row i's positive is row i + {offset} of b, but a has {a.shape[0]} rows and b has "
            f"{b.shape[0]}; give ids_a and ids_b, or a label_offset that fits"
        )


def check_options(op: str, reduction: str, memory_budget: int | None) -> None:
    """Raise on an unknown reduction or a memory budget that is not a positive number of bytes."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"{op}: reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}")
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"{op}: memory_budget must be a positive number of bytes or None, got {memory_budget}")


def scalar(op: str, name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """``value`` as a 0-d tensor in the compute dtype on the device of ``like``, differentiable.

    A non-finite number raises. So does a CPU tensor; one on a device is not read, for that would stop the
    host until the device has caught up, and shows as a non-finite loss.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(
                f"{op}: {name} must be a number or a tensor of one, got {value.dtype} of shape {tuple(value.shape)}"
            )
        if readable(value) and not is_finite(value.item()):
            raise ValueError(f"{op}: {name} must be finite, got {value.item()}")
        return value.reshape(()).to(like.device, compute_dtype(like))
    if not isinstance(value, (int, float, Real)):  # numpy's are Real
        raise TypeError(f"{op}: {name} must be a number or a tensor of one element, got {type(value).__name__}")
    if not is_finite(value):
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return torch.full((), float(value), dtype=compute_dtype(like), device=like.device)


def block_bytes(x: Tensor, columns: int) -> int:
    """Bytes that a row of ``columns`` similarities of ``x`` takes while its loss is differentiated."""
    return _LIVE_TENSORS * columns * torch.finfo(compute_dtype(x)).bits // 8


def by_rows(
    function: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    positions: Tensor,
    row_bytes: int,
    budget: int | None,
) -> Tensor:
    """Concatenate ``function(x[rows], positions[rows])`` over blocks of rows that fit in ``budget`` bytes.

    The backward pass recomputes each block, so only one is in memory at a time. A block has at least one row;
    without a budget it has all of them, and nothing is recomputed.
    """
    if budget is None or budget >= row_bytes * x.shape[0]:
        return function(x, positions)
    size = max(1, budget // row_bytes)
    blocks = zip(x.split(size), positions.split(size), strict=True)
    parts = [checkpoint(function, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
    return torch.cat(parts)


def pair_ids(
    a: Tensor, b: Tensor, ids_a: Tensor | None, ids_b: Tensor | None, label_offset: int | None
) -> tuple[Tensor, Tensor]:
    """Ids of the rows of ``a`` and ``b`` whose equality makes a pair positive, where none are given too."""
    if ids_a is None or ids_b is None:
        # Positions as ids: row i pairs with column i + label_offset; negative ids pair with none.
        ids_a, ids_b = (torch.arange(x.shape[0], device=x.device) for x in (a, b))
        ids_a = -1 - ids_a if label_offset is None else ids_a + label_offset
    return ids_a, ids_b


def positive_weights(
    ids_a: Tensor | None, ids_b: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """``1 / |P_i|`` of each row and of each column, 0 for one without positives; ``None`` without ids."""
    if ids_a is None or ids_b is None:
        return None, None

    def weights(ids: Tensor, others: Tensor) -> Tensor:
        ordered, ids = others.sort().values, ids.contiguous()  # torch warns of other strides
        first, last = (torch.searchsorted(ordered, ids, right=right) for right in (False, True))
        count = (last - first).to(dtype)
        return torch.where(count > 0, 1 / count, 0)

    return weights(ids_a, ids_b), weights(ids_b, ids_a)
