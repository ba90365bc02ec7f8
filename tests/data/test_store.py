from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import diffgap.data.store as store_module
from diffgap.data import EmbeddingStore, write_store

ROWS, FILE_ROWS = 24, 10
VIDEO_LENGTHS = torch.arange(FILE_ROWS) % 5 + 1


@pytest.fixture
def audio() -> torch.Tensor:
    return torch.randn(ROWS, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def video() -> torch.Tensor:
    values = torch.randn(FILE_ROWS, 5, 3, generator=torch.Generator().manual_seed(1))
    return values * (torch.arange(5) < VIDEO_LENGTHS[:, None])[..., None]


@pytest.fixture
def store(audio: torch.Tensor, video: torch.Tensor) -> EmbeddingStore:
    """Eight concepts of three recordings; video shared within a concept and missing for every twelfth row."""
    return EmbeddingStore.from_arrays(
        {"audio": audio, "video": video},
        {
            "id": [f"r{i}" for i in range(ROWS)],
            "group": [f"g{i // 3}" for i in range(ROWS)],
            "split": ["train"] * 15 + ["val"] * 3 + ["test"] * 6,
            "caption": ["ein Hörbeispiel"] * (ROWS - 1) + [None],
            "row_video": [-1 if i % 12 == 0 else i // 3 for i in range(ROWS)],
        },
        lengths={"video": VIDEO_LENGTHS},
        encoders={"audio": "clap:abc"},
    )


@pytest.fixture
def folder(store: EmbeddingStore, tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", store)


def alter_index(folder: Path, change: Any) -> None:
    table = pq.read_table(folder / "index.parquet")
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), folder / "index.parquet")


def set_column(name: str, values: Any) -> Any:
    return lambda table: table.set_column(table.column_names.index(name), name, values)


def rewrite_header(path: Path, change: Any) -> None:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def test_open_gives_back_what_was_written(
    store: EmbeddingStore, folder: Path, audio: torch.Tensor, video: torch.Tensor
) -> None:
    opened = EmbeddingStore.open(folder)
    assert opened.modalities == ("audio", "video") and len(opened) == ROWS
    assert (opened.dim("audio"), opened.dim("video"), opened.num_frames("video")) == (7, 3, 5)
    assert opened.num_frames("audio") is None and opened.encoder("audio") == "clap:abc"
    assert opened.index.equals(store.index)
    torch.testing.assert_close(opened.embeddings("audio"), audio, rtol=0, atol=0)
    rows = opened.present("video")
    assert rows.tolist() == [i for i in range(ROWS) if i % 12]
    torch.testing.assert_close(opened.embeddings("video", rows), video[rows // 3], rtol=0, atol=0)
    lengths = opened.lengths("video", rows)
    assert lengths is not None and lengths.tolist() == [1 + (i // 3) % 5 for i in rows]
    assert opened.lengths("audio") is None
    assert opened.column("caption")[-1] is None


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("float16", 1e-3), ("int8", 1 / 254)])
def test_write_store_dtype(
    store: EmbeddingStore, tmp_path: Path, audio: torch.Tensor, dtype: str, tolerance: float
) -> None:
    path = write_store(tmp_path / "s", store, dtype={"audio": dtype})
    stored = load_file(path / "audio.safetensors")
    assert str(stored["embeddings"].dtype) == f"torch.{dtype}" and ("scale" in stored) == (dtype == "int8")
    opened = EmbeddingStore.open(path)
    error = (opened.embeddings("audio") - audio).abs() / audio.abs().amax(1, keepdim=True)
    assert error.max() <= tolerance * 1.0001
    # Writing it again rounds nothing a second time.
    again = EmbeddingStore.open(write_store(tmp_path / "t", opened))
    torch.testing.assert_close(again.embeddings("audio"), opened.embeddings("audio"), rtol=0, atol=0)


def test_write_store_of_a_view_keeps_only_what_it_refers_to(store: EmbeddingStore, tmp_path: Path) -> None:
    part = store.split("test")
    opened = EmbeddingStore.open(write_store(tmp_path / "test", part))
    assert load_file(tmp_path / "test" / "video.safetensors")["embeddings"].shape[0] == 2
    rows = part.present("video")
    torch.testing.assert_close(opened.embeddings("video", rows), part.embeddings("video", rows))
    torch.testing.assert_close(opened.lengths("video", rows), part.lengths("video", rows))
    assert opened.column("id").tolist() == [f"r{i}" for i in range(18, 24)]


def test_open_is_memory_mapped(folder: Path, audio: torch.Tensor) -> None:
    opened = EmbeddingStore.open(folder)
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    assert str(folder / "audio.safetensors") in mapped
    gathered = opened.embeddings("audio")
    gathered.zero_()
    torch.testing.assert_close(opened.embeddings("audio"), audio)


def test_unique_rows_and_group_ids(store: EmbeddingStore) -> None:
    assert store.unique_rows("video").tolist() == [1, 3, 6, 9, 13, 15, 18, 21]
    assert store.unique_rows("audio").tolist() == list(range(ROWS))
    ids = store.group_ids()
    concept = torch.arange(ROWS) // 3
    assert (ids[:, None] == ids[None]).equal(concept[:, None] == concept[None])
    assert store.group_ids([5, 0]).tolist() == ids[[5, 0]].tolist()


def test_select_and_split_are_views_in_order(store: EmbeddingStore, audio: torch.Tensor) -> None:
    view = store.split("test").select([3, 1])
    assert view.column("id").tolist() == ["r21", "r19"]
    torch.testing.assert_close(view.embeddings("audio", [1]), audio[19:20])
    assert view.rows("video").tolist() == [7, 6]


def test_only_drops_modalities_and_keeps_rows(store: EmbeddingStore) -> None:
    name = store.modalities[0]
    view = store.only([name])
    assert view.modalities == (name,) and view.index.equals(store.index)
    assert torch.equal(view.embeddings(name, view.present(name)), store.embeddings(name, store.present(name)))
    with pytest.raises(ValueError, match="modality 'smell' is not in the store"):
        store.only([name, "smell"])


def test_with_split(store: EmbeddingStore) -> None:
    parts = {f"g{i}": "test" if i == 2 else "train" for i in range(8)}
    assert store.with_split(parts).split("test").column("id").tolist() == ["r6", "r7", "r8"]
    assert len(store.split("val")) == 3
    with pytest.raises(ValueError, match="split 'val' is empty: the store has test, train"):
        store.with_split(parts).split("val")
    with pytest.raises(ValueError, match="lacks 7 of the store's groups"):
        store.with_split({"g0": "train"})
    with pytest.raises(ValueError, match="split 'dev' is unknown"):
        store.with_split(dict.fromkeys(parts, "dev"))


def test_with_embeddings_keeps_sharing(store: EmbeddingStore) -> None:
    shared = torch.randn(8, 4)
    replaced = store.with_embeddings("video", shared)
    rows = replaced.present("video")
    torch.testing.assert_close(replaced.embeddings("video", rows), shared[rows // 3])
    assert replaced.unique_rows("video").tolist() == store.unique_rows("video").tolist()

    own = torch.randn(len(rows), 4)
    torch.testing.assert_close(store.with_embeddings("video", own).embeddings("video", rows), own)
    centred = store.with_embeddings("audio", store.embeddings("audio").numpy() - 1)
    torch.testing.assert_close(centred.embeddings("audio"), store.embeddings("audio") - 1)
    added = store.with_embeddings("text", torch.randn(ROWS, 2))
    assert added.modalities == ("audio", "text", "video") and store.modalities == ("audio", "video")
    with pytest.raises(ValueError, match=r"has 3 rows; expected 8 \(distinct embeddings\) or 22 \(rows\)"):
        store.with_embeddings("video", torch.randn(3, 4))


def test_with_embeddings_of_rows_out_of_file_order() -> None:
    rows = [2, 0, 2, 1]
    store = EmbeddingStore.from_arrays({"a": torch.randn(3, 2)}, {"id": list("wxyz"), "row_a": rows})
    values = store.embeddings("a", store.unique_rows("a")) * 2
    torch.testing.assert_close(store.with_embeddings("a", values).embeddings("a"), store.embeddings("a") * 2)


def test_from_arrays_defaults() -> None:
    store = EmbeddingStore.from_arrays({"a": np.random.default_rng(0).normal(size=(4, 3))})
    assert store.column("id").tolist() == store.column("group").tolist() == ["0", "1", "2", "3"]
    assert store.embeddings("a").dtype == torch.float32 and len(store.split("train")) == 4


@pytest.mark.parametrize("name", ["../evil", "Audio", "a/b", "", "1a", "a.b", "a b"])
def test_modality_names_cannot_leave_the_folder(name: str) -> None:
    with pytest.raises(ValueError, match="modality name"):
        EmbeddingStore.from_arrays({name: torch.randn(3, 2)})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.embeddings("smell"), ValueError, "modality 'smell' is not in the store; it has audio"),
        (lambda s: s.embeddings("video"), ValueError, r"2 of 24 rows have no 'video' embedding"),
        (lambda s: s.embeddings("audio", [24]), ValueError, "the store has 0..23"),
        (lambda s: s.embeddings("audio", [-1]), ValueError, "the store has 0..23"),
        (lambda s: s.embeddings("audio", [0.5]), TypeError, "rows must be a 1-D sequence of integers"),
        (lambda s: s.split("dev"), ValueError, "split 'dev' is unknown; choose one of train, val, test"),
        (lambda s: s.column("colour"), ValueError, "no column 'colour'; it has id, group, split, caption"),
        (lambda s: write_store("x", s, dtype="bfloat16"), ValueError, "dtype 'bfloat16' is not supported"),
        (lambda s: write_store("x", s, dtype={"smell": "int8"}), ValueError, "dtype names modality 'smell'"),
    ],
)
def test_bad_requests(store: EmbeddingStore, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call(store)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({0: float("nan"), 3: float("inf")}, r"2 of 6 embeddings are NaN or infinite; .* rows 0, 3 \(counted from 0\)"),
        ({2: 1e19}, r"1 of 6 embeddings are too large \(above \de\+18\); .* rows 2 \("),
        ({1: 0.0}, "1 of 6 embeddings are all zero; .* rows 1"),
        (dict.fromkeys(range(6), 0.7), r"all 6 embeddings are alike \(mean cosine 1.0000"),
    ],
)
@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 4)])
def test_degenerate_embeddings_are_refused_with_the_count(
    rows: dict[int, float], message: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    good = EmbeddingStore.from_arrays({"a": values})
    path = write_store(tmp_path / "s", good)
    for row, value in rows.items():
        values[row] = value
    with pytest.raises(ValueError, match=message):
        EmbeddingStore.from_arrays({"a": values})
    with pytest.raises(ValueError, match=message):
        good.with_embeddings("a", values)
    raw = (path / "a.safetensors").read_bytes()
    (path / "a.safetensors").write_bytes(raw[: -values.nbytes] + values.numpy().tobytes())
    with pytest.raises(ValueError, match=message):
        EmbeddingStore.open(path)
    assert len(EmbeddingStore.open(path, check=False)) == 6


def test_alike_is_judged_on_a_sample_of_the_whole_file() -> None:
    direction = torch.ones(3000, 8)
    half = torch.cat([direction[:1500], -direction[:1500]])
    assert len(EmbeddingStore.from_arrays({"a": half})) == 3000
    with pytest.raises(ValueError, match=r"alike \(mean cosine 0.99\d+ over 500\)"):
        EmbeddingStore.from_arrays({"a": direction + 0.01 * torch.randn(3000, 8)})


def test_float16_overflow_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    store = EmbeddingStore.from_arrays({"a": torch.randn(5, 3) * 1e6})
    with pytest.raises(ValueError, match="embeddings are NaN or infinite"):
        write_store(tmp_path / "s", store, dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["group"]), "column 'group' is missing; it has id, split, caption"),
        (set_column("id", pa.array(range(ROWS))), "column 'id' must be strings; got int64"),
        (set_column("id", pa.array(["a"] * ROWS)), "23 duplicate ids"),
        (set_column("group", pa.array([None] * ROWS, pa.string())), "column 'group' has 24 empty values"),
        (set_column("group", pa.array([""] * ROWS)), "column 'group' has 24 empty values"),
        (set_column("split", pa.array(["dev"] * ROWS)), "split 'dev' is unknown"),
        (set_column("row_video", pa.array([10] * ROWS)), "24 values of 'row_video' lie outside -1..7"),
        (set_column("row_video", pa.array([-2] * ROWS)), "24 values of 'row_video' lie outside -1..7"),
        (set_column("row_video", pa.array([None] + [0] * (ROWS - 1))), "got int64 with 1 nulls"),
        (set_column("row_video", pa.array([0.0] * ROWS)), "must be int64, -1 where a row has none; got double"),
        (lambda t: t.drop_columns(["row_video"]), "24 index rows but 8 'video' embeddings"),
        (lambda t: t.append_column("row_text", pa.array([0] * ROWS)), "no file text.safetensors"),
        (lambda t: t.slice(0, 20), "20 index rows but 24 'audio' embeddings"),
    ],
)
def test_open_checks_the_index(folder: Path, change: Any, message: str) -> None:
    alter_index(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        EmbeddingStore.open(folder)
    assert "\n" not in str(caught.value) and "index.parquet" in str(caught.value)


def test_open_refuses_strings_that_are_not_utf8(folder: Path) -> None:
    def spoil(table: pa.Table) -> pa.Table:
        offsets = np.arange(len(table) + 1, dtype=np.int32)
        strings = pa.StringArray.from_buffers(len(table), pa.py_buffer(offsets), pa.py_buffer(b"\xff" * len(table)))
        return table.set_column(table.column_names.index("group"), "group", strings)

    alter_index(folder, spoil)
    with pytest.raises(ValueError, match=r"index\.parquet: not a readable parquet file .*UTF8"):
        EmbeddingStore.open(folder)


@pytest.mark.parametrize("cut", [0, 4, 40, -1])
@pytest.mark.parametrize("name", ["audio.safetensors", "index.parquet"])
def test_open_truncated_file(folder: Path, name: str, cut: int) -> None:
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(raw[:cut])
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: not a readable") as caught:
        EmbeddingStore.open(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda h: h["__metadata__"].update(format_version="2"),
            "format version '2', this diffgap reads '1'",
        ),
        (lambda h: h.pop("__metadata__"), "no format version"),
        (lambda h: h.update(other=h.pop("embeddings")), r"no tensor 'embeddings', only \['other'\]"),
        (lambda h: h["embeddings"].update(dtype="I32"), "embeddings have dtype torch.int32"),
        (lambda h: h["embeddings"].update(shape=[168]), r"embeddings have shape \(168,\)"),
        (lambda h: h["embeddings"].update(shape=[24, 0]), "not a readable safetensors file"),
    ],
)
def test_open_checks_the_modality_header(folder: Path, change: Any, message: str) -> None:
    rewrite_header(folder / "audio.safetensors", change)
    with pytest.raises(ValueError, match=message):
        EmbeddingStore.open(folder)


def test_open_checks_lengths_and_scale(store: EmbeddingStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 of 3 lengths lie outside 1\.\.4"):
        EmbeddingStore.from_arrays({"a": torch.randn(3, 4, 2)}, lengths={"a": [0, 4, 5]})
    with pytest.raises(ValueError, match="'lengths' needs embeddings of shape"):
        EmbeddingStore.from_arrays({"a": torch.randn(3, 4)}, lengths={"a": [1, 1, 1]})
    with pytest.raises(TypeError, match=r"must be floating point; got torch\.int64"):
        EmbeddingStore.from_arrays({"a": torch.ones(3, 4, dtype=torch.int64)})
    with pytest.raises(ValueError, match="differ in length"):
        EmbeddingStore.from_arrays({"a": torch.randn(3, 4)}, {"id": ["a", "b", "c"], "group": ["a"]})
    path = write_store(tmp_path / "s", store, dtype="int8")
    rewrite_header(path / "audio.safetensors", lambda h: h.update(other=h.pop("scale")))
    with pytest.raises(ValueError, match="'scale' belongs to int8 embeddings"):
        EmbeddingStore.open(path)


def test_open_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not an embedding store"):
        EmbeddingStore.open(tmp_path / "nothing")


def test_write_store_refuses_what_is_not_its_own(store: EmbeddingStore, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        write_store(folder, store)
    (folder / "thesis.txt").write_text("only copy")
    with pytest.raises(FileExistsError, match=r"also holds 'thesis\.txt'"):
        write_store(folder, store, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="not a folder"):
        write_store(tmp_path / "file", store, overwrite=True)
    assert (folder / "thesis.txt").read_text() == "only copy"


def test_write_store_over_the_store_it_reads(folder: Path, audio: torch.Tensor, tmp_path: Path) -> None:
    opened = EmbeddingStore.open(folder)
    write_store(folder, opened.with_embeddings("video", torch.randn(8, 2)), overwrite=True)
    torch.testing.assert_close(EmbeddingStore.open(folder).embeddings("audio"), audio)
    torch.testing.assert_close(opened.embeddings("audio"), audio)
    assert EmbeddingStore.open(folder).dim("video") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("failing", ["write_modality", "write_index"])
def test_write_store_interrupted_leaves_the_old_store(
    store: EmbeddingStore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    real = getattr(store_module, failing)

    def interrupted(path: Path, *args: Any, **kwargs: Any) -> None:
        real(path, *args, **kwargs)
        if path.name in ("video.safetensors", "index.parquet"):
            raise KeyboardInterrupt

    monkeypatch.setattr(store_module, failing, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_store(folder, store.split("test"), overwrite=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "new", store)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e4])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_what_stands_beyond_a_length_never_matters(
    store: EmbeddingStore, video: torch.Tensor, tmp_path: Path, dtype: str, garbage: float
) -> None:
    beyond = torch.arange(5) >= VIDEO_LENGTHS[:, None]
    dirty = EmbeddingStore.from_arrays(
        {"video": video.masked_fill(beyond[..., None], garbage)}, lengths={"video": VIDEO_LENGTHS}
    )
    clean = EmbeddingStore.from_arrays({"video": video}, lengths={"video": VIDEO_LENGTHS})
    torch.testing.assert_close(dirty.embeddings("video"), video, rtol=0, atol=0)
    # int8 takes its scale from the frames that are there.
    one, two = (
        EmbeddingStore.open(write_store(tmp_path / name, of, dtype=dtype)).embeddings("video")
        for name, of in (("dirty", dirty), ("clean", clean))
    )
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_a_sequence_of_zeros_is_refused_whatever_its_padding_holds() -> None:
    x = torch.randn(3, 4, 2)
    x[1, :2] = 0.0
    with pytest.raises(ValueError, match="1 of 3 embeddings are all zero"):
        EmbeddingStore.from_arrays({"a": x}, lengths={"a": [4, 2, 3]})
