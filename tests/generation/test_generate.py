"""From a query to sound files: encoder, bridge, generator, vocoder, and sets of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.nn import functional as F

from diffgap.data.store import EmbeddingStore
from diffgap.generation.build import build_space
from diffgap.generation.generated import GeneratedSet
from diffgap.generation.native import load_generator
from diffgap.generation.pipeline import condition, generate
from diffgap.generation.space import AudioSpace
from diffgap.training.runs import load_bridge
from tests.generation.studio import MEL, TONES, WORDS, Studio
from tests.helpers import run
from tests.synthetic import make_config

QUERY = ["--text", "a tone, number 40", "--encoder", WORDS]


def read(path: Path) -> np.ndarray:
    wave, rate = soundfile.read(path)
    assert rate == MEL.sample_rate
    return wave


def test_a_text_becomes_a_sound_file(studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "--generator", studio.generator, *QUERY, "-o", tmp_path / "tone.wav") == 0
    assert "bridged" in capsys.readouterr().out
    typical = load_generator(studio.generator).model.config.typical_frames
    lengths = EmbeddingStore.open(studio.store).split("train").lengths("mel")
    assert typical == int(lengths.median())
    assert len(read(tmp_path / "tone.wav")) == (typical - 1) * MEL.hop


def test_samples_are_numbered_and_differ_and_the_seed_repeats_them(studio: Studio, tmp_path: Path) -> None:
    options = [*QUERY, "--num-samples", 2, "--seconds", 0.15, "--seed", 7]
    for how in ("bridged", "sampled", "raw", "none"):
        for name in ("first", "second"):
            out = tmp_path / how / f"{name}.flac"
            assert run("generate", "--generator", studio.generator, *options, "--how", how, "-o", out) == 0
        files = [tmp_path / how / f"{name}-{k}.flac" for name in ("first", "second") for k in (1, 2)]
        one, two, again, other = map(read, files)
        assert len(one) == 1200 and not np.array_equal(one, two)
        assert np.array_equal(one, again) and np.array_equal(two, other)


def test_a_sound_can_be_the_query(studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = next((studio.media / "test").glob("*.wav"))
    asked = ["--audio", sound, "--encoder", TONES, "-o", tmp_path / "again.ogg"]
    assert run("generate", "--generator", studio.generator, *asked) == 0
    assert "raw" in capsys.readouterr().out and len(read(tmp_path / "again.ogg"))


def test_how_a_query_becomes_a_condition(studio: Studio) -> None:
    bridge, store = load_bridge(studio.bridge), EmbeddingStore.open(studio.store).split("test")
    space, text = AudioSpace.load(str(studio.bridge), "audio", ""), store.embeddings("text")
    expected = bridge.translate("audio", text=text, seed=3)
    torch.testing.assert_close(condition(space, "bridged", "text", text, num_samples=2, seed=3)[:, 1], expected)
    drawn = bridge.sample("audio", text=text, seed=3, num_samples=2)
    torch.testing.assert_close(condition(space, "sampled", "text", text, num_samples=2, seed=3), drawn)
    own = bridge.project("text", text).detach()
    torch.testing.assert_close(condition(space, "raw", "text", text)[:, 0], own)
    assert condition(space, "none", "text", text) is None
    plain = AudioSpace(None, "audio", "audio:1")
    audio = store.embeddings("audio")
    torch.testing.assert_close(condition(plain, "raw", "audio", audio)[:, 0], F.normalize(audio, dim=-1))
    for bad, how, modality in ((plain, "bridged", "text"), (space, "sampled", "audio")):
        with pytest.raises(ValueError, match=f"how is '{how}'"):
            condition(bad, how, modality, store.embeddings(modality))


def test_a_sound_does_not_depend_on_its_neighbours(studio: Studio) -> None:
    generator = load_generator(studio.generator)
    z = F.normalize(torch.randn(3, generator.dim, generator=torch.Generator().manual_seed(0)), dim=1)
    seconds = [0.1, 0.3, 0.2]
    together = generator.generate(z, seconds, num_samples=2, seed=[5, 6, 7])
    for row in range(3):
        alone = generator.generate(z[row : row + 1], [seconds[row]], num_samples=2, seed=5 + row)[0]
        for one, other in zip(together[row], alone, strict=True):
            assert len(one) == int(seconds[row] * MEL.sample_rate)
            np.testing.assert_allclose(one, other, atol=1e-3)
    grouped = generate(generator, z[:, None].expand(-1, 2, -1), seconds, num_samples=2, seed=5)
    assert [len(samples) for samples in grouped] == [2, 2, 2]
    assert not np.allclose(grouped[0][0], grouped[0][1])


def test_a_set_holds_the_same_items_of_every_system(studio: Studio, tmp_path: Path) -> None:
    systems = ["reference", "vocoder", "audio", "bridged", "sampled", "raw", "none"]
    made = ["--generator", studio.generator, "--media", studio.media, "--label", "split", "--systems", *systems]
    assert run("generate-set", *made, "--limit", 5, "--seed", 1, "-o", tmp_path / "set") == 0
    found = GeneratedSet.open(tmp_path / "set")
    assert (list(found.systems), found.source, found.sample_rate) == (systems, "text", 8000)
    assert found.about["bridge"] == str(studio.bridge)  # the generator's own, as none was named
    store = EmbeddingStore.open(studio.store)
    rows = [list(store.column("id")).index(item.id) for item in found.items]
    assert len(rows) == 5 and all(item.label == "test" for item in found.items)
    numbers = [int(Path(item.id).name) for item in found.items]
    assert [item.caption for item in found.items] == [f"a tone, number {number}" for number in numbers]
    for item, row, number in zip(found.items, rows, numbers, strict=True):
        original = soundfile.read(studio.media / store.column("path_audio")[row])[0]
        assert item.seconds == pytest.approx(len(original) / 16_000, abs=MEL.hop / MEL.sample_rate)
        for system in systems:
            assert len(read(found.path(system, item))) == pytest.approx(item.seconds * 8000, abs=1)
        heard = read(found.path("reference", item))
        peak = np.abs(np.fft.rfft(heard)).argmax() * 8000 / len(heard)
        assert peak == pytest.approx(300 + 40 * number, abs=2 * 8000 / len(heard))
    bridge = load_bridge(studio.bridge)
    text = store.embeddings("text", rows)
    np.testing.assert_allclose(found.conditions("bridged"), bridge.translate("audio", text=text, seed=1), atol=1e-6)
    own = bridge.project("audio", store.embeddings("audio", rows)).detach()
    np.testing.assert_allclose(found.conditions("audio"), own, atol=1e-6)
    assert found.conditions("none") is None and found.conditions("reference") is None
    assert run("generate-set", *made, "--limit", 5, "--seed", 1, "-o", tmp_path / "set") == 2
    again = [*made, "--limit", 5, "--seed", 1, "-o", tmp_path / "again"]
    assert run("generate-set", *again) == 0
    for system in systems:
        for item in found.items:
            assert (tmp_path / f"again/{system}/{item.name}.wav").read_bytes() == found.path(system, item).read_bytes()


def test_a_set_that_is_not_whole_is_refused(studio: Studio, tmp_path: Path) -> None:
    made = ["--generator", studio.generator, "--systems", "raw", "--limit", 2]
    assert run("generate-set", *made, "-o", tmp_path / "set") == 0
    found = GeneratedSet.open(tmp_path / "set")
    described = (tmp_path / "set/set.json").read_text()
    for damage, message in (("{", "not a whole set"), (described.replace("/1", "/9"), "of format")):
        (tmp_path / "set/set.json").write_text(damage)
        with pytest.raises(ValueError, match=message):
            GeneratedSet.open(tmp_path / "set")
    (tmp_path / "set/set.json").write_text(described)
    lines = (tmp_path / "set/items.jsonl").read_text()
    first = json.loads(lines.splitlines()[0])
    (tmp_path / "set/items.jsonl").write_text(json.dumps({**first, "name": "../raw/" + first["name"]}))
    with pytest.raises(ValueError, match="outside of its folder"):
        GeneratedSet.open(tmp_path / "set")
    (tmp_path / "set/items.jsonl").write_text(lines)
    found.path("raw", found.items[0]).unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        GeneratedSet.open(tmp_path / "set")
    with pytest.raises(FileNotFoundError, match="generate-set"):
        GeneratedSet.open(tmp_path)


def test_conditions_of_another_space_are_refused(studio: Studio, tmp_path: Path) -> None:
    generator, space = load_generator(studio.generator), build_space(str(studio.generator), None)
    generator.check(space)
    make_config(studio.store, steps=1, seed=5).save(tmp_path / "other.yaml")
    only = ["--data.modalities", "audio", "text"]
    assert run("train", tmp_path / "other", "--config", tmp_path / "other.yaml", *only) == 0
    for other in (str(tmp_path / "other"), ""):
        with pytest.raises(ValueError, match=r"trained on conditions of head:\w+, these are of \w+:\w"):
            generator.check(build_space(str(studio.generator), other, "audio:1"))
    with pytest.raises(ValueError, match=r"conditions of head:\w+, and no bridge leads the query there; give the run"):
        generator.check(build_space(str(studio.generator), ""))
    with pytest.raises(ValueError, match=r"trained on audio embeddings of .*; these are of audio:9"):
        build_space(str(studio.generator), None, "audio:9")
    # A gallery's encoder alone is a space too.
    assert AudioSpace(None, "audio", "audio:1").fingerprint == "encoder:audio:1"
    assert replace(space, bridge=load_bridge(studio.bridge)).fingerprint == space.fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of --text, --image"),
        (["--text", "a", "--audio", "b.wav"], "one of --text, --image"),
        ([*QUERY, "--num-samples", "0"], "num_samples is 0"),
        ([*QUERY, "-o", "tone.mp3"], "ends in none of"),
        ([*QUERY, "--seconds", "-1"], "seconds has -1"),
        (["--text", "a", "--encoder", "tests.search.encoders:OtherWords"], "was trained on embeddings of text:1"),
        ([*QUERY, "--vocoder", "vocos"], "vocoder"),
        (["--audio", "absent.wav", "--encoder", TONES], "does not exist"),
        ([*QUERY, "--bridge", "nowhere"], "nowhere"),
        ([*QUERY, "--bridge", ""], "and no bridge leads the query there; give the run of one with --bridge"),
    ],
)
def test_bad_input_is_one_line_and_no_file(
    studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    output = [] if "-o" in arguments else ["-o", "tone.wav"]
    assert run("generate", "--generator", studio.generator, *arguments, *output) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_bridge_is_no_generator(studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["generate", *QUERY], ["generate-set"]):
        for bridge in (studio.bridge, studio.bridge / "model"):
            assert run(*command, "--generator", bridge, "-o", tmp_path / "tone.wav") == 2
            said = capsys.readouterr().err
            assert f"{bridge} holds a bridge of `diffgap train`, not a generator; name the folder of" in said
    assert not list(tmp_path.iterdir())


def test_an_existing_file_stays(studio: Studio, tmp_path: Path) -> None:
    kept = tmp_path / "tone.wav"
    kept.write_text("mine")
    made = ["--generator", studio.generator, *QUERY, "-o", kept]
    assert run("generate", *made) == 2 and kept.read_text() == "mine"
    assert run("generate", *made, "--overwrite") == 0 and len(read(kept))
    foreign = tmp_path / "folder"
    foreign.mkdir()
    refused = ["--generator", studio.generator, "-o", foreign, "--overwrite"]
    assert run("generate-set", *refused) == 2 and foreign.is_dir()


def test_a_store_without_recordings_has_no_reference(studio: Studio, tmp_path: Path, capsys) -> None:
    asked = ["--generator", studio.generator, "--systems", "reference", "-o", tmp_path / "set"]
    assert run("generate-set", *asked) == 2
    assert "system reference needs the recordings" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()
