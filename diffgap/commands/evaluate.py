"""``diffgap eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from rich.markup import escape
from tyro.conf import Positional, arg

__all__ = ["evaluate"]


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
