"""Numbers among the arguments of a compiled function that change from call to call, which makes them symbols."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffgap import ops
from diffgap.ops.solver_step import solver_step

A, B = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
HEADS = A.view(2, 2, 1, 6)
TABLE = torch.rand(3, 16, generator=torch.Generator().manual_seed(1))

OPS: dict[str, Callable[[float], Tensor]] = {
    "attention": lambda number: ops.attention(HEADS, HEADS, HEADS, scale=number),
    "clip_loss": lambda number: ops.clip_loss(A, B, number),
    "siglip_loss": lambda number: ops.siglip_loss(A, B, number, -number),
    "solver_step": lambda number: (
        solver_step(
            *(A, B, TABLE, 1),
            unconditional=A,
            guidance_scale=number,
            guidance_rescale=number / 10,
            last_sample=B,
            history=(A, A, A),
            seed=torch.arange(4),
            x0_clamp=number,
        ).sample
    ),
}


@pytest.mark.parametrize("op", OPS)
def test_a_number_may_change(op: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(OPS[op], fullgraph=True, backend="aot_eager")
    for number in (1.5, 2.5, 0.5):
        torch.testing.assert_close(compiled(number), OPS[op](number))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_numbers_that_are_not_finite_are_refused(op: str, number: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        OPS[op](number)
