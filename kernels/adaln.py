"""Triton kernels of ``diffgap::adaln`` and ``diffgap::adaln_backward``; the op module has the formulas.

A program holds whole rows, the features of some tokens, in registers and reads and writes each once. Tensors are
addressed by their strides over samples and tokens; modulation that the tokens of a sample share has stride 0 over
tokens. With ``a = grad_h (1 + scale)``, ``n`` the normed row, ``r`` its inverse standard deviation and means over
the features:

    dy = grad_y + r (a - mean(a) - n mean(a n)),   dx = dy,   dbranch = gate dy,
    dgate = dy branch,   dscale = grad_h n,   dshift = grad_h,   summed over the tokens that share a row of them.

The sums are formed in a fixed order: a program adds up the tokens of a chunk, a second kernel the chunks. Nothing is
atomic. Names inside kernels as in ``_tiles``.
"""

# The arguments of kernels are Triton's to type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from diffgap.kernels._tiles import blocks, store_gradient
from diffgap.kernels.configs import Rows, adaln_config, chip_of
from torch import Tensor

_EPS: tl.constexpr = tl.constexpr(1e-6)

#: Arguments of the kernels by which Triton shall not specialize: any number of tokens runs the same code.
_SIZES = ("R", "N", "chunk", "chunks")

#: Programs that occupy a large GPU several times over: a sample's tokens are cut into chunks until there are so many.
_PROGRAMS = 1024

#: Tokens of a chunk at most: the rounding error of a sum grows with the root of its terms.
_LONGEST_CHUNK = 256

#: Features that a program of the merging kernel adds up, in 4 warps: 16 bytes a thread.
_MERGE_BLOCK = 512


@triton.jit
def _normed(b_y, m_d, D):
    """The rows of ``b_y`` [ROWS, BLOCK_D] normed, 0 beyond D, and their inverse standard deviations [ROWS, 1].

    The rounded mean is corrected by that of the differences from it, which float32 holds exactly.
    """
    b_c = tl.where(m_d, b_y - (tl.sum(b_y, 1) / D)[:, None], 0.0)
    b_delta = (tl.sum(b_c, 1) / D)[:, None]
    b_c = tl.where(m_d, b_c - b_delta, 0.0)
    # One feature is its own mean, so y has no influence on it.
    b_rstd = tl.where(D > 1, tl.rsqrt(tl.sum(b_c * b_c, 1) / D + _EPS), 0.0)[:, None]
    return b_c * b_rstd, b_rstd


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    p_x, p_branch, p_gate, p_shift, p_scale, p_y, p_h,
    R, N, D, x_b, x_n, branch_b, branch_n, gate_b, gate_n, shift_b, shift_n, scale_b, scale_n,
    GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y and h of ROWS of the R rows, B samples of N tokens."""
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    o_d = tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    m_d = o_d < D
    m = (o_r < R) & m_d
    i_b, i_n = o_r // N, o_r % N
    b_y = tl.load(p_x + i_b * x_b + i_n * x_n + o_d, mask=m, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    if GATED:
        b_branch = tl.load(p_branch + i_b * branch_b + i_n * branch_n + o_d, mask=m, other=0.0).to(tl.float32)
        b_gate = tl.load(p_gate + i_b * gate_b + i_n * gate_n + o_d, mask=m, other=0.0).to(tl.float32)
        b_y += b_gate * b_branch
        store_gradient(p_y + o_r * D + o_d, b_y, m, WIDEN)
    b_scale = tl.load(p_scale + i_b * scale_b + i_n * scale_n + o_d, mask=m, other=0.0).to(tl.float32)
    b_shift = tl.load(p_shift + i_b * shift_b + i_n * shift_n + o_d, mask=m, other=0.0).to(tl.float32)
    b_normed, _ = _normed(b_y, m_d, D)
    store_gradient(p_h + o_r * D + o_d, b_normed * (1.0 + b_scale) + b_shift, m, WIDEN)


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    p_grad_y, p_grad_h, p_x, p_branch, p_gate, p_scale, p_dx, p_dbranch, p_dgate, p_dshift, p_dscale,
    N, D, chunk, chunks,
    grad_y_b, grad_y_n, grad_h_b, grad_h_n, x_b, x_n, branch_b, branch_n, gate_b, gate_n, scale_b, scale_n,
    GATED: tl.constexpr, HAS_GRAD_Y: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    RELOAD: tl.constexpr, WIDEN: tl.constexpr, WIDEN_SUMS: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk of a sample's tokens; of the modulation their sums, (B, chunks, D), if SUMS. RELOAD to read
    the gate twice rather than keep it in registers."""
    i_sum = tl.program_id(0)
    i_b, i_chunk = (i_sum // chunks).to(tl.int64), i_sum % chunks
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_d = o_d < D
    b_dgate = tl.zeros((ROWS, BLOCK_D), tl.float32)
    b_dshift = tl.zeros((ROWS, BLOCK_D), tl.float32)
    b_dscale = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for first in range(i_chunk * chunk, min(i_chunk * chunk + chunk, N), ROWS):
        i_n = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        m = (i_n < N) & m_d
        b_y = tl.load(p_x + i_b * x_b + i_n * x_n + o_d, mask=m, other=0.0).to(tl.float32)
        if GATED:
            b_branch = tl.load(p_branch + i_b * branch_b + i_n * branch_n + o_d, mask=m, other=0.0).to(tl.float32)
            b_gate = tl.load(p_gate + i_b * gate_b + i_n * gate_n + o_d, mask=m, other=0.0).to(tl.float32)
            b_y += b_gate * b_branch
        b_grad_h = tl.load(p_grad_h + i_b * grad_h_b + i_n * grad_h_n + o_d, mask=m, other=0.0).to(tl.float32)
        b_scale = tl.load(p_scale + i_b * scale_b + i_n * scale_n + o_d, mask=m, other=0.0).to(tl.float32)
        b_normed, b_rstd = _normed(b_y, m_d, D)
        b_a = b_grad_h * (1.0 + b_scale)
        b_mean_a, b_mean_an = tl.sum(b_a, 1) / D, tl.sum(b_a * b_normed, 1) / D
        b_dy = b_rstd * (b_a - b_mean_a[:, None] - b_normed * b_mean_an[:, None])
        if HAS_GRAD_Y:
            b_dy += tl.load(p_grad_y + i_b * grad_y_b + i_n * grad_y_n + o_d, mask=m, other=0.0).to(tl.float32)
        o_out = (i_b * N + i_n) * D + o_d
        store_gradient(p_dx + o_out, b_dy, m, WIDEN)
        if GATED:
            if RELOAD:
                b_gate = tl.load(p_gate + i_b * gate_b + i_n * gate_n + o_d, mask=m, other=0.0).to(tl.float32)
            store_gradient(p_dbranch + o_out, b_dy * b_gate, m, WIDEN)
        if SUMS:
            # Beyond N and D grad_h and branch are 0.
            b_dshift += b_grad_h
            b_dscale += b_grad_h * b_normed
            if GATED:
                b_dgate += b_dy * b_branch
        else:
            store_gradient(p_dshift + o_out, b_grad_h, m, WIDEN_SUMS)
            store_gradient(p_dscale + o_out, b_grad_h * b_normed, m, WIDEN_SUMS)
            if GATED:
                store_gradient(p_dgate + o_out, b_dy * b_branch, m, WIDEN_SUMS)
    if SUMS:
        o_sum = i_sum.to(tl.int64) * D + tl.arange(0, BLOCK_D)
        m_sum = tl.arange(0, BLOCK_D) < D
        store_gradient(p_dshift + o_sum, tl.sum(b_dshift, 0), m_sum, WIDEN_SUMS)
        store_gradient(p_dscale + o_sum, tl.sum(b_dscale, 0), m_sum, WIDEN_SUMS)
        if GATED:
            store_gradient(p_dgate + o_sum, tl.sum(b_dgate, 0), m_sum, WIDEN_SUMS)


@triton.jit(do_not_specialize=_SIZES)
def _merge_kernel(p_parts, p_sums, chunks, D, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr):
    """``sums`` (rows, D): the sum of ``parts`` (rows, chunks, D) float32 over the chunks, one after another."""
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_sum = tl.zeros((BLOCK_D,), tl.float32)
    for i_chunk in range(chunks):
        b_sum += tl.load(p_parts + (i_row * chunks + i_chunk) * D + o_d, mask=m_d, other=0.0)
    store_gradient(p_sums + i_row * D + o_d, b_sum, m_d, WIDEN)


def forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    config: Rows | None = None,
) -> tuple[Tensor, Tensor]:
    """``diffgap::adaln``; ``config`` for tests and compilation without a GPU."""
    b, n, d = x.shape
    h = x.new_empty(x.shape)
    y = x.new_empty(0 if branch is None else x.shape)
    if x.numel() == 0:
        return y, h
    config = config or _config(x)
    rows, strides = _addressed(x, branch, gate, shift, scale)
    with torch.cuda.device_of(x):
        _forward_kernel[(blocks(b * n, config.rows),)](
            *rows, y, h, b * n, n, d, *strides, GATED=branch is not None, ROWS=config.rows, BLOCK_D=config.block_d,
            WIDEN=_widen(x), num_warps=config.num_warps,
        )  # fmt: skip
    return y, h


def backward(
    grad_y: Tensor | None,
    grad_h: Tensor,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    config: Rows | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``diffgap::adaln_backward``; ``config`` for tests and compilation without a GPU."""
    b, n, d = x.shape
    dx, dbranch, dgate, dshift, dscale = (
        x.new_empty(0 if t is None else t.shape) for t in (x, branch, gate, scale, scale)
    )
    if x.numel() == 0:
        return dx, dbranch, dgate.zero_(), dshift.zero_(), dscale.zero_()
    config = config or _config(x)
    shared = scale.ndim == 2
    sums = shared and config.keeps_sums
    chunk = _chunk(b, n, config.rows)
    chunks = blocks(n, chunk)
    pieces = chunks if sums else n
    merged = [dshift, dscale] if gate is None else [dshift, dscale, dgate]
    parts = [x.new_empty((b, pieces, d), dtype=torch.float32) for _ in merged] if shared and pieces > 1 else merged
    rows, strides = _addressed(grad_y, grad_h, x, branch, gate, scale)
    with torch.cuda.device_of(x):
        _backward_kernel[(b * chunks,)](
            *rows, dx, dbranch, parts[2] if gate is not None else dgate, parts[0], parts[1], n, d, chunk, chunks,
            *strides, GATED=branch is not None, HAS_GRAD_Y=grad_y is not None, SUMS=sums, ROWS=config.rows,
            BLOCK_D=config.block_d, RELOAD=not config.keeps_sums, WIDEN=_widen(x), WIDEN_SUMS=_widen(parts[0]),
            num_warps=config.num_warps,
        )  # fmt: skip
        for part, result in zip(parts, merged, strict=True):
            if part is not result:
                _merge_kernel[(b, blocks(d, _MERGE_BLOCK))](
                    part, result, pieces, d, BLOCK_D=_MERGE_BLOCK, WIDEN=_widen(result), num_warps=4
                )
    return dx, dbranch, dgate, dshift, dscale


def _config(x: Tensor) -> Rows:
    return adaln_config(chip_of(x), x.shape[2])


def _chunk(samples: int, tokens: int, rows: int) -> int:
    """Tokens of a sample that one program works through, a power of two times ``rows``."""
    wanted = min(blocks(samples * tokens, _PROGRAMS), _LONGEST_CHUNK, tokens)
    return rows * int(triton.next_power_of_2(blocks(wanted, rows)))


def _widen(x: Tensor) -> bool:
    """Whether stores to ``x`` must round by hand: Triton's interpreter truncates to bfloat16."""
    return bool(triton.knobs.runtime.interpret) and x.dtype == torch.bfloat16


def _addressed(*tensors: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """The tensors, copied where features do not lie next to each other, and each one's strides by sample and token."""
    dense = [t if t is None or t.shape[-1] == 1 or t.stride(-1) == 1 else t.contiguous() for t in tensors]
    strides = [(0, 0) if t is None else (t.stride(0), t.stride(1) if t.ndim == 3 else 0) for t in dense]
    return dense, [stride for pair in strides for stride in pair]
