"""Scores, re-ranking by likelihood ratio, and what they cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffgap import BridgeSettings, DiffGAP
from diffgap.diffusion.schedule import NoiseSchedule
from diffgap.models.condition import Condition
from diffgap.models.likelihood import LOG_SNR_RANGE, Side, information, noise_levels
from diffgap.models.scoring import Candidates, Encoded, dense_scores, find_candidates, rerank, score_features
from diffgap.ops.random import normal, sample_seeds


def unit(*shape: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def encoded(rows: int, seed: int) -> Encoded:
    return Encoded(unit(rows, 8, seed=seed), unit(rows, 8, seed=seed + 1))


def bridge(**settings: object) -> DiffGAP:
    torch.manual_seed(0)
    chosen = BridgeSettings(width=8, tokens=2, denoiser_width=16, heads=2, head_dropout=0.0, **settings)  # type: ignore[arg-type]
    model = DiffGAP({"audio": 6, "text": 5}, chosen)
    latent = torch.randn(64, 5)
    model.fit({"audio": latent @ torch.randn(5, 6), "text": latent @ torch.randn(5, 5)})
    with torch.no_grad():
        for parameter in model.diffusion.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_features_give_the_formulas() -> None:
    q, g = encoded(5, 0), encoded(7, 2)
    plain, bridged = q.own @ g.own.T, (q.bridged @ g.own.T + q.own @ g.bridged.T) / 2
    for scoring, expected in (("cosine", plain), ("bridge", bridged), ("fusion", plain + 0.3 * bridged)):
        left, right = score_features(q, g, scoring, 0.3)  # type: ignore[arg-type]
        torch.testing.assert_close(left @ right.T, expected)
    with pytest.raises(ValueError, match="scoring is 'dot'; use one of cosine, bridge, fusion, rerank"):
        score_features(q, g, "dot")  # type: ignore[arg-type]


def test_candidates_leave_out_ties_with_the_first_excluded() -> None:
    q = torch.eye(1, 3)
    g = torch.tensor([[0.9, 0, 0], [0.5, 0, 0], [0.5, 1, 0], [0.1, 0, 0]])
    assert find_candidates(q, g, 2).scores.isfinite().tolist() == [[True, False]]
    assert find_candidates(q, g, 3).scores.isfinite().all()
    assert find_candidates(q, g, 9).indices.shape == (1, 4)
    assert not find_candidates(q, torch.ones(5, 3), 2).scores.isfinite().any()  # a collapsed model has none
    with pytest.raises(ValueError, match="candidates is 0; use 1 or more"):
        find_candidates(q, g, 0)


def test_reranked_candidates_stay_above_the_rest() -> None:
    q, g = unit(6, 4, seed=0), unit(20, 4, seed=1)
    found = find_candidates(q, g, 5)
    told = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    for beta in (0.0, 1.0, 100.0):
        scores = dense_scores(q, g, rerank(found, told, beta))
        order = scores.argsort(1, descending=True)
        assert (order[:, :5].sort(1).values == found.indices.sort(1).values).all()
        wanted = found.indices.gather(1, (found.scores + beta * told).argsort(1, descending=True))
        assert (order[:, :5] == wanted).all()
        plain = (q @ g.T).argsort(1, descending=True)
        assert (order[:, 5:] == plain[:, 5:]).all()
    whole = Candidates(torch.arange(20).expand(6, 20), q @ g.T)
    torch.testing.assert_close(dense_scores(q, g, whole), q @ g.T)  # nothing else is there to stay above


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("precondition", ["gaussian", "none"])
def test_information_is_the_difference_of_denoising_errors(prediction: str, precondition: str) -> None:
    """One pair, one level, one direction at a time, by the definition."""
    model = bridge(prediction=prediction, precondition=precondition)
    diffusion, schedule = model.diffusion, model.diffusion.schedule
    audio, text = unit(4, 8, seed=3), unit(5, 8, seed=4)
    candidates = torch.tensor([[0, 3], [1, 1], [4, 2], [2, 0]])
    levels = noise_levels(schedule, 3)
    seeds = sample_seeds(3, torch.Generator().manual_seed(7))

    def error(clean: Tensor, target: int, condition: Tensor | None) -> Tensor:
        total = torch.zeros(())
        for level, seed in zip(levels.tolist(), seeds, strict=True):
            alpha, sigma = schedule.table[level].tolist()
            noise = normal(seed[None], (8,))
            noisy = alpha * clean * 8**0.5 + sigma * noise
            conditions = [] if condition is None else [Condition(condition * 8**0.5, 1 - target)]
            output = diffusion.denoiser(noisy, diffusion.times[level][None], target, conditions)
            x0 = schedule.convert(output, noisy, torch.tensor([level]), "sample")
            total = total + (x0 - clean * 8**0.5).square().sum() / 8
        return total / 3

    with torch.no_grad():
        found = information(diffusion, Side("audio", audio), Side("text", text), candidates, levels=3, seed=7)
        for row, items in enumerate(candidates.tolist()):
            for column, item in enumerate(items):
                a, t = audio[row : row + 1], text[item : item + 1]
                expected = (error(t, 1, None) - error(t, 1, a) + error(a, 0, None) - error(a, 0, t)) / 2
                torch.testing.assert_close(found[row, column], expected, atol=1e-5, rtol=1e-4)
        again = information(
            diffusion, Side("audio", audio), Side("text", text), candidates, levels=3, seed=7, batch_size=3
        )
    torch.testing.assert_close(again, found)
    assert information(diffusion, Side("audio", audio), Side("text", text), candidates[:, :0]).shape == (4, 0)


def test_noise_levels_lie_in_their_range() -> None:
    schedule = NoiseSchedule("squaredcos_cap_v2")
    logs = schedule.snr.log()[noise_levels(schedule, 4)]
    low, high = LOG_SNR_RANGE
    torch.testing.assert_close(logs, low + (high - low) * (torch.arange(4).double() + 0.5) / 4, atol=0.05, rtol=0)
    with pytest.raises(ValueError, match="levels is 0; use 1 or more"):
        noise_levels(schedule, 0)


def test_rerank_of_a_bridge_knows_pairs() -> None:
    """What is told of true pairs is more than of others, and re-ranking by it finds them."""
    model = bridge(precondition="gaussian")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.diffusion.denoiser.head.named_parameters():
            assert name and parameter.zero_() is parameter  # the linear start alone
    latent = torch.randn(64, 5)
    x = {"audio": latent @ torch.randn(5, 6), "text": latent @ torch.randn(5, 5)}
    model.fit(x)
    z = {name: model.project(name, value) for name, value in x.items()}
    every = torch.arange(64).expand(64, 64)
    told = information(model.diffusion, Side("text", z["text"]), Side("audio", z["audio"]), every)
    assert told.diagonal().mean() > told.mean() + 0.1
    scores = model.score(scoring="rerank", candidates=8, beta=1.0, text=x["text"], audio=x["audio"])
    assert (scores.argmax(1) == torch.arange(64)).float().mean() > 16 / 64  # chance is 1 / 64
