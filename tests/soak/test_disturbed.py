"""Full disks, read-only folders, turned clocks, damaged parts and kills: a clear error, and nothing is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffgap.data.store import EmbeddingStore
from tests.embed.apart import Apart, embed
from tests.embed.fakes import digest, make_items
from tests.helpers import run
from tests.soak.length import KILLS, LONG, found
from tests.synthetic import saved_config

ROOT = Path(__file__).resolve().parents[2]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def in_one_process(module: str, *arguments: object) -> str:
    """What ``python -m module`` prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("disturbed")
    config = saved_config(folder, steps=8, eval_every=2, checkpoint_every=1)
    return folder, json.loads(in_one_process("tests.soak.disturbances", config, folder))


@pytest.mark.parametrize(
    ("name", "status", "words"), [("full", 1, "too large"), ("read-only", 1, "Read-only file system"), ("clock", 0, "")]
)
def test_training_that_is_disturbed(disturbed: tuple[Path, dict[str, Any]], name: str, status: int, words: str) -> None:
    folder, ends = disturbed
    first, said, again = ends[name]
    assert (first, again) == (status, 0), said
    assert "Traceback" not in said
    if status:
        (line,) = [line for line in said.splitlines() if line.startswith("diffgap: ")]
        assert words.lower() in line.lower()
        assert str(folder / name) in line
    assert tree(folder / name) == tree(folder / "whole")


def test_a_damaged_checkpoint_is_named_and_can_be_gone_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = saved_config(tmp_path, steps=4, eval_every=2, checkpoint_every=1)
    assert run("train", "--config", config, tmp_path / "whole") == 0
    whole = tree(tmp_path / "whole")
    newest = tmp_path / "whole" / "checkpoints" / "step-00000004"
    (newest / "optimizer.safetensors").write_bytes(bytes(100))
    assert run("train", "--config", config, tmp_path / "whole") == 2
    assert f"checkpoint {newest} cannot be restored" in capsys.readouterr().err
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert run("train", "--config", config, tmp_path / "whole") == 0
    assert tree(tmp_path / "whole") == whole


@pytest.fixture
def apart() -> Iterator[Apart]:
    process = Apart()
    yield process
    process.close()


@pytest.mark.parametrize("file", ["audio.safetensors", "failures.parquet", "index.parquet"])
def test_a_damaged_part_is_named_and_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    make_items(tmp_path / "media", 20, 2)
    embed(str(tmp_path / "media"), str(tmp_path / "whole"))
    monkeypatch.setattr("diffgap.embed.pipeline.merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed(str(tmp_path / "media"), str(tmp_path / "store"))
    monkeypatch.undo()
    part = tmp_path / "store.parts" / "part-000001"
    (part / file).write_bytes((part / file).read_bytes()[:40])
    with pytest.raises(ValueError, match=r"part-000001.* is damaged .*; delete that folder and run again"):
        embed(str(tmp_path / "media"), str(tmp_path / "store"))
    for one in part.iterdir():
        one.unlink()
    part.rmdir()
    embed(str(tmp_path / "media"), str(tmp_path / "store"))
    assert digest(tmp_path / "store") == digest(tmp_path / "whole")


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_embedding_that_is_killed(apart: Apart, tmp_path: Path) -> None:
    """By SIGKILL, at random moments, until it has died as often as it should."""
    media, moments, deaths = tmp_path / "media", random.Random(1), 0
    make_items(media, 20, 2)
    embed(str(media), str(tmp_path / "whole"))
    expected = digest(tmp_path / "whole")
    for round_ in range(10 * KILLS):
        output = tmp_path / str(round_)
        while deaths < KILLS:
            process = apart.start(media, output, seconds=0.02)
            time.sleep(moments.uniform(0.0, 0.4))
            os.kill(process, signal.SIGKILL)
            deaths += apart.wait(process) == -signal.SIGKILL
            if (output / "index.parquet").exists():
                break
        if not (output / "index.parquet").exists() or Path(f"{output}.parts").exists():
            assert apart.wait(apart.start(media, output)) == 0
        assert digest(output) == expected
        assert len(EmbeddingStore.open(output)) == 20
        if deaths >= KILLS:
            break
    assert deaths >= KILLS
    found.append(f"{deaths} kills of embedding runs: every store equals the undisturbed one, bit for bit")


@pytest.mark.skipif(not LONG, reason="tests/training/test_trainer.py kills a shorter run in the same way")
def test_training_that_is_killed(tmp_path: Path) -> None:
    config = saved_config(tmp_path, steps=300, eval_every=2, checkpoint_every=1)
    folders = tmp_path / "whole", tmp_path / "killed"
    deaths = int(in_one_process("tests.training.kill_loop", config, *folders, 0.05).split()[-1])
    assert deaths == KILLS
    assert tree(folders[1]) == tree(folders[0])
    found.append(f"{deaths} kills of one training run: its folder equals the undisturbed one, bit for bit")
