from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffgap.data.importers import assign_splits
from diffgap.data.items.listing import list_items
from tests.data.items.listed import by_id, files, items, touch


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller looks at the message
        list_items(path, **options)
    return str(caught.value)


def test_columns_have_the_meaning_of_their_names(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.csv",
        "id,audio,image,caption,group,split,start,stop,language,007\n"
        'a,x/a.wav,a.png,"A dog, ""barking"".\nTwice.",g,validation,1.5,3,en,007\n'
        "b,b.wav,,  ,g,,,,,\n",
    )
    a, b = items(path)
    assert files(a, tmp_path) == {"audio": "x/a.wav", "image": "a.png", "text": 'text:A dog, "barking".\nTwice.'}
    assert (a.id, a.group, a.split) == ("a", "g", "val")
    assert (a.media["audio"].start, a.media["audio"].stop) == (1.5, 3.0)
    assert (a.media["image"].start, a.media["image"].stop) == (None, None)
    assert a.columns == {"caption": 'A dog, "barking".\nTwice.', "language": "en", "007": "007"}
    assert files(b, tmp_path) == {"audio": "b.wav"} and b.columns == {}
    assert b.split == assign_splits(["g"])[0]


def test_ids_are_row_numbers_and_groups_the_medium_unless_given(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.csv",
        "audio,text,start\nbark.wav,a dog,\nbark.wav,woof,\nbark.wav,later,3\n,only text,\n",
    )
    assert [(i.id, i.group) for i in items(path)] == [
        ("0", "bark.wav"), ("1", "bark.wav"), ("2", "bark.wav@3-"), ("3", "3")
    ]  # fmt: skip
    assert [i.group for i in items(path, modalities=["text"])] == ["bark.wav", "bark.wav", "bark.wav@3-", "3"]


def test_video_is_the_audio_where_no_column_is(tmp_path: Path) -> None:
    timed = write(tmp_path / "a.csv", "video,start,audio_stop\nv.mp4,2,4\n")
    (item,) = items(timed)
    assert item.media["video"].path == item.media["audio"].path == tmp_path / "v.mp4"
    assert (item.media["video"].stop, item.media["audio"].start, item.media["audio"].stop) == (None, 2.0, 4.0)
    (item,) = items(write(tmp_path / "b.csv", "video,audio\nv.mp4,\n"))
    assert item.media.keys() == {"video"}


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r", "mixed"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_endings_and_byte_order_marks(tmp_path: Path, ending: str, mark: str) -> None:
    rows = ["id,audio", "1,a.wav", "", "2,b.wav", "3,c.wav"]
    text = "\r\n".join(rows[:2]) + "\n" + "\r".join(rows[2:]) if ending == "mixed" else ending.join(rows) + ending
    assert [i.id for i in items(write(tmp_path / "m.csv", mark + text))] == ["1", "2", "3"]


def test_tsv_and_the_nameless_column_of_pandas(tmp_path: Path) -> None:
    path = write(tmp_path / "m.tsv", "\taudio\ttext\n0\ta.wav\tone, two\n1\tb.wav\t\n")
    first, second = items(path)
    assert first.columns == {"caption": "one, two"} and second.columns == {}


def test_jsonl(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.jsonl",
        '{"audio": "a.wav", "text": ["one", " two ", ""], "n": 1, "ok": true, "tags": ["x"]}\n\n'
        '{"id": "z", "audio": "b.wav", "caption": "three", "n": 2.5, "extra": null}\r\n'
        '{"video": "v.mp4", "n": 3}\n',
    )
    listed = list_items(path)
    found = list(listed)
    assert [(i.id, i.group) for i in found] == [
        ("0#1", "a.wav"), ("0#2", "a.wav"), ("z", "b.wav"), ("2", "v.mp4")
    ]  # fmt: skip
    assert [i.media["text"].text for i in found[:3]] == ["one", "two", "three"]
    assert found[0].columns == {"caption": "one", "n": 1.0, "ok": 1}
    assert all(type(i.columns["n"]) is float for i in found)
    assert "audio" in found[3].media
    assert listed.notes == [
        f"cells that the index cannot hold (lists, bytes, columns named row_...): 1 (first: {path}, line 1, 'tags')"
    ]


def test_parquet(tmp_path: Path) -> None:
    table = pa.table(
        {
            "audio": ["a.wav", None, "c.wav"],
            "captions": [["one", "two"], ["three"], []],
            "year": pa.array([1999, None, 2001], pa.int16()),
            "row_audio": [0, 1, 2],
        }
    )
    pq.write_table(table, tmp_path / "m.parquet", row_group_size=2)
    found = by_id(tmp_path / "m.parquet")
    assert found.keys() == {"0#1", "0#2", "1", "2"}
    assert found["0#2"].columns == {"caption": "two", "year": 1999}
    assert files(found["1"], tmp_path) == {"text": "text:three"} and files(found["2"], tmp_path) == {"audio": "c.wav"}


def test_parquet_of_the_hub_holds_the_media_themselves(tmp_path: Path) -> None:
    media = [{"bytes": b"RIFF", "path": "dog.WAV"}, {"bytes": None, "path": "b.wav"}]
    pq.write_table(pa.table({"audio": media, "image": [b"\x89PNG", None]}), tmp_path / "m.parquet")
    first, second = items(tmp_path / "m.parquet")
    assert (first.media["audio"].data, first.media["audio"].suffix) == (b"RIFF", ".wav")
    assert first.media["image"].data == b"\x89PNG"
    assert second.media["audio"].path == tmp_path / "b.wav"


def test_columns_by_other_names(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", "file,sentence,text,clip\na.wav,a dog,unused,7\n")
    (item,) = items(path, columns={"audio": "file", "text": "sentence", "group": "clip"})
    assert files(item, tmp_path) == {"audio": "a.wav", "text": "text:a dog"} and item.group == "7"
    assert "'nope', named as audio, is missing; it has 'file', 'sentence'" in refused(path, columns={"audio": "nope"})
    assert "no role 'sound'" in refused(path, columns={"sound": "file"})


def test_no_column_to_embed(tmp_path: Path) -> None:
    message = refused(write(tmp_path / "m.csv", "path,label\na.wav,dog\n"))
    assert message.startswith(
        f"{tmp_path / 'm.csv'}: none of the columns audio, image, video, text and caption is there"
    )
    assert "it has 'path', 'label'" in message and "--column audio=NAME" in message
    message = refused(write(tmp_path / "c.csv", "audiocap_id,youtube_id,start_time\n1,a,2\n"))
    assert message.endswith("or read it with --format audiocaps")
    assert "is empty" in refused(write(tmp_path / "e.csv", ""))
    assert "holds nothing to embed" in refused(write(tmp_path / "h.csv", "audio\n"))
    assert "holds nothing to embed" in refused(write(tmp_path / "e.jsonl", ""))
    assert "none of the columns" in refused(write(tmp_path / "p.jsonl", '{"path": "a.wav"}'))


def test_objects_may_lack_a_named_column_but_not_all_of_them(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", '{"text": "a"}\n{"file": "b.wav"}\n')
    assert [set(i.media) for i in items(path, columns={"audio": "file"})] == [{"text"}, {"audio"}]
    assert "column 'fiel', named as audio, is missing; it has 'text'" in refused(path, columns={"audio": "fiel"})


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        ("audio,text\na.wav\n", 2, "1 cells, but there are 2 columns"),
        ("audio,text\na.wav,dog,barking\n", 2, "3 cells, but there are 2 columns"),
        ("audio,audio\na,b\n", 1, "column 'audio' is there more than once"),
        ('audio,text\na.wav,"dog" barks\n', 2, "double the quotes"),
        ('audio,text\na.wav,"dog\n' + "b.wav,cat\n" * 9, 2, "unexpected end of data"),
        ("audio,split\na,train\nb,other\n", 3, "split 'other' is unknown; use train, val, test"),
        ("audio,start\na,0\nb,x\n", 3, "start = 'x' must be seconds"),
        ("audio,start\na,0\nb,-1\n", 3, "start = '-1' must be seconds"),
        ("audio,start\na,0\nb,nan\n", 3, "start = 'nan' must be seconds"),
        ("audio,start,stop\na,0,1\nb,2,2\n", 3, "stop 2 s must be after start 2 s"),
        ("audio\na\nb\0.wav\n", 3, "holds a NUL byte"),
        (b"audio\na\nb\xe9.wav\n", 3, "is not UTF-8"),
        ("audio,text\na,b\n".encode("utf-16"), 1, "is not UTF-8"),
        ("audio\nhttps://x.org/a.wav\n", 2, "is a URL; download it first"),
        ('id,text\n1,"a\nb"\n2,c\n3,d\n2,e\n', 6, "line 4 (id '2')"),
        ("id,text\n1,a\n ,b\n", 3, "id is empty"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, content: str | bytes, line: int, says: str) -> None:
    path = write(tmp_path / "m.csv", content)
    message = refused(path)
    assert f"{path}, line {line}" in message and says in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"audio": "a"}\n[1]\n', "line 2: list instead of an object"),
        ('{"audio": "a"}\n{"audio": \n', "line 2: no JSON"),
        ('{"audio": "a"}\n' + "[" * 100_000 + "\n", "line 2: no JSON"),
        ('{"audio": "a"}\n{"audio": 5}\n', "line 2: audio must be a path or bytes; got int"),
        ('{"audio": "a"}\n{"text": {"a": 1}}\n', "line 2: a text is expected"),
        ('{"audio": "a"}\n{"text": "\\ud800"}\n', "line 2: '"),
        ('{"audio": "a", "n": 1}\n{"audio": "b", "n": "x"}\n', "line 2: column 'n' holds text here and numbers"),
        ('{"audio": "a", "n": 99999999999999999999}\n', "line 1: 'n' = 99999999999999999999 does not fit 64 bits"),
        ('{"audio": "a\\u0000"}\n', "line 1: 'a\\x00' is no path: it holds a NUL byte"),
    ],
)
def test_malformed_objects_are_named(tmp_path: Path, content: str, says: str) -> None:
    path = write(tmp_path / "m.jsonl", content)
    message = refused(path)
    assert message.startswith(f"{path}, ") and says in message


def test_repeated_ids_are_named_with_both_lines_before_anything_is_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", "id,text\n" + "".join(f"{i % 5000},t\n" for i in range(5002)))
    first = f"2 ids are repeated, the first at {path}, line 2 (id '0') and {path}, line 5002 (id '0'); give every item"
    assert first in refused(path)


@pytest.mark.parametrize(
    "content",
    [
        "audio,text\na.wav," + "x" * 10_000_000 + "\n",
        'audio,text\na.wav,"' + "x\n" * 5_000_000 + '"\n',
        'audio,text\na.wav,"' + "b.wav,y\n" * 1_000_000,
    ],
    ids=["one line", "one cell", "quote not closed"],
)
@pytest.mark.parametrize("limit", [131_072, 1 << 40])
def test_a_cell_of_ten_megabytes_is_refused_not_read(tmp_path: Path, content: str, limit: int) -> None:
    before = csv.field_size_limit(limit)  # other packages raise it for the whole process
    try:
        message = refused(write(tmp_path / "m.csv", content))
    finally:
        assert csv.field_size_limit(before) == limit
    assert "line 2" in message or "more than 1,048,576 characters; is a quote not closed?" in message


def test_media_stay_in_their_folder(tmp_path: Path) -> None:
    media = touch(tmp_path / "media", "in/a.wav")
    outside = tmp_path / "mediaother" / "b.wav"
    for name in ("../b.wav", "in/../../b.wav", "..", str(outside), "/etc/passwd", ".", "//etc/passwd"):
        path = write(tmp_path / "m.csv", f"audio\nin/a.wav\n{name}\n")
        message = refused(path, media=media)
        assert f"{path}, line 3: {name!r} is not in the media folder {media}; give media (--media)" in message
    path = write(tmp_path / "m.csv", f"audio\nin/../in/a.wav\n{media}/in/a.wav\n./in//a.wav\n")
    assert {i.media["audio"].path for i in items(path, media=media)} == {media / "in" / "a.wav"}
    path = write(tmp_path / "m.csv", f"audio\n{outside}\n/etc/../etc/hosts\n")
    assert [str(i.media["audio"].path) for i in items(path, media="/")] == [str(outside), "/etc/hosts"]
    with pytest.raises(FileNotFoundError, match=r"media folder .* does not exist"):
        list_items(path, media=tmp_path / "nothing")


def test_broken_parquet(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    assert "not a readable parquet file" in refused(write(path, b"PAR1 nothing"))
    pq.write_table(pa.table({"audio": ["a.wav"] * 5000, "n": list(range(5000))}), path, compression="none")
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    assert "not a readable parquet file" in refused(write(path, bytes(content)))


def test_listing_opens_no_medium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.jsonl", json.dumps({"audio": "gone.wav", "text": "a"}))
    opened = []
    monkeypatch.setattr(
        "builtins.open", lambda name, *a, _open=open, **k: opened.append(str(name)) or _open(name, *a, **k)
    )
    assert len(items(path)) == 1 and set(opened) == {str(path)}
