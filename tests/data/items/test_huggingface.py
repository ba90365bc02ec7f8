from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from diffgap.data.items import Item
from diffgap.data.items.listing import list_items
from tests.data.items.listed import by_id, items, touch

datasets = pytest.importorskip("datasets")


def content(item: Item, modality: str) -> bytes:
    with item.media[modality].open() as file:
        return file.read()


def saved(columns: dict[str, list[object]], features: dict[str, object]) -> datasets.Dataset:
    """Cast, not encoded: encoding an Audio feature needs torchcodec."""
    dataset = datasets.Dataset.from_dict(columns)
    for name, feature in features.items():
        dataset = dataset.cast_column(name, feature)
    return dataset


@pytest.fixture
def sounds() -> datasets.Dataset:
    media = [{"bytes": f"sound {i}".encode() * 50, "path": f"{i}.WAV"} for i in range(5)]
    pictures = [{"bytes": f"picture {i}".encode(), "path": None} for i in range(4)] + [None]
    columns = {
        "sound": media,
        "image": pictures,
        "caption": [["one", "two"], ["three"], [], ["four"], ["five"]],
        "label": [0, 1, 0, 1, None],
        "seconds": [1, 2, 3, 4, 5],
        "vector": [[0.5]] * 5,
    }
    kinds = {"sound": datasets.Audio(), "image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])}
    return saved(columns, kinds)


def test_a_dataset_is_read_in_place_by_its_features(tmp_path: Path, sounds: datasets.Dataset) -> None:
    sounds.save_to_disk(tmp_path / "set")
    listed = list_items(tmp_path / "set")
    found = {item.id: item for item in listed}
    assert list(found) == ["0#1", "0#2", "1", "2", "3", "4"]
    for i, id in enumerate(["0#1", "1", "2", "3", "4"]):
        assert content(found[id], "audio") == f"sound {i}".encode() * 50
        source = found[id].media["audio"]
        assert source.path is not None and source.path.suffix == ".arrow" and source.suffix == ".wav"
    assert content(found["3"], "image") == b"picture 3" and "image" not in found["4"].media
    assert found["0#2"].media["text"].text == "two" and found["0#2"].group == "0" and "text" not in found["2"].media
    assert found["0#2"].media["audio"] == found["0#1"].media["audio"]
    assert found["1"].columns == {"caption": "three", "label": "cat", "seconds": 2}
    assert "label" not in found["4"].columns
    assert "cells that the index cannot hold" in listed.notes[0] and "'vector'" in listed.notes[0]


def test_a_selection_in_several_files_is_read_in_its_order(tmp_path: Path, sounds: datasets.Dataset) -> None:
    sounds.select([4, 1, 0]).save_to_disk(tmp_path / "set", num_shards=2)
    assert [content(i, "audio")[:7] for i in items(tmp_path / "set", modalities=["audio"])] == [
        b"sound 4", b"sound 1", b"sound 0", b"sound 0"
    ]  # fmt: skip


def test_splits_of_a_dict(tmp_path: Path, sounds: datasets.Dataset) -> None:
    splits = {"train": sounds.select([0, 1]), "validation": sounds.select([2]), "test": sounds.select([3])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    assert {i.id: i.split for i in items(tmp_path / "set")} == {
        "train/0#1": "train", "train/0#2": "train", "train/1": "train", "validation/0": "val", "test/0": "test"
    }  # fmt: skip
    datasets.DatasetDict({"unlabelled": sounds}).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="split 'unlabelled' is none of train, validation and test; give the folder"):
        list_items(tmp_path / "other")
    assert len(items(tmp_path / "other" / "unlabelled")) == 6


def test_roles_by_name(tmp_path: Path) -> None:
    rows = {"left": [{"bytes": b"l", "path": ""}], "right": [{"bytes": b"r", "path": ""}], "sentence": ["words"]}
    saved(rows, {"left": datasets.Audio(), "right": datasets.Audio()}).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="columns left, right all hold audio; say which with columns"):
        list_items(tmp_path / "set")
    (item,) = items(tmp_path / "set", columns={"audio": "right", "text": "sentence"})
    assert content(item, "audio") == b"r" and item.media["text"].text == "words"
    with pytest.raises(
        ValueError, match="column 'nope', named as audio, is missing; it has 'left', 'right', 'sentence'"
    ):
        list_items(tmp_path / "set", columns={"audio": "nope"})


def test_paths_must_lie_in_the_media_folder(tmp_path: Path) -> None:
    touch(tmp_path / "media", "a.wav", content=b"sound")
    saved({"audio": [str(tmp_path / "media" / "a.wav")]}, {}).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=r"row 1: '.*/media/a.wav' is not in the media folder .*/set; give media"):
        list_items(tmp_path / "set")
    (item,) = items(tmp_path / "set", media=tmp_path / "media")
    assert item.media["audio"].path == tmp_path / "media" / "a.wav"


def test_compressed_batches_give_the_bytes_themselves(tmp_path: Path, sounds: datasets.Dataset) -> None:
    sounds.save_to_disk(tmp_path / "set")
    (file,) = (tmp_path / "set").glob("*.arrow")
    with pa.OSFile(str(file)) as source:
        table = pa.ipc.open_stream(source).read_all()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    first = items(tmp_path / "set")[0]
    assert first.media["audio"].data == b"sound 0" * 50


def test_damaged_folders(tmp_path: Path, sounds: datasets.Dataset) -> None:
    sounds.save_to_disk(tmp_path / "set")
    state = tmp_path / "set" / "state.json"
    values = json.loads(state.read_text())
    state.write_text(json.dumps({**values, "_data_files": [{"filename": "../../secret.arrow"}]}))
    with pytest.raises(ValueError, match=r"'../../secret.arrow' is not in the media folder"):
        list_items(tmp_path / "set")
    state.write_text(json.dumps({**values, "_data_files": [{"filename": "gone.arrow"}]}))
    with pytest.raises(ValueError, match=r"gone.arrow: not a readable arrow file .*; save it again"):
        list_items(tmp_path / "set")
    (tmp_path / "set" / "gone.arrow").write_bytes(b"nothing" * 9)
    with pytest.raises(ValueError, match=r"gone.arrow: not a readable arrow file .*; save it again"):
        list_items(tmp_path / "set")
    state.write_text("{")
    with pytest.raises(ValueError, match=r"state\.json cannot be read"):
        list_items(tmp_path / "set")
    with pytest.raises(ValueError, match=r"holds neither state\.json nor dataset_dict\.json"):
        list_items(tmp_path, format="huggingface")


def test_names_in_the_folder_are_unique(tmp_path: Path, sounds: datasets.Dataset) -> None:
    sounds.save_to_disk(tmp_path / "set", num_shards=3)
    assert list(by_id(tmp_path / "set")) == ["0#1", "0#2", "1", "2", "3", "4"]
