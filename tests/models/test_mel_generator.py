"""The mel generator: patches, lengths, conditions, and that it learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import diffgap
from diffgap.models.mel_generator import MelGenerator, MelGeneratorConfig

CONFIG = MelGeneratorConfig(
    condition_dim=6, bands=8, patch_bands=4, patch_frames=3, width=16, depth=2, heads=2, sampling_steps=4
)


@pytest.fixture
def generator() -> MelGenerator:
    """One whose output is not zero, as it is at its start."""
    torch.manual_seed(0)
    made = MelGenerator(CONFIG)
    with torch.no_grad():
        for layer in (made.rows, made.head):
            layer.weight.normal_(std=0.2)
            layer.bias.normal_(std=0.2)
        made.no_condition.normal_()
    return made.eval()


def batch(rows: int = 5, frames: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    lengths = torch.randint(1, frames + 1, (rows,))
    return torch.randn(rows, frames, 8), torch.randn(rows, 6), lengths, torch.arange(rows)


def test_starts_with_an_output_of_zero() -> None:
    made = MelGenerator(CONFIG)
    mel, condition, lengths, _ = batch()
    rows = made.modulation(made.time(torch.full((5,), 300.0)), made._drive(condition, lengths, torch.zeros(5).bool()))
    assert not made.denoise(mel, rows, lengths).any()


@pytest.mark.parametrize("frames", [1, 3, 7, 12])
def test_patches_are_put_together_again(generator: MelGenerator, frames: int) -> None:
    mel = torch.randn(2, frames, 8)
    patches = generator._patches(mel)
    assert patches.shape == (2, -(-frames // 3), 2, 12)
    torch.testing.assert_close(generator._whole(patches)[:, :frames], mel, rtol=0, atol=0)
    if frames >= 3:
        torch.testing.assert_close(patches[0, 0, 1], mel[0, :3, 4:].flatten(), rtol=0, atol=0)


def test_what_is_beyond_a_length_changes_nothing(generator: MelGenerator) -> None:
    mel, condition, lengths, seeds = batch()
    poisoned = mel.clone()
    for row, length in enumerate(lengths):
        poisoned[row, length:] = 1e4
    longer = F.pad(mel, (0, 0, 0, 5))
    generator.fit(mel, lengths)
    losses = [generator(x, condition, lengths=lengths, seeds=seeds)["loss"] for x in (mel, poisoned, longer)]
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


def test_loss_is_the_mean_of_the_rows_and_of_their_frames(generator: MelGenerator) -> None:
    mel, condition, lengths, seeds = batch()
    alone = [
        generator(mel[i : i + 1, : lengths[i]], condition[i : i + 1], seeds=seeds[i : i + 1])["loss"] for i in range(5)
    ]
    together = generator(mel, condition, lengths=lengths, seeds=seeds)["loss"]
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_a_sample_depends_on_its_seed_and_condition_alone(generator: MelGenerator) -> None:
    _, condition, _, seeds = batch()
    lengths = [11, 2, 7, 9, 4]
    seeds = torch.stack((seeds, seeds + 100), 1)
    together = generator.sample(condition, lengths, seeds=seeds, num_samples=2)
    assert together.shape == (5, 2, 11, 8)
    for row, length in enumerate(lengths):
        own = generator.sample(condition[[row]], [length], seeds=seeds[[row]], num_samples=2, batch_size=1)
        torch.testing.assert_close(together[row, :, :length], own[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[:, 0], together[:, 1])


def test_guidance_of_one_is_the_condition_and_of_zero_is_none(generator: MelGenerator) -> None:
    _, condition, _, seeds = batch()
    options = {"lengths": [6] * 5, "seeds": seeds[:, None]}
    conditional = generator.sample(condition, guidance_scale=1, **options)
    unconditional = generator.sample(None, **options)
    assert not torch.allclose(conditional, unconditional, atol=1e-2)
    torch.testing.assert_close(generator.sample(condition, guidance_scale=0, **options), unconditional)
    halfway = generator.sample(condition, guidance_scale=0.5, **options)
    assert not torch.allclose(halfway, conditional, atol=1e-3)


def test_hiding_the_condition_is_decided_by_the_seeds(generator: MelGenerator) -> None:
    mel, condition, lengths, seeds = batch(400)
    config = replace(CONFIG, condition_dropout=0.25)
    made = MelGenerator(config)
    made.load_state_dict(generator.state_dict())
    changed = torch.autograd.functional.jacobian(
        lambda c: made(mel, c, lengths=lengths, seeds=seeds)["loss"], condition
    )
    hidden = (changed == 0).all(1).double().mean()
    assert 0.18 < hidden < 0.32  # 0.25, of 400 rows


def test_statistics_are_those_of_the_frames_that_count(generator: MelGenerator) -> None:
    mel, _, lengths, _ = batch()
    generator.fit(mel, lengths)
    frames = torch.cat([mel[i, :n] for i, n in enumerate(lengths)]).double()
    torch.testing.assert_close(generator.mean, frames.mean(0).float())
    torch.testing.assert_close(generator.deviation, frames.std(0).float())


def test_all_parameters_learn(generator: MelGenerator) -> None:
    mel, condition, lengths, seeds = batch(64)
    generator(mel, condition, lengths=lengths, seeds=seeds)["loss"].backward()
    assert [name for name, p in generator.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_backends_agree(generator: MelGenerator) -> None:
    mel, condition, lengths, seeds = batch()
    losses = []
    for backend in ("eager", "auto"):
        with diffgap.backend(backend):
            losses.append(generator(mel, condition, lengths=lengths, seeds=seeds)["loss"])
    torch.testing.assert_close(losses[1], losses[0])


def test_learns_what_belongs_to_which_condition() -> None:
    torch.manual_seed(0)
    made = MelGenerator(replace(CONFIG, width=32, sampling_steps=10))
    patterns = torch.randn(2, 6, 8) * torch.linspace(0.5, 3, 8) + 4
    conditions = torch.eye(6)[:2]
    made.fit(patterns)
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    for _ in range(200):
        made(patterns.repeat(16, 1, 1), conditions.repeat(16, 1))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    drawn = made.eval().sample(conditions, [6, 6], num_samples=4)
    distances = torch.stack([(drawn - pattern).square().mean((2, 3)).sqrt() for pattern in patterns])  # (of, for, K)
    own, other = torch.stack([distances[i, i] for i in (0, 1)]), torch.stack([distances[1 - i, i] for i in (0, 1)])
    assert (own < 0.5 * other).all()


def test_is_saved_and_loaded(generator: MelGenerator, tmp_path) -> None:
    mel, condition, lengths, seeds = batch()
    generator.fit(mel, lengths)
    generator.save_pretrained(tmp_path)
    loaded = MelGenerator.from_pretrained(tmp_path).eval()
    assert loaded.config == CONFIG
    arguments = {"lengths": lengths, "seeds": seeds}
    assert loaded(mel, condition, **arguments)["loss"] == generator(mel, condition, **arguments)["loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(2, 5, 7), torch.randn(2, 6)), "mel is"),
        ((torch.randn(2, 0, 8), torch.randn(2, 6)), "mel is"),
        ((torch.randn(2, 5, 8), torch.randn(2, 5)), "condition is"),
        ((torch.randn(2, 5, 8), torch.randn(2, 6), torch.tensor([1, 6])), "lengths lie"),
        ((torch.randn(2, 5, 8), torch.randn(2, 6), torch.tensor([0, 5])), "lengths lie"),
        ((torch.randn(2, 5, 8), torch.randn(2, 6), torch.tensor([1.0, 5.0])), "lengths is"),
    ],
)
def test_bad_batches_are_refused(generator: MelGenerator, arguments, message: str) -> None:
    mel, condition, *lengths = arguments
    with pytest.raises(ValueError, match=message):
        generator(mel, condition, lengths=lengths[0] if lengths else None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bands": 10, "patch_bands": 4}, "patch_bands"),
        ({"width": 18, "heads": 4}, "heads"),
        ({"condition_dropout": 1.0}, "condition_dropout"),
        ({"x0_clamp": 0.0}, "x0_clamp"),
        ({"depth": 0}, "depth"),
        ({"solver": "heun"}, "solver"),
        ({"sampling_steps": 2000}, "num_steps"),
    ],
)
def test_bad_configurations_are_refused(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_sizes() -> None:
    counts = {
        size: sum(p.numel() for p in MelGenerator(MelGeneratorConfig.of_size(size, 256)).parameters()) / 1e6
        for size in ("tiny", "small")
    }
    assert counts["tiny"] == pytest.approx(4, abs=0.5)
    assert counts["small"] == pytest.approx(29, abs=1)
    with pytest.raises(ValueError, match="unknown"):
        MelGeneratorConfig.of_size("huge", 256)
