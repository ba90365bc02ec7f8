from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffgap.data.store import EmbeddingStore
from diffgap.models.bridge import DiffGAP
from diffgap.models.settings import BridgeSettings
from diffgap.training.batches import collate, fit_data

SMALL: dict[str, Any] = {
    "width": 16,
    "tokens": 4,
    "denoiser_width": 16,
    "depth": 1,
    "heads": 2,
    "dropout": 0.0,
    "head_dropout": 0.0,
}


def make(sequences: tuple[str, ...] = (), **settings: Any) -> DiffGAP:
    """A small bridge whose output layers are not zero, as if it had been trained."""
    torch.manual_seed(0)
    bridge = DiffGAP({"text": 10, "audio": 12, "image": 14}, BridgeSettings(**{**SMALL, **settings}), sequences)
    with torch.no_grad():
        for parameter in bridge.diffusion.denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return bridge


def batch(rows: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(rows, dim, generator=generator) for name, dim in (("text", 10), ("audio", 12), ("image", 14))
    }


@pytest.fixture(scope="module")
def store() -> EmbeddingStore:
    generator = torch.Generator().manual_seed(2)
    concept = torch.randn(60, 8, generator=generator)
    arrays = {
        name: concept @ torch.randn(8, dim, generator=generator)
        for name, dim in (("text", 10), ("audio", 12), ("image", 14))
    }
    return EmbeddingStore.from_arrays(arrays)


@pytest.mark.parametrize("split", ["alternate", "half", "random", "joint"])
@pytest.mark.parametrize("contrastive", ["clip", "siglip", "none"])
def test_losses_and_gradients(split: str, contrastive: str) -> None:
    bridge = make(split=split, contrastive=contrastive)
    losses = bridge(batch(), ids=torch.tensor([0, 0, 1, 2, 3, 4]), step=1)
    total = losses["diffusion"] + (losses["contrastive"] if contrastive != "none" else 0.0)
    torch.testing.assert_close(losses["loss"], total)
    losses["loss"].backward()
    for name, parameter in bridge.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name
    head = bridge.heads["text"].project.weight.grad
    assert (head is None or head.abs().sum() == 0) == (contrastive == "none"), (
        "only the contrastive loss moves the heads"
    )


def test_diffusion_trains_heads_when_asked() -> None:
    bridge = make(contrastive="none", diffusion_trains_heads=True)
    bridge(batch())["loss"].backward()
    grad = bridge.heads["text"].project.weight.grad
    assert grad is not None and grad.abs().sum() > 0


def test_unit_norm_projection() -> None:
    bridge = make()
    for name, x in batch().items():
        torch.testing.assert_close(bridge.project(name, x).norm(dim=-1), torch.ones(6))


def test_absent_rows_do_not_matter() -> None:
    bridge, x = make(split="joint"), batch()
    present = {"audio": torch.tensor([True] * 4 + [False] * 2)}
    spoilt = {**x, "audio": x["audio"].index_fill(0, torch.tensor([4, 5]), 99.0)}
    results = []
    for embeddings in (x, spoilt):
        torch.manual_seed(3)
        results.append(bridge(embeddings, present=present))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name])


def test_frames_beyond_the_length_do_not_matter() -> None:
    bridge = make(sequences=("audio",))
    x = batch() | {"audio": torch.randn(6, 5, 12)}
    lengths = {"audio": torch.tensor([1, 2, 3, 4, 5, 5])}
    spoilt = x["audio"].clone()
    spoilt[0, 1:] = 99.0
    results = []
    for audio in (x["audio"], spoilt):
        torch.manual_seed(3)
        results.append(bridge(x | {"audio": audio}, lengths=lengths))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name])
    first = bridge.sample("text", audio=x["audio"][:1], lengths=torch.tensor([1]))
    torch.testing.assert_close(first, bridge.sample("text", audio=spoilt[:1], lengths=torch.tensor([1])))


def test_sample_shapes_and_norms() -> None:
    bridge = make()
    samples = bridge.sample("audio", text=batch()["text"], num_samples=3, steps=2)
    assert samples.shape == (6, 3, 16)
    torch.testing.assert_close(samples.norm(dim=-1), torch.ones(6, 3))
    assert (samples[:, 0] - samples[:, 1]).abs().max() > 1e-3, "samples of one condition differ"


def test_sampling_sequences() -> None:
    bridge = make(sequences=("audio",))
    assert bridge.sample("audio", text=batch()["text"], frames=5, num_samples=2, steps=2).shape == (6, 2, 5, 16)
    assert bridge.translate("text", audio=torch.randn(6, 7, 12), steps=2, num_samples=2).shape == (6, 16)
    with pytest.raises(ValueError, match="frames is not given"):
        bridge.sample("audio", text=batch()["text"])


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp", "unipc"])
def test_a_sample_does_not_depend_on_its_batch(solver: str, guidance: float) -> None:
    bridge, x = make(), batch()["text"]
    options = {"solver": solver, "steps": 3, "guidance_scale": guidance, "num_samples": 2}
    whole = bridge.sample("audio", text=x, **options)
    torch.testing.assert_close(bridge.sample("audio", text=x, batch_size=2, **options), whole)
    torch.testing.assert_close(bridge.sample("audio", text=x[:2], **options), whole[:2])
    assert (bridge.sample("audio", text=x, seed=1, **options) - whole).abs().max() > 1e-3


def test_guidance_moves_the_sample() -> None:
    bridge, x = make(), batch()["text"]
    plain, guided = (bridge.sample("audio", text=x, steps=3, guidance_scale=g) for g in (1.0, 3.0))
    assert (plain - guided).abs().max() > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sample_equals_the_plain_loop(guidance: float) -> None:
    """Cached conditions, precomputed rows and one batch for both branches give what plain denoiser calls give."""
    from diffgap.diffusion.solvers import build_solver
    from diffgap.models.denoiser import Condition
    from diffgap.ops import normal, sample_seeds, solver_step

    bridge, x = make().eval(), batch()["text"]
    names, diffusion = bridge.modalities, bridge.diffusion
    seeds = sample_seeds(6, torch.Generator().manual_seed(0))
    table = build_solver("ddim", diffusion.schedule, 4)
    sample = normal(seeds, (16,))
    condition = Condition(diffusion.scaler("text").scale(bridge.project("text", x)), names.index("text"))
    with torch.no_grad():
        for step, t in enumerate(table.timesteps):
            conditional, unconditional = (
                diffusion.denoiser(sample, t.float().expand(6), names.index("audio"), given)
                for given in ([condition], [])
            )
            output = unconditional + guidance * (conditional - unconditional)
            sample = solver_step(sample, output, table.coefficients, step, x0_norm=4.0).sample
    expected = torch.nn.functional.normalize(sample, dim=-1)
    found = bridge.sample("audio", text=x, steps=4, solver="ddim", guidance_scale=guidance)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_prepared_denoiser_takes_over_another_batch() -> None:
    """What a CUDA graph reads: the first batch's tensors, with what the second one has in them."""
    from diffgap.models.denoiser import Condition

    bridge = make().eval()
    z = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1))
    prepare = functools.partial(
        bridge.diffusion._model,
        target="audio",
        num_samples=2,
        shape=(16,),
        timesteps=torch.tensor([9.0, 4.0]),
        both=True,
    )
    with torch.no_grad():
        first, second, smaller = (prepare([Condition(x, 1)]) for x in (z[0], z[1], z[2, :3]))
        noisy = torch.randn(16, 16)
        expected = second(noisy, 1)
        assert not torch.allclose(first(noisy, 1), expected)
        assert first.take_over(second)
        assert torch.equal(first(noisy, 1), expected)
        assert not first.take_over(smaller)
        assert torch.equal(first(noisy, 1), expected)


@pytest.mark.parametrize("log_scale", [0.5, 9.0])
def test_contrastive_loss_is_the_mean_over_pairs(log_scale: float) -> None:
    """Against the definition in float64: positives by id, both directions, the scale held to 100."""
    bridge, x = make(diffusion_weight=0.0), batch()
    ids = torch.tensor([0, 0, 1, 2, 3, 4])
    with torch.no_grad():
        bridge.logit_scale.fill_(log_scale)
    z = {name: bridge.project(name, values).double() for name, values in x.items()}
    target = (ids[:, None] == ids).double()
    target = target / target.sum(1, keepdim=True)
    expected = []
    for a, b in (("text", "audio"), ("text", "image"), ("audio", "image")):
        logits = min(math.exp(log_scale), 100.0) * z[a] @ z[b].T
        sides = [-(target * side.log_softmax(1)).sum(1).mean() for side in (logits, logits.T)]
        expected.append((sides[0] + sides[1]) / 2)
    found = bridge(x, ids=ids)["contrastive"]
    torch.testing.assert_close(found.double(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_diffusion_loss_is_the_weighted_denoising_error(gamma: float) -> None:
    """Against the definition, on the same draws: the time and weight of each row's own noise level."""
    from diffgap.models.denoiser import Condition
    from diffgap.models.randomness import STREAM_LEVEL
    from diffgap.ops import normal, q_sample

    bridge = make(split="alternate", schedule="flow", prediction="flow_prediction", min_snr_gamma=gamma)
    x = batch(rows=40)
    schedule, scaler = bridge.diffusion.schedule, bridge.diffusion.scaler("audio")
    seeds = 7 * torch.arange(40) - 100
    found = bridge(x, step=0, seeds=seeds)["diffusion"]
    level, hidden = torch.special.ndtr(normal(seeds, (2,), stream=STREAM_LEVEL).double()).T
    t, drop = (1000 * level).floor().long(), hidden < bridge.settings.condition_dropout
    assert 0 < drop.sum() < 40
    target, source = 0, 1  # the first direction: audio from image
    clean, given = (
        scaler.scale(bridge.project(bridge.modalities[i], x[bridge.modalities[i]])) for i in (target, source)
    )
    noisy, wanted = q_sample(clean, t, schedule.table.float(), seeds, "flow_prediction")
    predicted = bridge.diffusion.denoiser(
        noisy, schedule.times.float()[t], target, [Condition(given, source)], drop=drop
    )
    weight = schedule.min_snr_weights(gamma).float()[t] if gamma else torch.ones(40)
    torch.testing.assert_close(found, ((predicted - wanted).square().mean(1) * weight).mean())


def test_scores_of_all_kinds() -> None:
    bridge, x = make(num_samples=2, sampling_steps=2), batch()
    pair = {"text": x["text"], "audio": x["audio"][:4]}
    cosine = bridge.project("text", pair["text"]) @ bridge.project("audio", pair["audio"]).T
    torch.testing.assert_close(bridge.score(scoring="cosine", **pair), cosine)
    options = {"num_samples": 2, "steps": 1}
    bridged = 0.5 * (
        bridge.translate("audio", text=pair["text"], **options) @ bridge.project("audio", pair["audio"]).T
        + bridge.project("text", pair["text"]) @ bridge.translate("text", audio=pair["audio"], **options).T
    )
    torch.testing.assert_close(bridge.score(scoring="bridge", **pair), bridged)
    torch.testing.assert_close(bridge.score(scoring="fusion", alpha=0.7, **pair), cosine + 0.7 * bridged)


def test_save_and_load(tmp_path: Path, store: EmbeddingStore) -> None:
    bridge = make(scaling="whiten")
    bridge.fit(**fit_data(store, bridge))
    bridge.save_pretrained(tmp_path / "model")
    assert sorted(path.suffix for path in (tmp_path / "model").iterdir()) == [".json", ".md", ".safetensors"]
    loaded = DiffGAP.from_pretrained(tmp_path / "model")
    assert loaded.settings == bridge.settings and loaded.modalities == bridge.modalities
    x = batch()["text"]
    assert torch.equal(loaded.sample("audio", text=x, steps=2), bridge.sample("audio", text=x, steps=2))
    bridge.save_pretrained(tmp_path / "model")  # over itself
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match="does not hold a whole DiffGAP model"):
        DiffGAP.from_pretrained(tmp_path / "model")


def test_cca_start_aligns_pairs(store: EmbeddingStore) -> None:
    bridge = make(head_dropout=0.0, embeddings_per_input=0.0)
    bridge.fit(**fit_data(store, bridge))
    z = {name: bridge.project(name, store.embeddings(name)) for name in bridge.modalities}
    for a, b in (("text", "audio"), ("text", "image"), ("audio", "image")):
        scores = z[a] @ z[b].T
        assert (scores.argmax(1) == torch.arange(60)).float().mean() > 0.95, (a, b)


def test_collate_fills_what_is_missing(store: EmbeddingStore) -> None:
    rows = torch.arange(60)
    rows[5] = -1
    partial = EmbeddingStore.from_arrays(
        {name: store.embeddings(name) for name in store.modalities},
        {"row_audio": rows, "id": [str(i) for i in range(60)]},
    )
    collated = collate(partial, make(), torch.tensor([4, 5]))
    assert collated["present"]["audio"].tolist() == [True, False]
    assert collated["embeddings"]["audio"][1].abs().sum() == 0
    assert torch.isfinite(make()(**collated)["loss"])


def test_encode_pools_only_the_frames_that_are_there() -> None:
    bridge = make(sequences=("audio",))
    audio = torch.randn(2, 5, 12)
    spoilt = audio.clone()
    spoilt[:, 3:] = 99.0
    lengths = torch.tensor([3, 3])
    a, b = (bridge.encode("audio", x, "text", lengths=lengths, steps=2, num_samples=2) for x in (audio, spoilt))
    torch.testing.assert_close(a, b)


def test_folder_without_configuration(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ValueError, match="does not hold a whole DiffGAP model"):
        DiffGAP.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.sample("smell", text=torch.zeros(1, 10)), "modality 'smell' is unknown .* audio, image, text"),
        (lambda b: b.sample("audio", text=torch.zeros(1, 9)), r"text has shape \(1, 9\); this bridge takes .* D = 10"),
        (lambda b: b.sample("audio"), "give at least one source modality"),
        (lambda b: b.sample("audio", audio=torch.zeros(1, 12)), "source and target are both 'audio'"),
        (lambda b: b.sample("audio", text=torch.zeros(1, 10), num_samples=0), "num_samples is 0"),
        (lambda b: b.sample("audio", text=torch.zeros(1, 10), steps=0), "num_steps is 0"),
        (lambda b: b.sample("audio", text=torch.zeros(1, 10), solver="rk9"), "solver 'rk9' does not exist"),
        (lambda b: b.sample("audio", text=torch.zeros(1, 10), cuda_graph=True), "cuda_graph: z is on cpu"),
        (lambda b: b.score(text=torch.zeros(1, 10)), "score takes two modalities"),
        (lambda b: b.half().sample("audio", text=torch.zeros(1, 10)), r"is torch.float16, .* call bridge.float\(\)"),
        (lambda b: b({"text": torch.zeros(3, 10)}), "the losses need two modalities or more; got text alone"),
        (lambda b: b(batch(), ids=torch.zeros(6)), "ids is torch.float32; pass integers"),
        (lambda b: b(batch(), ids=[0, 1]), r"ids has shape \(2,\); pass \(6,\), one a row"),
        (lambda b: b.fit({"text": torch.zeros(3, 10)}), "fit needs audio, image, text; got text"),
        (lambda b: DiffGAP({"text": 3}), "modalities has 1 entries"),
        (lambda b: DiffGAP({"text": 3, "a/b": 3}), "modality name 'a/b' is no identifier"),
        (
            lambda b: DiffGAP({"text": 3, "audio": 3}, BridgeSettings(head="identity")),
            "head 'identity' needs width 256",
        ),
        (lambda b: DiffGAP({"text": 3, "seed": 3}), "modality name 'seed' is no identifier or an option"),
        (lambda b: DiffGAP({"text": 3, "audio": 3}, sequences=["video"]), "sequences names 'video'"),
    ],
)
def test_bad_input_is_one_clear_error(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(make())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.sample("audio", text=[[0.0] * 10]), "text is of type list; pass a floating-point tensor"),
        (lambda b: b.project("text", torch.zeros(1, 10).long()), "text is of type torch.int64; pass a floating-point"),
        (lambda b: b.fit(dict.fromkeys(b.modalities, "x")), "of type str; pass a floating-point tensor"),
        (lambda b: b(batch(), ids=list("abcdef")), r"ids is no list of numbers; pass a tensor \(6,\)"),
    ],
)
def test_input_of_another_type_is_one_clear_error(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call(make())


def test_float64_and_half_embeddings_are_taken() -> None:
    """They are converted to the bridge's own dtype."""
    bridge, x = make().eval(), batch()
    for dtype in (torch.float64, torch.bfloat16):
        given = {name: each.to(dtype) for name, each in x.items()}
        same = {name: each.float() for name, each in given.items()}
        for call in (
            lambda e: bridge(e, seeds=torch.arange(6))["loss"],
            lambda e: bridge.score(text=e["text"], audio=e["audio"]),
            lambda e: bridge.fit(e) or bridge.project("image", e["image"]),
        ):
            assert torch.equal(call(given), call(same))
    assert bridge.double()(x, seeds=torch.arange(6))["loss"].dtype == torch.float64
    assert bridge.half()(x, seeds=torch.arange(6))["loss"].isfinite()


@pytest.mark.parametrize("as_given", [list, np.array, lambda x: torch.tensor(x, dtype=torch.int32)])
def test_ids_lengths_and_present_may_be_lists_and_other_integers(as_given: Any) -> None:
    bridge, x = make(sequences=("image",)), batch()
    x["image"] = x["image"][:, None].expand(-1, 4, -1)
    ids, lengths, here = [0, 0, 1, 2, 3, 4], [1, 2, 3, 4, 4, 1], [True, True, False, True, True, True]

    def loss(convert: Any, present: Any) -> Tensor:
        options = {"present": {"audio": present}, "lengths": {"image": convert(lengths)}}
        return bridge(x, ids=convert(ids), seeds=torch.arange(6), **options)["loss"]

    assert torch.equal(loss(as_given, here), loss(torch.tensor, torch.tensor(here)))
    options = {"image": x["image"]}
    found = bridge.sample("text", lengths=as_given(lengths), **options)
    assert torch.equal(found, bridge.sample("text", lengths=torch.tensor(lengths), **options))
    found = bridge.sample("image", frames=as_given(lengths), text=x["text"])
    assert torch.equal(found, bridge.sample("image", frames=torch.tensor(lengths), text=x["text"]))


def test_head_dropout_is_for_the_contrastive_loss_alone() -> None:
    """The diffusion learns what the heads give in use."""
    bridge, x = make(head_dropout=0.5, split="joint"), batch()
    targets: list[Tensor] = []
    conditions: list[Tensor] = []
    original = bridge.diffusion._errors

    def spy(part: Any) -> Tensor:
        targets.append(part.clean[part.target == 0])
        (condition,) = part.conditions
        conditions.append(condition.embedding[condition.source == 0])
        return original(part)

    bridge.diffusion._errors = spy  # type: ignore[method-assign]
    dropped = bridge(x, step=0)["contrastive"]
    clean = bridge.eval().project("audio", x["audio"]) * 4.0  # sqrt(width)
    assert bridge.modalities[0] == "audio"
    for found in (targets[0], conditions[0]):
        torch.testing.assert_close(found.unique(dim=0), clean.unique(dim=0))
    assert (bridge(x, step=0)["contrastive"] - dropped).abs() > 1e-3


def test_stages() -> None:
    """Heads alone, diffusion alone, or both; a loss that is not made moves nothing."""
    bridge, x = make(), batch()
    both = {name for name in bridge(x)}
    assert both == {"loss", "contrastive", "diffusion"}
    owners = ("heads", "contrastive", ("heads.", "logit_")), ("diffusion", "diffusion", ("diffusion.",))
    for stage, kept, own in owners:
        bridge.zero_grad()
        bridge.stage = stage  # type: ignore[assignment]
        losses = bridge(x)
        assert set(losses) == {"loss", kept}
        losses["loss"].backward()
        moved = {name for name, parameter in bridge.named_parameters() if parameter.grad is not None}
        assert moved and all(name.startswith(own) for name in moved)


def test_parameter_groups() -> None:
    bridge = make(head_learning_rate=0.25)
    groups = bridge.parameter_groups(0.1)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in bridge.parameters())
    heads = {id(parameter) for parameter in bridge.heads.parameters()}
    for group in groups:
        for parameter in group["params"]:
            assert group["lr_scale"] == (0.25 if id(parameter) in heads else 1.0)
            assert group["weight_decay"] == (0.1 if parameter.ndim >= 2 else 0.0)


def test_empty_batch() -> None:
    bridge = make()
    assert bridge.sample("audio", text=torch.zeros(0, 10), num_samples=2).shape == (0, 2, 16)
