"""The denoiser's parts: embeddings, gated MLP, DiT block."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffgap.models.blocks import ROWS_PER_BLOCK, Context, DiTBlock, GatedMLP, Residual, TimestepEmbedding
from diffgap.models.tokens import DenoiserConfig, Tokenizer, sinusoidal_embedding
from tests.helpers import assert_close_to_oracle

CONFIG = DenoiserConfig(embedding_dim=24, kinds=("vector", "sequence"), tokens_per_vector=3, width=16, heads=2)


def test_sinusoidal_embedding() -> None:
    embedding = sinusoidal_embedding(torch.tensor([0.0, 2.0]), 4, max_period=100.0)
    frequencies = (1.0, 0.1)
    expected = [[f(2 * w) for w in frequencies] for f in (math.cos, math.sin)]
    torch.testing.assert_close(embedding[0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(embedding[1], torch.tensor(expected).flatten())


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_sinusoidal_embedding_tells_timesteps_apart(dtype: torch.dtype) -> None:
    embedding = sinusoidal_embedding(torch.arange(1000, dtype=dtype), 64)
    assert embedding.dtype == torch.float32
    assert torch.cdist(embedding, embedding).fill_diagonal_(1).min() > 1e-3


def test_timestep_embedding() -> None:
    module = TimestepEmbedding(16).double()
    output = module(torch.tensor([0, 500]))
    assert output.shape == (2, 16)
    assert output.dtype == torch.float64


def test_gated_mlp() -> None:
    module = GatedMLP(6, 2.0)
    assert module.down.in_features == 16
    x = torch.randn(2, 6)
    gate, up = F.linear(x, module.gate_up.weight, module.gate_up.bias).split(16, -1)
    torch.testing.assert_close(module(x), module.down(F.silu(gate) * up))


def _plain_block(block: DiTBlock, x: Tensor, rows: Tensor, context: Tensor | None) -> Tensor:
    """The block from torch's own functions, one operation at a time, its residual added."""
    shift1, scale1, gate1, shift2, scale2, gate2 = rows.unsqueeze(2).unbind(1)
    h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1
    q, k, v = (t.unflatten(-1, block.split) for t in block.qkv(h).chunk(3, -1))
    if context is not None:
        k, v = (torch.cat([own, other], 1) for own, other in zip((k, v), context.unbind(2), strict=True))
    q, k = (F.rms_norm(t, t.shape[-1:], w, 1e-6) for t, w in ((q, block.q_weight), (k, block.k_weight)))
    mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    x = x + gate1 * block.out(mixed.transpose(1, 2).flatten(2))
    h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
    return x + gate2 * block.mlp(h)


@pytest.mark.parametrize("context", [False, True])
def test_dit_block_is_the_textbook_block(context: bool) -> None:
    torch.manual_seed(0)
    block = DiTBlock(CONFIG).double()
    torch.nn.init.normal_(block.q_weight)
    x, rows = torch.randn(3, 5, 16).double(), torch.randn(3, ROWS_PER_BLOCK, 16).double()
    keys_values = torch.randn(3, 4, 2, 2, 8).double() if context else None
    stream = block(Residual(x), rows, context=None if keys_values is None else Context(keys_values))
    assert_close_to_oracle(
        stream.x + stream.gate.unsqueeze(1) * stream.branch, _plain_block(block, x, rows, keys_values)
    )


def test_context_with_room_holds_the_tokens_own_keys() -> None:
    own, others = torch.randn(3, 5, 2, 2, 8), torch.randn(3, 4, 2, 2, 8)
    roomy = Context(torch.cat([torch.full_like(own, torch.nan), others], 1), room=5)
    joined = roomy.beside(own)
    assert joined is roomy.keys_values
    assert torch.equal(joined, Context(others).beside(own))
    # Other numbers of tokens are copied.
    assert torch.equal(roomy.beside(own[:, :2]), torch.cat([own[:, :2], others], 1))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_dit_block_takes_rows_of_groups(groups: int) -> None:
    """Rows that consecutive samples share, given once, and each sample's own: the same result and gradients."""
    torch.manual_seed(0)
    block = DiTBlock(CONFIG).double()
    x = torch.randn(4, 5, 16).double()
    shared = torch.randn(groups, ROWS_PER_BLOCK, 16).double().requires_grad_()
    results = []
    for rows in (shared, shared.repeat_interleave(4 // groups, 0)):
        stream = block(block(Residual(x), rows), rows)
        total = (stream.x.sin() + stream.branch).sum()
        results.append((stream.x, stream.branch, *torch.autograd.grad(total, (shared, *block.parameters()))))
    for grouped, own in zip(*results, strict=True):
        torch.testing.assert_close(grouped, own, rtol=1e-10, atol=1e-10)


def test_dit_block_adds_the_pending_branch_first() -> None:
    torch.manual_seed(0)
    block = DiTBlock(CONFIG).double()
    x, branch = torch.randn(2, 2, 5, 16).double()
    gate, rows = torch.randn(2, 16).double(), torch.randn(2, ROWS_PER_BLOCK, 16).double()
    pending = block(Residual(x, branch, gate), rows)
    added = block(Residual(x + gate.unsqueeze(1) * branch), rows)
    for actual, expected in zip(pending, added, strict=True):
        assert_close_to_oracle(actual, expected)


def test_dit_block_drops_out_only_in_training() -> None:
    block = DiTBlock(DenoiserConfig(embedding_dim=16, width=16, heads=2, dropout=0.5))
    x, rows = torch.randn(2, 5, 16), torch.randn(2, ROWS_PER_BLOCK, 16)
    assert (block(Residual(x), rows).branch == 0).float().mean() > 0.3
    assert (block.eval()(Residual(x), rows).branch != 0).all()


def test_tokenizer_splits_vectors_and_keeps_frames() -> None:
    tokenizer = Tokenizer(CONFIG)
    vector, sequence = torch.randn(2, 24), torch.randn(2, 7, 24)
    tokens = tokenizer(vector, 0)
    expected = tokenizer.vector(vector[:, 8:16]) + tokenizer.positions[1] + tokenizer.modality.weight[0]
    torch.testing.assert_close(tokens[:, 1], expected)
    assert tokens.shape == (2, 3, 16)
    assert tokenizer(sequence, 1).shape == (2, 7, 16)
    torch.testing.assert_close(tokenizer(sequence[:, :4], 1), tokenizer(sequence, 1)[:, :4])


def test_tokenizer_modality_per_sample() -> None:
    tokenizer = Tokenizer(CONFIG)
    vector = torch.randn(2, 24)
    mixed = tokenizer(vector, torch.tensor([1, 0]))
    torch.testing.assert_close(mixed, torch.stack([tokenizer(vector, 1)[0], tokenizer(vector, 0)[1]]))
