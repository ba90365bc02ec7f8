from __future__ import annotations

from pathlib import Path

import pytest

from diffgap.data.items.formats import OFFICIAL
from diffgap.data.items.listing import list_items
from tests.data.items.listed import by_id, files, items, touch

HEADER = "audiocap_id,youtube_id,start_time,caption\r\n"


def audiocaps(folder: Path, clips: int = 4) -> Path:
    """As the data set's own files: CR LF, five captions a clip in val and test, not beside one another."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"train": ["tr-_AAAAAAA"], "val": ["va_BBBBBBBB"], "test": [f"te{i}CCCCCCCC" for i in range(clips)]}
    number = 0
    for split, ids in names.items():
        rows = []
        for caption in range(1 if split == "train" else 5):
            for clip in ids:
                number += 1
                rows.append(f'{number},{clip},30,"A dog, {clip}, says {caption}"\r\n')
        (folder / f"{split}.csv").write_bytes((HEADER + "".join(rows)).encode())
    return folder


def test_audiocaps_captions_are_items_of_one_group(tmp_path: Path) -> None:
    root = touch(audiocaps(tmp_path), "test/te0CCCCCCCC.wav", "test/te1CCCCCCCC.wav", "train/tr-_AAAAAAA.mp4")
    listed = list_items(root, format="audiocaps")
    found = list(listed)
    assert [i.split for i in found] == ["train"] + ["test"] * 10
    first = [i for i in found if i.group == "te0CCCCCCCC"]
    assert [i.media["text"].text for i in first] == [f"A dog, te0CCCCCCCC, says {n}" for n in range(5)]
    assert {i.media["audio"] for i in first} == {first[0].media["audio"]} and first[0].media["audio"].start is None
    assert first[0].id == "7" and first[0].columns == {
        "caption": "A dog, te0CCCCCCCC, says 0", "youtube_id": "te0CCCCCCCC", "start_time": 30
    }  # fmt: skip
    assert files(found[0], root) == {
        "video": "train/tr-_AAAAAAA.mp4", "audio": "train/tr-_AAAAAAA.mp4",
        "text": "text:A dog, tr-_AAAAAAA, says 0",
    }  # fmt: skip
    assert listed.notes[:3] == [
        "AudioCaps train: 1 of 49,838 clips found; train.csv itself lists 1",
        "AudioCaps val: 0 of 495 clips found (494 in WavCaps' list); val.csv itself lists 1",
        "AudioCaps test: 2 of 975 clips found (957 in WavCaps' list); test.csv itself lists 4",
    ]
    assert "clips without a file in" in listed.notes[3] and ": 3 (first: " in listed.notes[3]
    assert "looked for 'va_BBBBBBBB_30', " in listed.notes[3]


def test_audiocaps_against_the_official_numbers(tmp_path: Path) -> None:
    """A csv of the official size, 940 of whose clips are there."""
    clips = [f"{i:011d}" for i in range(975)]
    rows = [f"{5 * i + n},{clip},0,caption {n}\r\n" for n in range(5) for i, clip in enumerate(clips)]
    (tmp_path / "test.csv").write_text(HEADER + "".join(rows), newline="")
    touch(tmp_path / "wav", *(f"Y{clip}.wav" for clip in clips[:940]))
    listed = list_items(tmp_path / "test.csv", format="audiocaps", media=tmp_path / "wav")
    assert len(listed) == 940 * 5
    assert listed.notes[0] == "AudioCaps test: 940 of 975 clips found (957 in WavCaps' list)"


@pytest.mark.parametrize(
    "name",
    [
        "te0CCCCCCCC.wav", "Yte0CCCCCCCC.flac", "te0CCCCCCCC_30.mp3", "te0CCCCCCCC_30_40.ogg", "te0CCCCCCCC_000030.mp4",
        "Yte0CCCCCCCC_30000_40000.wav", "Yte0CCCCCCCC_30.000_40.000.wav", "7.wav", "a/b/te0CCCCCCCC.WAV",
    ],
)  # fmt: skip
def test_audiocaps_files_by_the_names_that_downloaders_give(tmp_path: Path, name: str) -> None:
    audiocaps(tmp_path / "csv")
    touch(tmp_path / "media", name)
    item = items(tmp_path / "csv", format="audiocaps", media=tmp_path / "media")[0]
    assert item.media["audio"].path == tmp_path / "media" / name and item.group == "te0CCCCCCCC"
    assert item.media["audio"].start is None


def test_start_is_applied_to_whole_videos_only(tmp_path: Path) -> None:
    audiocaps(tmp_path)
    touch(tmp_path, "te0CCCCCCCC.webm", "te1CCCCCCCC_30.webm", "Yte2CCCCCCCC.webm")
    times = {}
    for item in items(tmp_path, format="audiocaps", whole=True):
        times[item.group[:3]] = [(s.start, s.stop) for m, s in sorted(item.media.items()) if m != "text"]
    assert times == {"te0": [(30.0, 40.0)] * 2, "te1": [(None, None)] * 2, "te2": [(None, None)] * 2}
    assert items(tmp_path, format="audiocaps")[0].media["audio"].start is None


def test_a_file_of_another_split_is_not_taken(tmp_path: Path) -> None:
    audiocaps(tmp_path)
    touch(tmp_path, "audio/train/te0CCCCCCCC.wav", "audio/test/te0CCCCCCCC.mp3", "audio/train/te1CCCCCCCC.wav")
    assert {str(i.media["audio"].path) for i in items(tmp_path, format="audiocaps")} == {
        str(tmp_path / "audio/test/te0CCCCCCCC.mp3")
    }


def test_audiocaps_refusals(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is or holds none of train.csv, val.csv, test.csv"):
        list_items(tmp_path, format="audiocaps")
    with pytest.raises(
        ValueError, match=r"holds nothing to embed; AudioCaps train: 0 of 49,838 clips found.*looked for"
    ):
        list_items(audiocaps(tmp_path / "a"), format="audiocaps")
    (tmp_path / "test.csv").write_text("audiocap_id,youtube_id,caption\n1,a,b\n")
    with pytest.raises(
        ValueError, match=r"test.csv: column 'start_time' is missing; it has audiocap_id, youtube_id, cap"
    ):
        list_items(tmp_path, format="audiocaps")
    (tmp_path / "test.csv").write_text(HEADER + "1,a,x,b\n")
    with pytest.raises(ValueError, match=r"test.csv, line 2: start 'x' must be whole seconds"):
        list_items(tmp_path, format="audiocaps")
    touch(tmp_path, "my_test.csv")
    with pytest.raises(ValueError, match=r"both my_test.csv and test.csv are the test split; keep one"):
        list_items(tmp_path, format="audiocaps")


# Kinds of characters that Clotho's names have.
CLOTHO = ["Distorted AM Radio noise.wav", "[FD]_AMB 01, night (2).wav", "01 A pug struggles to breathe 1_14_2008.wav",
          "#1 café's \"door\".wav", "dots.in.name v1.2.wav"]  # fmt: skip


def clotho(folder: Path, split: str, names: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["file_name,caption_1,caption_2,caption_3,caption_4,caption_5"]
    for name in names:
        quoted = name.replace('"', '""')
        rows.append(",".join([f'"{quoted}"', *(f'"Caption, {n} of it."' for n in range(5))]))
    (folder / f"clotho_captions_{split}.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_clotho(tmp_path: Path) -> None:
    clotho(tmp_path, "development", CLOTHO)
    clotho(tmp_path, "evaluation", [CLOTHO[0], "gone.wav"])
    touch(tmp_path / "development", *CLOTHO)
    touch(tmp_path / "evaluation", CLOTHO[0])
    listed = list_items(tmp_path, format="clotho")
    found = by_id(tmp_path, format="clotho")
    assert len(found) == 30
    for name in CLOTHO:
        stem = name.removesuffix(".wav")
        captions = [found[f"train/{stem}#{n}"] for n in range(1, 6)]
        assert {i.media["audio"].path for i in captions} == {tmp_path / "development" / name}
        assert {(i.group, i.split) for i in captions} == {(f"train/{stem}", "train")}
    last = found[f"test/{CLOTHO[0][:-4]}#5"]
    assert last.media["audio"].path == tmp_path / "evaluation" / CLOTHO[0]
    assert last.columns == {"caption": "Caption, 4 of it.", "file_name": CLOTHO[0]}
    assert listed.notes[:2] == [
        "Clotho train: 5 of 3,839 clips found; clotho_captions_development.csv itself lists 5",
        "Clotho test: 1 of 1,045 clips found; clotho_captions_evaluation.csv itself lists 2",
    ]


def test_clotho_names_lead_nowhere_else(tmp_path: Path) -> None:
    clotho(tmp_path / "c", "evaluation", ["../../secret.wav", "/etc/x.wav", "a.wav"])
    touch(tmp_path, "secret.wav", "c/evaluation/a.wav")
    assert {str(i.media["audio"].path) for i in items(tmp_path / "c", format="clotho")} == {
        str(tmp_path / "c/evaluation/a.wav")
    }


def test_vggsound(tmp_path: Path) -> None:
    (tmp_path / "vggsound.csv").write_text(
        '--_AAAAAAAA,30,"people marching",test\nBBBBBBBBBBB,0,dog barking,train\nCCCCCCCCCCC,5,dog barking,train\n'
        "DDDDDDDDDDD,7,gone,test\n"
    )
    touch(tmp_path, "video/--_AAAAAAAA_000030.mp4", "video/BBBBBBBBBBB_0.mp4", "audio/BBBBBBBBBBB_000000.wav")
    touch(tmp_path, "CCCCCCCCCCC.mp4")
    listed = list_items(tmp_path, format="vggsound")
    a, b = listed
    assert files(a, tmp_path) == {
        "video": "video/--_AAAAAAAA_000030.mp4", "audio": "video/--_AAAAAAAA_000030.mp4", "text": "text:people marching"
    }  # fmt: skip
    assert (a.id, a.group, a.split) == ("--_AAAAAAAA_000030", "--_AAAAAAAA_000030", "test")
    assert a.columns == {"caption": "people marching", "youtube_id": "--_AAAAAAAA", "start_time": 30}
    assert files(b, tmp_path)["audio"] == "audio/BBBBBBBBBBB_000000.wav" and b.split == "train"
    assert listed.notes[:2] == [
        "VGGSound test: 1 of 15,446 clips found; vggsound.csv itself lists 2",
        "VGGSound train: 1 of 2 clips found",
    ]
    c = by_id(tmp_path, format="vggsound", whole=True)["CCCCCCCCCCC_000005"]
    assert (c.media["video"].start, c.media["video"].stop, c.media["audio"].stop) == (5.0, 15.0, 15.0)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("a,1,dog", "3 cells, but there are 4 columns"),
        ("a,x,dog,test", "start 'x' must be whole"),
        ("a,1,dog,dev2", "split 'dev2' is unknown; train or test"),
    ],
)
def test_vggsound_refusals(tmp_path: Path, row: str, says: str) -> None:
    (tmp_path / "vggsound.csv").write_text(f"b,1,cat,train\n{row}\n")
    with pytest.raises(ValueError, match=f"vggsound.csv, line 2: {says}"):
        list_items(tmp_path, format="vggsound")
    (tmp_path / "vggsound.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"take it from github\.com/hche11/VGGSound"):
        list_items(tmp_path, format="vggsound")


def test_official_numbers() -> None:
    """Captions follow: AudioCaps 2,475 and 4,875 lines of val.csv and test.csv; Clotho 5 a clip."""
    assert OFFICIAL["AudioCaps", "val"] * 5 == 2_475 and OFFICIAL["AudioCaps", "test"] * 5 == 4_875
    assert sum(OFFICIAL["Clotho", split] for split in ("train", "val", "test")) * 5 == 34_870 - 1_045 * 5
