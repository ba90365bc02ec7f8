from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diffgap.data import EmbeddingStore, importers
from diffgap.data._modality import write_modality
from diffgap.data.importers import assign_splits, import_clip_retrieval, import_npy

RNG = np.random.default_rng(0)
AUDIO = RNG.normal(size=(6, 4)).astype(np.float32)
TEXT = RNG.normal(size=(3, 2, 5)).astype(np.float16)
CSV = """id,clip,caption,row_text
007,a,"dogs, barking",0
008,a,a dog,0
009,b,rain,1
010,b,rain again,-1
011,c,,2
012,c,wind,2
"""


@pytest.fixture
def npy_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "npy"
    folder.mkdir()
    np.save(folder / "audio.npy", AUDIO)
    np.save(folder / "text.npy", TEXT)
    (folder / "index.csv").write_text(CSV)
    return folder


def write_shards(folder: Path, sizes: tuple[int, ...] = (4, 1, 3), *, key: bool = True) -> np.ndarray:
    """The layout of clip-retrieval with shards 0, 1, 10 (so that text order would be wrong)."""
    images = np.random.default_rng(1).normal(size=(sum(sizes), 6)).astype(np.float16)
    start = 0
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for number, size in zip((0, 2, 10), sizes, strict=True):
        rows = range(start, start + size)
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", images[rows])
        np.save(folder / "text_emb" / f"text_emb_{number}.npy", -images[rows])
        columns: dict[str, Any] = {"caption": [f"caption {i}" for i in rows], "similarity": [0.5] * size}
        columns["exif"] = [{"a": i} for i in rows]
        if key:
            columns["key"] = list(rows)
        pq.write_table(pa.table(columns), folder / "metadata" / f"metadata_{number}.parquet")
        start += size
    return images


def damage_header(path: Path, old: bytes, new: bytes) -> None:
    """Change the Python literal that describes an array."""
    path.write_bytes(path.read_bytes().replace(old, new.rjust(len(old)), 1))


def test_import_npy_folder(npy_folder: Path, tmp_path: Path) -> None:
    import_npy(npy_folder, tmp_path / "store", group="clip", split=(0.5, 0.25, 0.25))
    store = EmbeddingStore.open(tmp_path / "store")
    assert store.column("id").tolist() == ["007", "008", "009", "010", "011", "012"]
    assert store.column("group").tolist() == list("aabbcc")
    assert store.column("caption")[0] == "dogs, barking"
    np.testing.assert_array_equal(store.embeddings("audio"), AUDIO)
    np.testing.assert_array_equal(store.embeddings("text", [0, 1, 2, 5]), TEXT[[0, 0, 1, 2]].astype(np.float32))
    assert store.rows("text").tolist() == [0, 0, 1, -1, 2, 2]
    assert store.column("split").tolist() == assign_splits(list("aabbcc"), (0.5, 0.25, 0.25))


def test_import_npy_mapping_without_csv(npy_folder: Path, tmp_path: Path) -> None:
    store = import_npy({"sound": npy_folder / "audio.npy"}, tmp_path / "store", dtype="int8")
    assert store.modalities == ("sound",) and store.column("id").tolist() == [str(i) for i in range(6)]
    np.testing.assert_allclose(store.embeddings("sound"), AUDIO, atol=np.abs(AUDIO).max() / 250)


@pytest.mark.parametrize("number", ["{}", "{}.0"])  # of pandas, that of a column with an empty cell
def test_an_empty_row_number_is_a_missing_embedding(npy_folder: Path, tmp_path: Path, number: str) -> None:
    rows = [0, None, 1, None, 2, 2]
    lines = [f"{i},{'' if row is None else number.format(row)}" for i, row in enumerate(rows)]
    (npy_folder / "index.csv").write_text("\n".join(["id,row_text", *lines]))
    store = import_npy(npy_folder, tmp_path / "store")
    assert store.rows("text").tolist() == [0, -1, 1, -1, 2, 2]


def test_import_npy_takes_a_split_column(npy_folder: Path, tmp_path: Path) -> None:
    lines = CSV.splitlines()
    parts = ["part", "train", "train", "val", "val", "test", "test"]
    (npy_folder / "index.csv").write_text("\n".join(f"{a},{b}" for a, b in zip(lines, parts, strict=True)))
    store = import_npy(npy_folder, tmp_path / "s", split="part")
    assert store.column("split").tolist() == parts[1:]


def test_import_clip_retrieval(tmp_path: Path) -> None:
    images = write_shards(tmp_path / "shards")
    store = import_clip_retrieval(tmp_path / "shards", tmp_path / "store", group="caption")
    assert store.modalities == ("image", "text")
    np.testing.assert_array_equal(store.embeddings("image"), images.astype(np.float32))
    np.testing.assert_array_equal(store.embeddings("text"), -images.astype(np.float32))
    assert store.column("id").tolist() == [str(i) for i in range(8)]
    assert store.column("group").tolist() == [f"caption {i}" for i in range(8)]
    assert store.index.column_names == ["id", "group", "split", "caption", "similarity", "key"]


def test_import_clip_retrieval_numbers_rows_without_a_key(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", key=False)
    store = import_clip_retrieval(tmp_path / "shards", tmp_path / "store")
    assert store.column("id").tolist() == ["0_0", "0_1", "0_2", "0_3", "2_0", "10_0", "10_1", "10_2"]


def test_import_streams(npy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def watched(path: Path, chunks: Any, *args: Any, **options: Any) -> None:
        assert iter(chunks) is chunks  # lazy: nothing is read before it is written
        write_modality(path, (sizes.append(c[0].numel()) or c for c in chunks), *args, **options)

    monkeypatch.setattr(importers, "_CHUNK_ELEMENTS", 10)
    monkeypatch.setattr(importers, "write_modality", watched)
    store = import_npy({"audio": npy_folder / "audio.npy"}, tmp_path / "store")
    assert sizes == [8, 8, 8]
    np.testing.assert_array_equal(store.embeddings("audio"), AUDIO)


def test_assign_splits() -> None:
    groups = [f"group {i // 2}" for i in range(8000)]
    parts = np.array(assign_splits(groups, (0.7, 0.1, 0.2)))
    assert (parts[::2] == parts[1::2]).all()
    shares = [(parts == name).mean() for name in ("train", "val", "test")]
    np.testing.assert_allclose(shares, [0.7, 0.1, 0.2], atol=0.03)
    # Fixed for ever: stored splits must not move with the version.
    first = assign_splits([f"g{i}" for i in range(12)])
    assert [i for i, part in enumerate(first) if part == "val"] == [3, 5, 7] and "test" not in first
    assert assign_splits(groups[:100], (0.7, 0.1, 0.2)) == parts[:100].tolist()
    assert assign_splits(groups, seed=1) != assign_splits(groups)
    assert set(assign_splits(groups, (1, 0, 0))) == {"train"} and set(assign_splits(groups, (0, 0, 1))) == {"test"}


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.9, 0.2, -0.1), (0.5, 0.1, 0.1), (float("nan"), 0.5, 0.5)])
def test_assign_splits_bad_fractions(fractions: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="three numbers >= 0"):
        assign_splits(["a"], fractions)


@pytest.mark.parametrize(
    ("spoil", "options", "error", "message"),
    [
        (
            lambda f: np.save(f / "audio.npy", AUDIO[:5]),
            {},
            ValueError,
            "6 index rows but 5 'audio' embeddings",
        ),
        (lambda f: np.save(f / "audio.npy", AUDIO.astype(int)), {}, ValueError, "expected floats of shape"),
        (lambda f: np.save(f / "audio.npy", AUDIO[0]), {}, ValueError, r"got float32 \(4,\)"),
        (lambda f: np.save(f / "audio.npy", np.array([{}])), {}, ValueError, "not a readable .npy file"),
        (lambda f: (f / "audio.npy").write_bytes(b"\x93NUM"), {}, ValueError, "not a readable .npy file"),
        (lambda f: damage_header(f / "audio.npy", b"}", b" "), {}, ValueError, "not a readable .npy file"),
        (lambda f: damage_header(f / "audio.npy", b"'fortran", b"fortran"), {}, ValueError, "not a readable .npy"),
        (lambda f: np.save(f / "audio.npy", AUDIO * np.nan), {}, ValueError, r"audio\.npy: 6 of 6 embeddings are NaN"),
        (lambda f: np.save(f / "audio.npy", np.full((6, 4), 1e300)), {}, ValueError, r"rows 0, 1, 2, 3, 4 \.\.\. \("),
        (
            lambda f: np.save(f / "audio.npy", AUDIO[:0]),
            {},
            ValueError,
            r"'audio' holds no embeddings, its shape is \(0",
        ),
        (lambda f: np.savez(f / "image.npz", image=AUDIO), {}, ValueError, r"image\.npz is not read; save each of its"),
        (lambda f: np.save(f / "Audio 2.npy", AUDIO), {}, ValueError, "modality name 'Audio 2'"),
        (lambda f: (f / "b.csv").touch(), {}, ValueError, "holds 2 csv files"),
        (lambda f: (f / "index.csv").write_text("id,a\n1,2,3\n"), {}, ValueError, "not a readable csv file"),
        (lambda f: (f / "index.csv").write_text("id,id\n1,2\n"), {}, ValueError, "column names repeat"),
        (
            lambda f: (f / "index.csv").write_text("id;caption\n7;a, b\n"),
            {},
            ValueError,
            "separated by semicolons; save",
        ),
        (lambda f: (f / "index.csv").write_text("id\tcaption\n7\ta\n"), {}, ValueError, "separated by tabs; save"),
        (
            lambda f: (f / "index.csv").write_text("".join(f"{row},a {row}\n" for row in range(6))),
            {},
            ValueError,
            "6 embeddings need as many lines below a header, and the first line is no header: '0, a 0'",
        ),
        (
            lambda f: (f / "index.csv").write_text(CSV.replace(",-1", ",none")),
            {},
            ValueError,
            "column 'row_text' must hold whole numbers, and nothing or -1 where .* values are string",
        ),
        (lambda f: None, {"group": "band"}, ValueError, "group='band': .* has no such column"),
        (lambda f: None, {"id": "caption"}, ValueError, "column 'id' has 1 empty values"),
        (lambda f: None, {"split": "clip"}, ValueError, "split .a. is unknown"),
        (lambda f: None, {"dtype": "float8"}, ValueError, "dtype 'float8' is not supported"),
        (lambda f: None, {"csv": "nowhere.csv"}, FileNotFoundError, "csv file nowhere.csv does not exist"),
    ],
)
def test_import_npy_bad_input(
    npy_folder: Path, tmp_path: Path, spoil: Any, options: Any, error: type[Exception], message: str
) -> None:
    spoil(npy_folder)
    with pytest.raises(error, match=message) as caught:
        import_npy(npy_folder, tmp_path / "store", **options)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["npy"]


def test_import_npy_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        import_npy(tmp_path / "nowhere", tmp_path / "store")
    with pytest.raises(FileNotFoundError, match=r"holds no \.npy files"):
        import_npy(tmp_path, tmp_path / "store")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        import_npy({"a": tmp_path / "a.npy"}, tmp_path / "store")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "img_emb" / "img_emb_2.npy").unlink(), ValueError, "shard 2 is missing in 'image'"),
        (
            lambda f: np.save(f / "img_emb" / "img_emb_2.npy", AUDIO),
            ValueError,
            "1 rows but 6 'image' embeddings",
        ),
        (
            lambda f: np.save(f / "img_emb" / "img_emb_2.npy", AUDIO[:1]),
            ValueError,
            "shards of 'image' differ in shape",
        ),
        (
            lambda f: (f / "metadata" / "metadata_0.parquet").write_bytes(b"PAR1"),
            ValueError,
            "not a readable parq",
        ),
        (
            lambda f: [p.unlink() for p in (f / "metadata").iterdir()],
            FileNotFoundError,
            "holds no metadata_N",
        ),
        (lambda f: (f / "metadata").rename(f / "meta"), FileNotFoundError, "is not a folder"),
    ],
)
def test_import_clip_retrieval_bad_input(tmp_path: Path, spoil: Any, error: type[Exception], message: str) -> None:
    write_shards(tmp_path / "shards")
    spoil(tmp_path / "shards")
    with pytest.raises(error, match=message):
        import_clip_retrieval(tmp_path / "shards", tmp_path / "store")
    assert [p.name for p in tmp_path.iterdir()] == ["shards"]


def test_import_interrupted_leaves_nothing(npy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importers, "write_index", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_npy(npy_folder, tmp_path / "store")
    assert [p.name for p in tmp_path.iterdir()] == ["npy"]


def test_import_overwrite(npy_folder: Path, tmp_path: Path) -> None:
    import_npy(npy_folder, tmp_path / "store")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        import_npy(npy_folder, tmp_path / "store")
    assert len(import_npy(npy_folder, tmp_path / "store", overwrite=True)) == 6
    assert torch.isfinite(EmbeddingStore.open(tmp_path / "store").embeddings("audio")).all()
