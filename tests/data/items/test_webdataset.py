from __future__ import annotations

import gzip
import io
import json
import tarfile
import tempfile
from pathlib import Path

import pytest
import webdataset.tariterators as peer
from hypothesis import given, settings
from hypothesis import strategies as st

from diffgap.data.items import Item
from diffgap.data.items._checked import Notes
from diffgap.data.items.listing import list_items
from diffgap.data.items.webdataset import expand_braces, samples
from tests.data.items.listed import by_id, items, tar


def content(item: Item, modality: str) -> bytes:
    with item.media[modality].open() as file:
        return file.read()


def as_json(**values: object) -> bytes:
    return json.dumps(values).encode()


def test_members_are_read_where_they_lie(tmp_path: Path) -> None:
    shard = tar(
        tmp_path / "train-000.tar",
        [
            ("a.flac", b"fLaC" + bytes(700)),
            ("a.txt", b"a dog"),
            ("a.json", as_json(text="not used", split="test", year=1999, tags=["x"], group="clip")),
            ("b/c.mp4", b"video"),
            ("b/c.cls", b"17\n"),
            ("b/c.json", as_json(caption=["one", "two"])),
        ],
    )
    found = by_id(shard)
    assert list(found) == ["train-000/a", "train-000/b/c#1", "train-000/b/c#2"]
    a, c = found["train-000/a"], found["train-000/b/c#2"]
    assert content(a, "audio") == b"fLaC" + bytes(700) and content(a, "text") == b"a dog"
    assert a.media["audio"].path == shard and a.media["audio"].suffix == ".flac"
    assert (a.split, a.group, a.columns) == ("test", "clip", {"year": 1999, "key": "a"})
    assert (c.split, c.group, c.media["text"].text) == ("train", "train-000/b/c", "two")
    assert content(c, "video") == content(c, "audio") == b"video"
    assert c.columns == {"caption": "two", "cls": 17, "key": "b/c"}


def test_several_texts_and_names_with_dots(tmp_path: Path) -> None:
    shard = tar(
        tmp_path / "s.tar",
        [("./x.2.txt", b"two"), ("./x.1.txt", b"one"), ("./x.seg.png", b"mask"), ("./x.WAV", b"w"), ("./x.jpg", b"j")],
    )
    first, second = items(shard)
    assert [content(i, "text") for i in (first, second)] == [b"one", b"two"]
    assert first.id == "s/x#1" and first.group == "s/x"
    assert content(first, "image") == b"j" and first.media["audio"].suffix == ".wav"


def test_folders_globs_and_braces(tmp_path: Path) -> None:
    for name in ("train/0.tar", "train/1.tar", "val/0.tar", ".hidden.tar", "other/9.tar"):
        tar(tmp_path / name, [("k.txt", name.encode())])
    assert [(i.id, i.split) for i in items(tmp_path)] == [
        ("train/0/k", "train"), ("train/1/k", "train"), ("val/0/k", "val")
    ]  # fmt: skip
    assert [i.id for i in items(f"{tmp_path}/train/{{0..1}}.tar")] == ["0/k", "1/k"]
    assert [i.id for i in items(f"{tmp_path}/{{train,val}}/0.tar")] == ["train/0/k", "val/0/k"]
    assert [i.id for i in items(f"{tmp_path}/*/0.tar")] == ["train/0/k", "val/0/k"]
    with pytest.raises(FileNotFoundError, match=r"shard .*/train/2\.tar does not exist"):
        list_items(f"{tmp_path}/train/{{0..3}}.tar")
    with pytest.raises(FileNotFoundError, match=r"no\*\.tar does not exist"):
        list_items(f"{tmp_path}/no*.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no \.tar"):
        list_items(tmp_path / "empty", format="webdataset")


def test_braces_are_those_of_bash() -> None:
    assert expand_braces("a{8..11}b") == ["a8b", "a9b", "a10b", "a11b"]
    assert expand_braces("{008..010}") == ["008", "009", "010"]
    assert expand_braces("{2..0}") == ["2", "1", "0"]
    assert expand_braces("{a,b}-{0..1}") == ["a-0", "a-1", "b-0", "b-1"]
    assert expand_braces("plain") == ["plain"]
    with pytest.raises(ValueError, match="more than 1,000,000 shards"):
        expand_braces("{0..999999999999}.tar")


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_compressed_shards_are_refused_with_the_fix(tmp_path: Path, name: str) -> None:
    plain = tar(tmp_path / "plain.tar", [("a.txt", b"x")]).read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(plain))
    with pytest.raises(ValueError, match=f"is not a plain .tar.*unpack it once: gunzip .*/{name}"):
        list_items(tmp_path / name)


def test_a_member_called_like_a_magic_number_is_no_compression(tmp_path: Path) -> None:
    assert [i.id for i in items(tar(tmp_path / "s.tar", [("BZh9.wav", b"x")]))] == ["s/BZh9"]


def hostile(path: Path) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:

        def add(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", target: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, len(data)
            archive.addfile(info, io.BytesIO(data) if data else None)

        add("/etc/passwd.wav", data=b"absolute")
        add("../../up.wav", data=b"up")
        add("soft.wav", tarfile.SYMTYPE, target="/etc/passwd")
        add("hard.wav", tarfile.LNKTYPE, target="/etc/passwd.wav")
        add("device.wav", tarfile.CHRTYPE)
        add("pipe.wav", tarfile.FIFOTYPE)
        add("folder.wav", tarfile.DIRTYPE)
        add("__meta__/x.wav", data=b"meta")
        add("nosuffix", data=b"nothing")
        add("twice.wav", data=b"first")
        add("twice.WAV", data=b"second")
    return path


def test_names_are_labels_and_only_plain_members_are_listed(tmp_path: Path) -> None:
    listed = list_items(hostile(tmp_path / "s.tar"))
    found = {item.id: content(item, "audio") for item in listed}
    assert found == {"s//etc/passwd": b"absolute", "s/../../up": b"up", "s/twice": b"first"}
    assert listed.notes[0].startswith("members that are links, devices or sparse files, left out: 4 (first: ")
    assert listed.notes[1].startswith("members twice in a sample, the second left out: 1 (first: ")
    assert list(tmp_path.iterdir()) == [tmp_path / "s.tar"]


def test_sparse_members_are_left_out(tmp_path: Path) -> None:
    """A GNU sparse member: 4 bytes at 1 MB; what is stored is not what the file would hold."""
    info = tarfile.TarInfo("hole.wav")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 4
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:398], header[398:410] = b"%011o\0" % (1 << 20), b"%011o\0" % 4
    header[483:495] = b"%011o\0" % ((1 << 20) + 4)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    rest = tar(tmp_path / "s.tar", [("a.wav", b"a")]).read_bytes()
    (tmp_path / "s.tar").write_bytes(bytes(header) + b"DATA" + bytes(508) + rest)
    listed = list_items(tmp_path / "s.tar")
    assert [i.id for i in listed] == ["s/a"] and "sparse files, left out: 1" in listed.notes[0]


@pytest.mark.parametrize("kept", ["in the data", "in a header", "without an end"])
def test_of_a_shard_that_is_cut_off_all_but_the_last_sample_is_listed(tmp_path: Path, kept: str) -> None:
    members = [(f"{key}.{suffix}", bytes(600)) for key in "abc" for suffix in ("wav", "txt")]
    whole = tar(tmp_path / "s.tar", members).read_bytes()
    member = 512 + 1024
    size = {"in the data": 6 * member - 700, "in a header": 5 * member + 100, "without an end": 6 * member}[kept]
    (tmp_path / "s.tar").write_bytes(whole[:size])
    listed = list_items(tmp_path / "s.tar")
    assert [i.id for i in listed] == ["s/a", "s/b"]
    assert listed.notes[0].startswith("shards that are damaged, listed up to there but for the last sample: 1 (first: ")


def test_damaged_shards_beside_a_whole_one_are_noted(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", [("a.wav", b"a")])
    (tmp_path / "1.tar").write_bytes(b"")
    (tmp_path / "2.tar").write_bytes(b"no tar at all" * 100)
    negative = bytearray(tar(tmp_path / "3.tar", [("a.wav", b"a"), ("b.wav", b"b")]).read_bytes())
    negative[1024 + 124 : 1024 + 136] = b"\xff" * 11 + b"\x00"  # base 256, -256
    negative[1024 + 148 : 1024 + 156] = b" " * 8
    negative[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(negative[1024:1536])
    (tmp_path / "3.tar").write_bytes(negative)
    listed = list_items(tmp_path)
    assert [i.id for i in listed] == ["0/a"]
    assert "listed up to there but for the last sample: 3 (first: " in listed.notes[0]
    with pytest.raises(ValueError, match="holds nothing to embed; shards that are damaged"):
        list_items(tmp_path / "2.tar")


def test_json_that_is_none_is_noted(tmp_path: Path) -> None:
    bad = [b"{", b"[1]", b"[" * 100_000, b'"' + b"x" * (1 << 20) + b'"', b"\xff"]
    members = [m for i, j in enumerate(bad) for m in ((f"{i}.wav", b"w"), (f"{i}.json", j))]
    listed = list_items(tar(tmp_path / "s.tar", members))
    assert len(list(listed)) == 5
    assert "that are no object of at most 1,048,576 bytes, not read: 5 (first: 's/0')" in listed.notes[0]


def test_a_key_twice_in_a_shard_is_refused(tmp_path: Path) -> None:
    shard = tar(tmp_path / "s.tar", [("a.wav", b"1"), ("b.wav", b"2"), ("a.txt", b"3")])
    with pytest.raises(ValueError, match=r"1 ids are repeated, the first at .*s\.tar, 's/a'"):
        list_items(shard)


NAMES = st.text(st.sampled_from("ab./_A-"), min_size=1, max_size=7).filter(
    lambda n: not n.endswith("/") and n not in (".", "..")
)


@settings(max_examples=80, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=10))
def test_samples_are_those_of_the_webdataset_package(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        members = [(name, f"{i}".encode()) for i, name in enumerate(names)]
        path = tar(Path(folder) / "s.tar", members)
        with open(path, "rb") as file:
            stream = ({**f, "__url__": ""} for f in peer.tar_file_iterator(file))
            try:
                expected = list(peer.group_by_keys(stream))
            except ValueError:  # a suffix twice in a sample, which we note
                return
        ours = [
            {"__key__": s.key, "__url__": "", **{name: source.open().read() for name, source in s.members.items()}}
            for s in samples(path, Notes())
        ]
        assert ours == expected


def test_the_package_reads_the_same_bytes(tmp_path: Path) -> None:
    members = [(f"{i:03d}.{s}", f"{i}{s}".encode() * 50) for i in range(20) for s in ("wav", "png", "txt")]
    path = tar(tmp_path / "s.tar", members)
    with open(path, "rb") as file:
        theirs = list(peer.group_by_keys({**f, "__url__": ""} for f in peer.tar_file_iterator(file)))
    ours = items(path)
    assert [i.columns["key"] for i in ours] == [s["__key__"] for s in theirs]
    for item, sample in zip(ours, theirs, strict=True):
        for modality, suffix in (("audio", "wav"), ("image", "png"), ("text", "txt")):
            assert content(item, modality) == sample[suffix]
