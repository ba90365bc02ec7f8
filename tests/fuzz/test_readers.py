"""Readers of files that are damaged anywhere: what the documentation names is raised, and nothing else happens."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import yaml
from hypothesis import strategies as st

from diffgap.data.items.listing import list_items
from diffgap.data.store import EmbeddingStore
from diffgap.encoders import aisfx
from diffgap.generation.generated import GeneratedSet
from diffgap.generation.vocoder import HiFiGAN
from diffgap.training.config import RunConfig
from tests.data.items.listed import tar
from tests.fuzz.budget import fuzzed
from tests.fuzz.damage import DAMAGES, VALUES, altered, contents, damaged, harmless
from tests.fuzz.readers import READERS, make_set, make_whole
from tests.search.conftest import write_tone

ROOT = Path(__file__).resolve().parents[2]

#: What readers may raise: the message is for the user.
REFUSALS = (ValueError, FileNotFoundError)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_whole(folder)
    return folder


def read_damaged(whole: Path, name: str, change: Callable[[bytes], bytes], file: str) -> Exception | None:
    """Read a copy of ``whole`` in which one file is changed: it is refused, or read; nothing else happens.

    What is imported appears whole or not at all. Returns the refusal.
    """
    reader = READERS[name]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        (copy / "out").mkdir(parents=True)
        for entry in reader.needs:
            if (whole / entry).is_dir():
                shutil.copytree(whole / entry, copy / entry, copy_function=os.link)
            else:
                os.link(whole / entry, copy / entry)
        content = (copy / file).read_bytes()
        (copy / file).unlink()
        (copy / file).write_bytes(change(content))
        output = copy / "out" if reader.writes else None
        before, refusal = contents(Path(folder), output), None
        with harmless(output):
            try:
                reader.read(copy)
            except REFUSALS as error:
                refusal = error
        assert contents(Path(folder), output) == before
        made = [path.name for path in (copy / "out").iterdir()]
        assert made == (["store"] if reader.writes and refusal is None else [])
        if made:
            EmbeddingStore.open(copy / "out" / "store")
    assert refusal is None or str(copy) in str(refusal), f"no file is named: {refusal!r}"
    return refusal


@pytest.mark.parametrize(
    "harm", [lambda path: path.write_text("x"), lambda path: os.mkdir(path), lambda _: subprocess.run(["true"])]
)
def test_harm_is_seen(tmp_path: Path, harm: Callable[[Path], Any]) -> None:
    with pytest.raises(AssertionError), harmless(tmp_path / "out"):
        harm(tmp_path / "new")


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read(whole: Path, name: str) -> None:
    for file in READERS[name].files:
        assert read_damaged(whole, name, bytes, file) is None


@pytest.mark.parametrize("name", READERS)
@fuzzed(25, data=st.data(), damages=DAMAGES, bend=st.booleans())
def test_damaged_files_are_refused_or_read(whole: Path, name: str, data: Any, damages: list[Any], bend: bool) -> None:
    file = data.draw(st.sampled_from(READERS[name].files))
    read_damaged(whole, name, lambda content: damaged(content, damages, bend), file)


#: By the ending of a file of structured text, how it is read and written.
STRUCTURED: dict[str, tuple[Callable[[str], Any], Callable[[Any], str]]] = {
    ".json": (json.loads, json.dumps),
    ".jsonl": (json.loads, json.dumps),
    ".yaml": (yaml.safe_load, yaml.safe_dump),
}


@pytest.mark.parametrize(
    "name", [n for n, reader in READERS.items() if any(Path(f).suffix in STRUCTURED for f in reader.files)]
)
@fuzzed(25, data=st.data())
def test_values_of_other_content_are_refused_or_read(whole: Path, name: str, data: Any) -> None:
    file = data.draw(st.sampled_from([file for file in READERS[name].files if Path(file).suffix in STRUCTURED]))
    load, dump = STRUCTURED[Path(file).suffix]

    def change(content: bytes) -> bytes:
        first, *rest = content.decode().splitlines() if file.endswith(".jsonl") else [content.decode()]
        return "\n".join([dump(altered(load(first), data.draw)), *rest]).encode()

    read_damaged(whole, name, change, file)


@fuzzed(100, content=VALUES, section=st.sampled_from((None, "data", "bridge", "train")))
def test_configurations_of_any_content(content: Any, section: str | None) -> None:
    """A mapping of any values is a configuration or one clear error."""
    with suppress(ValueError):
        RunConfig.from_dict(content if section is None else {section: content}, "config")
    fields = RunConfig().to_dict()
    for name in fields.get(section, {}) if section else ():
        with suppress(ValueError):
            RunConfig.from_dict({section: {name: content}}, "config")


ESCAPES = ("../outside.txt", "/tmp/outside.txt", "a/../../outside.txt", "..", "a/..")


def test_shards_lead_nowhere_else(tmp_path: Path) -> None:
    """Members named out of the folder, and links, are neither written nor followed."""
    (tmp_path / "secret.txt").write_text("secret")
    shard = tmp_path / "in" / "shard.tar"
    tar(shard, [(f"{name}.txt" if name.endswith(".") else name, b"text") for name in ESCAPES] + [("ok.txt", b"ok")])
    with tarfile.open(shard, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("link.txt")
            link.type, link.linkname = kind, str(tmp_path / "secret.txt")
            archive.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    texts = []
    with harmless():
        for item in list_items(shard):
            with item.media["text"].open() as file:
                texts.append(file.read())
    assert b"ok" in texts and b"secret" not in texts
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [*ESCAPES, "", ".", "a/b", 5])
def test_generated_sets_lead_nowhere_else(tmp_path: Path, name: Any) -> None:
    make_set(tmp_path / "set")
    lines = (tmp_path / "set" / "items.jsonl").read_text().splitlines()
    item = json.dumps({**json.loads(lines[0]), "name": name})
    (tmp_path / "set" / "items.jsonl").write_text(item + "\n")
    write_tone(tmp_path / "outside.wav", 440.0, 0.01)
    with pytest.raises(ValueError, match="set"):
        GeneratedSet.open(tmp_path / "set")


#: Files that may name pickle, with the reason.
PICKLING = {
    "diffgap/embed/reading.py": "a pipe between a process and the child that it started; no file",
    "diffgap/encoders/openclip.py": "the name of an exception",
}
_PICKLE = r"import pickle|from pickle|pickle\.load|joblib|dill|cloudpickle|yaml\.(unsafe_load|full_load|load)\("
_LOADS = re.compile(rf"\b(torch\.load\((?P<torch>.*)|np\.load\((?P<numpy>.*)|(?P<pickle>{_PICKLE}))")


def test_no_pickle_is_read() -> None:
    """torch.load takes weights alone, numpy no objects, YAML no tags; and nothing else unpickles files."""
    found = []
    for file in sorted((ROOT / "diffgap").rglob("*.py")):
        name = str(file.relative_to(ROOT))
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            match = _LOADS.search(line)
            if match is None or (match["pickle"] and name in PICKLING):
                continue
            safe = (match["torch"] is not None and "weights_only=True" in line) or (
                match["numpy"] is not None and "allow_pickle=False" in line
            )
            if not safe:
                found.append(f"{name}:{number}: {line.strip()}")
    assert found == []


def bomb(folder: Path) -> bytes:
    """A pickle that makes ``folder/exploded``."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (folder / "exploded",)

    return pickle.dumps(Bomb())


def test_a_bomb_goes_off_where_it_is_unpickled(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"pickle\.find_class"), harmless():
        pickle.loads(bomb(tmp_path))
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", READERS)
def test_a_pickle_in_the_place_of_a_file_is_not_run(whole: Path, tmp_path: Path, name: str) -> None:
    for file in READERS[name].files:
        assert read_damaged(whole, name, lambda _: bomb(tmp_path), file) is not None
    assert not (tmp_path / "exploded").exists()


def test_pinned_weights_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others than those pinned are not read at all, and if a pickle were pinned it would be refused."""
    file = tmp_path / "models" / "checkpoint.pth"
    file.parent.mkdir()
    file.write_bytes(bomb(tmp_path))
    monkeypatch.setattr(aisfx, "package_folder", lambda *_: tmp_path)
    with harmless(), pytest.raises(ValueError, match=f"{file}: .* differs from the pinned"):
        aisfx.AisfxAudio()
    monkeypatch.setattr(aisfx.AisfxAudio, "_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    with harmless(), pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        aisfx.AisfxAudio()
    assert not (tmp_path / "exploded").exists()


def test_a_hifigan_that_is_damaged(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=4, upsample_initial_channel=4, upsample_rates=[2], upsample_kernel_sizes=[4],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]],
    )  # fmt: skip
    transformers.SpeechT5HifiGan(config).save_pretrained(tmp_path)
    HiFiGAN(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = safetensors.torch.load_file(weights)
    content = weights.read_bytes()
    for damage in (b"", content[:100], bytes([content[0] ^ 1]) + content[1:]):
        weights.write_bytes(damage)
        with harmless(), pytest.raises(ValueError, match=f"{tmp_path} does not hold a whole SpeechT5HifiGan"):
            HiFiGAN(tmp_path)
    safetensors.torch.save_file({name: x for name, x in whole.items() if name != "conv_pre.bias"}, weights)
    with pytest.raises(ValueError, match=r"\(no weights conv_pre.bias\)"):
        HiFiGAN(tmp_path)
    weights.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(bomb(tmp_path))
    with harmless(), pytest.raises(ValueError, match=f"{tmp_path} does not hold a whole SpeechT5HifiGan"):
        HiFiGAN(tmp_path)
    assert not (tmp_path / "exploded").exists()
