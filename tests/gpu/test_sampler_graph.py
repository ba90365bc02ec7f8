"""The sampler's CUDA graph against the same loop without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffgap.diffusion import Guidance, NoiseSchedule, SamplingLoop, build_solver, sample
from diffgap.models.bridge import DiffGAP
from diffgap.models.settings import BridgeSettings

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

    def model(x: Tensor, step: int) -> Tensor:
        return torch.tanh(x @ weight + rows[step])

    seeds = torch.arange(32, device="cuda")
    loop = SamplingLoop(model, solver, 32, (64,), device=seeds.device, guidance=guidance)
    loop.capture()
    for batch in (seeds, seeds + 100):
        expected = sample(model, solver, batch, (64,), guidance=guidance)
        torch.testing.assert_close(loop(batch), expected, rtol=1e-4, atol=1e-4)


def test_bridge_replays_its_graph_for_every_batch() -> None:
    torch.manual_seed(0)
    bridge = DiffGAP({"audio": 16, "text": 12}, BridgeSettings(width=32, denoiser_width=32, heads=2)).cuda().eval()
    for parameter in bridge.diffusion.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(20, 12, device="cuda")
    expected = bridge.sample("audio", text=x, steps=4, num_samples=2, batch_size=16)
    found = bridge.sample("audio", text=x, steps=4, num_samples=2, batch_size=16, cuda_graph=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
