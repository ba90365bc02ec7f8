"""The command line: ``diffgap demo | train | eval | diagnose | ablate | sample | import | doctor``.

Exit status: 0 done; 1 the machine failed (disk full, out of memory ...); 2 bad input; 3 a check of
``diagnose --strict`` is bad; 130 interrupted. An error is one line on standard error that names what is wrong and how
to put it right.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tyro.conf import Positional, arg

from diffgap.models.settings import BridgeSettings
from diffgap.training.config import DataConfig, RunConfig, TrainConfig

if TYPE_CHECKING:
    from diffgap.models.bridge import DiffGAP
    from diffgap.training.trainer import TrainResult

Output: TypeAlias = Annotated[Positional[Path], arg(metavar="OUTPUT")]
Run: TypeAlias = Annotated[Positional[Path], arg(metavar="RUN")]


def _train(config: RunConfig, output: Path) -> TrainResult[DiffGAP]:
    """Train with a progress bar that shows the loss and the last validation score."""
    from diffgap.diagnose import DiagnosticsCallback
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
    console = Console(quiet=os.environ.get("RANK", "0") != "0")  # of a run's processes the first speaks
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("training", total=config.train.steps, losses="")
        score = ""

        def report(step: int, values: dict[str, float]) -> None:
            nonlocal score
            if "val/score" in values:
                score = f"validation R@5 {values['val/score']:.3f}"
                if not sys.stderr.isatty():
                    console.print(f"step {step}: loss {values['loss']:.3f}, {score}")
            if values.get("diagnose/bad"):
                found = f"{values['diagnose/bad']:.0f} diagnostics are bad"
                console.print(f"step {step}: {found}; see `diffgap diagnose {output}`", markup=False)
            shown = " ".join(f"{name} {values[name]:.3f}" for name in ("contrastive", "diffusion") if name in values)
            progress.update(task, completed=step, losses=f"{shown} {score}")

        store = load_data(config.data)
        callbacks = [DiagnosticsCallback()] if config.train.diagnose else []
        result = Trainer(config, store, output, validate=validation_scores, report=report, callbacks=callbacks).train()
    together = f" in {result.processes} processes" if result.processes > 1 else ""
    console.print(
        f"trained {result.step} steps{together}; "
        f"best validation R@5 {result.best_score:.3f} at step {result.best_step}; "
        f"model in {escape(str(output / 'model'))}"
    )
    return result


def _train_command(defaults: RunConfig) -> Callable[..., None]:
    def train(
        output: Output,
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
    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN ...")],
    output: Path | None = None,
    split: Literal["val", "test"] = "test",
    scoring: tuple[Literal["cosine", "bridge", "fusion", "rerank"], ...] = ("cosine", "bridge", "fusion"),
    steps: int | None = None,
    num_samples: int | None = None,
    solver: str | None = None,
    guidance_scale: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    candidates: int = 32,
    few_steps: bool = False,
    baselines: bool = True,
    bootstrap: int = 1000,
    seed: int = 0,
) -> None:
    """Retrieval of one or several runs beside every baseline, with intervals, costs, gap diagnostics and plots.

    Args:
        runs: Run folders of `diffgap train`. Several are averaged: give one per split seed.
        output: Folder for report.md, report.json and the plots; the first run's folder + "/eval" by default.
        split: Rows to evaluate on. Settings chosen on data (baselines, weights) always come from "val".
        scoring: What to score by. "rerank" reorders the best candidates of "fusion" by how much likelier the denoiser
            finds the pair, at some hundred times the denoiser calls of a query.
        steps: Sampling steps of a bridged embedding; by default the run's own, as for the next three.
        num_samples: Samples averaged into a bridged embedding.
        solver: Solver: ddim, ddpm, dpmpp, sde_dpmpp, unipc or euler_flow.
        guidance_scale: Guidance; 1 is none.
        alpha: Weight of the bridged cosines beside the plain one; the best on validation data if not given.
        beta: Weight of the likelihood ratio in "rerank"; the best on validation data if not given.
        candidates: Items of each query that "rerank" reorders.
        few_steps: Add a table and a plot of recall, gap and cost at 1 to 50 steps, 1 and 16 samples (minutes a run).
        baselines: Fit and score the baselines too.
        bootstrap: Bootstrap replicates for the intervals.
        seed: Seed of samples, baselines and bootstrap.
    """
    from diffgap.retrieval.evaluate import evaluate_runs
    from diffgap.retrieval.few_steps import compare_steps
    from diffgap.retrieval.options import ScoringOptions
    from diffgap.retrieval.report import check_output, terminal_table, write_report

    if not runs:
        raise ValueError("runs is empty; name at least one run folder of `diffgap train`")
    if bootstrap < 1:
        raise ValueError(f"bootstrap is {bootstrap}; use 1 replicate or more, 1000 for intervals worth reading")
    options = ScoringOptions(scoring, steps, num_samples, solver, guidance_scale, alpha, beta, candidates)
    folder = output or runs[0] / "eval"
    check_output(folder)
    report = evaluate_runs(
        runs, split=split, options=options, with_baselines=baselines, replicates=bootstrap, seed=seed
    )
    if few_steps:
        report.few_steps = compare_steps(runs, split=split, options=options, replicates=bootstrap, seed=seed)
    write_report(report, folder)
    console = Console()
    console.print(terminal_table(report))
    console.print(f"report and plots in {escape(str(folder))}")


def diagnose(
    path: Annotated[Positional[Path], arg(metavar="RUN|STORE")],
    output: Path | None = None,
    split: Literal["train", "val", "test"] = "val",
    seed: int = 0,
    strict: bool = False,
) -> None:
    """Check a run, or an embedding store alone: are pairs pairs, is the condition used, do samples collapse or drift?

    Each check gives a verdict (good, warn, bad), its threshold with the reason, and what to try.

    Args:
        path: Run folder of `diffgap train`, folder of an embedding store, or "stamps".
        output: Folder for report.md, report.json and the plots; by default "diagnose" in the run's folder, or beside
            the store's with "-diagnose" at the end of its name.
        split: Rows that the bridge is checked on. The data are checked whole.
        seed: Seed of samples, halves and shuffles.
        strict: Exit with status 3 if a verdict is bad. Without, the status is 0 whatever the verdicts are.
    """
    from diffgap.diagnose.checks import diagnose, is_run
    from diffgap.diagnose.report import advice, terminal_table, write_report
    from diffgap.retrieval.report import check_output

    folder = output or (path / "diagnose" if is_run(path) else path.with_name(f"{path.name}-diagnose"))
    check_output(folder)
    found = diagnose(path, split=split, seed=seed)
    write_report(found, folder)
    console = Console()
    console.print(terminal_table(found))
    for line in advice(found):
        console.print(f"- {line}", markup=False)
    console.print(f"report and plots in {folder}", markup=False)
    if strict and found.count("bad"):
        sys.exit(3)


def ablate(
    grid: Annotated[Positional[str], arg(metavar="GRID")],
    output: Output,
    jobs: int = 1,
    steps: int | None = None,
    split: Literal["val", "test"] = "val",
    bootstrap: int = 1000,
) -> None:
    """Train every variant of a declared grid under every seed, and compare them with intervals. Run again to resume.

    Args:
        grid: YAML file of base, seeds and variants, or "paper" for the bundled ablation of the method.
        output: Folder for ablation.md, .json and .png, with the run folders below.
        jobs: Runs at a time, each a process with one thread; no more than cores.
        steps: Training steps of every run, instead of the grid's.
        split: Rows to compare on. A variant that is chosen by its test score has no honest test score any more, so
            this is "val" unless the choice is made already.
        bootstrap: Bootstrap replicates for the intervals.
    """
    from diffgap.retrieval.ablation import run_grid
    from diffgap.retrieval.ablation_report import write_ablation
    from diffgap.training.grid import Grid

    if bootstrap < 1:
        raise ValueError(f"bootstrap is {bootstrap}; use 1 replicate or more, 1000 for intervals worth reading")
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # A run takes minutes: the time that remains is estimated from all of them, not from the last half minute.
    bar = Progress(*columns, console=console, disable=not sys.stderr.isatty(), speed_estimate_period=math.inf)
    with bar:
        task = bar.add_task("runs", total=None)

        def progress(done: int, total: int, name: str, failure: str | None) -> None:
            bar.update(task, completed=done, total=total)
            if name:
                outcome = "done" if failure is None else f"failed: {failure}"
                console.print(f"{done}/{total} {name}: {outcome}", markup=False)

        found = run_grid(
            Grid.load(grid, steps=steps), output, split=split, jobs=jobs, replicates=bootstrap, progress=progress
        )
    write_ablation(found, output)
    console.print(f"ablation.md, ablation.json and ablation.png in {output}", markup=False)
    if found.failures:
        name, reason = next(iter(found.failures.items()))
        raise RuntimeError(
            f"{len(found.failures)} runs failed, the first {name}: {reason}; run the same command again to retry them"
        )


def sample(
    run: Run,
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    target: Annotated[Positional[str], arg(metavar="TARGET")],
    output: Output,
    data: str = "",
    split: Literal["train", "val", "test", "all"] = "test",
    num_samples: int = 1,
    frames: int | None = None,
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
        data: Embedding store, "stamps", "stamps-frames", or a .npy file of shape (N, D) or (N, T, D); the run's own
            data by default.
        split: Rows of the store to bridge; a .npy file is taken whole.
        num_samples: Samples per embedding.
        frames: Frames to sample of a sequence modality; those of each source sequence if not given.
        steps: Sampling steps; the model's default if not given.
        solver: Solver; the model's default if not given.
        guidance_scale: Guidance, 1 is none; the model's default if not given.
        seed: Seed of the noise.
        overwrite: Replace an existing output.
    """
    from diffgap.data.store import check_replaceable, write_store
    from diffgap.training.runs import bridge_embeddings

    check_replaceable(output, overwrite=overwrite)
    store = bridge_embeddings(
        run, source, target, data=data, split=split, num_samples=num_samples, seed=seed,
        frames=frames, steps=steps, solver=solver, guidance_scale=guidance_scale,
    )  # fmt: skip
    write_store(output, store, overwrite=overwrite)
    Console().print(f"{len(store)} {target} embeddings in {escape(str(output))}")


def import_embeddings(
    source: Annotated[Positional[Path], arg(metavar="SOURCE")],
    output: Output,
    layout: Literal["npy", "clip-retrieval"] = "npy",
    csv: Path | None = None,
    id: str | None = None,
    group: str | None = None,
    split: str | None = None,
    fractions: tuple[float, float, float] | None = None,
    split_seed: int = 0,
    dtype: Literal["float32", "float16", "int8"] | None = None,
    overwrite: bool = False,
) -> None:
    """Turn embeddings you already have into an embedding store.

    Args:
        source: Folder to read: `npy` is one <modality>.npy each and a .csv, `clip-retrieval` its output folder.
        output: Folder of the new store.
        layout: How the source is laid out.
        csv: The .csv of the `npy` layout, one line a row; the one beside the .npy files by default.
        id: Column of unique names; "id" if there is one, else the row number.
        group: Column whose equal values mark rows that match one another (several captions of one clip); "group" if
            there is one, else every row by itself.
        split: Column of train, val and test; "split" if there is one.
        fractions: Shares of train, val and test, by a hash of the group, instead of a column; 0.8 0.1 0.1 if there is
            neither.
        split_seed: Seed of that hash.
        dtype: Number format of the store; float16 stays float16 and all else becomes float32 by default.
        overwrite: Replace an existing output.
    """
    from diffgap.data.importers import import_clip_retrieval, import_npy

    if split is not None and fractions is not None:
        raise ValueError("split and fractions were both given; name a column or give shares")
    options: dict[str, Any] = {
        "id": id, "group": group, "split": split if fractions is None else fractions,
        "split_seed": split_seed, "dtype": dtype, "overwrite": overwrite,
    }  # fmt: skip
    if layout == "npy":
        store = import_npy(source, output, csv=csv, **options)
    elif csv is not None:
        raise ValueError("csv belongs to layout 'npy'; the clip-retrieval layout has its own metadata")
    else:
        store = import_clip_retrieval(source, output, **options)
    Console().print(f"{store} in {output}", markup=False)


def doctor() -> None:
    """Versions, devices, the backend each op takes and why, and what to install for the rest."""
    from diffgap.doctor import show

    show(Console())


def demo(output: Path = Path("demo-run"), steps: int = 1200, bootstrap: int = 500) -> None:
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
            if not options[name]:
                raise ValueError(f"{name} is given without a value; see diffgap train --help")
    if "--config" in options:
        if "--preset" in options:
            raise ValueError("--preset and --config were both given; put the preset's settings into the config file")
        return RunConfig.load(Path(options["--config"]))
    name = options.get("--preset", "recommended")
    return RunConfig(bridge=BridgeSettings.preset(name))  # type: ignore[arg-type]


def _deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """A command that gives back its call instead of making it, so that parsing ends before work begins."""

    @functools.wraps(command)
    def defer(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(command, *args, **kwargs)

    return defer


def _parse(arguments: Sequence[str]) -> Callable[[], None]:
    """The call that the arguments ask for.

    Raises:
        ValueError: Arguments that are wrong, in one line where tyro draws a box of several.
        SystemExit: Help was asked for, and shown.
    """
    training = arguments[:1] == ["train"] and not {"-h", "--help"} & set(arguments)
    commands: dict[str, Callable[..., None]] = {
        "demo": demo,
        "train": _train_command(_requested_defaults(arguments) if training else RunConfig()),
        "eval": evaluate,
        "diagnose": diagnose,
        "ablate": ablate,
        "sample": sample,
        "import": import_embeddings,
        "doctor": doctor,
    }
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            call: Callable[[], None] = tyro.extras.subcommand_cli_from_dict(
                {name: _deferred(command) for name, command in commands.items()},
                prog="diffgap",
                description="Bridge text, video and audio embeddings: train, evaluate, sample.",
                args=arguments,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        drawn = str.maketrans(dict.fromkeys("\u2500\u2502\u256d\u256e\u2570\u256f", " "))
        title, _, rest = complaint.getvalue().translate(drawn).strip().partition("\n")
        said = rest.partition("For full helptext")[0].replace("__tyro-dummy-inner__.", "")
        command = f"{arguments[0]} " if arguments[0] in commands else ""
        raise ValueError(f"{' '.join(said.split()) or title}; see diffgap {command}--help") from None
    return call


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``diffgap`` command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _parse(arguments or ["--help"])()
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, ModuleNotFoundError) as error:
        _fail(error, 2)
    except (OSError, RuntimeError, MemoryError) as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        resume = "; run the same command again to resume" if arguments[:1] in (["train"], ["demo"], ["ablate"]) else ""
        print(f"diffgap: interrupted{resume}", file=sys.stderr)
        sys.exit(130)


def _fail(error: BaseException, status: int) -> None:
    print(f"diffgap: {' '.join(str(error).split())[:600] or type(error).__name__}", file=sys.stderr)
    sys.exit(status)
