"""The kernels of adaln, through the public function, against float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from diffgap.kernels import adaln as kernels
from diffgap.kernels.configs import adaln_config
from torch import Tensor

from diffgap.ops import _dispatch
from tests.helpers import assert_close_to_oracle
from tests.ops.test_adaln import adaln, explicit, inputs, outputs_and_gradients, with_layer_norm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("diffgap.ops.adaln")
    monkeypatch.setattr(_dispatch, "choose", lambda *_: "native")
    # As on the smallest chip: there is none here to ask.
    monkeypatch.setattr(module, "_adaln", lambda x, *rest: kernels.forward(x, *rest, adaln_config("sm_80", x.shape[2])))
    monkeypatch.setattr(
        module, "_adaln_backward", lambda *given: kernels.backward(*given, adaln_config("sm_80", given[2].shape[2]))
    )


def assert_matches(arguments: list[Tensor | None]) -> None:
    exact = outputs_and_gradients(explicit, [None if x is None else x.double() for x in arguments])
    eager = outputs_and_gradients(with_layer_norm, arguments)
    for actual, expected, torchs in zip(outputs_and_gradients(adaln, arguments), exact, eager, strict=True):
        assert_close_to_oracle(actual, expected, torchs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 1), (2, 1, 7), (3, 17, 33), (1, 3, 1000), (1, 5, 2048)])
def test_adaln_matches_the_oracle(shape: tuple[int, ...], per_token: bool, first: bool, dtype: torch.dtype) -> None:
    assert_matches(inputs(*shape, dtype, per_token=per_token, first=first))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_adaln_of_rows_whose_sums_take_too_many_registers(tokens: int, per_token: bool, dtype: torch.dtype) -> None:
    assert not adaln_config("sm_80", 4100).keeps_sums
    assert_matches(inputs(2, tokens, 4100, dtype, per_token=per_token))


@pytest.mark.parametrize("programs", [1, 2, 3, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adaln_in_chunks_of_any_length(programs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    assert_matches(inputs(2, 21, 300, dtype))


def test_chunks_cover_all_tokens_in_whole_blocks() -> None:
    for samples in (1, 7, 4096):
        for tokens in (1, 3, 77, 1024, 100_000):
            for rows in (1, 2, 64):
                chunk = kernels._chunk(samples, tokens, rows)
                assert chunk % rows == 0 and rows <= chunk <= max(rows, 2 * kernels._LONGEST_CHUNK)
                assert chunk < 2 * max(tokens, rows)


def test_adaln_of_a_large_offset() -> None:
    x, _, _, shift, scale = inputs(1, 3, 512)
    assert_matches([x + 1e4, None, None, shift, scale])


def test_adaln_of_equal_features_is_the_shift() -> None:
    x, _, _, shift, scale = inputs(1, 2, 100)
    _, h = adaln(torch.full_like(x, 1e4), None, None, shift, scale)
    torch.testing.assert_close(h, shift.unsqueeze(1).expand_as(h), rtol=0, atol=1e-5)


@pytest.mark.parametrize("used", ["y", "h"])
def test_adaln_gradient_through_one_output(used: str) -> None:
    gradients = []
    for function, dtype in ((adaln, torch.float32), (explicit, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs(2, 3, 24)]
        output = function(*leaves)[0 if used == "y" else 1]
        gradients.append(torch.autograd.grad(output.square().sum(), leaves, materialize_grads=True))
    for actual, expected in zip(*gradients, strict=True):
        assert_close_to_oracle(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adaln_of_strided_rows_is_that_of_their_copies(dtype: torch.dtype) -> None:
    wide = torch.randn(3, 5, 6, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    x, branch, grad_y, grad_h = (wide[:, :, i, 3:36] for i in range(4))
    per_sample = [wide[:, 0, i, :33] for i in range(3)]
    per_token = [wide[:1, :, 4, :33].expand(3, -1, -1), wide[:, :1, 5, :33].expand(-1, 5, -1), wide[:, :, 4, :33]]
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    for arguments in ([x, branch, *per_sample], [x, branch, *per_token], [transposed, branch, *per_sample]):
        results = []
        for values in (arguments, [t.contiguous() for t in arguments]):
            leaves = [t.detach().requires_grad_() for t in values]
            outputs = adaln(*leaves)
            results.append([*outputs, *torch.autograd.grad(outputs, leaves, (grad_y, grad_h))])
        assert all(torch.equal(strided, dense) for strided, dense in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_adaln_is_deterministic(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_PROGRAMS", 3)
    once, again = (outputs_and_gradients(adaln, inputs(2, 21, 100, dtype)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
@pytest.mark.parametrize("first", [False, True])
def test_adaln_of_nothing(shape: tuple[int, ...], first: bool) -> None:
    y, h, *gradients = outputs_and_gradients(adaln, inputs(*shape, first=first))
    assert y.shape == h.shape == shape
    assert all((x == 0).all() for x in gradients)
