"""``diffgap eval``: runs beside every baseline, or runs and stores by the protocols of published numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from rich.console import Console
from rich.markup import escape
from tyro.conf import Positional, arg

from diffgap.commands.arguments import Bootstrap, Seed, Solver, Steps, Within
from diffgap.commands.console import open_console

if TYPE_CHECKING:
    from diffgap.retrieval.options import ScoringOptions
    from diffgap.retrieval.protocols import ProtocolName

__all__ = ["evaluate"]


def evaluate(
    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN ...")],
    output: Path | None = None,
    split: Literal["val", "test"] = "test",
    protocol: Literal["audiocaps", "clotho", "vggsound", "pairs"] | None = None,
    data: str = "",
    modalities: tuple[str, ...] = (),
    scoring: tuple[Literal["cosine", "bridge", "fusion", "rerank"], ...] = ("cosine", "bridge", "fusion"),
    steps: Steps = None,
    num_samples: Annotated[int | None, Within(1, 10_000)] = None,
    solver: Solver = None,
    guidance_scale: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    candidates: Annotated[int, Within(1)] = 32,
    few_steps: bool = False,
    baselines: bool = True,
    bootstrap: Bootstrap = 1000,
    seed: Seed = 0,
) -> None:
    """Retrieval of one or several runs beside every baseline, with intervals, costs, gap diagnostics and plots.

    With --protocol: R@1, R@5, R@10 and mAP@10 as LAION-CLAP and WavCaps define them, of runs or of the embeddings in a
    store as they are, beside published numbers where those are on as many clips.

    Args:
        runs: Run folders of `diffgap train`. Several are averaged: give one per split seed. With --protocol it may
            instead be one embedding store, a folder or "stamps".
        output: Folder for report.md, report.json and the plots; the first run's folder + "/eval" by default. With
            --protocol for protocol.md and protocol.json; by default "eval-<protocol>" in the run's folder, or beside
            the store's with that at the end of its name. An earlier report there is replaced.
        split: Rows to evaluate on. Settings chosen on data (baselines, weights) always come from "val".
        protocol: Five captions a clip (audiocaps, clotho), audio and video of a clip (vggsound), or any two modalities
            (pairs). Baselines are left out.
        data: Store that the runs are evaluated on by the protocol, instead of their own data.
        modalities: The two of protocol "pairs"; by default the only two that there are.
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
    from diffgap.retrieval.options import ScoringOptions

    if not runs:
        raise ValueError("runs is empty; name at least one run folder of `diffgap train`")
    if bootstrap < 1:
        raise ValueError(f"bootstrap is {bootstrap}; use 1 replicate or more, 1000 for intervals worth reading")
    options = ScoringOptions(scoring, steps, num_samples, solver, guidance_scale, alpha, beta, candidates)
    if protocol is not None:
        if few_steps:
            raise ValueError("few_steps and protocol were both given; evaluate them one after the other")
        _by_protocol(protocol, runs, output, split, data, modalities, options, bootstrap, seed)
        return
    for name, value in (("data", data), ("modalities", modalities)):
        if value:
            raise ValueError(f"{name} belongs to --protocol; name one of audiocaps, clotho, vggsound, pairs")
    from diffgap.retrieval.evaluate import evaluate_runs
    from diffgap.retrieval.few_steps import compare_steps
    from diffgap.retrieval.report import check_output, terminal_table, write_report

    folder = output or runs[0] / "eval"
    check_output(folder)
    console = open_console()
    _say_replaced(console, folder)
    report = evaluate_runs(
        runs, split=split, options=options, with_baselines=baselines, replicates=bootstrap, seed=seed
    )
    if few_steps:
        report.few_steps = compare_steps(runs, split=split, options=options, replicates=bootstrap, seed=seed)
    write_report(report, folder)
    console.print(terminal_table(report))
    console.print(f"report and plots in {escape(str(folder))}")


def _say_replaced(console: Console, folder: Path) -> None:
    """Before the work is done, that an earlier report goes; :func:`check_output` has let nothing else through."""
    if folder.exists():
        console.print(f"{folder} holds an earlier report, which is replaced; --output FOLDER keeps both", markup=False)


def _by_protocol(
    protocol: ProtocolName,
    paths: tuple[Path, ...],
    output: Path | None,
    split: str,
    data: str,
    modalities: tuple[str, ...],
    options: ScoringOptions,
    replicates: int,
    seed: int,
) -> None:
    from diffgap._files import beside
    from diffgap.retrieval.protocol_evaluate import evaluate_protocol
    from diffgap.retrieval.protocol_report import FILE, notes, terminal_table, write_report
    from diffgap.retrieval.report import check_output
    from diffgap.training.runs import is_run

    first, name = paths[0], f"eval-{protocol}"
    folder = output or (first / name if is_run(first) else beside(first, f"-{name}"))
    check_output(folder, FILE)
    console = open_console()
    _say_replaced(console, folder)
    report = evaluate_protocol(
        protocol,
        paths,
        data=data,
        modalities=modalities,
        split=split,
        options=options,
        replicates=replicates,
        seed=seed,
    )
    write_report(report, folder)
    console.print(terminal_table(report))
    for note in notes(report):
        console.print(f"- {note}", markup=False)
    console.print(f"protocol.md and protocol.json in {folder}", markup=False)
