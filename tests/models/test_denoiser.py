"""Denoiser: one network for every direction."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffgap.models.denoiser import Condition, Denoiser, DenoiserConfig
from tests.helpers import assert_close_to_oracle

AUDIO, TEXT, VIDEO = range(3)
CONFIG = DenoiserConfig(
    embedding_dim=24,
    kinds=("vector", "vector", "sequence"),
    tokens_per_vector=3,
    width=16,
    depth=2,
    heads=2,
)


def trained(config: DenoiserConfig = CONFIG) -> Denoiser:
    """A denoiser in float64 with every parameter moved off its initial value, so that nothing is zero."""
    torch.manual_seed(0)
    denoiser = Denoiser(config).double()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return denoiser


def batch(b: int = 4, frames: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """audio (B, D), text (B, D), video (B, T, D), t (B,)."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(b, 24), (b, 24), (b, frames, 24)]
    audio, text, video = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return audio, text, video, torch.linspace(0, 999, b, dtype=torch.float64)


@pytest.mark.parametrize("b", [0, 1, 4])
@pytest.mark.parametrize("frames", [1, 5])
def test_denoiser_shapes(b: int, frames: int) -> None:
    denoiser = trained()
    audio, text, video, t = batch(b, frames)
    assert denoiser(audio, t, AUDIO, [Condition(text, TEXT)]).shape == audio.shape
    assert denoiser(audio, t, AUDIO, [Condition(text, TEXT), Condition(video, VIDEO)]).shape == audio.shape
    assert denoiser(video, t, VIDEO, [Condition(text, TEXT)]).shape == video.shape
    assert denoiser(audio, t.long(), AUDIO).shape == audio.shape


@pytest.mark.parametrize("condition_depth", [0, 1, 2])
def test_denoiser_is_zero_at_initialisation(condition_depth: int) -> None:
    denoiser = Denoiser(dataclasses.replace(CONFIG, condition_depth=condition_depth)).double()
    audio, text, video, t = batch()
    assert (denoiser(audio, t, AUDIO, [Condition(text, TEXT)]) == 0).all()
    assert (denoiser(video, t, VIDEO, [Condition(text, TEXT)]) == 0).all()


def test_denoiser_blocks_are_the_identity_at_initialisation() -> None:
    denoiser = Denoiser(CONFIG).double()
    audio, text, _, t = batch()
    torch.nn.init.eye_(denoiser.head.vector.weight)
    tokens = denoiser.tokens(audio, AUDIO)
    expected = F.layer_norm(tokens, (16,), eps=1e-6)[..., :8].flatten(1)
    assert_close_to_oracle(denoiser(audio, t, AUDIO, [Condition(text, TEXT)]), expected)


def test_denoiser_depends_on_everything_it_is_given() -> None:
    denoiser = trained()
    audio, text, _, t = batch()
    base = denoiser(audio, t, AUDIO, [Condition(text, TEXT)])
    others = [
        denoiser(audio + 1, t, AUDIO, [Condition(text, TEXT)]),
        denoiser(audio, t + 1, AUDIO, [Condition(text, TEXT)]),
        denoiser(audio, t, TEXT, [Condition(text, TEXT)]),
        denoiser(audio, t, AUDIO, [Condition(text + 1, TEXT)]),
        denoiser(audio, t, AUDIO, [Condition(text, AUDIO)]),
        denoiser(audio, t, AUDIO),
    ]
    assert all((other - base).abs().amax(1).min() > 1e-6 for other in others)


def test_denoiser_mixes_directions_in_one_batch() -> None:
    denoiser = trained()
    audio, text, _, t = batch(2)
    noisy, source = torch.stack([audio[0], text[1]]), torch.stack([text[0], audio[1]])
    condition = Condition(source, torch.tensor([TEXT, AUDIO]))
    mixed = denoiser(noisy, t, torch.tensor([AUDIO, TEXT]), [condition])
    first = denoiser(audio[:1], t[:1], AUDIO, [Condition(text[:1], TEXT)])
    second = denoiser(text[1:], t[1:], TEXT, [Condition(audio[1:], AUDIO)])
    assert_close_to_oracle(mixed, torch.cat([first, second]))


def test_encode_condition_serves_every_timestep() -> None:
    denoiser = trained()
    audio, text, video, t = batch()
    conditions = [Condition(text, TEXT), Condition(video, VIDEO)]
    encoded = denoiser.encode_condition(conditions, 4)
    for offset in (0, 1):
        cached = denoiser.denoise(audio, AUDIO, denoiser.modulation(t + offset, AUDIO, encoded.sources), encoded)
        assert_close_to_oracle(cached, denoiser(audio, t + offset, AUDIO, conditions))


def test_encoded_condition_repeat() -> None:
    denoiser = trained()
    _, text, _, t = batch()
    drop = torch.tensor([False, True, False, False])
    encoded = denoiser.encode_condition([Condition(text, TEXT)], 4, drop=drop).repeat(3)
    noisy = torch.randn(12, 24, dtype=torch.float64)
    rows = denoiser.modulation(t.repeat_interleave(3), AUDIO, encoded.sources)
    expected = denoiser(
        noisy,
        t.repeat_interleave(3),
        AUDIO,
        [Condition(text.repeat_interleave(3, 0), TEXT)],
        drop=drop.repeat_interleave(3),
    )
    assert_close_to_oracle(denoiser.denoise(noisy, AUDIO, rows, encoded), expected)


@pytest.mark.parametrize("mixed", [False, True])
def test_precompute_equals_modulation(mixed: bool) -> None:
    denoiser = trained()
    text = batch()[1]
    drop = torch.tensor([False, True, False, True]) if mixed else None
    target = torch.tensor([AUDIO, AUDIO, TEXT, AUDIO]) if mixed else AUDIO
    sources = denoiser.encode_condition([Condition(text, TEXT)], 4, drop=drop).sources
    timesteps = torch.tensor([999, 500, 1])
    steps = denoiser.precompute(timesteps, target, sources)
    assert steps.rows.shape[:2] == (3, 3 if mixed else 1)
    for step, t in enumerate(timesteps):
        expected = denoiser.modulation(t.expand(4), target, sources).rows
        rows = steps.at(step).rows
        assert len(rows) == (4 if mixed else 1)
        assert_close_to_oracle(rows.repeat_interleave(4 // len(rows), 0), expected)


def test_precompute_finds_equal_groups() -> None:
    denoiser = trained()
    text = batch()[1]
    timesteps = torch.tensor([999, 500, 1])
    for drop, groups in (([False, False, True, True], 2), ([True, True, False, False], 2), ([True, False] * 2, 4)):
        sources = denoiser.encode_condition([Condition(text, TEXT)], 4, drop=torch.tensor(drop)).sources
        steps = denoiser.precompute(timesteps, AUDIO, sources)
        rows = steps.at(1).rows
        assert len(rows) == groups
        expected = denoiser.modulation(timesteps[1].expand(4), AUDIO, sources).rows
        assert_close_to_oracle(rows.repeat_interleave(4 // groups, 0), expected)


def test_condition_padding_has_no_influence() -> None:
    denoiser = trained()
    audio, text, video, t = batch()
    lengths = torch.tensor([5, 3, 1, 4])
    mask = torch.arange(9) < lengths[:, None]
    padded = F.pad(video, (0, 0, 0, 4), value=float("nan"))
    padded = padded.masked_fill(~mask[..., None], float("nan"))
    together = denoiser(audio, t, AUDIO, [Condition(text, TEXT), Condition(padded, VIDEO, mask)])
    for i, length in enumerate(lengths):
        row = slice(i, i + 1)
        conditions = [Condition(text[row], TEXT), Condition(video[row, :length], VIDEO)]
        assert_close_to_oracle(together[row], denoiser(audio[row], t[row], AUDIO, conditions))
    together.sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in denoiser.parameters())


def test_target_padding_has_no_influence() -> None:
    denoiser = trained()
    _, text, video, t = batch()
    lengths = torch.tensor([5, 3, 1, 4])
    mask = torch.arange(5) < lengths[:, None]
    noisy = video.masked_fill(~mask[..., None], float("nan"))
    together = denoiser(noisy, t, VIDEO, [Condition(text, TEXT)], mask=mask)
    assert (together[~mask] == 0).all()
    for i, length in enumerate(lengths):
        row = slice(i, i + 1)
        alone = denoiser(video[row, :length], t[row], VIDEO, [Condition(text[row], TEXT)])
        assert_close_to_oracle(together[row, :length], alone)


def test_a_missing_modality_is_as_if_not_given() -> None:
    denoiser = trained()
    audio, text, video, t = batch()
    present = torch.tensor([True, False, True, False])
    partial = denoiser(audio, t, AUDIO, [Condition(text, TEXT, present), Condition(video, VIDEO)])
    both = denoiser(audio, t, AUDIO, [Condition(text, TEXT), Condition(video, VIDEO)])
    only = denoiser(audio, t, AUDIO, [Condition(video, VIDEO)])
    assert_close_to_oracle(partial, torch.where(present[:, None], both, only))


@pytest.mark.parametrize("how", ["drop", "mask"])
def test_null_condition_is_the_unconditional_model(how: str) -> None:
    denoiser = trained()
    audio, text, _, t = batch()
    hidden = torch.tensor([False, True, False, True])
    drop, mask = (hidden, None) if how == "drop" else (None, ~hidden)
    output = denoiser(audio, t, AUDIO, [Condition(text, TEXT, mask)], drop=drop)
    conditional = denoiser(audio, t, AUDIO, [Condition(text, TEXT)])
    assert_close_to_oracle(output, torch.where(hidden[:, None], denoiser(audio, t, AUDIO), conditional))


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(CONFIG).double()
    audio, text, video, t = batch()
    drop = torch.tensor([False, True, False, False])

    def loss() -> Tensor:
        by_video = denoiser(audio, t, AUDIO, [Condition(text, TEXT), Condition(video, VIDEO)], drop=drop)
        by_audio = denoiser(video, t, VIDEO, [Condition(audio, AUDIO)])
        by_text = denoiser(audio, t, TEXT, [Condition(text, TEXT)])
        return (by_video - audio).square().mean() + (by_audio - video).square().mean() + by_text.square().mean()

    optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.1)
    for _ in range(3):  # the head opens at the first step, the gates at the second
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert [name for name, p in denoiser.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_denoiser_fits_a_target() -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(CONFIG)
    audio, text, _, t = (x.float() for x in batch(8))
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    for _ in range(400):
        optimizer.zero_grad()
        error = (denoiser(torch.randn_like(audio), t, AUDIO, [Condition(text, TEXT)]) - audio).square().mean()
        error.backward()
        optimizer.step()
    assert error < 0.1 * audio.square().mean()


def test_denoiser_compiles() -> None:
    denoiser = trained(dataclasses.replace(CONFIG, depth=1))
    audio, text, video, t = batch()
    drop = torch.tensor([False, True, False, False])
    mask = torch.arange(5) < torch.tensor([5, 3, 0, 4])[:, None]

    def function(audio: Tensor, text: Tensor, video: Tensor, t: Tensor) -> Tensor:
        conditions = [Condition(text, TEXT), Condition(video, VIDEO, mask)]
        return denoiser(audio, t, AUDIO, conditions, drop=drop)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    outputs = [f(audio, text, video, t) for f in (compiled, function)]
    assert_close_to_oracle(*outputs)
    parameters = list(denoiser.parameters())
    for actual, expected in zip(
        *(
            torch.autograd.grad(x.square().sum(), parameters, materialize_grads=True, allow_unused=True)
            for x in outputs
        ),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_denoiser_autocast(dtype: torch.dtype) -> None:
    denoiser = trained().float()
    audio, text, _, t = (x.float() for x in batch())
    exact = denoiser(audio, t, AUDIO, [Condition(text, TEXT)])
    with torch.autocast("cpu", dtype):
        output = denoiser(audio, t, AUDIO, [Condition(text, TEXT)], drop=torch.zeros(4, dtype=torch.bool))
    assert (output - exact).norm() < 0.05 * exact.norm()
    output.float().sum().backward()


def test_denoiser_state_round_trip() -> None:
    denoiser = trained()
    other = Denoiser(CONFIG).double()
    other.load_state_dict(denoiser.state_dict())
    audio, text, _, t = batch()
    torch.testing.assert_close(
        other(audio, t, AUDIO, [Condition(text, TEXT)]), denoiser(audio, t, AUDIO, [Condition(text, TEXT)])
    )


A, V = torch.zeros(4, 24), torch.zeros(4, 5, 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noisy": torch.zeros(4, 23)}, r"noisy has shape \(4, 23\); pass \(batch, 24\)"),
        ({"noisy": V}, r"noisy has shape \(4, 5, 24\), a sequence; modality 0 of .* is not one"),
        ({"target": 3}, "noisy has modality 3; use 0 to 2"),
        ({"t": torch.zeros(3)}, r"t has shape \(3,\); pass \(4,\)"),
        ({"conditions": [Condition(A[:3], TEXT)]}, r"conditions\[0\] has 3 samples, expected 4"),
        (
            {"conditions": [Condition(A, TEXT), Condition(A, VIDEO)]},
            r"conditions\[1\] has shape .*, a vector; modality 2",
        ),
        (
            {"conditions": [Condition(V, VIDEO, torch.ones(4, 4).bool())]},
            r"the mask of conditions\[0\] is torch.bool",
        ),
        (
            {"conditions": [Condition(A, TEXT, torch.ones(4))]},
            r"the mask of conditions\[0\] is torch.float32",
        ),
        ({"drop": torch.zeros(4)}, r"drop is torch.float32 \(4,\); pass bool \(4,\)"),
    ],
)
def test_denoiser_bad_input(change: dict[str, Any], message: str) -> None:
    arguments = {"noisy": A, "t": torch.zeros(4), "target": AUDIO, "conditions": [Condition(A, TEXT)]}
    with pytest.raises(ValueError, match=message):
        Denoiser(CONFIG)(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width is 0; use 1 or more"),
        ({"width": 18}, "width 18 is not an even multiple of heads 2"),
        ({"tokens_per_vector": 5}, "embedding_dim 24 is not a multiple of tokens_per_vector 5"),
        ({"kinds": ("vector", "frames")}, "kinds is .*give 'vector' or 'sequence'"),
        ({"kinds": ()}, "kinds is"),
        ({"condition_depth": -1}, "condition_depth is -1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_denoiser_config_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
