"""Inputs, routes and comparisons that the tests of the contrastive ops share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import assert_close_to_oracle
from tests.ops import routes

#: Dtype of inputs that name none.
_default_dtype = torch.float64


def take(route: str, patch: pytest.MonkeyPatch, module: ModuleType, **ops: str) -> None:
    """:func:`routes.take`; on the native route inputs that name no dtype are float32."""
    routes.take(route, patch, module, **ops)
    if route == "native":
        patch.setitem(globals(), "_default_dtype", torch.float32)


def pairs(rows: int, columns: int, width: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Two sets of unit vectors, row i of one resembling row i of the other; leaves that require grad."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    b = torch.randn(columns, width, generator=generator, dtype=torch.float64)
    shared = min(rows, columns)
    b[:shared] += a[:shared] / 8  # weakly: at scale 100 a solved batch has no gradient left to compare
    return [F.normalize(x, dim=1).to(dtype or _default_dtype).requires_grad_() for x in (a, b)]


def leaf(value: float, dtype: torch.dtype | None = None) -> Tensor:
    """A learnable 0-d tensor."""
    return torch.tensor(value, dtype=dtype or _default_dtype, requires_grad=True)


def ids_for(rows: int, groups: int, seed: int = 0) -> Tensor:
    """``rows`` ids out of ``groups`` scattered values, negative ones among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(groups, (rows,), generator=generator) * 1_000_003 - 2_000_006


def gradients(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the loss, rows of unequal weight where it is a vector."""
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return list(torch.autograd.grad((weights * loss).sum(), inputs))


def assert_matches(function: Callable[..., Tensor], oracle: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Loss and gradients of all inputs as the oracle has them, computed in float64 from the same inputs."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    loss, expected = function(*inputs), oracle(*exact)
    assert loss.dtype == (torch.float64 if inputs[0].dtype == torch.float64 else torch.float32)
    assert_close_to_oracle(loss, expected)
    for x, actual, wanted in zip(inputs, gradients(loss, inputs), gradients(expected, exact), strict=True):
        assert actual.dtype == x.dtype
        assert_close_to_oracle(actual, wanted)


class LargestTensor(TorchDispatchMode):
    """Records the size, in elements, of the largest tensor any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(output, Tensor):
                self.elements = max(self.elements, output.numel())
        return outputs
