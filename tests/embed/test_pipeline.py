"""What a run makes of its items: embeddings, rows, failures, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from diffgap.data.items import Item
from diffgap.data.items.limit import FirstItems
from diffgap.data.media import Source
from diffgap.data.store import EmbeddingStore, write_store
from diffgap.embed import EmbedReport, embed_items
from tests.embed.fakes import HashEncoder, Listed, digest, encoders, make_items


def run(items: Any, found: Mapping[str, Any], output: Path, **options: Any) -> tuple[EmbeddingStore, EmbedReport]:
    report = embed_items(items, found, output, **{"workers": 0, "batch_size": 4, "chunk": 7, **options})
    assert report is not None
    return EmbeddingStore.open(output), report


def failures(output: Path) -> list[tuple[str, ...]]:
    return [tuple(row.values()) for row in pq.read_table(output / "failures.parquet").to_pylist()]


def content(item: Item, modality: str) -> bytes:
    source = item.media[modality]
    return source.text.encode() if source.text is not None else source.path.read_bytes()  # type: ignore[union-attr]


@pytest.mark.parametrize(("batch_size", "chunk"), [(4, 7), (1, 40), (100, 100)])
def test_equals_direct_encoding(tmp_path: Path, batch_size: int, chunk: int) -> None:
    items, found = make_items(tmp_path / "m", 40, 3), encoders()
    store, report = run(items, found, tmp_path / "store", batch_size=batch_size, chunk=chunk)
    for modality, encoder in found.items():
        expected = np.stack([encoder.one(content(item, modality)) for item in items])
        assert np.array_equal(store.embeddings(modality).numpy(), expected)
        assert store.encoder(modality) == encoder.fingerprint
        assert max(encoder.batches) <= batch_size
    for column in ("id", "group", "split"):
        assert list(store.column(column)) == [getattr(item, column) for item in items]
    assert list(store.column("caption")) == [item.columns["caption"] for item in items]
    assert store.column("number").tolist() == list(range(40)) and store.column("number").dtype == np.int64
    assert (report.rows, report.items, report.left_out, report.failures) == (40, 40, 0, {})
    assert failures(tmp_path / "store") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "store"]


def test_equal_sources_are_embedded_once(tmp_path: Path) -> None:
    items, found = make_items(tmp_path / "m", 40, 3), encoders()
    store, report = run(items, found, tmp_path / "store")
    distinct = {name: len({item.media[name] for item in items}) for name in found}
    assert distinct == {"audio": 14, "text": 27}
    assert {name: sum(encoder.batches) for name, encoder in found.items()} == distinct == report.embeddings
    assert {name: len(store.unique_rows(name)) for name in found} == distinct
    assert store.rows("audio").tolist() == [number // 3 for number in range(40)]


def test_without_shared_sources_there_are_no_row_columns(tmp_path: Path) -> None:
    items = Listed([Item(f"i{n}", "g", "test", {"text": Source(text=f"t{n}")}) for n in range(9)])
    run(items, {"text": HashEncoder("text")}, tmp_path / "store")
    assert pq.read_schema(tmp_path / "store" / "index.parquet").names == ["id", "group", "split"]


def test_parts_of_a_file_are_sources_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "tar"
    file.write_bytes(b"abcdef")
    sources = [
        Source(path=file, offset=0, size=2), Source(path=file, offset=2, size=2), Source(path=file, offset=0, size=2),
        Source(data=b"ab"), Source(data=b"cd"), Source(data=b"ab"), Source(text="ab"),
        Source(path=file, start=0.0, stop=1.0), Source(path=file, start=0.0, stop=2.0),
    ]  # fmt: skip
    items = Listed([Item(f"i{n}", "g", "test", {"audio": source}) for n, source in enumerate(sources)])
    store, _ = run(items, {"audio": HashEncoder()}, tmp_path / "store")
    assert store.rows("audio").tolist() == [0, 1, 0, 2, 3, 2, 4, 5, 6]


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "int8", {"audio": "int8", "text": "float16"}, {"text": "int8"}]
)
def test_number_formats_are_those_of_write_store(tmp_path: Path, dtype: Any) -> None:
    items = make_items(tmp_path / "m", 40, 3)
    store, _ = run(items, encoders(), tmp_path / "store", dtype=dtype)
    whole, _ = run(items, encoders(), tmp_path / "whole")
    expected = EmbeddingStore.open(write_store(tmp_path / "expected", whole, dtype=dtype))
    for modality in store.modalities:
        assert torch.equal(store.embeddings(modality), expected.embeddings(modality))
        same = [(tmp_path / name / f"{modality}.safetensors").read_bytes() for name in ("store", "expected")]
        assert same[0] == same[1]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_sequences(tmp_path: Path, dtype: str) -> None:
    items = make_items(tmp_path / "m", 23)
    found = {"audio": HashEncoder(sequence=True), "text": HashEncoder("text")}
    store, _ = run(items, found, tmp_path / "store", dtype=dtype)
    expected = [found["audio"].frames(content(item, "audio")) for item in items]
    lengths = store.lengths("audio")
    assert lengths is not None and lengths.tolist() == [len(frames) for frames in expected]
    assert store.num_frames("audio") == max(len(frames) for frames in expected) == 5
    for row, frames in zip(store.embeddings("audio").numpy(), expected, strict=True):
        assert np.abs(row[: len(frames)] - frames).max() <= (0 if dtype == "float32" else 0.5001 / 127)
        assert not row[len(frames) :].any()


def test_sequences_are_as_long_as_the_longest_that_a_row_has(tmp_path: Path) -> None:
    texts = ["a\x00", "b\x04", "c\x01", "broken"]  # 1, 5 and 2 frames; the item with 5 is left out
    audio = ["x", "broken", "y", "z"]
    items = Listed([
        Item(f"i{n}", "g", "test", {"text": Source(text=t), "audio": Source(text=a)})
        for n, (t, a) in enumerate(zip(texts, audio, strict=True))
    ])  # fmt: skip
    found = {"text": HashEncoder("text", sequence=True), "audio": HashEncoder()}
    store, _ = run(items, found, tmp_path / "store", chunk=2)
    assert list(store.column("id")) == ["i0", "i2"]
    assert store.num_frames("text") == 2
    lengths = store.lengths("text")
    assert lengths is not None and lengths.tolist() == [1, 2]


def test_failures(tmp_path: Path) -> None:
    """Every way to fail, alone and in a medium that rows share; what is left with one modality is no row."""
    items = make_items(tmp_path / "m", 30, 3)
    names = ["broken", "fault", "", None, "nan", "zero", "refused"]  # None: no such file
    for group, text in enumerate(names):
        file = tmp_path / "m" / f"{group:05d}.bin"
        file.unlink() if text is None else file.write_text(text)
    store, report = run(items, encoders(), tmp_path / "store", dtype="float16")
    assert list(store.column("id")) == [f"item-{n}" for n in range(21, 30)]
    assert report.failures == {
        ("audio", "undecodable"): 6, ("audio", "empty"): 3, ("audio", "missing"): 3, ("audio", "not finite"): 6,
        ("audio", "too short"): 3,
    }  # fmt: skip
    assert (report.rows, report.left_out) == (9, 21)
    assert report.warnings == [
        "21 of 30 audio items failed, 6 of them as 'undecodable'", "21 of 30 items are left out",
    ]  # fmt: skip
    rows = failures(tmp_path / "store")
    assert [row[:2] for row in rows] == [(f"item-{n}", "audio") for n in range(21)]
    for at, (reason, message) in {
        0: ("undecodable", "00000.bin is broken"), 3: ("undecodable", "KeyError: 'a fault in the reader'"),
        6: ("empty", "00002.bin is empty"), 9: ("missing", "00003.bin does not exist"),
        12: ("not finite", "00004.bin: its embedding is not finite as float16"),
        15: ("not finite", "00005.bin: its embedding is all zero"), 18: ("too short", "the encoder refuses it"),
    }.items():  # fmt: skip
        assert rows[at][2].endswith(f"{at // 3:05d}.bin")
        assert rows[at][3] == reason
        assert rows[at][4].endswith(message)


def test_a_batch_that_is_refused_is_tried_one_by_one(tmp_path: Path) -> None:
    items = Listed(
        [Item(f"i{n}", "g", "test", {"text": Source(text=t)}) for n, t in enumerate(["a", "b", "refused", "d", "e"])]
    )
    encoder = HashEncoder("text")
    store, report = run(items, {"text": encoder}, tmp_path / "store")
    assert list(store.column("id")) == ["i0", "i1", "i3", "i4"]
    assert encoder.batches == [4, 1, 1, 1, 1, 1]
    assert report.encoded == {"text": 4}


def test_a_float16_that_overflows_is_a_failure(tmp_path: Path) -> None:
    class Large(HashEncoder):
        def one(self, content: bytes) -> np.ndarray:
            return super().one(content) * (1e6 if content == b"t3" else 1)

    items = Listed([Item(f"i{n}", "g", "test", {"text": Source(text=f"t{n}")}) for n in range(9)])
    store, _ = run(items, {"text": Large("text")}, tmp_path / "store", dtype="float16")
    assert "i3" not in store.column("id") and len(store) == 8


def test_rows_need_two_modalities(tmp_path: Path) -> None:
    def item(name: str, **texts: str) -> Item:
        return Item(name, "g", "test", {modality: Source(text=text) for modality, text in texts.items()})

    items = Listed([
        item("all", audio="a", text="b", image="c"), item("two", audio="d", image="e"), item("one", text="f"),
        item("broken", audio="broken", text="g", image="h"), item("left", audio="broken too", text="i"),
        item("none", video="j"), item("last", audio="k", text="l", image="m"),
    ])  # fmt: skip
    found = {name: HashEncoder(name) for name in ("audio", "text", "image")}
    store, report = run(items, found, tmp_path / "store")
    assert list(store.column("id")) == ["all", "two", "broken", "last"]
    assert [store.rows(name).tolist() for name in ("audio", "text", "image")] == [
        [0, 1, -1, 2], [0, -1, 1, 2], [0, 1, 2, 3],
    ]  # fmt: skip
    # Captions of items that are left out are not in the store.
    assert report.embeddings == {"audio": 3, "image": 4, "text": 3} and report.encoded["text"] == 5
    assert [(row[0], row[1], row[3], row[4]) for row in failures(tmp_path / "store")] == [
        ("one", "audio", "not listed", "it lists text and no audio, image; a row needs 2"),
        ("broken", "audio", "undecodable", "text 'broken' is broken"),
        ("left", "audio", "undecodable", "text 'broken too' is broken"),
        ("none", "audio", "not listed", "it lists none of the modalities and no audio, text, image; a row needs 2"),
    ]
    assert [len(run(items, found, tmp_path / f"least{n}", min_modalities=n)[0]) for n in (1, 2, 3)] == [6, 4, 2]


def test_one_modality_alone(tmp_path: Path) -> None:
    items = make_items(tmp_path / "m", 12, 3)
    (tmp_path / "m" / "00001.bin").write_text("broken")
    store, report = run(items, {"audio": HashEncoder()}, tmp_path / "store")
    assert store.modalities == ("audio",) and len(store) == report.rows == 9


def test_everything_failed(tmp_path: Path) -> None:
    items = make_items(tmp_path / "m", 12, 1, content="broken")
    (tmp_path / "m" / "00001.bin").unlink()
    said = (
        r"no audio medium could be embedded; the commonest reason is 'undecodable' \(11 of 12\), as in: .*00000\.bin "
        r"is broken\. Put it right, delete .*store\.parts, and run"
    )
    with pytest.raises(ValueError, match=said):
        run(items, encoders(), tmp_path / "store")
    assert not (tmp_path / "store").exists() and (tmp_path / "store.parts" / "part-000001").is_dir()


def test_no_row_is_left(tmp_path: Path) -> None:
    texts = [("broken 1", "a"), ("b", "broken 2")]
    items = Listed([
        Item(f"i{n}", "g", "test", {"audio": Source(text=a), "text": Source(text=t)}) for n, (a, t) in enumerate(texts)
    ])  # fmt: skip
    with pytest.raises(
        ValueError, match="no item has 2 modalities that could be embedded; the commonest reason is 'und"
    ):
        run(items, encoders(), tmp_path / "store")


def test_embeddings_all_alike_name_the_encoder_and_keep_the_parts(tmp_path: Path) -> None:
    class Collapsed(HashEncoder):
        def one(self, content: bytes) -> np.ndarray:
            return np.ones(self.dim, dtype=np.float32)

    found = {**encoders(), "text": Collapsed("text", fingerprint="clap-text:no-vocabulary")}
    said = (
        r"text encoder 'clap-text:no-vocabulary': .*all 10 embeddings are alike .* check its tokenizer .*parts are "
        r"kept in .*store\.parts: put the encoder right, delete them"
    )
    with pytest.raises(ValueError, match=said):
        run(make_items(tmp_path / "m", 12, 1), found, tmp_path / "store")
    assert (tmp_path / "store.parts" / "part-000001").is_dir() and not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (np.zeros((3, 8)), r"gave float64 \(3, 8\); its encode must give float32 \(3, 8\)"),
        (np.zeros((2, 8), np.float32), r"gave float32 \(2, 8\); its encode must give float32 \(3, 8\)"),
        (np.zeros((3, 9), np.float32), r"gave .* \(3, 9\); .* float32 \(3, 8\)"),
        ((np.zeros((3, 2, 8), np.float32), np.ones(3, int)), r"gave .* with lengths \(3,\); .* float32 \(3, 8\)"),
    ],
)
def test_an_encoder_that_breaks_its_promise(tmp_path: Path, encoded: Any, message: str) -> None:
    class Wrong(HashEncoder):
        def encode(self, batch):  # type: ignore[no-untyped-def]
            return encoded

    with pytest.raises(TypeError, match=f"encoder 'hash:1' {message}"):
        run(make_items(tmp_path / "m", 3), {"audio": Wrong()}, tmp_path / "store")


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (np.zeros((3, 8), np.float32), r"gave float32 \(3, 8\); its encode must give float32 \(3, T, 8\) with lengths"),
        ((np.zeros((3, 2, 8), np.float32), np.ones(2, int)), r"with lengths \(2,\); its"),
        ((np.zeros((3, 2, 8), np.float32), np.array([1, 2, 3])), r"lengths outside 1\.\.2"),
        ((np.zeros((3, 2, 8), np.float32), np.array([1, 0, 2])), r"lengths outside 1\.\.2"),
    ],
)
def test_a_sequence_encoder_that_breaks_its_promise(tmp_path: Path, encoded: Any, message: str) -> None:
    class Wrong(HashEncoder):
        def encode(self, batch):  # type: ignore[no-untyped-def]
            return encoded

    with pytest.raises(TypeError, match=message):
        run(make_items(tmp_path / "m", 3), {"audio": Wrong(sequence=True)}, tmp_path / "store")


def changed(**changes: Any) -> Listed:
    items = [Item(f"i{n}", "g", "test", {"audio": Source(text=f"a{n}")}, {"year": n}) for n in range(5)]
    items[3] = replace(items[3], **changes)
    return Listed(items)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (changed(id="i1"), "1 ids repeat, the first 'i1'"),
        (changed(id=""), "item '' has id ''"),
        (changed(group=""), "item 'i3' has group ''"),
        (changed(split="dev"), "item 'i3' has split 'dev'; use one of train, val, test"),
        (changed(columns={"year": "old"}), "item 'i3' has year='old', where earlier items have numbers"),
        (changed(columns={"caption": 3}), "item 'i3' has caption=3; the column takes text"),
        (changed(columns={"tags": ["a"]}), r"item 'i3' has tags=\['a'\]; the column takes text or a number"),
        (changed(columns={"row_audio": 3}), "item 'i3' has a column 'row_audio', which the index keeps for itself"),
        (changed(columns={"split": "test"}), "item 'i3' has a column 'split', which the index keeps for itself"),
        (Listed([]), "a list: there are no items"),
        (Listed([Item("i", "g", "test", {"text": Source(text="a")})]), "no item has modality 'audio'; they have text"),
    ],
)
def test_bad_items_are_refused_before_any_work(tmp_path: Path, items: Listed, message: str) -> None:
    encoder = HashEncoder()
    with pytest.raises(ValueError, match=message):
        run(items, {"audio": encoder}, tmp_path / "store")
    assert encoder.batches == [] and not list(tmp_path.iterdir())


def test_a_list_of_another_length_than_announced(tmp_path: Path) -> None:
    class Short(Listed):
        def __len__(self) -> int:
            return 9

    with pytest.raises(ValueError, match="5 items came where 9 were announced"):
        run(Short(changed().items), {"audio": HashEncoder()}, tmp_path / "store")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; use 1 or more"),
        ({"workers": -1}, "workers is -1; use 0 or more"),
        ({"chunk": 0}, "chunk is 0; use 1 or more"),
        ({"dtype": "bfloat16"}, "dtype 'bfloat16' is not supported; choose one of float32, float16, int8"),
        ({"dtype": {"image": "int8"}}, "dtype names modality 'image'; the encoders have audio, text"),
        ({"min_modalities": 3}, "min_modalities is 3; use 1 to 2"),
        ({"min_modalities": 0}, "min_modalities is 0; use 1 to 2"),
    ],
)
def test_bad_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(make_items(tmp_path / "m", 3), encoders(), tmp_path / "store", **options)
    with pytest.raises(ValueError, match="encoders is empty"):
        run(make_items(tmp_path / "m", 3), {}, tmp_path / "store")
    with pytest.raises(ValueError, match="modality name 'Audio' must match"):
        run(make_items(tmp_path / "m", 3), {"Audio": HashEncoder()}, tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_columns_that_some_items_lack_are_null_there(tmp_path: Path) -> None:
    columns: list[dict[str, Any]] = [{"year": 1}, {"year": 2.5, "language": "fr"}, {}, {"good": True}, {"caption": "c"}]
    items = Listed([Item(f"i{n}", "g", "test", {"audio": Source(text=f"{n}")}, c) for n, c in enumerate(columns)])
    store, _ = run(items, {"audio": HashEncoder()}, tmp_path / "store", chunk=1)
    table = store.index.to_pydict()
    assert table["year"] == [1.0, 2.5, None, None, None]
    assert table["language"] == [None, "fr", None, None, None]
    assert table["good"] == [None, None, None, True, None]
    assert table["caption"] == [None, None, None, None, "c"]


def test_first_items(tmp_path: Path) -> None:
    items = make_items(tmp_path / "m", 20, 2)
    store, _ = run(FirstItems(items, 9), encoders(), tmp_path / "store")
    assert list(store.column("id")) == [f"item-{n}" for n in range(9)]
    assert len(FirstItems(items, 100)) == 20
    assert FirstItems(items, 9).description == "a list, the first 9 items"
    with pytest.raises(ValueError, match="limit is 0; use 1 item or more"):
        FirstItems(items, 0)


def test_the_order_of_encoders_changes_no_store(tmp_path: Path) -> None:
    items, found = make_items(tmp_path / "m", 12, 3), encoders()
    run(items, found, tmp_path / "a")
    run(items, dict(reversed(found.items())), tmp_path / "b")
    a, b = EmbeddingStore.open(tmp_path / "a"), EmbeddingStore.open(tmp_path / "b")
    assert a.index.equals(b.index)
    assert all(digest(tmp_path / "a")[f"{m}.safetensors"] == digest(tmp_path / "b")[f"{m}.safetensors"] for m in found)


def test_notes_are_those_of_the_list(tmp_path: Path) -> None:
    items = make_items(tmp_path / "m", 3)
    items.notes.append("2 clips are missing")
    assert run(items, encoders(), tmp_path / "store")[1].notes == ["2 clips are missing"]
