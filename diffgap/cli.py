"""The command line: ``diffgap demo | train | eval | sample | import | doctor``.

Exit status: 0 done; 1 the machine failed (disk full, out of memory ...); 2 bad input, said in one line on standard error;
130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diffgap.models.settings import BridgeSettings
from diffgap.training.config import DataConfig, RunConfig, TrainConfig

if TYPE_CHECKING:
    from diffgap.training.trainer import TrainResult

_console = Console()
_Positional = tyro.conf.Positional


def _train(config: RunConfig, output: Path) -> TrainResult:
    """Train with a progress bar that shows the loss and the last validation score."""
    from diffgap.retrieval.evaluate import validation_scores
    from diffgap.training.runs import load_data
    from diffgap.training.trainer import Trainer

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    with Progress(*columns, console=_console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("training", total=config.train.steps, losses="")
        score = ""

        def report(step: int, values: dict[str, float]) -> None:
            nonlocal score
            if "val/score" in values:
                score = f"validation R@5 {values['val/score']:.3f}"
                if not sys.stderr.isatty():
                    _console.print(f"step {step}: loss {values['loss']:.3f}, {score}")
            shown = " ".join(f"{name} {values[name]:.3f}" for name in ("contrastive", "diffusion") if name in values)
            progress.update(task, completed=step, losses=f"{shown} {score}")

        store = load_data(config.data)
        result = Trainer(config, store, output, validate=validation_scores, report=report).train()
    _console.print(
        f"trained {result.step} steps; best validation R@5 {result.best_score:.3f} at step {result.best_step}; "
        f"model in {output / 'model'}"
    )
    return result


def _train_command(defaults: RunConfig) -> Callable[..., None]:
    def train(
        output: _Positional[Path],
        config: Path | None = None,
        preset: Literal["recommended", "paper"] = "recommended",
        data: DataConfig = defaults.data,
        bridge: BridgeSettings = defaults.bridge,
        train: TrainConfig = defaults.train,
    ) -> None:
        """Train a bridge on an embedding store. Run again on the same folder to resume.

        Args:
            output: Run folder: config.yaml, metrics.jsonl, checkpoints/, model/.
            config: YAML file of settings; flags given beside it win.
            preset: Bridge settings to start from.
            data: Embeddings.
            bridge: The model.
            train: Optimisation.
        """
        _train(RunConfig(data=data, bridge=bridge, train=train), output)

    return train


def evaluate(
    runs: _Positional[tuple[Path, ...]],
    output: Path | None = None,
    split: Literal["val", "test"] = "test",
    baselines: bool = True,
    bootstrap: int = 1000,
    seed: int = 0,
) -> None:
    """Retrieval of one or several runs beside every baseline, with intervals, gap diagnostics and plots.

    Args:
        runs: Run folders of `diffgap train`. Several are averaged: give one per split seed.
        output: Folder for report.md, report.json and the plots; the first run's folder + "/eval" by default.
        split: Rows to evaluate on. Settings chosen on data (baselines, fusion weight) always come from "val".
        baselines: Fit and score the baselines too.
        bootstrap: Bootstrap replicates for the intervals.
        seed: Seed of samples, baselines and bootstrap.
    """
    from diffgap.retrieval.evaluate import evaluate_runs
    from diffgap.retrieval.report import terminal_table, write_report

    if not runs:
        raise ValueError("runs is empty; name at least one run folder of `diffgap train`")
    report = evaluate_runs(runs, split=split, with_baselines=baselines, replicates=bootstrap, seed=seed)
    folder = output or runs[0] / "eval"
    write_report(report, folder)
    _console.print(terminal_table(report))
    _console.print(f"report and plots in {folder}")


def sample(
    run: _Positional[Path],
    source: _Positional[str],
    target: _Positional[str],
    output: _Positional[Path],
    data: str = "",
    split: Literal["train", "val", "test", "all"] = "test",
    num_samples: int = 1,
    steps: int | None = None,
    solver: str | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Bridge embeddings from one modality to another and write the samples as an embedding store.

    Args:
        run: Run folder, or a folder saved by `save_pretrained`.
        source: Modality to start from.
        target: Modality to sample, in the bridge's contrastive space (unit vectors).
        output: Folder of the new store; row i holds sample k of an input, its id "<id>#k".
        data: Embedding store, or a .npy file of shape (N, D); the run's own data by default.
        split: Rows of the store to bridge.
        num_samples: Samples per embedding.
        steps: Sampling steps; the model's default if not given.
        solver: Solver; the model's default if not given.
        guidance_scale: Guidance, 1 is none; the model's default if not given.
        seed: Seed of the noise.
        overwrite: Replace an existing output.
    """
    from diffgap.training.runs import bridge_embeddings

    store = bridge_embeddings(
        run, source, target, data=data, split=split, num_samples=num_samples, seed=seed,
        steps=steps, solver=solver, guidance_scale=guidance_scale,
    )  # fmt: skip
    from diffgap.data.store import write_store

    write_store(output, store, overwrite=overwrite)
    _console.print(f"{len(store)} {target} embeddings in {output}")


def import_embeddings(
    source: _Positional[Path],
    output: _Positional[Path],
    layout: Literal["npy", "clip-retrieval"] = "npy",
    group: str | None = None,
    overwrite: bool = False,
) -> None:
    """Turn embeddings you already have into an embedding store.

    Args:
        source: Folder to read: `npy` is one <modality>.npy each and a .csv, `clip-retrieval` its output folder.
        output: Folder of the new store.
        layout: How the source is laid out.
        group: Column whose equal values mark rows that match one another (several captions of one clip).
        overwrite: Replace an existing output.
    """
    from diffgap.data.importers import import_clip_retrieval, import_npy

    importer = import_npy if layout == "npy" else import_clip_retrieval
    store = importer(source, output, group=group, overwrite=overwrite)
    _console.print(f"{store} in {output}")


def doctor() -> None:
    """Versions, devices, the backend each op takes and why, and what to install for the rest."""
    from diffgap.doctor import show

    show(_console)


def demo(output: Path = Path("demo-run"), steps: int = 600, bootstrap: int = 500) -> None:
    """The main job on bundled real data: train a bridge between spoken words, text and images; retrieve; sample.

    Args:
        output: Run folder. A demo that was interrupted goes on from its last checkpoint.
        steps: Training steps.
        bootstrap: Bootstrap replicates for the intervals.
    """
    checkpoint_every = max(1, min(100, steps // 2))
    settings = TrainConfig(steps=steps, eval_every=max(1, steps // 3), checkpoint_every=checkpoint_every)
    _train(RunConfig(train=settings), output)
    evaluate((output,), bootstrap=bootstrap)
    sample(output, "text", "audio", output / "samples", num_samples=4, overwrite=True)


def _requested_defaults(arguments: Sequence[str]) -> RunConfig:
    """The settings that ``--config`` and ``--preset`` ask for, which the other flags then change."""
    options: dict[str, str] = {}
    for index, argument in enumerate(arguments):
        name, given, value = argument.partition("=")
        if name in ("--config", "--preset"):
            options[name] = value if given else next(iter(arguments[index + 1 :]), "")
    if "--config" in options:
        if "--preset" in options:
            raise ValueError("--preset and --config were both given; put the preset's settings into the config file")
        return RunConfig.load(Path(options["--config"]))
    name = options.get("--preset", "recommended")
    return RunConfig(bridge=BridgeSettings.preset(name))  # type: ignore[arg-type]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``diffgap`` command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        training = arguments[:1] == ["train"] and not {"-h", "--help"} & set(arguments)
        commands: dict[str, Callable[..., Any]] = {
            "demo": demo,
            "train": _train_command(_requested_defaults(arguments) if training else RunConfig()),
            "eval": evaluate,
            "sample": sample,
            "import": import_embeddings,
            "doctor": doctor,
        }
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="diffgap", description=__doc__.splitlines()[0] if __doc__ else None, args=arguments
        )
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, ModuleNotFoundError) as error:
        print(f"diffgap: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (OSError, RuntimeError) as error:
        print(f"diffgap: {' '.join(str(error).split())[:500]}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("diffgap: interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
