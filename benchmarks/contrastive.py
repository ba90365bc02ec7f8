"""Batched contrastive similarity, against open_clip, torch, faiss and sentence-transformers.

Embeddings are of unit norm and every pair agrees a little, so that losses and ranks are those of a model under
training. In matrix products of ``2 N M D`` operations, the losses need four (logits, logits again, two gradients), or
three where the logits are kept or, for SigLIP, where a logit's gradient needs no other logit; retrieval needs one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import Case, Gate, Inputs, Outputs, Peer, Run, oracle
from benchmarks.check import ranks_gate, topk_gate
from diffgap.ops.clip_loss import clip_loss
from diffgap.ops.siglip_loss import siglip_loss
from diffgap.ops.similarity import similarity_ranks, similarity_topk

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_BOTH = (torch.float32, torch.bfloat16)
_WIDTH = 512
_TOP = 10
_CHUNK = 512

#: Rows of a and b, and dtypes.
LOSS_SHAPES: dict[str, tuple[tuple[int, tuple[torch.dtype, ...]], ...]] = {
    "ci": ((1024, _BOTH), (4096, (torch.float32,))),
    "full": ((8192, _BOTH),),
}
#: With all logits kept for the backward pass.
BUDGET_ROWS = {"ci": 1024, "full": 8192}
#: Rows whose N x N logits do not fit, as copies of fewer rows.
LARGE_ROWS, LARGE_COPIES = 65536, 8
#: Queries and gallery rows.
RETRIEVAL_SHAPES = {"ci": (512, 10000), "full": (4096, 50000)}

# What their authors start training with.
_CLIP_SCALE = 1 / 0.07
_SIGLIP_SCALE, _SIGLIP_BIAS = 10.0, -10.0


def cases(size: str) -> Iterator[Case]:
    """The cases of ``--size ci`` or ``full``."""
    for rows, dtypes in LOSS_SHAPES[size]:
        for dtype in dtypes:
            yield clip_case(rows, _WIDTH, dtype)
            yield siglip_case(rows, _WIDTH, dtype)
    yield clip_budget_case(BUDGET_ROWS[size], _WIDTH)
    if size == "full":
        yield clip_large_case(LARGE_ROWS, _WIDTH, LARGE_COPIES)
    yield from retrieval_cases(*RETRIEVAL_SHAPES[size], _WIDTH)


def clip_case(rows: int, width: int, dtype: torch.dtype) -> Case:
    """``clip_loss`` with the gradients of the embeddings and the scale."""
    return Case(
        f"clip_loss/fwd+bwd/{rows}x{width}/{_DTYPES[dtype]}",
        dtype,
        partial(_clip_inputs, rows, width, dtype),
        _clip,
        CLIP_PEERS,
        flops=4 * 2.0 * rows * rows * width,
    )


def clip_budget_case(rows: int, width: int) -> Case:
    """``clip_loss`` that may keep its logits: three matrix products in all."""
    budget = 4 * rows * rows
    return Case(
        f"clip_loss/fwd+bwd+budget/{rows}x{width}/fp32",
        torch.float32,
        partial(_clip_inputs, rows, width, torch.float32),
        partial(_clip, memory_budget=budget),
        CLIP_PEERS[:1],
        flops=3 * 2.0 * rows * rows * width,
    )


def clip_large_case(rows: int, width: int, copies: int, dtype: torch.dtype = torch.float32) -> Case:
    """``clip_loss`` of more rows than an oracle, or the memory of most machines, has room for.

    Its rows are ``copies`` of each pair of a smaller batch, shuffled: then every softmax is that batch's, spread evenly
    over the copies. The loss is larger by ``log(copies)``, a gradient that of the original over ``copies``, and the
    scale's gradient the same. So all outputs have an oracle at a ``copies**2``-th of the work.
    """
    base = clip_case(rows // copies, width, dtype)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)) % (rows // copies)

    def inputs(device: torch.device) -> Inputs:
        small = base.inputs(device)
        index = order.to(device)
        large = {name: small[name].detach()[index].requires_grad_() for name in ("a", "b")}
        return {**large, "logit_scale": small["logit_scale"]}

    def expected(device: torch.device) -> Outputs:
        loss, grad_a, grad_b, grad_scale = oracle(base, base.inputs(device))
        index = order.to(device)
        return loss + torch.tensor(float(copies)).log(), grad_a[index] / copies, grad_b[index] / copies, grad_scale

    def infeasible(device: torch.device) -> Mapping[str, str]:
        reasons: dict[str, str] = {}
        # Eager code makes float32 logits of all inputs, open_clip those of the inputs' dtype.
        for name, itemsize in (("eager", 4), ("compile", 4), ("open_clip", dtype.itemsize)):
            stored = itemsize * rows * rows
            # The logits and log-softmaxes of both directions, and their gradients.
            if device.type == "cpu" or 8 * stored > torch.cuda.get_device_properties(device).total_memory:
                reasons[name] = f"needs several N x N matrices of {stored / 2**30:.0f} GiB"
        if device.type == "cpu":
            reasons |= dict.fromkeys(("torch_lce", "torch_chunked"), "minutes a call; see the smaller batch")
        return reasons

    return Case(
        f"clip_loss/fwd+bwd/{rows}x{width}/{_DTYPES[dtype]}",
        dtype,
        inputs,
        _clip,
        CLIP_PEERS,
        flops=4 * 2.0 * rows * rows * width,
        expected=expected,
        infeasible=infeasible,
    )


def siglip_case(rows: int, width: int, dtype: torch.dtype) -> Case:
    """``siglip_loss`` with the gradients of the embeddings, the scale and the bias."""
    return Case(
        f"siglip_loss/fwd+bwd/{rows}x{width}/{_DTYPES[dtype]}",
        dtype,
        partial(_siglip_inputs, rows, width, dtype),
        _siglip,
        SIGLIP_PEERS,
        flops=3 * 2.0 * rows * rows * width,
    )


def retrieval_cases(queries: int, gallery: int, width: int) -> Iterator[Case]:
    """The rank of each query's one answer, and each query's best ten.

    Users of the peers compute recall from the best ten, so that is what ranks are compared with.
    """

    def infeasible(device: torch.device) -> Mapping[str, str]:
        return {"compile": "unrolls the reference's loop over tiles, minutes of compilation"}

    shape = f"{queries}x{gallery}x{width}/fp32"
    flops = 2.0 * queries * gallery * width
    for name, call, gate in (
        ("similarity_ranks", _ranks, ranks_gate),
        ("similarity_topk", _topk, _best_ten_gate),
    ):
        yield Case(
            f"{name}/fwd/{shape}",
            torch.float32,
            partial(_retrieval_inputs, queries, gallery, width),
            call,
            RETRIEVAL_PEERS,
            flops=flops,
            gate=gate,
            infeasible=infeasible,
        )


def _pairs(rows: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Unit vectors, each at a cosine of about 0.25 to its partner."""
    a, noise = (F.normalize(torch.randn(rows, width, generator=generator), dim=1) for _ in range(2))
    return a, F.normalize(a + 4 * noise, dim=1)


def _clip_inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    a, b = _pairs(rows, width, torch.Generator().manual_seed(0))
    leaves = {"a": a.to(device, dtype), "b": b.to(device, dtype), "logit_scale": torch.tensor(_CLIP_SCALE).to(device)}
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def _siglip_inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    scalars = {"logit_scale": _SIGLIP_SCALE, "logit_bias": _SIGLIP_BIAS}
    leaves = {name: torch.tensor(value).to(device).requires_grad_() for name, value in scalars.items()}
    return _clip_inputs(rows, width, dtype, device) | leaves


def _retrieval_inputs(queries: int, gallery: int, width: int, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    g, near = _pairs(gallery, width, generator)
    positives = torch.randperm(gallery, generator=generator)[:queries]
    inputs = {"q": near[positives], "g": g, "positives": positives}
    return {name: value.to(device) for name, value in inputs.items()}


def _clip(**inputs: Any) -> Outputs:
    return (clip_loss(**inputs),)


def _siglip(**inputs: Any) -> Outputs:
    return (siglip_loss(**inputs),)


def _ranks(**inputs: Any) -> Outputs:
    return (similarity_ranks(**inputs),)


def _topk(q: Tensor, g: Tensor, positives: Tensor) -> Outputs:
    return similarity_topk(q, g, _TOP)


def _best_ten_gate(q: Tensor, g: Tensor, positives: Tensor) -> Gate:
    return topk_gate(q, g, _TOP)


def _both_ways(direction: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, logit_scale: Tensor) -> Outputs:
    """A one-sided cross-entropy, given (scaled, other), as CLIP's symmetric loss."""
    return ((direction(logit_scale * a, b) + direction(logit_scale * b, a)) / 2,)


def _open_clip_clip(a: Tensor, b: Tensor, logit_scale: Tensor) -> Run:
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return lambda: (loss(a, b, logit_scale),)


def _open_clip_siglip(a: Tensor, b: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Run:
    from open_clip.loss import SigLipLoss

    loss = SigLipLoss()
    return lambda: (loss(a, b, logit_scale, logit_bias),)


def _linear_cross_entropy(a: Tensor, b: Tensor, logit_scale: Tensor) -> Run:
    labels = torch.arange(a.shape[0], device=a.device)
    options = torch.nn.LinearCrossEntropyOptions()

    def direction(scaled: Tensor, other: Tensor) -> Tensor:
        return F.linear_cross_entropy(scaled, other, labels, options=options)

    return lambda: _both_ways(direction, a, b, logit_scale)


def _checkpointed_chunks(a: Tensor, b: Tensor, logit_scale: Tensor) -> Run:
    labels = torch.arange(a.shape[0], device=a.device)

    def chunk(scaled: Tensor, other: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(scaled @ other.T, targets, reduction="sum")

    def direction(scaled: Tensor, other: Tensor) -> Tensor:
        parts = zip(scaled.split(_CHUNK), labels.split(_CHUNK), strict=True)
        losses = [checkpoint(chunk, rows, other, targets, use_reentrant=False) for rows, targets in parts]
        return torch.stack(losses).sum() / a.shape[0]

    return lambda: _both_ways(direction, a, b, logit_scale)


def _inf_cl(a: Tensor, b: Tensor, logit_scale: Tensor) -> Run:
    from inf_cl import cal_inf_loss

    # Its own scale argument sums the scale's gradient over a process group, which has to exist.
    return lambda: _both_ways(cal_inf_loss, a, b, logit_scale)


def _mm_topk(q: Tensor, g: Tensor, positives: Tensor) -> Run:
    return lambda: tuple((q @ g.T).topk(_TOP, dim=1))


def _faiss(q: Tensor, g: Tensor, positives: Tensor) -> Run:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    queries, gallery = q.numpy(), g.numpy()

    def run() -> Outputs:
        values, indices = faiss.knn(queries, gallery, _TOP, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(values), torch.from_numpy(indices)

    return run


def _semantic_search(q: Tensor, g: Tensor, positives: Tensor) -> Run:
    from sentence_transformers.util import dot_score, semantic_search

    def run() -> Outputs:
        hits = semantic_search(q, g, top_k=_TOP, score_function=dot_score)
        # Reading its dictionaries takes well under a percent of the search.
        values = torch.tensor([[hit["score"] for hit in row] for row in hits], device=q.device)
        return values, torch.tensor([[int(hit["corpus_id"]) for hit in row] for row in hits], device=q.device)

    return run


CLIP_PEERS = (
    Peer("open_clip", _open_clip_clip, "open-clip-torch"),
    Peer("torch_lce", _linear_cross_entropy, "torch>=2.13", module="torch.nn.modules.linear_cross_entropy_options"),
    Peer("torch_chunked", _checkpointed_chunks, "torch", module="torch"),
    Peer("inf_cl", _inf_cl, "inf-cl", devices=("cuda",)),
)
SIGLIP_PEERS = (Peer("open_clip", _open_clip_siglip, "open-clip-torch"),)
RETRIEVAL_PEERS = (
    Peer("torch", _mm_topk, "torch", gate=_best_ten_gate),
    Peer("faiss", _faiss, "faiss-cpu", devices=("cpu",), gate=_best_ten_gate),
    Peer("sentence_transformers", _semantic_search, "sentence-transformers", gate=_best_ten_gate),
)
