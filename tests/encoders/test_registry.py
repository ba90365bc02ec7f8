"""Encoders by name: what a spec builds, what is said of one that builds nothing, and whose towers go together."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffgap.data.media import Source
from diffgap.encoders import registry
from diffgap.encoders.registry import build_encoder, check_spaces
from tests.encoders.checkpoints import no_network, picture, waveform, write_wav
from tests.encoders.test_hf_clap import save_clap
from tests.encoders.test_hf_clip import save_clip

pytestmark = pytest.mark.usefixtures("no_network")
__all__ = ["no_network"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "clap": save_clap(root / "clap", fused=False),
        "other": save_clap(root / "other", fused=False, seed=1),
        "clip": save_clip(root / "clip"),
    }


@pytest.mark.parametrize(
    ("modality", "kind", "name"),
    [
        ("audio", "clap", "ClapAudio"),
        ("text", "clap", "ClapText"),
        ("image", "clip", "ClipImage"),
        ("video", "clip", "ClipVideo"),
        ("text", "clip", "ClipText"),
    ],
)
def test_a_folder_of_transformers_gives_the_tower_of_the_modality(
    folders: dict[str, Path], modality: str, kind: str, name: str
) -> None:
    encoder = build_encoder(modality, f"transformers:{folders[kind]}")
    assert type(encoder).__name__ == name and encoder.modality == modality
    for member in registry._MEMBERS:
        assert hasattr(encoder, member)


def test_options_reach_the_encoder(folders: dict[str, Path]) -> None:
    encoder = build_encoder("video", f"transformers:{folders['clip']}?fps=2.5&frames=sequence&max_frames=7")
    assert encoder.sequence and encoder.reader.read.fps == 2.5 and encoder.reader.read.max_frames == 7  # type: ignore[attr-defined]
    rows, lengths = encoder.encode([encoder.reader.prepare([picture(0), picture(1)])])  # type: ignore[attr-defined]
    assert rows.shape == (1, 2, encoder.dim) and lengths.tolist() == [2]


def test_specs_of_packages_reach_their_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffgap.encoders import laionclap, openclip

    def record(*arguments: Any, **options: Any) -> Any:
        return arguments, options

    monkeypatch.setattr(openclip, "OpenClipImage", record)
    monkeypatch.setattr(openclip, "OpenClipVideo", record)
    monkeypatch.setattr(laionclap, "LaionClapText", record)
    monkeypatch.setattr(laionclap, "LaionClapAudio", record)
    assert build_encoder("image", "open-clip:ViT-B-32:/weights.pt") == (("ViT-B-32", "/weights.pt", "cpu"), {})
    video = build_encoder("video", "open-clip:ViT-B-32:openai?fps=2&like=openai&frames=sequence", "cuda")
    assert video == (("ViT-B-32", "openai", "cuda"), {"fps": 2.0, "like": "openai", "frames": "sequence"})
    assert build_encoder("image", "open-clip:ViT-B-32") == (("ViT-B-32", "", "cpu"), {})
    text = build_encoder("text", "laion-clap:/630k-audioset-best.pt?tokenizer=/roberta-base")
    assert text == (("/630k-audioset-best.pt", "cpu"), {"tokenizer": "/roberta-base"})
    assert build_encoder("audio", "laion-clap:/630k-audioset-best.pt") == (("/630k-audioset-best.pt", "cpu"), {})


def test_offline_names_the_small_encoder_of_the_modality(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffgap.encoders import offline

    for modality, name in {"text": "MiniLMText", "image": "EfficientNetImage", "audio": "WhisperSpeech"}.items():
        monkeypatch.setattr(offline, name, lambda name=name: name)
        assert build_encoder(modality, "offline") == name
    with pytest.raises(ValueError, match="no video tower; it embeds text, image, audio"):
        build_encoder("video", "offline")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", r"unknown encoder ''.*offline, offline:aisfx.*transformers:/path/to/folder.*package\.module:Class"),
        ("clap", "unknown encoder 'clap' for audio"),
        ("offline:nonsense", "unknown encoder 'offline:nonsense'"),
        ("transformers", "names no weights"),
        ("laion-clap:", "names no weights"),
        ("transformers:/absent", "/absent is not a transformers checkpoint"),
        ("nowhere.to.be:Found", "there is no module nowhere"),
        ("json:Nothing", "defines no Nothing"),
        ("laion-clap:/x.pt?tokenizer=/y", "no option 'tokenizer'; here it has none"),
        ("laion-clap:/x.pt?tokenizer", "must read name=value"),
        ("offline?fps=2", "no option 'fps'"),
    ],
)
def test_a_spec_that_names_no_encoder_is_one_clear_error(spec: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_encoder("audio", spec)


def test_wrong_options_and_modalities_are_refused(folders: dict[str, Path]) -> None:
    clip = f"transformers:{folders['clip']}"
    with pytest.raises(ValueError, match="no audio tower; it embeds image, video, text"):
        build_encoder("audio", clip)
    with pytest.raises(ValueError, match="could not convert string to float: 'often'"):
        build_encoder("video", f"{clip}?fps=often")
    with pytest.raises(ValueError, match="frames must be 'pooled' or 'sequence', not 'all'"):
        build_encoder("video", f"{clip}?frames=all")
    with pytest.raises(ValueError, match="fps must be"):
        build_encoder("video", f"{clip}?fps=0")
    with pytest.raises(ValueError, match="no option 'fps'"):
        build_encoder("image", f"{clip}?fps=1")


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="a 'bert' model; of transformers, clap and clip are known"):
        build_encoder("text", f"transformers:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "module", "command"),
    [
        ("open-clip:ViT-B-32:openai", "open_clip", "pip install open-clip-torch"),
        ("laion-clap:/weights.pt", "laion_clap", "pip install --no-deps laion-clap torchlibrosa"),
        ("transformers:", "transformers", "pip install 'transformers>=4.50'"),
    ],
)
def test_a_missing_package_is_named_with_its_command(
    spec: str, module: str, command: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))
    modality = {"open_clip": "image", "laion_clap": "audio", "transformers": "audio"}[module]
    if module == "transformers":
        spec += str(folders["clap"])
    with pytest.raises(ModuleNotFoundError) as caught:
        build_encoder(modality, spec)
    assert command in str(caught.value) and caught.value.name == module


def test_the_ten_lines_of_the_documentation_are_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (registry.__doc__ or "").partition("::\n")[2]
    (tmp_path / "loudness.py").write_text(dedent(lines))
    assert sum(bool(line.strip()) for line in lines.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    encoder = build_encoder("audio", "loudness:Loudness")
    source = Source(path=write_wav(tmp_path / "sound.wav", waveform(1.0, rate=16_000), rate=16_000))
    rows = encoder.encode([encoder.reader(source)])
    wave = waveform(1.0, rate=16_000)
    np.testing.assert_allclose(rows, [[wave.std(), np.abs(wave).max()]], rtol=1e-6)
    with pytest.raises(ValueError, match="embeds audio, not text"):
        build_encoder("text", "loudness:Loudness")


def test_a_custom_encoder_is_told_each_member_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_an_encoder.py").write_text(
        dedent("""
        class Half:
            modality, dim, sequence = "audio", 2, False
            def __init__(self, size="small"):
                self.size = size
        class Deaf(Half):
            normalized, fingerprint, space, reader = False, "deaf", "", print
            def encode(self, batch): ...
        """)
    )
    (tmp_path / "needs_another.py").write_text("import a_module_that_is_absent\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    with pytest.raises(TypeError, match="half_an_encoder:Half lacks normalized, fingerprint, space, reader, encode;"):
        build_encoder("audio", "half_an_encoder:Half?size=large")
    with pytest.raises(TypeError, match="reader must be a"):
        build_encoder("audio", "half_an_encoder:Deaf")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_absent"):
        build_encoder("audio", "needs_another:Encoder")


def test_towers_of_different_checkpoints_are_refused_with_both_fingerprints(folders: dict[str, Path]) -> None:
    audio = build_encoder("audio", f"transformers:{folders['clap']}")
    text = build_encoder("text", f"transformers:{folders['clap']}")
    other = build_encoder("text", f"transformers:{folders['other']}")
    clip = build_encoder("text", f"transformers:{folders['clip']}")
    check_spaces({"audio": audio, "text": text})
    check_spaces({"audio": audio, "text": clip})  # two families: nobody takes them for one space
    with pytest.raises(ValueError, match="different clap checkpoints") as caught:
        check_spaces({"audio": audio, "text": other})
    assert audio.fingerprint in str(caught.value) and other.fingerprint in str(caught.value)
    alone: Any = SimpleNamespace(space="", fingerprint="a")
    check_spaces({"audio": alone, "text": SimpleNamespace(space="", fingerprint="b"), "image": alone})  # type: ignore[dict-item]
