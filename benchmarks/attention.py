"""Attention over short sequences, against SDPA and its backends, FlexAttention, xformers and FlashAttention.

Every implementation is given tensors of our layout, (B, N, H, d), as a projection makes them, and returns its output in
it. SDPA wants (B, H, N, d) and gets transposed views. In matrix products of ``2 B H N_q N_k d`` operations
a forward pass needs two, and a forward and a backward pass seven: the logits are computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.cases import (
    DIRECTIONS,
    DTYPES,
    Case,
    Direction,
    Gate,
    Inputs,
    Outputs,
    Peer,
    Run,
    differentiated,
    in_float64,
    under,
)
from diffgap.ops.attention import attention

#: What a case has beside queries, keys and values.
Option = Literal["norm", "mask"]

HEADS, HEAD_DIM = 8, 64
BATCH = {"ci": 8, "full": 64}
#: (N_q, N_k).
LENGTHS = {
    "ci": ((4, 4), (16, 16)),
    "full": ((4, 4), (8, 8), (16, 16), (16, 77), (64, 64), (256, 256)),
}
#: Where queries and keys are normalised, or some keys masked.
OPTION_LENGTHS = (16, 16)
#: Inputs that have a part for every sample of the batch.
_OF_SAMPLES = ("q", "k", "v", "key_mask")
#: Logits of a slice of the batch in the oracle, which holds several tensors of so many in float64.
_ORACLE_LOGITS = 1 << 26
_PRODUCTS = {"fwd": 2, "fwd+bwd": 7}
_EPS = 1e-6


def cases(size: str) -> Iterator[Case]:
    """The cases of ``--size ci`` or ``full``."""
    batch = BATCH[size]
    for n_q, n_k in LENGTHS[size]:
        for dtype in DTYPES:
            for direction in DIRECTIONS:
                yield attention_case(direction, batch, n_q, n_k, dtype)
    for option in ("norm", "mask"):
        for direction in DIRECTIONS:
            yield attention_case(direction, batch, *OPTION_LENGTHS, "fp32", option)


def attention_case(
    direction: Direction,
    batch: int,
    n_q: int,
    n_k: int,
    dtype_name: str,
    option: Option | None = None,
    heads: int = HEADS,
    head_dim: int = HEAD_DIM,
) -> Case:
    """Attention of ``n_q`` queries to ``n_k`` keys, and in a ``fwd+bwd`` case the gradients of all it is made from."""
    dtype = DTYPES[dtype_name]
    inputs = partial(_inputs, direction, (batch, n_q, n_k, heads, head_dim), dtype, option)
    label = direction if option is None else f"{direction}+{option}"
    return Case(
        f"attention/{label}/{batch}x{n_q}x{n_k}x{heads}x{head_dim}/{dtype_name}",
        dtype,
        inputs,
        _attention,
        (*PEERS, COPY) if direction == "fwd" else PEERS,
        flops=_PRODUCTS[direction] * 2.0 * batch * heads * n_q * n_k * head_dim,
        expected=lambda device: _sliced_oracle(inputs(device), max(1, _ORACLE_LOGITS // (heads * n_q * n_k))),
        infeasible=partial(_infeasible, direction, dtype, option),
    )


def _inputs(
    direction: Direction,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    option: Option | None,
    device: torch.device,
) -> Inputs:
    batch, n_q, n_k, heads, head_dim = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    inputs: Inputs = {
        name: normal(batch, n, heads, head_dim).to(device, dtype) for name, n in (("q", n_q), ("k", n_k), ("v", n_k))
    }
    if option == "norm":
        inputs |= {name: (1 + 0.1 * normal(head_dim)).to(device) for name in ("q_weight", "k_weight")}
    if direction == "fwd+bwd":
        inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    if option == "mask":
        # As in a batch of captions: the first tokens of each, at least one.
        lengths = torch.randint(1, n_k + 1, (batch, 1), generator=generator)
        inputs["key_mask"] = (torch.arange(n_k) < lengths).to(device)
    return inputs


def _sliced_oracle(inputs: Inputs, samples: int) -> Outputs:
    """The outputs in float64, of ``samples`` of the batch at a time: no sample has an influence on another's.

    At once the largest batch of the models would take about 96 GB.
    """
    parts = []
    for start in range(0, inputs["q"].shape[0], samples):
        rows = slice(start, start + samples)
        exact = in_float64({name: x[rows] if name in _OF_SAMPLES else x for name, x in inputs.items()})
        run = under("eager", partial(_attention, **exact))
        parts.append(differentiated(run, exact, first=start * inputs["q"][0].numel())())
    # The output, then the gradients of the inputs that have one; those of shared inputs add up.
    names = ["output", *(name for name, x in inputs.items() if x.requires_grad)]
    return tuple(
        torch.cat(of_slices) if name in ("output", *_OF_SAMPLES) else torch.stack(of_slices).sum(0)
        for name, of_slices in zip(names, zip(*parts, strict=True), strict=True)
    )


def _infeasible(
    direction: Direction, dtype: torch.dtype, option: Option | None, device: torch.device
) -> Mapping[str, str]:
    """Who cannot take a case on a device, among the peers that exist for it."""
    if device.type == "cpu":
        return {"flex": "has no backward pass on the CPU"} if direction == "fwd+bwd" else {}
    reasons: dict[str, str] = {}
    if dtype == torch.float32:
        reasons |= dict.fromkeys(("sdpa_flash", "sdpa_cudnn", "flash_attn"), "takes no float32")
    if option == "mask":
        reasons |= dict.fromkeys(("sdpa_flash", "flash_attn"), "takes no key mask")
    return reasons


def _attention(**inputs: Any) -> Outputs:
    return (attention(**inputs),)


def _normed(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else F.rms_norm(x, weight.shape, weight.to(x.dtype), _EPS)


def _peer(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Run:
    """A peer that attends from (q, k, v, key_mask), all (B, N, H, d), and has its queries and keys normalised."""
    return lambda: (attend(_normed(q, q_weight), _normed(k, k_weight), v, key_mask),)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    mask = None if key_mask is None else key_mask[:, None, None, :]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _sdpa_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    with sdpa_kernel(backend):
        return _sdpa(q, k, v, key_mask)


def _flex(key_mask: Tensor | None = None, **inputs: Any) -> Run:
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    block_mask = None if key_mask is None else _block_mask(key_mask, inputs["q"].shape[1])

    def attend(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=block_mask).transpose(1, 2)

    return _peer(attend, **inputs)


def _block_mask(key_mask: Tensor, n_q: int) -> BlockMask:
    batch, n_k = key_mask.shape
    return create_block_mask(lambda b, h, i, j: key_mask[b, j], batch, None, n_q, n_k, device=key_mask.device)


def _xformers(*, own: bool = False, **inputs: Any) -> Run:
    """By the kernel that xformers chooses, or by its own, which is CUTLASS's, where it would take another's."""
    from xformers.ops import MemoryEfficientAttentionCutlassOp, memory_efficient_attention

    op = MemoryEfficientAttentionCutlassOp if own else None

    def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        bias = None
        if key_mask is not None:
            # A dense bias, whose rows its kernels want aligned to eight elements.
            (batch, n_k), n_q, heads = key_mask.shape, q.shape[1], q.shape[2]
            rows = q.new_zeros(batch, 1, 1, -(-n_k // 8) * 8)[..., :n_k].masked_fill_(
                ~key_mask[:, None, None], -torch.inf
            )
            bias = rows.expand(batch, heads, n_q, n_k)
        return cast(Tensor, memory_efficient_attention(q, k, v, attn_bias=bias, op=op))

    return _peer(attend, **inputs)


def _flash_attn(**inputs: Any) -> Run:
    flash_attn_func = import_module("flash_attn").flash_attn_func
    return _peer(lambda q, k, v, _: flash_attn_func(q, k, v), **inputs)


def _copy(q: Tensor, k: Tensor, **others: Tensor) -> Run:
    source = torch.ones(q.numel() + k.numel(), dtype=q.dtype, device=q.device)
    target = torch.empty_like(source)
    return lambda: (target.copy_(source),)


def _copied(**inputs: Tensor) -> Gate:
    return lambda outputs: None if (outputs[0] == 1).all() else "is no copy"


def _sdpa_peer(name: str, backend: SDPBackend) -> Peer:
    return Peer(name, partial(_peer, partial(_sdpa_backend, backend)), "torch", module="torch", devices=("cuda",))


#: Moves as many bytes as q, k, v and the output have: its time over ours is the share of its bandwidth that we reach.
COPY = Peer("copy", _copy, "torch", module="torch", gate=_copied)
PEERS = (
    Peer("sdpa", partial(_peer, _sdpa), "torch", module="torch"),
    Peer("flex", _flex, "torch", module="torch"),
    _sdpa_peer("sdpa_flash", SDPBackend.FLASH_ATTENTION),
    _sdpa_peer("sdpa_efficient", SDPBackend.EFFICIENT_ATTENTION),
    _sdpa_peer("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION),
    _sdpa_peer("sdpa_math", SDPBackend.MATH),
    Peer("xformers", _xformers, "xformers", devices=("cuda",)),
    Peer("xformers_cutlass", partial(_xformers, own=True), "xformers", module="xformers", devices=("cuda",)),
    Peer("flash_attn", _flash_attn, "flash-attn", devices=("cuda",)),
)
