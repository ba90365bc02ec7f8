from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import pickle
import shutil
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffgap.data._schema import SPLITS
from diffgap.data.items.listing import FORMATS, list_items
from tests.data.items.listed import items, tar, touch


def test_sources_are_recognised(tmp_path: Path) -> None:
    touch(tmp_path / "media", "train/a.wav")
    tar(tmp_path / "shards" / "0.tar", [("a.wav", b"a")])
    tar(tmp_path / "split" / "train" / "0.tar", [("a.wav", b"a")])
    for suffix, content in {"csv": "audio\na.wav\n", "tsv": "audio\na.wav\n", "jsonl": '{"audio": "a.wav"}\n'}.items():
        (tmp_path / f"m.{suffix}").write_text(content)
    pq.write_table(pa.table({"audio": ["a.wav"]}), tmp_path / "m.parquet")
    kinds = {"media": "folder", "shards": "webdataset", "split": "webdataset", "shards/0.tar": "webdataset"}
    kinds |= {f"m.{suffix}": "manifest" for suffix in ("csv", "tsv", "jsonl", "parquet")}
    for name, kind in kinds.items():
        listed = list_items(str(tmp_path / name))
        assert listed.description.startswith(f"{kind} {tmp_path / name} (audio 1; contents "), name
        assert len(listed) == 1
    touch(tmp_path / "shards", "b.wav")
    with pytest.raises(ValueError, match=r"both \.tar shards and media; say which with format"):
        list_items(tmp_path / "shards")
    assert items(tmp_path / "shards", format="folder")[0].id == "b"


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("nothing", {}, "source .*nothing does not exist; check the path"),
        ("nothing.csv", {}, "source .*nothing.csv does not exist; check the path"),
        ("org/dataset", {"format": "huggingface"}, "does not exist"),
        ("a.wav", {}, "neither a folder, nor a table .* nor a .tar; give one of these, or say what it is with format"),
        ("a.wav", {"format": "folder"}, "is no folder; folder means one"),
        ("a.wav", {"format": "manifest"}, "is no manifest; a file that ends in .csv, .tsv"),
        (".", {"format": "zip"}, f"format 'zip' is unknown; choose one of {', '.join(FORMATS)}"),
        (".", {"modalities": ["sound"]}, "modality 'sound' is unknown; choose among audio, image, video, text"),
        (".", {"modalities": []}, "modalities is empty"),
        (".", {"modalities": ["audio", "image"]}, "no item has 'image', only audio; ask for what is there"),
        (".", {"media": "."}, "media means nothing for .*, a folder; it is for manifest, huggingface"),
        (".", {"columns": {"audio": "a"}}, "columns means nothing for"),
        (".", {"whole": True}, "whole means nothing for"),
        (".", {"split": (0.5, 0.6, 0)}, "split fractions"),
        ("empty", {}, "folder .*empty holds nothing to embed"),
    ],
)
def test_refusals(tmp_path: Path, name: str, options: dict[str, object], says: str) -> None:
    touch(tmp_path, "a.wav")
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        list_items(tmp_path / name, **options)  # type: ignore[arg-type]


def test_modalities_that_are_not_asked_for_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "a.txt", "b.mp4", "c.txt", "d.png")
    listed = list_items(tmp_path, modalities=["audio", "text"])
    assert {i.id: set(i.media) for i in listed} == {"a": {"audio", "text"}, "b": {"audio"}, "c": {"text"}}
    assert len(listed) == 3
    assert listed.notes == [f"items that hold none of audio, text: 1 (first: {tmp_path / 'd'})"]


def test_the_description_tells_lists_apart_but_not_where_they_are(tmp_path: Path) -> None:
    def contents(**options: object) -> str:
        return list_items(tmp_path / "m", **options).description.split("contents ")[1]  # type: ignore[arg-type]

    touch(tmp_path / "m", "a.wav", "b.wav")
    before = contents()
    assert before == contents() and before != contents(split=(0, 0, 1))
    (tmp_path / "m" / "b.wav").rename(tmp_path / "m" / "c.wav")
    assert contents() != before
    (tmp_path / "m" / "c.wav").rename(tmp_path / "m" / "b.wav")
    assert contents() == before
    shutil.move(tmp_path / "m", tmp_path / "elsewhere")
    (tmp_path / "m").symlink_to(tmp_path / "elsewhere")
    assert contents() == before


def test_a_source_that_changes_while_it_is_listed_is_noticed(tmp_path: Path) -> None:
    listed = list_items(touch(tmp_path, "a.wav", "b.wav"))
    touch(tmp_path, "c.wav")
    with pytest.raises(RuntimeError, match="changed: 2 items when it was checked, 3 now"):
        list(listed)
    assert [item.id for item in itertools.islice(listed, 2)] == ["a", "b"]


def test_groups_in_several_splits_are_noted(tmp_path: Path) -> None:
    rows = ["g,train", "g,test", "h,train", "h,train", "g,test"]
    (tmp_path / "m.csv").write_text("text,group,split\n" + "".join(f"t,{row}\n" for row in rows))
    assert list_items(tmp_path / "m.csv").notes == [
        "groups have items in more than one split (1 times): what is trained on is also tested on"
    ]


def test_items_cross_processes(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "a.txt")
    (item,) = list_items(tmp_path)
    again = pickle.loads(pickle.dumps(item))
    assert again == item and hash(again.media["audio"]) == hash(item.media["audio"])


COUNT = 20_000


def flat_folder(root: Path) -> Path:
    """As many files as items, in one folder: their names must be held to be put in order."""
    place = root / "media"
    place.mkdir()
    first = place / "000000.wav"
    first.touch()
    for i in range(1, COUNT):
        (place / f"{i:06d}.wav").hardlink_to(first)
    return place


def csv_file(root: Path) -> Path:
    with open(root / "m.csv", "w") as file:
        file.write("id,audio,text,group\n")
        file.writelines(f"{i},clips/{i}.wav,caption number {i},{i // 5}\n" for i in range(COUNT))
    return root / "m.csv"


def jsonl_file(root: Path) -> Path:
    with open(root / "m.jsonl", "w") as file:
        file.writelines(json.dumps({"audio": f"{i}.wav", "text": ["a", "b"]}) + "\n" for i in range(COUNT // 2))
    return root / "m.jsonl"


def parquet_file(root: Path) -> Path:
    numbers = pa.array([str(i) for i in range(COUNT)])
    table = pa.table({"id": numbers, "audio": numbers, "text": numbers})
    pq.write_table(table, root / "m.parquet", row_group_size=10_000)
    return root / "m.parquet"


def shard_file(root: Path) -> Path:
    with tarfile.open(root / "s.tar", "w") as archive:
        for i in range(COUNT // 10):
            archive.addfile(tarfile.TarInfo(f"{i}.wav"))
    return root / "s.tar"


def peak_mb(source: Path, format: str | None = None) -> tuple[float, int]:
    """Peak of what Python allocates while a list is checked and gone through, and its items.

    In a process of its own: in one as large as that of all tests, garbage is collected too rarely to tell.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measured, (source, format))


def measured(source: Path, format: str | None) -> tuple[float, int]:
    with tempfile.TemporaryDirectory() as small:
        list_items(touch(Path(small), "a.wav"))  # imports
    gc.collect()
    tracemalloc.start()
    count = sum(1 for _ in list_items(source, format=format))
    return tracemalloc.get_traced_memory()[1] / 2**20, count


@pytest.mark.parametrize(
    ("make", "count", "bound"),
    [
        (csv_file, COUNT, 12),
        (jsonl_file, COUNT, 12),
        (parquet_file, COUNT, 12),
        (shard_file, COUNT // 10, 4),
        (flat_folder, COUNT, 14),
    ],
)
def test_memory_is_flat(tmp_path: Path, make: Callable[[Path], Path], count: int, bound: float) -> None:
    """20,000 items held as objects are more than 20 MB; what is kept of each is 33 bytes."""
    source = make(tmp_path)
    peak, listed = peak_mb(source)
    assert listed == count and peak < bound


def test_an_index_of_many_clips_is_small(tmp_path: Path) -> None:
    """5,000 of AudioCaps' clips: the names of all files are held, their paths are not."""
    place = tmp_path / "media"
    place.mkdir()
    clips = [f"{i:011d}" for i in range(5_000)]
    for clip in clips:
        (place / f"{clip}.wav").touch()
    rows = "".join(f"{i},{clip},0,caption\n" for i, clip in enumerate(clips))
    (tmp_path / "train.csv").write_text("audiocap_id,youtube_id,start_time,caption\n" + rows)
    peak, listed = peak_mb(tmp_path, "audiocaps")
    assert listed == 5_000 and peak < 8


def test_splits_are_drawn_by_the_group(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("text,group\n" + "".join(f"t{i},g{i // 7}\n" for i in range(2000)))
    splits: dict[str, set[str]] = {}
    for item in list_items(tmp_path / "m.csv"):
        splits.setdefault(item.group, set()).add(item.split)
    assert all(len(found) == 1 for found in splits.values())
    assert {split for found in splits.values() for split in found} == set(SPLITS)
