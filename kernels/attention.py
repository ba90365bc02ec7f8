"""Triton kernels of ``diffgap::attention`` and ``diffgap::attention_backward``; the op module has the formulas.

Where all queries and keys of a batch and head fit in one tile, the short path, one launch each way and nothing saved
but the inputs; elsewhere the long path. Nothing is atomic, so the same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from diffgap.kernels._attention_long import (
    long_backward_keys_kernel,
    long_backward_queries_kernel,
    long_forward_kernel,
)
from diffgap.kernels._attention_rows import UNIT
from diffgap.kernels._attention_short import short_backward_kernel, short_forward_kernel
from diffgap.kernels._tiles import blocks
from diffgap.kernels.configs import SHORT, Attention, Pass, attention_config, chip_of, product_kind
from torch import Tensor
from torch.nn import functional as F


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    causal: bool,
    config: Attention | None = None,
) -> tuple[Tensor, Tensor]:
    """``diffgap::attention``; ``config`` for tests and compilation without a GPU."""
    features = q.shape[3]
    q, k, v, q_weight, k_weight = (_padded(x) for x in (q, k, v, q_weight, k_weight))
    b, n_q, h, d = q.shape
    n_k = k.shape[1]
    short = max(n_q, n_k) <= SHORT
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((0,) if short else (b, h, n_q), dtype=torch.float32, device=q.device)
    if output.numel() == 0 or n_k == 0:
        return output[..., :features].contiguous().zero_(), lse.fill_(-torch.inf)
    config = config or _config(q, k, "forward")
    (q, k, v), strides = _addressed(q, k, v)
    _, output_strides = _addressed(output)
    options = _options(config, q, features, q_weight, k_weight, key_mask, causal)
    key_mask = None if key_mask is None else key_mask.contiguous()
    with torch.cuda.device_of(q):
        if short:
            short_forward_kernel[(blocks(b * h, config.pairs),)](
                q, k, v, q_weight, k_weight, key_mask, output, scale, b * h, h, n_q, n_k, d, *strides, *output_strides,
                PAIRS=config.pairs, **options,
            )  # fmt: skip
        else:
            long_forward_kernel[(b * h * blocks(n_q, config.block_m),)](
                q, k, v, q_weight, k_weight, key_mask, output, lse, scale, h, n_q, n_k, d, *strides, *output_strides,
                MASKED=_masked(key_mask, causal, n_k, config.block_n), **options,
            )  # fmt: skip
    return output[..., :features].contiguous(), lse


def backward(
    grad: Tensor,
    output: Tensor | None,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    causal: bool,
    config: Attention | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``diffgap::attention_backward``; ``config`` for tests and compilation without a GPU."""
    features = q.shape[3]
    grad, q, k, v, output, q_weight, k_weight = (_padded(x) for x in (grad, q, k, v, output, q_weight, k_weight))
    b, n_q, h, d = q.shape
    n_k = k.shape[1]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return _narrowed(features, dq.zero_(), dk.zero_(), dv.zero_(), _parts(q_weight, 0, q), _parts(k_weight, 0, q))
    config = config or _config(q, k, "backward")
    options = _options(config, q, features, q_weight, k_weight, key_mask, causal)
    _, (dq_strides, dk_strides) = _addressed(dq, dk)
    key_mask = None if key_mask is None else key_mask.contiguous()
    with torch.cuda.device_of(q):
        if output is None or lse is None:
            (grad, q, k, v), strides = _addressed(grad, q, k, v)
            programs = blocks(b * h, config.pairs)
            parts_q, parts_k = (_parts(w, programs, q) for w in (q_weight, k_weight))
            short_backward_kernel[(programs,)](
                grad, q, k, v, q_weight, k_weight, key_mask, dq, dk, dv, parts_q, parts_k,
                scale, b * h, h, n_q, n_k, d, *strides, dq_strides, dk_strides,
                PAIRS=config.pairs, **options,
            )  # fmt: skip
        else:
            (output, grad, q, k, v), (output_strides, *strides) = _addressed(output, grad, q, k, v)
            programs_q, programs_k = (b * h * blocks(n, config.block_m) for n in (n_q, n_k))
            parts_q, parts_k = _parts(q_weight, programs_q, q), _parts(k_weight, programs_k, q)
            delta = torch.empty_like(lse)
            long_backward_queries_kernel[(programs_q,)](
                grad, output, lse, q, k, v, q_weight, k_weight, key_mask, dq, delta, parts_q, scale, h, n_q, n_k, d,
                strides[0], output_strides, *strides[1:], dq_strides,
                MASKED=_masked(key_mask, causal, n_k, config.block_n), **options,
            )  # fmt: skip
            long_backward_keys_kernel[(programs_k,)](
                grad, delta, lse, q, k, v, q_weight, k_weight, key_mask, dk, dv, parts_k, scale, h, n_q, n_k, d,
                *strides, dk_strides,
                MASKED=_masked(key_mask, causal, n_k, config.block_m), **options,
            )  # fmt: skip
    return _narrowed(features, dq, dk, dv, parts_q, parts_k)


def _config(q: Tensor, k: Tensor, which: Pass) -> Attention:
    """The row of the tables for the device, dtype and sizes."""
    return attention_config(chip_of(q), product_kind(q), q.shape[1], k.shape[1], q.shape[3], which)


def _options(
    config: Attention,
    q: Tensor,
    features: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    key_mask: Tensor | None,
    causal: bool,
) -> dict[str, Any]:
    """Launch arguments that all kernels take."""
    return config.options(q) | {
        "D": q.shape[3],
        "FEATURES": features,
        "Q_NORM": q_weight is not None,
        "K_NORM": k_weight is not None,
        "HAS_MASK": key_mask is not None,
        "CAUSAL": causal,
    }


def _masked(key_mask: Tensor | None, causal: bool, n_k: int, block_n: int) -> bool:
    """Whether some key of a block of the long path may be hidden from some query."""
    return key_mask is not None or causal or n_k % block_n != 0


def _padded(x: Any) -> Any:
    """A tensor whose d is filled up with zeros to a multiple of UNIT, for which rows can be aligned."""
    return x if x is None or x.shape[-1] % UNIT.value == 0 else F.pad(x, (0, -x.shape[-1] % UNIT.value))


def _narrowed(
    features: int, dq: Tensor, dk: Tensor, dv: Tensor, parts_q: Tensor, parts_k: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients, those of the weights summed up, without what :func:`_padded` added."""
    dq, dk, dv, dq_weight, dk_weight = (
        x[..., :features].contiguous() for x in (dq, dk, dv, parts_q.sum(0), parts_k.sum(0))
    )
    return dq, dk, dv, dq_weight, dk_weight


def _addressed(*tensors: Tensor) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    """The tensors (B, N, H, d), copied only where d is not contiguous or rows do not begin at multiples of 16 bytes;
    their strides of B, N and H in units of UNIT."""
    rows = [x if x.stride(3) == 1 and _aligned(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors]
    return rows, [tuple(stride // UNIT.value for stride in x.stride()[:3]) for x in rows]


def _aligned(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and all(stride % UNIT.value == 0 for stride in x.stride()[:3])


def _parts(weight: Tensor | None, programs: int, q: Tensor) -> Tensor:
    """One row per program of the gradient of a weight, to be summed over the programs."""
    return torch.empty((0, 0) if weight is None else (programs, q.shape[3]), dtype=torch.float32, device=q.device)
