"""The best linear denoiser against Gaussian conditioning, and the network's place in it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from diffgap import BridgeSettings, DiffGAP
from diffgap.diffusion.prediction import Prediction
from diffgap.diffusion.schedule import NoiseSchedule
from diffgap.models.condition import Condition
from diffgap.models.denoiser import Denoiser, DenoiserConfig
from diffgap.models.linear_gaussian import LinearGaussian, posterior_coefficients
from tests.helpers import assert_close_to_oracle

WIDTH = 12
SMALL: dict[str, Any] = {"width": 8, "tokens": 2, "denoiser_width": 16, "heads": 2}
PREDICTIONS: tuple[Prediction, ...] = ("sample", "epsilon", "v_prediction", "flow_prediction")


def pairs(rows: int = 4000, seed: int = 0) -> dict[int, Tensor]:
    """Three linearly related modalities, float64, with means of their own."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    latent = randn(rows, 5)
    return {m: latent @ randn(5, WIDTH) / 5**0.5 + 0.4 * randn(rows, WIDTH) + randn(WIDTH) for m in range(3)}


def everywhere(x: dict[int, Tensor]) -> dict[int, Tensor]:
    return {m: torch.ones(len(v), dtype=torch.bool) for m, v in x.items()}


def fitted(x: dict[int, Tensor]) -> LinearGaussian:
    model = LinearGaussian(len(x), WIDTH).double()
    model.fit(x, everywhere(x))
    return model


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("level", [(1.0, 1e-3), (0.8, 0.6), (0.1, 0.995), (0.0, 1.0), (0.4, 0.6)])
def test_posterior_is_gaussian_conditioning(prediction: Prediction, level: tuple[float, float]) -> None:
    """Mean and deviation of the prediction given x_t, from the joint covariance of (x, eps) and x_t."""
    alpha, sigma = (torch.tensor(value, dtype=torch.float64) for value in level)
    variance = torch.tensor(0.3, dtype=torch.float64)
    mean, noisy = torch.tensor(1.7, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    wanted = {
        "sample": torch.tensor([1.0, 0.0]),
        "epsilon": torch.tensor([0.0, 1.0]),
        "v_prediction": torch.stack((-sigma, alpha)),
        "flow_prediction": torch.tensor([-1.0, 1.0]),
    }[prediction].double()
    seen = torch.stack((alpha, sigma))
    covariance = torch.diag(torch.stack((variance, torch.ones_like(variance))))
    centre = torch.stack((mean, torch.zeros_like(mean)))
    gain = (wanted @ covariance @ seen) / (seen @ covariance @ seen)
    expected = wanted @ centre + gain * (noisy - seen @ centre)
    left = wanted @ covariance @ wanted - gain * (seen @ covariance @ wanted)
    a, b, g = posterior_coefficients(alpha, sigma, variance, prediction)
    torch.testing.assert_close(a * noisy + b * mean, expected)
    torch.testing.assert_close(g, left.clamp_min(0).sqrt(), atol=1e-7, rtol=1e-6)


def test_means_are_ridge_regression() -> None:
    x = pairs()
    model, rows = fitted(x), 50
    for target, source in itertools.permutations(range(3), 2):
        c, y = x[source] - x[source].mean(0), x[target] - x[target].mean(0)
        gram = c.T @ c
        weight = torch.linalg.solve(gram + gram.diagonal().mean() * torch.eye(WIDTH, dtype=gram.dtype), c.T @ y)
        sources = torch.zeros(rows, 3, dtype=torch.float64)
        sources[:, source] = 1
        means = model.means([(x[source][:rows], source, None)], sources)
        torch.testing.assert_close(means[:, target], x[target].mean(0) + c[:rows] @ weight)


def test_several_sources_are_averaged_and_absent_ones_are_not_read() -> None:
    x = pairs()
    model, rows = fitted(x), 6
    first, second = x[0][:rows].clone(), x[1][:rows].clone()
    here = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0], [1, 1], [1, 0]], dtype=torch.bool)
    first[~here[:, 0]] = torch.nan
    second[~here[:, 1]] = torch.nan
    sources = torch.cat((here, torch.zeros(rows, 1, dtype=torch.bool)), 1).double()
    found = model.means([(first, 0, here[:, 0]), (second, 1, here[:, 1])], sources)[:, 2]
    for row, (a, b) in enumerate(here.tolist()):
        alone = []
        for source, given in ((0, a), (1, b)):
            if given:
                one = torch.zeros(1, 3, dtype=torch.float64)
                one[0, source] = 1
                alone.append(model.means([(x[source][row : row + 1], source, None)], one)[0, 2])
        expected = torch.stack(alone).mean(0) if alone else x[2].mean(0)
        torch.testing.assert_close(found[row], expected)


def test_variance_is_what_the_regression_leaves() -> None:
    x = pairs()
    model = fitted(x)
    assert (model.variance[:, 1] < 0.7 * model.variance[:, 0]).all()
    for m in range(3):
        torch.testing.assert_close(model.variance[m, 0], (x[m] - x[m].mean(0)).square().mean())


def test_sequences_count_by_their_mean_frame() -> None:
    x = pairs(200)
    frames = x[0].unsqueeze(1) + torch.randn(200, 4, WIDTH, dtype=torch.float64)
    lengths = torch.arange(200) % 4 + 1
    mask = torch.arange(4) < lengths[:, None]
    pooled = (frames * mask[..., None]).sum(1) / lengths[:, None]
    poisoned = frames.masked_fill(~mask[..., None], torch.nan)
    whole, by_frames = fitted({**x, 0: pooled}), LinearGaussian(3, WIDTH).double()
    by_frames.fit({**x, 0: poisoned}, {**everywhere(x), 0: mask})
    for name in ("centres", "maps"):
        torch.testing.assert_close(getattr(by_frames, name), getattr(whole, name))
    torch.testing.assert_close(by_frames.variance[1:], whole.variance[1:])
    # The variance to be explained of a sequence is that of a frame: here unit noise about its row.
    spread = (frames - pooled[:, None]).square().masked_fill(~mask[..., None], 0.0).mean(2).sum(1) / lengths
    torch.testing.assert_close(by_frames.variance[0], whole.variance[0] + spread.mean())
    sources = torch.tensor([[1.0, 0, 0]]).double().expand(200, 3)
    torch.testing.assert_close(
        by_frames.means([(poisoned, 0, mask)], sources), whole.means([(pooled, 0, None)], sources)
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoiser_starts_as_the_best_linear_one(prediction: Prediction) -> None:
    """Converted to x0, the untrained prediction is the posterior mean; a trained network adds to it."""
    kind = "flow" if prediction == "flow_prediction" else "squaredcos_cap_v2"
    schedule = NoiseSchedule(kind, prediction_type=prediction)
    denoiser = Denoiser(DenoiserConfig(WIDTH, ("vector",) * 3, 4, width=16, heads=2), schedule).double()
    x = pairs()
    denoiser.condition.linear_gaussian.fit(x, everywhere(x))
    t, rows = torch.tensor([5, 300, 998]), 3
    alpha, sigma = schedule.table[t].unbind(1)
    noisy = alpha[:, None] * x[2][:rows] + sigma[:, None] * torch.randn(rows, WIDTH, dtype=torch.float64)
    found = denoiser(noisy, schedule.times[t], 2, [Condition(x[0][:rows], 0)])
    model = denoiser.condition.linear_gaussian
    mean = model.means([(x[0][:rows], 0, None)], torch.tensor([[1.0, 0, 0]]).double().expand(rows, 3))[:, 2]
    v, alpha, sigma = model.variance[2, 1], alpha[:, None], sigma[:, None]
    expected = (alpha * v * noisy + sigma**2 * mean) / (alpha**2 * v + sigma**2)
    assert_close_to_oracle(schedule.convert(found, noisy, t, "sample").float(), expected)
    with torch.no_grad():
        denoiser.head.vector.bias.add_(1.0)
    _, _, g = posterior_coefficients(alpha, sigma, v, prediction)
    moved = denoiser(noisy, schedule.times[t], 2, [Condition(x[0][:rows], 0)])
    assert_close_to_oracle((moved - found).float(), g.expand_as(found))


def test_untrained_bridge_translates_by_ridge_regression_and_samples_around_it() -> None:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(400, 6, generator=generator)
    x = {m: latent @ torch.randn(6, d, generator=generator) for m, d in (("audio", 14), ("text", 10))}
    bridge = DiffGAP({"audio": 14, "text": 10}, BridgeSettings(**SMALL, precondition="gaussian"))
    bridge.fit(x)
    translated = bridge.translate("audio", text=x["text"])
    again = bridge.translate("audio", text=x["text"], seed=1)
    torch.testing.assert_close(again, translated, atol=1e-4, rtol=0)  # alpha is 5e-5 at the first step
    own = bridge.eval().project("audio", x["audio"])
    assert (translated * own).sum(1).mean() > 0.9
    samples = bridge.sample("audio", text=x["text"][:20], num_samples=64)
    spread = (samples - samples.mean(1, keepdim=True)).norm(dim=-1).mean()
    assert spread > 0.05
    centred = torch.nn.functional.normalize(samples.mean(1), dim=-1)
    assert ((centred * translated[:20]).sum(1) > 0.97).all()


def test_without_precondition_the_network_predicts_alone() -> None:
    bridge = DiffGAP(
        {"a": 8, "b": 8}, BridgeSettings(width=8, tokens=2, denoiser_width=16, heads=2, precondition="none")
    )
    noisy = torch.randn(3, 8)
    found = bridge.diffusion.denoiser(noisy, torch.full((3,), 500.0), 0, [Condition(torch.randn(3, 8), 1)])
    assert not found.any()
