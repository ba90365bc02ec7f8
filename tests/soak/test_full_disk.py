"""Every command that writes, on a disk of its own that is full, fills up or is read-only."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.generation.conftest import studio  # noqa: F401 (a fixture)
from tests.generation.studio import TONES, WORDS
from tests.helpers import run
from tests.search.conftest import write_tone
from tests.soak.length import LONG, found
from tests.synthetic import saved_config

#: Of the disk. No command's output is as large, and some of their parts are larger than what is left by ``fill``.
SIZE = 1 << 20


class Disk:
    """A file system in memory, mounted on a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.filler = folder, folder / "filler"

    def mount(self, *options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", self.folder], check=True)

    def fill(self, room: int) -> None:
        """Leave ``room`` bytes."""
        self.filler.write_bytes(bytes(SIZE - room))

    def remount(self, mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", self.folder], check=True)

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path != self.filler)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    made = Disk(folder)
    try:
        made.mount(f"size={SIZE}")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield made
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read: a trained bridge, media, and arrays."""
    folder = tmp_path_factory.mktemp("inputs")
    assert run("train", folder / "run", "--config", saved_config(folder, steps=2)) == 0
    for number in range(40):
        write_tone(folder / "media" / f"{number}.wav", 300.0 + 10 * number, 0.05)
        (folder / "media" / f"{number}.txt").write_text(f"tone {number}")
    (folder / "arrays").mkdir()
    np.save(folder / "arrays" / "audio.npy", np.random.default_rng(0).normal(size=(40, 100)))
    return folder


ENCODERS = ["--audio", TONES, "--text", WORDS, "--workers", "0"]
#: By name, the command from its inputs to its output.
COMMANDS: dict[str, Callable[[Path, Path], list[object]]] = {
    "import": lambda inputs, output: ["import", inputs / "arrays", output],
    "sample": lambda inputs, output: [
        "sample", inputs / "run", "text", "audio", output, "--split", "all", "--num-samples", 20],
    "train": lambda inputs, output: ["train", output, "--config", inputs / "run.yaml"],
}  # fmt: skip
#: Those whose tests take seconds.
LONG_COMMANDS: dict[str, Callable[[Path, Path], list[object]]] = {
    "embed": lambda inputs, output: ["embed", inputs / "media", output, *ENCODERS],
    "eval": lambda inputs, output: [
        "eval", inputs / "run", "--output", output, "--bootstrap", 10, "--no-baselines", "--scoring", "cosine"],
    "generate": lambda inputs, output: [
        "generate", "--generator", inputs, "--text", "a tone", "--encoder", WORDS, "--num-samples", 9, "--overwrite",
        "-o", output / "tone.wav"],
}  # fmt: skip


@pytest.fixture
def command(request: pytest.FixtureRequest) -> Callable[[Path], list[object]]:
    """The command of the test's name, which takes its output."""
    name = request.param
    source = request.getfixturevalue("studio").generator if name == "generate" else request.getfixturevalue("inputs")
    return lambda output: {**COMMANDS, **LONG_COMMANDS}[name](source, output)


@pytest.mark.parametrize("command", [*COMMANDS, *(LONG_COMMANDS if LONG else ())], indirect=True)
@pytest.mark.parametrize("trouble", ["full", "filling up", "read-only"])
def test_commands_on_such_a_disk(
    command: Callable[[Path], list[object]], disk: Disk, capsys: pytest.CaptureFixture[str], trouble: str
) -> None:
    """One line says what is wrong, nothing is left, and the same command succeeds once there is room."""
    output = disk.folder / "out"
    if trouble == "read-only":
        disk.remount("ro")
    else:
        disk.fill(0 if trouble == "full" else 12 << 10)
    capsys.readouterr()
    status = run(*command(output))
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("diffgap: ")]
    assert (status, len(lines)) == (2 if trouble == "read-only" else 1, 1), said
    assert "Traceback" not in said
    assert os.strerror(errno.EROFS if trouble == "read-only" else errno.ENOSPC) in lines[0]
    if trouble == "read-only":
        disk.remount("rw")
        assert disk.files() == []
    disk.filler.unlink(missing_ok=True)
    assert run(*command(output)) == 0
    assert output.exists()
    assert not [path for path in disk.files() if ".tmp" in path.name]
    if LONG:
        found.append(f"{command(output)[0]} on a disk that is {trouble}: one line, and well once there was room")
