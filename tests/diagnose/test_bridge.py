"""Checks of a bridge: each kind of broken bridge is caught by its own check, and a healthy one is good throughout."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from diffgap.data.store import EmbeddingStore
from diffgap.diagnose import Finding, check_bridge
from diffgap.diagnose.bridge import check_collapse, check_condition, check_gap, check_trajectory
from diffgap.diagnose.observe import Errors, Samples, denoising_errors, draw, pairs
from diffgap.models.bridge import DiffGAP
from diffgap.training.batches import fit_data
from tests.diagnose.bridges import SETTINGS, as_store, gapped_arrays, trained

DIRECTIONS = ("audio -> text", "text -> audio")


@pytest.fixture(scope="module")
def store() -> EmbeddingStore:
    return as_store(gapped_arrays())


@pytest.fixture(scope="module")
def healthy(store: EmbeddingStore) -> DiffGAP:
    return trained(store)


@pytest.fixture(scope="module")
def samples(healthy: DiffGAP, store: EmbeddingStore) -> Samples:
    return draw(healthy, *pairs(healthy, store.split("val"), "audio", "text", 60), num_samples=8, seed=0)


def findings(bridge: DiffGAP, store: EmbeddingStore) -> dict[str, Finding]:
    return {finding.name: finding for finding in check_bridge(bridge, store.split("val"))}


def wrong(found: dict[str, Finding]) -> dict[str, str]:
    return {name: finding.verdict for name, finding in found.items() if finding.verdict != "good"}


@torch.no_grad()
def silence(bridge: DiffGAP) -> DiffGAP:
    """A copy whose network says nothing: its samples are the linear denoiser's."""
    bridge = copy.deepcopy(bridge)
    for parameter in bridge.diffusion.denoiser.head.parameters():
        parameter.zero_()
    return bridge


def test_a_healthy_bridge_is_good_throughout(healthy: DiffGAP, store: EmbeddingStore) -> None:
    found = findings(healthy, store)
    assert wrong(found) == {}
    checks = ("trajectory", "condition", "collapse", "gap")
    expected = {f"{check}/{direction}" for check in checks for direction in DIRECTIONS}
    assert set(found) == expected | {"spread/audio, projected", "spread/text, projected"}
    assert all(finding.threshold and finding.reason for finding in found.values())


def test_findings_are_a_function_of_bridge_data_and_seed(healthy: DiffGAP, store: EmbeddingStore) -> None:
    healthy.train()
    state = torch.get_rng_state()
    try:
        found = findings(healthy, store)
        assert found == findings(healthy, store)
        assert healthy.training and torch.equal(torch.get_rng_state(), state)
    finally:
        healthy.eval()


def test_a_bridge_trained_on_shuffled_pairs(store: EmbeddingStore) -> None:
    arrays = gapped_arrays()
    order = torch.randperm(240, generator=torch.Generator().manual_seed(1))
    shuffled = as_store(arrays | {"text": arrays["text"][order]})
    found = wrong(findings(trained(shuffled), store))
    for direction in DIRECTIONS:
        assert found[f"condition/{direction}"] == "bad"
        assert found[f"trajectory/{direction}"] == "bad"


@torch.no_grad()
def test_a_bridge_that_ignores_its_condition(healthy: DiffGAP, store: EmbeddingStore) -> None:
    deaf = copy.deepcopy(healthy)
    encoder = deaf.diffusion.denoiser.condition
    encoder.linear_gaussian.maps.zero_()
    encoder.keys_values.weight.zero_()
    found = findings(deaf, store)
    for direction in DIRECTIONS:
        condition = found[f"condition/{direction}"]
        assert condition.verdict == "bad" and condition.fix
        assert condition.values["gain_over_shuffled"] == pytest.approx(0, abs=1e-6)
        assert found[f"trajectory/{direction}"].verdict == "bad"


@torch.no_grad()
def test_a_sampler_that_gives_one_answer(healthy: DiffGAP, store: EmbeddingStore) -> None:
    collapsed = silence(healthy)
    model = collapsed.diffusion.denoiser.condition.linear_gaussian
    model.maps.zero_()
    model.variance.fill_(1e-6)
    found = findings(collapsed, store)
    for direction in DIRECTIONS:
        collapse = found[f"collapse/{direction}"]
        assert collapse.verdict == "bad" and collapse.values["spread_of_real"] < 0.01


@torch.no_grad()
def test_a_sampler_that_is_too_sure_of_each_answer(healthy: DiffGAP, store: EmbeddingStore) -> None:
    sure = silence(healthy)
    sure.diffusion.denoiser.condition.linear_gaussian.variance.fill_(1e-3)
    found = findings(sure, store)
    for direction in DIRECTIONS:
        collapse = found[f"collapse/{direction}"]
        assert (collapse.verdict, found[f"gap/{direction}"].verdict) == ("warn", "good")
        assert collapse.values["spread_of_truth"] < 0.1 < collapse.values["spread_of_real"]
        assert "for generation" in collapse.fix


def test_a_collapsed_encoder_shows_in_the_contrastive_space(healthy: DiffGAP) -> None:
    arrays = gapped_arrays()
    arrays["text"] = normalize(torch.ones(16) + 0.25 * arrays["text"], dim=1)
    assert wrong(findings(healthy, as_store(arrays)))["spread/text, projected"] == "bad"


@torch.no_grad()
def test_a_bridge_that_gives_nan(healthy: DiffGAP, store: EmbeddingStore) -> None:
    broken = copy.deepcopy(healthy)
    broken.diffusion.denoiser.head.vector.bias.fill_(torch.nan)
    assert wrong(findings(broken, store)) == {f"finite/{direction}": "bad" for direction in DIRECTIONS}


def test_real_embeddings_without_spread_are_not_the_samplers_fault(samples: Samples) -> None:
    same = samples.target[:1].expand(60, -1)
    for drawn in (samples.drawn, same[:, None].expand(60, 8, 16)):
        values = check_collapse(replace(samples, target=same, drawn=drawn), "").values.values()
        assert all(torch.tensor([*values]).isfinite())


def test_only_directions_that_are_trained_are_checked(store: EmbeddingStore) -> None:
    def checked(**changes: object) -> set[str]:
        bridge = DiffGAP({"audio": 16, "text": 16}, replace(SETTINGS, **changes))  # type: ignore[arg-type]
        bridge.fit(**fit_data(store.split("train"), bridge))
        return {finding.subject for finding in check_bridge(bridge, store.split("val"), gap=False)}

    heads = {"audio, projected", "text, projected"}
    assert checked(directions="text -> audio") == heads | {"text -> audio"}
    assert checked(diffusion_weight=0.0) == heads


def test_a_direction_with_too_few_pairs_is_not_judged(healthy: DiffGAP) -> None:
    few = as_store(gapped_arrays(28))  # 7 of them for validation
    found = findings(healthy, few)
    assert {name: f.verdict for name, f in found.items() if f.check == "pairs"} == {
        f"pairs/{direction}": "warn" for direction in DIRECTIONS
    }
    assert not any(finding.check == "trajectory" for finding in found.values())


def test_drift_is_less_than_a_perfect_sample_has(samples: Samples) -> None:
    """A fall to the square of the best cosine is a perfect sampler's; half way from there to 0 is not."""
    steps = torch.linspace(0.8, 0.64, 8, dtype=torch.float64)
    steady = replace(samples, cosines=steps[:, None].expand(8, 60))
    assert check_trajectory(steady, "").verdict == "good"
    drifting = check_trajectory(replace(steady, cosines=steady.cosines - torch.arange(8)[:, None] * 0.03), "")
    assert drifting.verdict == "warn" and "fewer sampling steps" in drifting.fix
    weak = replace(samples, cosines=torch.linspace(0.3, 0.09, 8, dtype=torch.float64)[:, None].expand(8, 60))
    assert check_trajectory(weak, "").verdict == "good"
    assert (
        check_trajectory(replace(weak, cosines=weak.cosines[:, :] - torch.arange(8)[:, None] * 0.01), "").verdict
        == "warn"
    )


@pytest.mark.parametrize(("norm", "verdict"), [(1.0, "good"), (1.5, "good"), (1.6, "bad"), (0.4, "bad")])
def test_samples_that_leave_the_norm_of_the_data(samples: Samples, norm: float, verdict: str) -> None:
    assert samples.norm_spread == pytest.approx(32**-0.5)  # unit vectors: the noise's spread, 1 / sqrt(2 D), alone
    norms = samples.norms.clone()
    norms[3] = 5.0  # on the way it is no fault
    norms[-1] = norm
    assert check_trajectory(replace(samples, norms=norms), "").verdict == verdict


@torch.no_grad()
def test_norms_of_a_perfect_trajectory_are_one(store: EmbeddingStore) -> None:
    """Whitened embeddings sampled as N(0, I) have at each step the norm that its signal and noise give."""
    rows = store.split("train")
    perfect = DiffGAP({"audio": 16, "text": 16}, replace(SETTINGS, scaling="whiten", sampling_steps=50))
    perfect.fit(**fit_data(rows, perfect))
    model = perfect.diffusion.denoiser.condition.linear_gaussian
    model.centres.zero_(), model.maps.zero_(), model.variance.fill_(1.0)
    drawn = draw(silence(perfect), *pairs(perfect, rows, "audio", "text", 120), num_samples=16, seed=0)
    assert float((drawn.norms - 1).abs().max()) < 0.03
    model.variance.fill_(4.0)  # samples twice as long as embeddings are
    long = draw(silence(perfect), *pairs(perfect, rows, "audio", "text", 120), num_samples=16, seed=0)
    assert float(long.norms[-1]) == pytest.approx(2, rel=0.05)


def test_condition_verdicts_follow_the_order_of_the_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    base = 1 + 0.1 * torch.rand(40, 8, generator=generator, dtype=torch.float64)
    normal = torch.randn(40, 8, generator=generator, dtype=torch.float64)

    def verdict(null: float, shuffled: float, *, noise: float = 0.02, null_trained: bool = True) -> str:
        errors = Errors(base, base + shuffled + noise * normal, base + null + noise * normal.flip(0))
        return check_condition(errors, "", null_trained=null_trained).verdict

    assert verdict(0.1, 0.2) == "good"
    assert verdict(-0.05, 0.2) == "warn"
    assert verdict(-0.05, 0.2, null_trained=False) == "good"
    assert verdict(0.1, 0.0) == "bad"
    assert verdict(0.1, -0.1) == "bad"
    # A difference that is certain, but too small for any use.
    assert verdict(0.1, 2e-7, noise=0) == verdict(0.1, 8e-3, noise=0) == "bad"
    assert verdict(2e-7, 0.2, noise=0) == "warn"
    assert verdict(0.02, 0.02, noise=0) == "good"


def test_denoising_errors_share_their_noise_and_use_strangers(healthy: DiffGAP, store: EmbeddingStore) -> None:
    source, target = pairs(healthy, store.split("val"), "audio", "text", 60)
    errors = denoising_errors(healthy, source, target, seed=0)
    same = denoising_errors(healthy, source._replace(z=source.z[:1].expand(60, -1)), target, seed=0)
    assert torch.equal(same.true, same.shuffled)  # one condition for all: nothing but the condition may differ
    torch.testing.assert_close(same.null, errors.null)
    assert errors.true.shape == (60, 8) and not torch.isclose(errors.true, errors.shuffled).all(1).any()


def test_collapse_measures_the_samples_against_the_real(samples: Samples) -> None:
    real = samples.target
    generator = torch.Generator().manual_seed(0)
    own = normalize(real[:, None] + 0.3 * torch.randn(60, 8, 16, generator=generator, dtype=torch.float64), dim=-1)
    calibrated = replace(samples, drawn=own[:, 1:], target=own[:, 0])  # the truth is one more draw
    finding = check_collapse(calibrated, "")
    assert finding.verdict == "good"
    assert finding.values["spread_of_truth"] == pytest.approx(1, abs=0.1)
    assert finding.values["rank_of_real"] == pytest.approx(1, abs=0.05)
    alike = normalize(own[:, 1:2] + 0.02 * own, dim=-1)  # as varied as the real, but sure of each answer
    sure = check_collapse(replace(samples, drawn=alike, target=own[:, 0]), "")
    assert sure.verdict == "warn" and sure.values["spread_of_truth"] < 0.25 < 0.5 < sure.values["spread_of_real"]
    line = torch.linspace(-1, 1, 60, dtype=torch.float64)[:, None, None] * real[0] + real[1]
    flat = check_collapse(replace(samples, drawn=normalize(line.expand(60, 8, 16), dim=-1)), "")
    assert flat.verdict == "bad" and flat.values["rank_of_real"] < 0.25


def test_gap_verdicts(samples: Samples) -> None:
    assert check_gap(samples, "").verdict == "good"
    nothing = check_gap(replace(samples, translated=samples.source), "")
    assert nothing.verdict == "warn" and nothing.values["gain"] == 0
    worse = check_gap(replace(samples, source=samples.translated, translated=samples.source), "")
    assert worse.verdict == "bad"
    source = normalize(samples.target + samples.target.roll(1, 0), dim=-1)  # centred with the targets, and less close
    aside = normalize(samples.target + 0.5 * torch.eye(16, dtype=torch.float64)[0], dim=-1)
    moved = check_gap(replace(samples, source=source, translated=aside), "")
    assert moved.verdict == "warn" and moved.values["gain_low"] > 0


@pytest.fixture(scope="module")
def sequences() -> tuple[DiffGAP, EmbeddingStore]:
    generator = torch.Generator().manual_seed(0)
    arrays, lengths = gapped_arrays(), torch.arange(240) % 4 + 1
    frames = arrays["audio"][:, None] + 0.2 * torch.randn(240, 5, 16, generator=generator)
    columns = {"split": [("train", "train", "val", "test")[i % 4] for i in range(240)]}
    store = EmbeddingStore.from_arrays(arrays | {"audio": frames}, columns, lengths={"audio": lengths})
    bridge = DiffGAP({"audio": 16, "text": 16}, SETTINGS, sequences=("audio",))
    bridge.fit(**fit_data(store.split("train"), bridge))
    return bridge.eval(), store


def test_sequences_are_compared_by_their_frames_that_are_there(sequences: tuple[DiffGAP, EmbeddingStore]) -> None:
    bridge, store = sequences
    frames = store.embeddings("audio")
    frames[torch.arange(5) >= store.lengths("audio")[:, None]] = 1e4  # type: ignore[index]
    padded = store.with_embeddings("audio", frames, lengths=store.lengths("audio"))
    found = findings(bridge, store)
    assert {f"condition/{direction}" for direction in DIRECTIONS} <= {
        n for n, f in found.items() if f.verdict == "good"
    }
    for name, finding in findings(bridge, padded).items():
        assert finding.values == pytest.approx(found[name].values, rel=1e-4, abs=1e-5)
