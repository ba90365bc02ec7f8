"""AudioLDM, MusicLDM and AudioLDM2 driven by vectors, against diffusers' own pipelines with the same random weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.helpers import relative_l2, run
from tests.search.conftest import write_tone
from tests.synthetic import make_config, with_bridge

diffusers = pytest.importorskip("diffusers", reason="diffusers is the peer: pip install diffusers")
pytest.importorskip("transformers")
from diffgap import BridgeSettings, DiffGAP  # noqa: E402
from diffgap.encoders.registry import build_encoder  # noqa: E402
from diffgap.generation.pretrained import DiffusersGenerator, load_pretrained  # noqa: E402
from diffgap.generation.space import AudioSpace  # noqa: E402
from tests.generation.diffusers_pipelines import HOP, PIPELINES, RATE, clap  # noqa: E402

TEXTS = ["a dog barks", "rain on a roof"]
LENGTH = 0.01


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a kind of pipeline, saved once."""
    folder = tmp_path_factory.mktemp("pipelines")

    def find(kind: str) -> Path:
        if not (folder / kind).exists():
            PIPELINES[kind](folder / f"{kind}-words").save_pretrained(folder / kind)
        return folder / kind

    return find


@pytest.fixture(params=list(PIPELINES))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def noise(generator: DiffusersGenerator, seeds: list[int], length: float = LENGTH) -> torch.Tensor:
    return torch.cat([generator._noise(seed, 0, length) for seed in seeds])


def texts_of(generator: DiffusersGenerator) -> torch.Tensor:
    return torch.from_numpy(generator.encoder.encode(TEXTS))


def plain(saved: Path, kind: str, latents: torch.Tensor, **options: Any) -> list[np.ndarray]:
    """Diffusers' own pipeline, prompted by words where it still can be (MusicLDM's prompts fail on transformers 5).

    One text a call: what AudioLDM2 makes of a text depends on the padding that others bring.
    """
    pipe = diffusers.DiffusionPipeline.from_pretrained(saved)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler).__module__.startswith("diffusers.")

    def vector(text: str) -> torch.Tensor:
        own = pipe.text_encoder.get_text_features(**pipe.tokenizer(text, padding="max_length", return_tensors="pt"))
        return getattr(own, "pooler_output", own)

    waves = []
    for text, latent in zip(TEXTS, latents, strict=True):
        prompt: dict[str, Any] = {"prompt": text}
        if kind == "musicldm":
            prompt = {"prompt_embeds": vector(text), "negative_prompt_embeds": vector("")}
        waves.append(pipe(audio_length_in_s=LENGTH, latents=latent[None], **prompt, **options).audios[0])
    return waves


def test_an_identity_gives_what_the_plain_pipeline_gives(saved: Callable[[str], Path], kind: str) -> None:
    ours = load_pretrained(kind, str(saved(kind)))
    assert type(ours.pipeline.scheduler).__module__ == "diffgap.integrations.diffusers"
    seeds = [5, 6]
    waves = ours.generate(texts_of(ours), [LENGTH] * 2, steps=4, seed=seeds, captions=TEXTS)
    expected = plain(saved(kind), kind, noise(ours, seeds), num_inference_steps=4)
    for (wave,), other in zip(waves, expected, strict=True):
        assert len(wave) == round(LENGTH * RATE) and wave.std() > 0.01
        assert relative_l2(torch.from_numpy(wave), torch.from_numpy(other.clip(-1, 1))) < 1e-4


def test_an_identity_bridge_leaves_the_vectors_alone(saved: Callable[[str], Path]) -> None:
    ours = load_pretrained("audioldm", str(saved("audioldm")))
    bridge = DiffGAP({"audio": 16, "text": 16}, BridgeSettings(width=16, head="identity", tokens=2))
    vectors = texts_of(ours)
    torch.testing.assert_close(AudioSpace(bridge, "text", "").project(vectors), vectors)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))


def test_the_fused_scheduler_gives_diffusers_numbers(saved: Callable[[str], Path], kind: str) -> None:
    found = []
    for scheduler in ("ours", "theirs"):
        generator = load_pretrained(kind, str(saved(kind)), scheduler=scheduler)
        vectors = F.normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(1)), dim=1)
        found.append(generator.generate(vectors, [LENGTH], steps=5, guidance_scale=3.0, seed=2)[0][0])
    assert relative_l2(torch.from_numpy(found[0]), torch.from_numpy(found[1])) < 1e-4


def test_a_sound_depends_on_its_own_condition_length_seed_and_number(saved: Callable[[str], Path], kind: str) -> None:
    generator = load_pretrained(kind, str(saved(kind)))
    vectors, lengths = texts_of(generator), [LENGTH, 0.006]
    together = generator.generate(vectors, lengths, num_samples=3, steps=2, seed=[1, 2])
    alone = generator.generate(vectors[1:], lengths[1:], num_samples=3, steps=2, seed=2)
    for one, other in zip(together[1], alone[0], strict=True):
        assert len(one) == round(0.006 * RATE)
        np.testing.assert_allclose(one, other, atol=1e-4)
    first, second, _ = together[0]
    assert not np.allclose(first, second, atol=1e-3)
    again = generator.generate(vectors, lengths, steps=2, seed=[9, 9])
    assert not np.allclose(again[0][0], first, atol=1e-3)
    other = generator.generate(vectors.flip(0), [LENGTH] * 2, steps=2, seed=[1, 2])
    assert not np.allclose(other[0][0], generator.generate(vectors[:1], [LENGTH], steps=2, seed=1)[0][0], atol=1e-3)


def test_without_a_condition_it_is_the_empty_prompt_unguided(saved: Callable[[str], Path]) -> None:
    generator = load_pretrained("audioldm", str(saved("audioldm")))
    wave = generator.generate(None, [LENGTH], steps=3, seed=4)[0][0]
    pipe = diffusers.DiffusionPipeline.from_pretrained(saved("audioldm"))
    latents = noise(generator, [4])
    expected = pipe("", audio_length_in_s=LENGTH, latents=latents, num_inference_steps=3, guidance_scale=1.0).audios[0]
    assert relative_l2(torch.from_numpy(wave), torch.from_numpy(expected.clip(-1, 1))) < 1e-4


def test_captions_reach_the_second_encoder(saved: Callable[[str], Path]) -> None:
    generator = load_pretrained("audioldm2", str(saved("audioldm2")))
    vectors = texts_of(generator)[:1]
    said = [generator.generate(vectors, [LENGTH], steps=2, captions=c)[0][0] for c in (None, [""], ["abc"])]
    assert np.array_equal(said[0], said[1]) and not np.allclose(said[0], said[2], atol=1e-4)


def test_captions_of_other_lengths_leave_a_sound_alone(saved: Callable[[str], Path]) -> None:
    generator = load_pretrained("audioldm2", str(saved("audioldm2")))
    vectors, captions = texts_of(generator), ["a dog barks at the moon", "rain"]
    together = generator.generate(vectors, [LENGTH] * 2, steps=3, seed=[1, 2], captions=captions)
    for row in range(2):
        alone = generator.generate(vectors[row : row + 1], [LENGTH], steps=3, seed=row + 1, captions=[captions[row]])
        np.testing.assert_allclose(together[row][0], alone[0][0], atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (BridgeSettings(width=16, tokens=2), "has linear heads and so a space of its own"),
        (BridgeSettings(width=32, tokens=2, head="identity"), "width is 32, that of AudioLDM's CLAP 16"),
    ],
)
def test_a_bridge_into_another_space_is_refused(
    saved: Callable[[str], Path], settings: BridgeSettings, message: str
) -> None:
    generator = load_pretrained("audioldm", str(saved("audioldm")))
    bridge = DiffGAP({"audio": settings.width, "text": settings.width}, settings)
    with pytest.raises(ValueError, match=message):
        generator.check(AudioSpace(bridge, "audio", ""))


@pytest.mark.parametrize("kind", ["musicldm", "audioldm2"])
def test_another_audio_tower_is_refused(saved: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    """The text towers are the same: what was fine-tuned is on the audio side."""
    generator = load_pretrained(kind, str(saved(kind)))
    pipe = generator.pipeline
    for part in (pipe.text_encoder, pipe.tokenizer, pipe.feature_extractor):
        part.save_pretrained(tmp_path)
    for modality in ("text", "audio"):
        generator.check_tower(build_encoder(modality, f"transformers:{tmp_path}"))
    with torch.no_grad():
        pipe.text_encoder.audio_projection.linear2.weight[0] *= -1
    generator.check_tower(build_encoder("text", f"transformers:{tmp_path}"))
    with pytest.raises(ValueError, match="their audio towers agree to a cosine of"):
        generator.check_tower(build_encoder("audio", f"transformers:{tmp_path}"))


def test_what_is_no_such_pipeline_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a MusicLDMPipeline, not the AudioLDMPipeline of audioldm"):
        load_pretrained("audioldm", str(saved("musicldm")))
    with pytest.raises(ValueError, match="'tango' is unknown"):
        load_pretrained("tango", str(saved("musicldm")))
    with pytest.raises(FileNotFoundError, match=r"holds no model_index\.json"):
        load_pretrained("audioldm", str(tmp_path))


@pytest.mark.parametrize(
    ("part", "error"), [("unet/diffusion_pytorch_model", FileNotFoundError), ("text_encoder/model", ValueError)]
)
def test_damaged_weights_are_named(
    saved: Callable[[str], Path], tmp_path: Path, part: str, error: type[Exception]
) -> None:
    folder = Path(shutil.copytree(saved("audioldm"), tmp_path / "damaged"))
    file = folder / f"{part}.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(error, match="damaged"):
        load_pretrained("audioldm", str(folder))


def test_wrong_arguments_are_refused(saved: Callable[[str], Path]) -> None:
    generator = load_pretrained("audioldm", str(saved("audioldm")))
    vectors = texts_of(generator)
    with pytest.raises(ValueError, match=r"conditions are \(2, 16\); pass \(1, 16\)"):
        generator.generate(vectors, [LENGTH])
    with pytest.raises(ValueError, match="seed has 1 numbers for 2 sounds"):
        generator.generate(vectors, [LENGTH] * 2, seed=[1])
    with pytest.raises(ValueError, match="captions has 1 texts for 2 sounds"):
        generator.generate(vectors, [LENGTH] * 2, captions=["rain"])
    with pytest.raises(ValueError, match="num_samples is 0"):
        generator.generate(vectors, [LENGTH] * 2, num_samples=0)
    with pytest.raises(ValueError, match="steps is 0"):
        generator.generate(vectors, [LENGTH] * 2, steps=0)
    for bad in (0.0, 1.9 * HOP / RATE, float("inf")):
        with pytest.raises(ValueError, match="seconds has"):
            generator.generate(vectors, [LENGTH, bad])


def test_the_command_with_and_without_a_bridge(
    saved: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = f"musicldm:{saved('musicldm')}"
    short = ["--generator", spec, "--seconds", LENGTH, "--steps", 2, "--text", "a dog barks"]
    assert run("generate", *short, "-o", tmp_path / "raw.wav") == 0
    # The CLAP of the pipeline, as a folder of its own, embeds sounds and texts; an identity bridge is trained on them.
    pipe = diffusers.DiffusionPipeline.from_pretrained(saved("musicldm"))
    own, foreign = tmp_path / "clap", tmp_path / "foreign"
    for folder, model in ((own, pipe.text_encoder), (foreign, clap())):
        for part in (model, pipe.tokenizer, pipe.feature_extractor):
            part.save_pretrained(folder)
    for number in range(24):
        split = ("train", "train", "val", "test")[number % 4]
        write_tone(tmp_path / f"media/{split}/{number:02}.wav", 300 + 90 * number)
        (tmp_path / f"media/{split}/{number:02}.txt").write_text(f"tone {'do' * number}")
    for name, folder in (("own", own), ("foreign", foreign)):
        towers = ["--audio", f"transformers:{folder}", "--text", f"transformers:{folder}", "--workers", 0]
        assert run("embed", tmp_path / "media", tmp_path / f"{name}-store", *towers) == 0
        config = make_config(tmp_path / f"{name}-store", steps=2, batch_size=4)
        with_bridge(config, head="identity", head_init="random").save(tmp_path / f"{name}.yaml")
        assert run("train", tmp_path / f"{name}-run", "--config", tmp_path / f"{name}.yaml") == 0
    capsys.readouterr()
    led = ["--bridge", tmp_path / "own-run", "--encoder", f"transformers:{own}"]
    assert run("generate", *short, *led, "-o", tmp_path / "bridged.wav") == 0
    assert "bridged" in capsys.readouterr().out
    named = ["--bridge", tmp_path / "own-run", "--clap", f"transformers:{own}"]  # embeds the text too
    assert run("generate", *short, *named, "-o", tmp_path / "named.wav") == 0
    assert (tmp_path / "named.wav").read_bytes() == (tmp_path / "bridged.wav").read_bytes()
    assert run("generate", *short, *led, "--how", "raw", "-o", tmp_path / "same.wav") == 0
    assert (tmp_path / "same.wav").read_bytes() == (tmp_path / "raw.wav").read_bytes()
    assert (tmp_path / "bridged.wav").read_bytes() != (tmp_path / "raw.wav").read_bytes()
    for arguments, message in (
        (["--bridge", tmp_path / "foreign-run", "--encoder", f"transformers:{foreign}"], "is not the generator's"),
        (["--bridge", tmp_path / "own-run", "--encoder", f"transformers:{foreign}"], "audio side was embedded by"),
        (["--bridge", tmp_path / "own-run"], "--clap is not given"),
    ):
        capsys.readouterr()
        assert run("generate", *short, *arguments, "-o", tmp_path / "refused.wav") == 2
        assert message in capsys.readouterr().err
    made = ["--generator", spec, "--bridge", tmp_path / "own-run", "--data", tmp_path / "own-store", "--steps", 2]
    assert run("generate-set", *made, "--clap", f"transformers:{own}", "--seconds", LENGTH, "--limit", 2,
               "--systems", "audio", "bridged", "raw", "none", "-o", tmp_path / "set") == 0  # fmt: skip
