"""Readers of files that are damaged anywhere: what the documentation names is raised, and nothing else happens."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from diffgap.data.items.listing import list_items
from diffgap.data.store import EmbeddingStore, write_store
from diffgap.generation.generated import FORMAT, GeneratedSet
from diffgap.models.bridge import DiffGAP
from diffgap.search.index import SearchIndex, build_index
from diffgap.training import checkpoint
from diffgap.training.config import RunConfig
from tests.data.items.listed import tar
from tests.fuzz.budget import fuzzed
from tests.search.conftest import write_tone
from tests.synthetic import TINY, make_config, make_store

ROOT = Path(__file__).resolve().parents[2]

#: What readers may raise: the message is for the user.
REFUSALS = (ValueError, FileNotFoundError)

_DANGEROUS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_watched: list[str] = []
_active = False


def _hook(event: str, details: tuple[Any, ...]) -> None:
    if not _active or "__pycache__" in str(details[:1]):  # of a module that is imported now
        return
    written = event == "open" and isinstance(details[2], int) and details[2] & _WRITING
    if written or event in _DANGEROUS or event in ("os.rename", "os.remove", "os.mkdir", "os.symlink", "os.rmdir"):
        _watched.append(f"{event} {details[:2]}")


sys.addaudithook(_hook)


#: Bytes of address space that reading a few kilobytes may take: enough for threads' stacks.
_ROOM = 2 << 30


@contextmanager
def harmless() -> Iterator[None]:
    """No process, connection, unpickling, change of the file system or large allocation happens within."""
    global _active
    limits = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + _ROOM, limits[1]))
    _watched.clear()
    _active = True
    try:
        yield
    finally:
        _active = False
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert _watched == []


def model_parts() -> tuple[nn.Module, AveragedModel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    return model, AveragedModel(model), optimizer


def make_set(folder: Path) -> None:
    for name in ("a", "b"):
        write_tone(folder / "reference" / f"{name}.wav", 440.0, 0.01)
    items = [{"name": name, "id": name, "caption": "", "label": "", "seconds": 0.01} for name in ("a", "b")]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    described = {"format": FORMAT, "sample_rate": 16_000, "source": "text", "systems": ["reference"], "about": {}}
    (folder / "set.json").write_text(json.dumps(described))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of everything that can be read."""
    folder = tmp_path_factory.mktemp("whole")
    write_store(folder / "store", make_store(groups=8), dtype={"audio": "int8"})
    make_config(folder / "store").save(folder / "config.yaml")
    model, ema, optimizer = model_parts()
    state = {"step": 1, "best_step": 0, "best_score": 0.0, "stale": 0, "scaler": {}}
    checkpoint.save(folder / "checkpoints", 1, model=model, ema=ema, optimizer=optimizer, state=state)
    DiffGAP({"audio": 12, "text": 10}, TINY).save_pretrained(folder / "model")
    build_index(folder / "store", folder / "index", modality="audio")
    make_set(folder / "set")
    row = json.dumps({"text": "c", "split": "val"}).encode()
    tar(folder / "shard.tar", [("a.txt", b"a dog"), ("a.wav", b"RIFF"), ("b.json", row), ("b.wav", b"RIFF")])
    return folder


def open_store(path: Path) -> None:
    store = EmbeddingStore.open(path / "store")
    for modality in store.modalities:
        store.embeddings(modality, store.present(modality))
    store.group_ids()


def open_checkpoint(path: Path) -> None:
    model, ema, optimizer = model_parts()
    checkpoint.load(path / "checkpoints" / "step-00000001", model=model, ema=ema, optimizer=optimizer)
    optimizer.step()


def open_index(path: Path) -> None:
    index = SearchIndex.open(path / "index", store=str(path / "store"))
    index.search(torch.nn.functional.normalize(torch.ones(1, index.meta.dim)), 3)


def open_shard(path: Path) -> None:
    for item in list_items(path / "shard.tar"):
        for source in item.media.values():
            if source.text is None:
                with suppress(OSError), source.open() as file:
                    file.read(100)


def open_set(path: Path) -> None:
    found = GeneratedSet.open(path / "set")
    for system in found.systems:
        for item in found.items:
            assert found.path(system, item).resolve().is_relative_to(found.folder.resolve())


READERS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "store": (open_store, ("store/index.parquet", "store/audio.safetensors", "store/text.safetensors")),
    "checkpoint": (open_checkpoint, tuple(f"checkpoints/step-00000001/{name}" for name in (
        "model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"))),
    "config": (lambda path: RunConfig.load(path / "config.yaml"), ("config.yaml",)),
    "model": (lambda path: DiffGAP.from_pretrained(path / "model"), ("model/config.json", "model/model.safetensors")),
    "index": (open_index, ("index/meta.json", "index/rows.safetensors", "index/vectors.safetensors")),
    "shard": (open_shard, ("shard.tar",)),
    "set": (open_set, ("set/set.json", "set/items.jsonl")),
}  # fmt: skip

DAMAGES = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.floats(0, 1), st.integers(1, 255)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
        st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("replace"), st.just(0.0), st.one_of(st.binary(max_size=40), st.just(b"null"))),
    ),
    min_size=1,
    max_size=3,
)


def damaged(content: bytes, damages: list[Any], bend: bool) -> bytes:
    """The content with bytes changed, cut off, inserted or replaced; ``bend`` towards its beginning."""
    for kind, place, value in damages:
        at = int((place**4 if bend else place) * max(len(content) - 1, 0))
        if kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ value]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + value + content[at:]
        elif kind == "replace":
            content = value
    return content


_VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("../../x"), st.just("..")
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


def altered(text: str, draw: Callable[..., Any]) -> str:
    """JSON with one value, at any depth, replaced by another or left out."""
    content = json.loads(text)
    node = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return json.dumps(content)
        key = draw(st.sampled_from(keys))
        if isinstance(node[key], (dict, list)) and node[key] and draw(st.booleans()):
            node = node[key]
            continue
        if draw(st.booleans()):
            node[key] = draw(_VALUES)
        else:
            del node[key]
        return json.dumps(content)


def read_damaged(whole: Path, name: str, change: Callable[[bytes], bytes], file: str) -> None:
    """Read a copy of ``whole`` in which one file is changed: it is refused, or read; nothing else happens."""
    reader, _ = READERS[name]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(whole, copy)
        (copy / file).write_bytes(change((copy / file).read_bytes()))
        with harmless(), suppress(*REFUSALS):
            reader(copy)


@pytest.mark.parametrize(
    "harm", [lambda path: path.write_text("x"), lambda path: os.mkdir(path), lambda _: subprocess.run(["true"])]
)
def test_harm_is_seen(tmp_path: Path, harm: Callable[[Path], Any]) -> None:
    with pytest.raises(AssertionError), harmless():
        harm(tmp_path / "new")


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read(whole: Path, name: str) -> None:
    with harmless():
        READERS[name][0](whole)


@pytest.mark.parametrize("name", READERS)
@fuzzed(25, data=st.data(), damages=DAMAGES, bend=st.booleans())
def test_damaged_files_are_refused_or_read(whole: Path, name: str, data: Any, damages: list[Any], bend: bool) -> None:
    file = data.draw(st.sampled_from(READERS[name][1]))
    read_damaged(whole, name, lambda content: damaged(content, damages, bend), file)


@pytest.mark.parametrize("name", ["checkpoint", "index", "model", "set"])
@fuzzed(25, data=st.data())
def test_json_of_other_content_is_refused_or_read(whole: Path, name: str, data: Any) -> None:
    file = data.draw(st.sampled_from([file for file in READERS[name][1] if ".json" in file]))

    def change(content: bytes) -> bytes:
        first, *rest = content.decode().splitlines() if file.endswith(".jsonl") else [content.decode()]
        return "\n".join([altered(first, data.draw), *rest]).encode()

    read_damaged(whole, name, change, file)


@fuzzed(100, content=_VALUES, section=st.sampled_from((None, "data", "bridge", "train")))
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


def test_a_pickle_in_the_place_of_a_file_is_not_run(whole: Path, tmp_path: Path) -> None:
    import pickle

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    for name, (_, files) in READERS.items():
        for file in files:
            read_damaged(whole, name, lambda _: pickle.dumps(Bomb()), file)
    assert not (tmp_path / "exploded").exists()
