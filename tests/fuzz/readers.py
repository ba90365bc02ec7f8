"""Small files of every kind that diffgap reads, and how each is read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from diffgap.data.importers import import_clip_retrieval, import_npy
from diffgap.data.items.listing import list_items
from diffgap.data.store import EmbeddingStore, write_store
from diffgap.encoders._checkpoint import read_state_dict
from diffgap.generation import native, vocoder
from diffgap.generation.generated import FORMAT, GeneratedSet
from diffgap.generation.mel import MelSettings
from diffgap.generation.trainer import GeneratorData, GeneratorRunConfig
from diffgap.models.bridge import DiffGAP
from diffgap.models.mel_generator import MelGenerator, MelGeneratorConfig
from diffgap.search.index import SearchIndex, build_index
from diffgap.training import checkpoint
from diffgap.training.config import RunConfig
from diffgap.training.grid import Grid
from diffgap.training.runs import read_npy
from tests.data.items.listed import tar, touch
from tests.search.conftest import write_tone
from tests.synthetic import TINY, make_config, make_store


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


def make_run(folder: Path) -> None:
    """A generator's run folder."""
    mel = MelSettings(sample_rate=8000, n_fft=256, hop=80, bands=4, high=4000)
    config = MelGeneratorConfig(
        condition_dim=3, bands=4, patch_bands=4, width=8, depth=1, heads=2, sampling_steps=2, mel=mel.description
    )
    MelGenerator(config).save_pretrained(folder / "model")
    GeneratorRunConfig(data=GeneratorData("store", bridge="bridge")).save(folder / "config.yaml")


def make_tables(folder: Path) -> None:
    """Manifests in each of their formats, and the csv files of the known data sets with stubs of their media."""
    touch(folder, "a.wav", "b.wav", "vid_000030.wav", "train/Yvid_30.wav", "clip.wav")
    rows = [
        {"audio": "a.wav", "caption": "a dog", "group": "a", "start": 0.5, "stop": 2.0, "split": "train", "year": 1999},
        {"audio": "b.wav", "caption": 'rain, "loud"', "group": "b", "start": 0, "stop": 1, "split": "val", "year": -1},
    ]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for ending, mark in (("csv", ","), ("tsv", "\t")):
        quoted = [['"{}"'.format(str(value).replace('"', '""')) for value in row.values()] for row in rows]
        (folder / f"list.{ending}").write_text("\n".join(map(mark.join, [list(rows[0]), *quoted])))
    pq.write_table(pa.Table.from_pylist(rows), folder / "list.parquet")
    (folder / "train.csv").write_text("audiocap_id,youtube_id,start_time,caption\n1,vid,30,a dog barks\n")
    captions = ",".join(f"caption_{n}" for n in range(1, 6))
    (folder / "clotho_captions_validation.csv").write_text(f"file_name,{captions}\nclip.wav,a,b,c,d,e\n")
    (folder / "vggsound.csv").write_text('vid,30,"dog barking, loud",train\n')


def make_saved_dataset(folder: Path) -> None:
    """What ``datasets`` writes by ``save_to_disk``."""
    folder.mkdir()
    table = pa.table({"caption": ["a dog", "rain"], "sound": [{"bytes": b"RIFF", "path": "a.wav"}, None]})
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    features = {"caption": {"dtype": "string", "_type": "Value"}, "sound": {"_type": "Audio"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))


def make_arrays(folder: Path) -> None:
    """What the importers take: arrays with a csv, and clip-retrieval's shards."""
    rows = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    for place in ("npy", "shards/img_emb", "shards/metadata"):
        (folder / place).mkdir(parents=True)
    np.save(folder / "npy" / "audio.npy", rows)
    (folder / "npy" / "index.csv").write_text("id,group,caption,row_audio\n007,a,a dog,0\n008,a,rain,1\n009,b,,3\n")
    for number in range(2):
        np.save(folder / "shards" / "img_emb" / f"img_emb_{number}.npy", rows[2 * number :][:2])
        keys = [str(2 * number + i) for i in range(2)]
        table = pa.table({"key": keys, "caption": ["a", "b"], "similarity": [0.5, 1]})
        pq.write_table(table, folder / "shards" / "metadata" / f"metadata_{number}.parquet")


class Layer(nn.Module):
    """Stands for a part of Vocos."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(dim, dim)


def make_weights(folder: Path) -> None:
    """Checkpoints of other packages: torch's file of today, that of its first versions, and a Vocos model."""
    (folder / "vocos").mkdir(parents=True)
    state = {"state_dict": nn.Linear(3, 2).state_dict(), "epoch": 3, "best": np.float64(0.5), "order": np.arange(3)}
    torch.save(state, folder / "new.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    parts = nn.ModuleDict({name: Layer(4) for name in ("backbone", "head")})
    torch.save(parts.state_dict(), folder / "vocos" / "pytorch_model.bin")
    classes = ("feature_extractors.MelSpectrogramFeatures", "models.VocosBackbone", "heads.ISTFTHead")
    content = {
        name: {"class_path": f"vocos.{path}", "init_args": arguments}
        for name, path, arguments in zip(
            ("feature_extractor", "backbone", "head"), classes, ({"n_mels": 4}, {"dim": 4}, {"dim": 4}), strict=True
        )
    }
    (folder / "vocos" / "config.yaml").write_text(json.dumps(content))


GRID = "base: {train: {steps: 3}}\nseeds: [0, 1]\nvariants:\n  recommended: {}\n  deeper: {bridge.depth: 3}\n"


def make_whole(folder: Path) -> None:
    """A folder of everything that can be read."""
    write_store(folder / "store", make_store(groups=8), dtype={"audio": "int8"})
    make_config(folder / "store").save(folder / "config.yaml")
    (folder / "grid.yaml").write_text(GRID)
    model, ema, optimizer = model_parts()
    state = {"step": 1, "best_step": 0, "best_score": 0.0, "stale": 0, "scaler": {}}
    checkpoint.save(folder / "checkpoints", 1, model=model, ema=ema, optimizer=optimizer, state=state)
    DiffGAP({"audio": 12, "text": 10}, TINY).save_pretrained(folder / "model")
    build_index(folder / "store", folder / "index", modality="audio")
    make_set(folder / "set")
    row = json.dumps({"text": "c", "split": "val"}).encode()
    tar(folder / "shard.tar", [("a.txt", b"a dog"), ("a.wav", b"RIFF"), ("b.json", row), ("b.wav", b"RIFF")])
    make_run(folder / "generator")
    make_tables(folder / "tables")
    make_saved_dataset(folder / "saved")
    make_arrays(folder / "arrays")
    make_weights(folder / "weights")


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


def open_items(path: Path, source: str, format: str | None = None) -> None:
    for item in list_items(path / source, format=format):
        for medium in item.media.values():
            if medium.text is None:
                with suppress(OSError), medium.open() as file:
                    file.read(100)


def open_set(path: Path) -> None:
    found = GeneratedSet.open(path / "set")
    for system in found.systems:
        for item in found.items:
            assert found.path(system, item).resolve().is_relative_to(found.folder.resolve())


def open_grid(path: Path) -> None:
    grid = Grid.load(str(path / "grid.yaml"))
    for run in grid.runs():
        assert run.folder(path / "out").is_relative_to(path / "out") and ".." not in run.folder(path).parts
        grid.changes(run.variant)


def open_generator(path: Path) -> None:
    run = path / "generator"
    # A vocoder that takes whatever spectrograms there are: Griffin and Lim's needs librosa.
    with mock.patch.object(native, "load_vocoder", lambda _, mel: SimpleNamespace(settings=mel)):
        native.load_generator(run)
    native.bridge_of(run), native.data_of(run)


def open_weights(path: Path, file: str) -> None:
    for value in read_state_dict(path / "weights" / file, "state_dict").values():
        value.sum()


def open_vocos(path: Path) -> None:
    modules = {name: ModuleType(name) for name in ("vocos", "vocos.heads", "vocos.models")}
    modules["vocos.heads"].ISTFTHead = modules["vocos.models"].VocosBackbone = Layer  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, modules), mock.patch.object(vocoder, "require"):
        vocoder.Vocos(path / "weights" / "vocos")


@dataclass(frozen=True)
class Reader:
    """How something is read from a folder as :func:`make_whole` makes it.

    Attributes:
        read: Reads it from the folder.
        files: Its files, any of which may be damaged.
        also: What is read beside the entries of the folder that hold ``files``.
        writes: Whether it becomes a store, ``out/store``.
    """

    read: Callable[[Path], Any]
    files: tuple[str, ...]
    also: tuple[str, ...] = ()
    writes: bool = False

    @property
    def needs(self) -> set[str]:
        """The entries of the folder that are read."""
        return {*(Path(file).parts[0] for file in self.files), *self.also}


READERS = {
    "store": Reader(open_store, ("store/index.parquet", "store/audio.safetensors", "store/text.safetensors")),
    "checkpoint": Reader(open_checkpoint, tuple(f"checkpoints/step-00000001/{name}" for name in (
        "model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"))),
    "config": Reader(lambda path: RunConfig.load(path / "config.yaml"), ("config.yaml",)),
    "grid": Reader(open_grid, ("grid.yaml",)),
    "model": Reader(lambda path: DiffGAP.from_pretrained(path / "model"), (
        "model/config.json", "model/model.safetensors")),
    "index": Reader(open_index, ("index/meta.json", "index/rows.safetensors", "index/vectors.safetensors"), (
        "store",)),
    "set": Reader(open_set, ("set/set.json", "set/items.jsonl")),
    "generator": Reader(open_generator, (
        "generator/config.yaml", "generator/model/config.json", "generator/model/model.safetensors")),
    "shard": Reader(partial(open_items, source="shard.tar"), ("shard.tar",)),
    **{f"{ending}_table": Reader(partial(open_items, source=f"tables/list.{ending}"), (f"tables/list.{ending}",))
       for ending in ("jsonl", "csv", "tsv", "parquet")},
    "audiocaps": Reader(partial(open_items, source="tables/train.csv", format="audiocaps"), ("tables/train.csv",)),
    "clotho": Reader(partial(open_items, source="tables/clotho_captions_validation.csv", format="clotho"), (
        "tables/clotho_captions_validation.csv",)),
    "vggsound": Reader(partial(open_items, source="tables", format="vggsound"), ("tables/vggsound.csv",)),
    "saved": Reader(partial(open_items, source="saved"), (
        "saved/data.arrow", "saved/dataset_info.json", "saved/state.json")),
    "array": Reader(lambda path: read_npy(path / "arrays/npy/audio.npy", "audio"), ("arrays/npy/audio.npy",)),
    "import_npy": Reader(lambda path: import_npy(path / "arrays/npy", path / "out/store"), (
        "arrays/npy/audio.npy", "arrays/npy/index.csv"), writes=True),
    "import_clip_retrieval": Reader(lambda path: import_clip_retrieval(path / "arrays/shards", path / "out/store"), (
        "arrays/shards/img_emb/img_emb_0.npy", "arrays/shards/metadata/metadata_1.parquet"), writes=True),
    "new_weights": Reader(partial(open_weights, file="new.pt"), ("weights/new.pt",)),
    "old_weights": Reader(partial(open_weights, file="old.pt"), ("weights/old.pt",)),
    "vocos": Reader(open_vocos, ("weights/vocos/config.yaml", "weights/vocos/pytorch_model.bin")),
}  # fmt: skip
