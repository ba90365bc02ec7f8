"""The sampler's CUDA graph against the same loop without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffgap.diffusion import Guidance, NoiseSchedule, build_solver, sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device; none is visible"),
]


@pytest.mark.parametrize(
    ("name", "options"),
    [("ddim", {}), ("dpmpp", {"order": 3}), ("sde_dpmpp", {}), ("unipc", {"order": 3})],
)
@pytest.mark.parametrize("guidance", [None, Guidance(2.0, rescale=0.5)])
def test_sample_replays_a_cuda_graph(name: str, options: dict[str, Any], guidance: Guidance | None) -> None:
    schedule = NoiseSchedule("scaled_linear", prediction_type="v_prediction")
    solver = build_solver(name, schedule, 12, **options)
    weight = torch.randn(64, 64, device="cuda") / 8
    rows = torch.linspace(0, 1, 12, device="cuda")[:, None]

    def model(x: Tensor, step: int | Tensor) -> Tensor:
        row = rows[step] if isinstance(step, int) else rows.index_select(0, step)
        return torch.tanh(x @ weight + row)

    seeds = torch.arange(32, device="cuda")
    eager = sample(model, solver, seeds, (64,), guidance=guidance)
    graph = sample(model, solver, seeds, (64,), guidance=guidance, cuda_graph=True)
    torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-4)
