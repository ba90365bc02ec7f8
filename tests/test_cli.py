"""Every command through ``diffgap.cli.main``, and every kind of bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from diffgap import cli
from diffgap.data.store import EmbeddingStore, write_store
from diffgap.training.config import RunConfig
from diffgap.training.trainer import Trainer
from tests.helpers import run
from tests.synthetic import DIMS, make_store, saved_config

#: Every command, with what its help must show.
COMMANDS = {
    "demo": ["--output", "--steps", "--bootstrap"],
    "train": ["OUTPUT", "--config", "--preset", "--data.path", "--train.learning-rate", "(default: 0.001)"],
    "eval": ["RUN ...", "--split {val,test}", "{cosine,bridge,fusion,rerank}", "--few-steps", "(default: 1000)"],
    "sample": ["RUN", "SOURCE", "TARGET", "OUTPUT", "--num-samples", "--guidance-scale"],
    "embed": ["SOURCE", "OUTPUT", "--audio", "--text", "--format", "clotho", "--workers", "--limit", "--overwrite"],
    "import": ["SOURCE", "OUTPUT", "--csv", "--id", "--group", "--split", "--fractions", "--split-seed", "--dtype"],
    "diagnose": ["RUN|STORE", "--output", "--split {train,val,test}", "--seed", "--strict"],
    "ablate": ["GRID", "seeds", "variants", "OUTPUT", "--jobs", "--steps", "--split {val,test}", "--bootstrap"],
    "index": ["STORE|RUN", "INDEX", "--modality", "--kind {exact,ivf,hnsw}", "--nlist", "--alpha", "--overwrite"],
    "search": ["INDEX", "QUERY ...", "--rows", "--k", "--json", "--serve", "--port"],
    "train-generator": ["OUTPUT", "--config", "--data.path", "--generator.size {tiny,small,base}", "--train.steps"],
    "generate": ["--generator", "-o", "--text", "--image", "--how {", "--seconds", "--num-samples", "--vocoder"],
    "generate-set": ["--generator", "-o", "--systems", "--limit", "--media", "--seed", "--overwrite"],
    "metrics": ["SET|FOLDER", "--backbone", "--classifier", "--confidence", "--resamples", "--skip-broken"],
    "report": ["RUN", "-o", "--generated", "--split {train,val,test}", "--megabytes", "--overwrite"],
    "listen": ["SET", "-o", "--method {ab,mushra}", "--systems", "--trials", "--score", "--key"],
    "doctor": ["usage: diffgap doctor"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with store/, run.yaml and run/."""
    folder = tmp_path_factory.mktemp("trained")
    config = saved_config(folder, steps=2)
    assert run("train", folder / "run", "--config", config) == 0
    return folder


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail as bad input, in one line, and must leave no file behind; returns the line."""

    def act(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        status = run(*arguments)
        said = capsys.readouterr().err
        assert (status, said.count("\n")) == (2, 1), said
        assert said.startswith("diffgap: ")
        assert sorted(tmp_path.rglob("*")) == before
        return said

    return act


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_shows_options_and_defaults(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    for expected in COMMANDS[command]:
        assert expected in text


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], []):
        assert run(*arguments) == 0
        text = capsys.readouterr().out
        assert all(command in text for command in COMMANDS)


def test_every_command_is_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setattr("tyro.extras.subcommand_cli_from_dict", lambda commands, **_: seen.update(commands) or print)
    assert run("doctor") == 0
    assert sorted(seen) == sorted(COMMANDS)
    for command in seen:
        assert command in str(cli.__doc__)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_an_option_that_does_not_exist(refused: Callable[..., str], command: str) -> None:
    assert f"--no-such-option; see diffgap {command} --help" in refused(command, *_needed(command), "--no-such-option")


def _needed(command: str) -> list[str]:
    """Stand-ins for what a command cannot do without, so that nothing but the option is wrong."""
    names = [word for word in COMMANDS[command] if word.split("|")[0].isupper()]
    flags = {"index": ["--modality", "a"], "generate": ["--generator", "g", "-o", "o"]}
    return [f"x{place}" for place, _ in enumerate(names)] + flags.get(command.removesuffix("-set"), [])


def test_flags_win_over_the_config_file(tmp_path: Path) -> None:
    config = saved_config(tmp_path, steps=4)
    output = tmp_path / "run"
    flags = ["--train.steps", 2, "--bridge.split=half", "--data.modalities", "text", "audio"]
    assert run("train", output, "--config", config, *flags) == 0
    resolved, given = RunConfig.load(output / "config.yaml"), RunConfig.load(config)
    assert resolved.differences(given) == ["data.modalities", "bridge.split", "train.steps"]
    assert (resolved.train.steps, resolved.bridge.split) == (2, "half")
    assert [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_preset_is_what_flags_start_from(tmp_path: Path) -> None:
    write_store(tmp_path / "store", make_store())
    small = ["--bridge.width", 16, "--bridge.tokens", 2, "--bridge.denoiser-width", 16, "--bridge.depth", 1]
    train = ["--train.steps", 1, "--train.batch-size", 8, "--bridge.sampling-steps", 2, "--bridge.heads", 2]
    data = ["--data.path", tmp_path / "store"]
    assert run("train", tmp_path / "run", "--preset", "paper", *data, *small, *train) == 0
    bridge = RunConfig.load(tmp_path / "run" / "config.yaml").bridge
    assert (bridge.prediction, bridge.split, bridge.depth) == ("epsilon", "alternate", 1)


def test_eval_writes_a_report(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", trained / "run", "--output", tmp_path / "eval", "--no-baselines", "--bootstrap", 10]
    assert run(*arguments) == 0
    assert "audio -> text" in capsys.readouterr().out
    assert json.loads((tmp_path / "eval" / "report.json").read_text())["runs"] == ["run"]
    assert run(*arguments) == 0  # an earlier report is replaced


def test_eval_takes_scorings_sampling_and_weights(trained: Path, tmp_path: Path) -> None:
    arguments = ["eval", trained / "run", "--output", tmp_path / "eval", "--no-baselines", "--bootstrap", 5]
    scoring = ["--scoring", "cosine", "bridge", "fusion", "rerank", "--candidates", 3, "--alpha", 0.5, "--beta", 2]
    sampling = ["--steps", 2, "--num-samples", 3, "--guidance-scale", 1.5, "--solver", "ddim", "--split", "val"]
    assert run(*arguments, *scoring, *sampling) == 0
    report = json.loads((tmp_path / "eval" / "report.json").read_text())
    expected = {"scoring steps": 2, "scoring samples": 3, "guidance": 1.5, "solver": "ddim"}
    assert expected.items() <= report["settings"].items()
    assert (report["split"], report["alphas"], report["betas"]) == ("val", [0.5], [2.0])
    assert report["metrics"].keys() == {"heads (cosine)", "bridge", "bridge + cosine", "re-ranked"}
    assert report["costs"]["bridge"]["query_calls"] == 2 * 3 * 2  # steps, samples, with and without the condition
    assert report["costs"]["re-ranked"]["query_calls"] == 2 * 3 * 2 + 4 * (2 * 3 + 1)


def test_eval_of_few_steps(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffgap.retrieval.few_steps.STEPS", (1, 3))
    monkeypatch.setattr("diffgap.retrieval.few_steps.SAMPLES", (1, 2))
    arguments = ["eval", trained / "run", "--output", tmp_path / "eval", "--no-baselines", "--bootstrap", 5]
    assert run(*arguments, "--few-steps", "--solver", "ddim") == 0
    found = json.loads((tmp_path / "eval" / "report.json").read_text())["few_steps"]
    assert [(one["steps"], one["num_samples"], one["calls"]) for one in found] == [
        (1, 1, 1),
        (3, 1, 3),
        (1, 2, 2),
        (3, 2, 6),
    ]
    assert {one["solver"] for one in found} == {"ddim"}
    assert (tmp_path / "eval" / "few_steps.png").is_file()


def test_sample_from_the_runs_own_data(trained: Path, tmp_path: Path) -> None:
    assert run("sample", trained / "run", "text", "audio", tmp_path / "out", "--num-samples", 3) == 0
    store, inputs = EmbeddingStore.open(tmp_path / "out"), EmbeddingStore.open(trained / "store").split("test")
    assert store.modalities == ("audio",) and len(store) == 3 * len(inputs)
    assert store.column("group").tolist() == np.repeat(inputs.column("group"), 3).tolist()
    assert store.column("id")[1] == f"{inputs.column('id')[0]}#1"
    torch.testing.assert_close(store.embeddings("audio").norm(dim=1), torch.ones(len(store)))


def test_sample_from_npy_with_a_saved_model(trained: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "text.npy", np.random.default_rng(0).normal(size=(5, DIMS["text"])).astype(np.float32))
    arguments = ["--data", tmp_path / "text.npy", "--solver", "dpmpp", "--steps", 3, "--guidance-scale", 2]
    for number, folder in enumerate((trained / "run", trained / "run" / "model")):
        assert run("sample", folder, "text", "audio", tmp_path / f"out{number}", *arguments) == 0
    one, two = (EmbeddingStore.open(tmp_path / f"out{number}").embeddings("audio") for number in (0, 1))
    assert one.shape == (5, 16) and torch.equal(one, two)


def test_import_npy_with_every_option(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    np.save(source / "audio.npy", np.random.default_rng(0).normal(size=(6, 4)))
    (tmp_path / "rows.csv").write_text("name,clip,part\n" + "".join(f"n{i},c{i // 2},train\n" for i in range(6)))
    columns = ["--csv", tmp_path / "rows.csv", "--id", "name", "--group", "clip"]
    assert run("import", source, tmp_path / "a", *columns, "--split", "part", "--dtype", "int8") == 0
    store = EmbeddingStore.open(tmp_path / "a")
    assert store.column("id").tolist() == [f"n{i}" for i in range(6)]
    assert store.column("group").tolist() == [f"c{i // 2}" for i in range(6)]
    assert set(store.column("split")) == {"train"}
    shares = ["--fractions", 0, 0, 1, "--split-seed", 3]
    assert run("import", source, tmp_path / "a", *columns, *shares, "--overwrite") == 0
    assert set(EmbeddingStore.open(tmp_path / "a").column("split")) == {"test"}


def test_import_clip_retrieval(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("img_emb", "text_emb", "metadata"):
        (tmp_path / "source" / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("img", "text"):
        np.save(tmp_path / "source" / f"{name}_emb" / f"{name}_emb_0.npy", rng.normal(size=(4, 3)))
    pq.write_table(pa.table({"caption": list("abcd")}), tmp_path / "source" / "metadata" / "metadata_0.parquet")
    assert run("import", tmp_path / "source", tmp_path / "out", "--layout", "clip-retrieval") == 0
    assert EmbeddingStore.open(tmp_path / "out").modalities == ("image", "text")


def test_demo_trains_evaluates_and_samples(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.load(trained / "run.yaml")
    monkeypatch.setattr("diffgap.commands.demo.RunConfig", lambda train=None: config)
    for _ in range(2):  # the second time finds everything done
        assert run("demo", "--output", tmp_path / "demo", "--steps", 2, "--bootstrap", 10) == 0
    assert (tmp_path / "demo" / "eval" / "report.md").is_file()
    assert len(EmbeddingStore.open(tmp_path / "demo" / "samples")) > 0


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    assert "solver_step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "bogus"),
        (["train"], "OUTPUT"),
        (["train", "x", "--train.stepz", "3"], "Unrecognized options: --train.stepz"),
        (["train", "x", "--train.steps", "three"], "--train.steps: invalid literal"),
        (["train", "x", "--train.steps", "0"], "train.steps is 0; use 1 or more"),
        (["train", "x", "--train.max-grad-norm", "0"], "train.max_grad_norm is 0.0; use a positive value"),
        (["train", "x", "--bridge.split", "both"], "invalid choice 'both'"),
        (["train", "x", "--preset", "best"], "preset 'best' does not exist"),
        (["train", "x", "--config"], "--config"),
        (["train", "x", "--config", "nowhere.yaml"], "config file nowhere.yaml does not exist"),
        (["train", "x", "--config", "a.yaml", "--preset", "paper"], "--preset and --config were both given"),
        (["train", "x", "--data.path", "nowhere"], "nowhere is not an embedding store"),
        (["eval"], "runs is empty"),
        (["eval", "nowhere"], "nowhere is no run folder (no config.yaml); train one"),
        (["eval", "nowhere", "--bootstrap", "0"], "bootstrap is 0; use 1"),
        (["eval", "nowhere", "--steps", "0"], "steps is 0; use 1 or more"),
        (["eval", "nowhere", "--scoring", "dot"], "invalid choice 'dot'"),
        (["eval", "nowhere", "--solver", "heun"], "solver 'heun' does not exist; use one of"),
        (["sample", "nowhere", "a", "b", "c"], "nowhere is no run folder"),
        (["import", "nowhere", "x"], "nowhere is not a folder"),
        (["import", "a", "b", "--split", "s", "--fractions", "1", "0", "0"], "split and fractions were both given"),
        (["import", "a", "b", "--layout", "clip-retrieval", "--csv", "c"], "csv belongs to layout 'npy'"),
    ],
)
def test_wrong_arguments(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)


def test_wrong_width(refused: Callable[..., str], trained: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "text.npy", np.ones((3, 7), np.float32) + np.eye(3, 7, dtype=np.float32))
    said = refused("sample", trained / "run", "text", "audio", tmp_path / "out", "--data", tmp_path / "text.npy")
    assert "text has shape (3, 7); this bridge takes (B, D) with D = 10" in said


@pytest.mark.parametrize("content", [b"", b"not numbers"])
def test_npy_that_is_none(refused: Callable[..., str], trained: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text.npy").write_bytes(content)
    said = refused("sample", trained / "run", "text", "audio", tmp_path / "out", "--data", tmp_path / "text.npy")
    assert "text.npy is not a .npy array of numbers" in said


def test_missing_npy(refused: Callable[..., str], trained: Path, tmp_path: Path) -> None:
    said = refused("sample", trained / "run", "text", "audio", tmp_path / "out", "--data", tmp_path / "no.npy")
    assert "no.npy does not exist" in said


def test_saved_model_without_data(refused: Callable[..., str], trained: Path, tmp_path: Path) -> None:
    said = refused("sample", trained / "run" / "model", "text", "audio", tmp_path / "out")
    assert "data is not given" in said


def test_samples_do_not_replace_what_they_are_made_from(refused: Callable[..., str], trained: Path) -> None:
    store, before = trained / "store", len(EmbeddingStore.open(trained / "store"))
    for data in ([], ["--data", trained / "run" / ".." / "store"]):
        said = refused("sample", trained / "run", "text", "audio", store, "--overwrite", *data)
        assert "store is the store that is bridged; choose another path" in said
    assert len(EmbeddingStore.open(store)) == before


def test_mismatched_counts(refused: Callable[..., str], tmp_path: Path) -> None:
    np.save(tmp_path / "audio.npy", np.random.default_rng(0).normal(size=(6, 4)))
    (tmp_path / "rows.csv").write_text("id\na\nb\n")
    assert "2 index rows but 6 'audio' embeddings" in refused("import", tmp_path, tmp_path / "out")


def test_nan_rows(refused: Callable[..., str], tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(6, 4))
    values[2, 1] = np.nan
    np.save(tmp_path / "audio.npy", values)
    assert "1 of 6 embeddings are NaN or infinite; drop" in refused("import", tmp_path, tmp_path / "out")


@pytest.mark.parametrize(("source", "target"), [("video", "audio"), ("text", "video")])
def test_unknown_modality(refused: Callable[..., str], trained: Path, tmp_path: Path, source: str, target: str) -> None:
    said = refused("sample", trained / "run", source, target, tmp_path / "out")
    assert "'video' is unknown to the bridge in" in said and "it has audio, text" in said


def test_unknown_modality_in_training(refused: Callable[..., str], tmp_path: Path) -> None:
    config = saved_config(tmp_path)
    said = refused("train", tmp_path / "run", "--config", config, "--data.modalities", "video", "text")
    assert "data.modalities names 'video'" in said and "it has audio, text" in said


@pytest.mark.parametrize("command", ["train", "sample"])
def test_truncated_store(refused: Callable[..., str], trained: Path, tmp_path: Path, command: str) -> None:
    config = saved_config(tmp_path)
    file = tmp_path / "store" / "audio.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    arguments = {
        "train": ["train", tmp_path / "run", "--config", config],
        "sample": ["sample", trained / "run", "audio", "text", tmp_path / "out", "--data", tmp_path / "store"],
    }[command]
    said = refused(*arguments)
    assert "audio.safetensors: not a readable safetensors file" in said and "write the store again" in said


def test_truncated_model(refused: Callable[..., str], tmp_path: Path) -> None:
    assert run("train", tmp_path / "run", "--config", saved_config(tmp_path, steps=2)) == 0
    file = tmp_path / "run" / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    assert "does not hold a whole DiffGAP model" in refused("eval", tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bridge.solver", "rk9"), "solver is 'rk9'; use one of ddpm, ddim"),
        (("--bridge.solver", "euler_flow"), "needs a schedule of kind 'flow'"),
        (("--bridge.sampling-steps", "5000"), "num_steps is 5000; use 1 to 1000"),
    ],
)
def test_a_sampler_that_cannot_be_is_refused_before_training(
    refused: Callable[..., str], tmp_path: Path, options: tuple[str, str], message: str
) -> None:
    assert message in refused("train", tmp_path / "run", "--config", saved_config(tmp_path), *options)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_without_results_may_be_given_other_settings(tmp_path: Path) -> None:
    """It was killed before its first checkpoint: nothing would be lost."""
    config = saved_config(tmp_path, steps=2)
    (tmp_path / "run").mkdir()
    RunConfig.load(config).save(tmp_path / "run" / "config.yaml")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert run("train", tmp_path / "run", "--config", config, "--bridge.depth", "2") == 0
    assert RunConfig.load(tmp_path / "run" / "config.yaml").bridge.depth == 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


@pytest.mark.parametrize(("splits", "name"), [(("train", "test"), "val"), (("val", "test"), "train")])
def test_empty_split(refused: Callable[..., str], tmp_path: Path, splits: tuple[str, ...], name: str) -> None:
    config = saved_config(tmp_path, make_store(splits=splits))
    assert f"split '{name}' is empty" in refused("train", tmp_path / "run", "--config", config)


def test_checkpoint_of_another_configuration(refused: Callable[..., str], tmp_path: Path) -> None:
    config = saved_config(tmp_path, steps=2)
    assert run("train", tmp_path / "run", "--config", config) == 0
    said = refused("train", tmp_path / "run", "--config", config, "--bridge.depth", "2")
    assert "holds a run with bridge.depth 1 (now 2); choose another output folder" in said
    # The same, where someone has edited config.yaml to get past that.
    edited = RunConfig.load(config)
    (tmp_path / "run" / "config.yaml").write_text(
        (tmp_path / "run" / "config.yaml").read_text().replace("denoiser_width: 16", "denoiser_width: 32")
    )
    assert edited != RunConfig.load(tmp_path / "run" / "config.yaml")
    said = refused("train", tmp_path / "run", "--config", config, "--bridge.denoiser-width", "32")
    assert "step-00000002 cannot be restored" in said and "delete that folder" in said


def test_existing_output_is_refused_before_any_work(
    refused: Callable[..., str], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffgap.training.runs.load_run", lambda _: pytest.fail("work was done"))
    monkeypatch.setattr("diffgap.retrieval.evaluate.load_run", lambda _: pytest.fail("work was done"))
    (tmp_path / "mine").mkdir()
    assert "mine exists" in refused("sample", trained / "run", "text", "audio", tmp_path / "mine")
    assert "mine exists and is not a report" in refused("eval", trained / "run", "--output", tmp_path / "mine")


def test_ctrl_c_and_failures_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = saved_config(tmp_path)
    errors: list[BaseException] = [KeyboardInterrupt(), OSError("No space left\non device")]
    said = []
    for error in errors:

        def fail(self: Trainer, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(Trainer, "train", fail)
        said.append((run("train", tmp_path / "run", "--config", config), capsys.readouterr().err))
    assert said == [
        (130, "diffgap: interrupted; run the same command again to resume\n"),
        (1, "diffgap: No space left on device\n"),
    ]
