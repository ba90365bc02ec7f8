"""The command line against slips of the hand, outputs that cannot be written, signals and odd terminals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffgap._files import atomic_file, beside, check_writable
from diffgap.data.store import EmbeddingStore, write_store
from diffgap.training.config import RunConfig
from tests.helpers import run
from tests.synthetic import make_store, saved_config

BIG = str(10**23)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with store/, run.yaml and run/."""
    folder = tmp_path_factory.mktemp("trained")
    assert run("train", folder / "run", "--config", saved_config(folder, steps=2)) == 0
    return folder


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command that must be refused in one line and leave everything as it was; returns the line."""
    monkeypatch.chdir(tmp_path)

    def act(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        status = run(*arguments)
        said = capsys.readouterr().err
        assert (status, said.count("\n")) == (2, 1), said
        assert sorted(tmp_path.rglob("*")) == before
        return said

    return act


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(([*command.split(), "--seed", "-1"], "seed is -1; use 0 or more") for command in (
            "eval r", "sample r a b o", "diagnose r", "report r", "metrics s", "listen s -o o",
            "generate --generator g -o o.wav", "generate-set --generator g -o o",
        )),
        (["eval", "r", "--seed", BIG], f"seed is {BIG}; use 9223372036854775807 or less"),
        (["import", "a", "o", "--split-seed", "-1"], "split_seed is -1; use 0 or more"),
        (["eval", "r", "--num-samples", BIG], f"num_samples is {BIG}; use 10000 or less"),
        (["eval", "r", "--bootstrap", BIG], "bootstrap is"),
        (["ablate", "paper", "o", "--bootstrap", "1000000000000"], "use 1000000 or less"),
        (["sample", "r", "a", "b", "o", "--steps", "0"], "steps is 0; use 1 or more"),
        (["sample", "r", "a", "b", "o", "--frames", "-1"], "frames is -1; use 1 or more"),
        (["sample", "r", "a", "b", "o", "--solver", ""], "solver '' does not exist; use one of"),
        (["sample", "r", "a", "b", "o", "--guidance-scale", "-1"], "guidance_scale is -1.0; use 0 or more"),
        (["generate", "--generator", "g", "-o", "o.wav", "--steps", "0"], "steps is 0; use 1 or more"),
        (["generate", "--generator", "g", "-o", "o.wav", "--seconds", "1e30"], "seconds is 1e+30; use 3600 or less"),
        (["generate", "--generator", "g", "-o", "o.wav", "--num-samples", BIG], "num_samples is"),
        (["generate", "--generator", "g", "-o", "o.wav", "--device", "bogus"], "device is 'bogus'; use cpu, cuda"),
        (["generate-set", "--generator", "g", "-o", "o", "--device", "cuda:99"], "device is 'cuda:99', which this"),
        (["embed", "m", "o", "--text", "offline", "--device", ""], "device is ''; use cpu"),
        (["embed", "m", "o", "--text", "offline", "--workers", BIG], "workers is"),
        (["embed", "m", "o", "--text", "offline", "--limit", BIG], "limit is"),
        (["metrics", "s", "--regularisation", "nan"], "regularisation is nan; use a finite number"),
        (["metrics", "s", "--splits", "0"], "splits is 0; use 1 or more"),
        (["listen", "s", "-o", "o", "--catch", BIG], "catch is"),
        (["report", "r", "--megabytes", "inf"], "megabytes is inf; use a finite number"),
        (["search", "i", "--serve", "--port", "70000"], "port is 70000; use 65535 or less"),
        (["train", "o", "--train.learning-rate", "nan"], "train.learning_rate is nan; use a positive value"),
        (["train", "o", "--train.max-grad-norm", "inf"], "train.max_grad_norm is inf; use a positive value"),
        (["train", "o", "--train.weight-decay", "nan"], "train.weight_decay is nan; use 0 or more"),
        (["eval", "r", "--alpha", "abc"], "Error parsing --alpha: 'abc' is not {None}|FLOAT; see diffgap eval --help"),
        (["train", ""], "the path is empty; give one, . for this folder"),
        (["report", "r", "-o", ""], "Error parsing -o/--output: '' is not {None}|PATH"),
        (["train", "o", "--bridge.head-learning-rate", "nan"], "settings.head_learning_rate is nan; use a finite"),
        (["train", "o", "--bridge.diffusion-weight", "-1"], "settings.diffusion_weight is -1.0; use a finite"),
        (["train", "o", "--bridge.guidance-scale", "inf"], "settings.guidance_scale is inf; use a finite number"),
        (["train", "o", "--bridge.init-logit-scale", "0"], "settings.init_logit_scale is 0.0; use a positive number"),
        (["train", "o", "--bridge.init-logit-bias", "nan"], "settings.init_logit_bias is nan; use a finite number"),
        (["train-generator", "o", "--generator.max-seconds", "-1"], "generator.max_seconds is -1.0; use a positive"),
        (["train-generator", "o", "--generator.guidance-scale", "nan"], "generator.guidance_scale is nan; use a"),
        (["index", "s", "o", "--modality", "a", "--m", "10000"], "m is 10000; use 1024 or less"),
        (["search", "i", "words", "--port", "8000"], "port belongs to --serve"),
        (["metrics", "s", "--column", "label"], "column is one of --classifier"),
        (["generate-set", "--generator", "nowhere", "-o", "o"], "nowhere holds no generator; train one with"),
    ],
)  # fmt: skip
def test_values_out_of_range(refused: Callable[..., str], arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)


#: Commands that write, with where their output goes.
WRITERS = {
    "train": ["train", "{}", "--config", "run.yaml"],
    "eval": ["eval", "run", "--output", "{}"],
    "eval --protocol": ["eval", "run", "--protocol", "pairs", "--output", "{}"],
    "diagnose": ["diagnose", "run", "--output", "{}"],
    "sample": ["sample", "run", "text", "audio", "{}"],
    "index": ["index", "store", "{}", "--modality", "audio"],
    "report": ["report", "run", "-o", "{}"],
    "ablate": ["ablate", "paper", "{}"],
    "import": ["import", "npy", "{}"],
}


@pytest.mark.parametrize("output", ["file/x", "/proc/x/y", "n" * 300], ids=["below a file", "no place", "too long"])
@pytest.mark.parametrize("command", list(WRITERS))
def test_outputs_that_cannot_be_written(
    refused: Callable[..., str],
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    output: str,
) -> None:
    for name in ("run.yaml", "run", "store"):
        (tmp_path / name).symlink_to(trained / name)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy" / "audio.npy", np.eye(4, dtype=np.float32))
    for work in ("training.trainer.Trainer.train", "models.bridge.DiffGAP.from_pretrained", "search.gallery.Gallery"):
        monkeypatch.setattr(f"diffgap.{work}", lambda *_, **__: pytest.fail("work was done"))
    said = refused(*[argument.replace("{}", output) for argument in WRITERS[command]])
    assert f"output {output[:20]}" in said and "cannot be written" in said and "choose another path" in said


def test_nothing_takes_the_place_of_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="is a folder or a device"), atomic_file(tmp_path / "pipe"):
        pytest.fail("work was done")
    assert (tmp_path / "pipe").is_fifo()


def test_a_report_takes_the_place_of_no_device(refused: Callable[..., str], trained: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is a folder or a device" in refused("report", trained / "run", "-o", "pipe", "--overwrite")


def test_a_disk_that_is_full_is_no_wrong_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        check_writable(tmp_path, "out")


@pytest.mark.parametrize("name", ["metrics.jsonl", "model", "checkpoints"])
def test_a_run_does_not_replace_what_is_not_its_own(
    refused: Callable[..., str], trained: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "mine" / name).mkdir(parents=True)
    (tmp_path / "mine" / ".kept.tmp").write_text("mine")
    said = refused("train", "mine", "--config", trained / "run.yaml")
    assert f"mine holds {name}, but is no run folder" in said


def test_a_new_run_leaves_other_files_alone(trained: Path, tmp_path: Path) -> None:
    (tmp_path / ".kept.tmp").write_text("mine")
    assert run("train", tmp_path, "--config", trained / "run.yaml") == 0
    assert (tmp_path / ".kept.tmp").read_text() == "mine"


@pytest.mark.parametrize("content", ["", "# nothing\n", "[]", "false"])
def test_a_config_that_says_nothing(refused: Callable[..., str], tmp_path: Path, content: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    for command in ("train", "train-generator"):
        assert "run.yaml: expected a mapping of fields" in refused(command, "out", "--config", "run.yaml")


def test_a_store_in_the_current_folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "store", make_store(groups=80))
    monkeypatch.chdir(tmp_path / "store")
    assert run("diagnose", ".") == 0
    assert (tmp_path / "store-diagnose" / "report.md").is_file()
    (tmp_path / "store" / "below").mkdir()
    monkeypatch.chdir(tmp_path / "store" / "below")
    assert beside(Path(".."), ".parts") == (tmp_path / "store.parts").resolve()


def test_a_store_without_rows(refused: Callable[..., str], tmp_path: Path) -> None:
    write_store(tmp_path / "store", make_store().select([]))
    assert "store is a store without rows; there is nothing to check" in refused("diagnose", "store")


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "RANK"])
def test_a_variable_that_no_launcher_sets(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.txt").write_text("a bell")
    for variable, value in {"RANK": "0", "WORLD_SIZE": "1", name: "abc"}.items():
        monkeypatch.setenv(variable, value)
    said = refused("embed", "media", "out", "--text", "tests.generation.studio:Captions")
    assert f"{name}='abc'" in said and "unset" in said


#: Seconds, for machines on which all is slow.
PATIENCE = 300


def _started(*arguments: object, **variables: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "diffgap", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, preexec_fn=_with_interrupts
    )


def _with_interrupts() -> None:
    """Tests that a shell runs in the background ignore SIGINT, and so would what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "in")]
)
def test_a_signal_in_mid_work(trained: Path, tmp_path: Path, number: signal.Signals, status: int, word: str) -> None:
    arguments = ["train", tmp_path / "run", "--config", trained / "run.yaml", "--train.steps", 10**6]
    process = _started(*arguments)
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    try:
        said = process.communicate(timeout=PATIENCE)[1].decode()
    finally:
        process.kill()  # of a million steps
    assert process.returncode == status
    assert said.startswith(f"diffgap: {word}") and said.endswith("; run the same command again to resume\n")
    assert said.count("\n") == 1
    assert RunConfig.load(tmp_path / "run" / "config.yaml").train.steps == 10**6


def test_a_backend_that_does_not_exist() -> None:
    process = _started("doctor", DIFFGAP_BACKEND="fast")
    said = process.communicate(timeout=PATIENCE)[1].decode()
    assert (process.returncode, said.count("\n")) == (2, 1)
    assert said.startswith("diffgap: DIFFGAP_BACKEND: unknown backend 'fast'; use one of")


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (ValueError("VARIABLE is wrong"), 2)])
def test_what_happens_while_modules_are_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int
) -> None:
    from diffgap import __main__

    def importing(*_: object) -> None:
        raise error

    monkeypatch.delattr("diffgap.cli")
    monkeypatch.delitem(sys.modules, "diffgap.cli")
    monkeypatch.setattr("builtins.__import__", importing)
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    monkeypatch.undo()
    assert stop.value.code == status
    assert capsys.readouterr().err in ("diffgap: interrupted\n", "diffgap: VARIABLE is wrong\n")


def test_a_pipe_that_is_closed(trained: Path) -> None:
    process = _started("doctor")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=PATIENCE)) == (b"", 1)


def test_letters_that_the_terminal_does_not_have(trained: Path, tmp_path: Path) -> None:
    store = tmp_path / "bl\u00e5"
    write_store(store, EmbeddingStore.open(trained / "store"))
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    process = _started("import", store, tmp_path / "out", **ascii_only)
    said = process.communicate(timeout=PATIENCE)[1].decode()
    assert process.returncode == 2 and "bl\\xe5" in said
    process = _started("index", store, tmp_path / "ind\u00e9x", "--modality", "audio", **ascii_only)
    said = process.communicate(timeout=PATIENCE)[0].decode()
    assert process.returncode == 0 and "ind\\xe9x" in said
