"""An ablation: the runs of a grid, evaluated, and compared with its reference query by query."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffgap._files import atomic_file
from diffgap.models.scoring import Scoring
from diffgap.retrieval.bootstrap import Interval, bootstrap_strata
from diffgap.retrieval.evaluate import validation_scores
from diffgap.retrieval.metrics import per_query_metrics
from diffgap.retrieval.tasks import directions, encode_pairs, rank_direction
from diffgap.retrieval.weights import choose_alpha
from diffgap.training.folder import exclusive
from diffgap.training.grid import Grid, GridRun
from diffgap.training.runs import load_data, load_run
from diffgap.training.trainer import Trainer
from diffgap.training.workers import check_jobs, run_apart

Array = np.ndarray[Any, Any]

#: Scorings compared: without the bridge, with the bridge alone, with both.
SCORINGS: tuple[Scoring, ...] = ("cosine", "bridge", "fusion")

#: MRR takes notice of every rank and is the less noisy; R@5 is what retrieval papers report.
METRICS = ("MRR", "R@5")


@dataclass(frozen=True)
class RunScores:
    """What the evaluation of one run left on disk: the rank of the best positive of every query.

    Attributes:
        ranks: [scoring][direction] -> (N,) strict ranks from 1.
        groups: [direction] -> (N,) the concept of each query.
        alpha: The fusion weight, chosen on the validation split.
        seconds: Time of all training steps and validations, or ``None`` where it was never taken.
    """

    ranks: dict[Scoring, dict[str, list[int]]]
    groups: dict[str, list[str]]
    alpha: float
    seconds: float | None

    def values(self, scoring: Scoring, metric: str) -> dict[str, Array]:
        """[direction] -> (N,) a metric of every query."""
        return {
            name: per_query_metrics(torch.tensor(ranks, dtype=torch.float64)[:, None])[metric].numpy()
            for name, ranks in self.ranks[scoring].items()
        }

    def concepts(self) -> dict[str, Array]:
        """``groups`` as arrays."""
        return {name: np.array(groups) for name, groups in self.groups.items()}


@dataclass(frozen=True)
class Cell:
    """One metric of one scoring of one variant: its mean over directions, and that mean less the reference's on the
    same queries (``None`` where there are no common ones)."""

    mean: Interval
    difference: Interval | None


@dataclass
class Variant:
    """One row of the table.

    Attributes:
        name: Its name in the grid.
        changes: The fields in which it differs from the reference.
        twin: The variant whose runs it shares, if it has none of its own.
        seeds: Those that were trained and evaluated.
        seconds: Mean training time of a run, or ``None`` if unknown.
        cells: [scoring][metric]; empty if no run was finished.
        directions: [scoring][metric][direction] -> mean over the queries.
    """

    name: str
    changes: dict[str, Any]
    twin: str | None
    seeds: list[int] = field(default_factory=list)
    seconds: float | None = None
    cells: dict[Scoring, dict[str, Cell]] = field(default_factory=dict)
    directions: dict[Scoring, dict[str, dict[str, float]]] = field(default_factory=dict)


@dataclass
class Ablation:
    """The finding. ``failures`` has the reason of each run that could not be finished, by its name."""

    split: str
    reference: str
    seeds: list[int]
    steps: list[int]
    directions: list[str]
    variants: list[Variant]
    failures: dict[str, str]


def run_grid(
    grid: Grid,
    output: Path,
    *,
    split: str = "val",
    jobs: int = 1,
    replicates: int = 1000,
    progress: Callable[[int, int, str, str | None], None] | None = None,
) -> Ablation:
    """Train and evaluate what is still missing of a grid below ``output``, and compare.

    A run that is killed goes on from its last checkpoint when this is called again; one that is finished is left alone.

    Args:
        split: Rows to evaluate on.
        jobs: Runs at a time, each a process with one thread.
        replicates: Bootstrap replicates.
        progress: Called with (runs done, runs in all, name of the run, why it failed or ``None``), first with those
            that were done already.

    Raises:
        ValueError: A run below ``output`` has another configuration, another process works on it, a split is empty, or
            ``jobs`` is below 1.
        FileNotFoundError: There is no store.
    """
    check_jobs(jobs)
    grid.check_output(output)
    runs = list(grid.runs())
    for data in dict.fromkeys(run.config.data for run in runs):
        store = load_data(data)
        for part in ("train", "val", split):
            store.split(part)
    failures: dict[str, str] = {}
    with exclusive(output):
        missing = [run for run in runs if not _scores_file(run, output, split).is_file()]
        done = len(runs) - len(missing)
        if progress is not None:
            progress(done, len(runs), "", None)

        def finished(run: GridRun, reason: str | None) -> None:
            nonlocal done
            done += 1
            if reason is not None:
                failures[str(run)] = reason
            if progress is not None:
                progress(done, len(runs), str(run), reason)

        run_apart(complete, missing, output, split, jobs=jobs, finished=finished)
    return compare(grid, output, split, failures, replicates=replicates)


def complete(run: GridRun, output: Path, split: str) -> None:
    """Train one run to its end, from its last checkpoint if it has one, and write the ranks of all queries."""
    folder = run.folder(output)
    ends: list[float] = []
    trained = Trainer(
        run.config,
        load_data(run.config.data),
        folder,
        validate=validation_scores,
        report=lambda *_: ends.append(time.perf_counter()),
    ).train()
    if len(ends) > 1:
        # The rate of this attempt stands for those that were killed.
        _write_json(folder / "seconds.json", (ends[-1] - ends[0]) / (len(ends) - 1) * trained.step)
    _write_json(_scores_file(run, output, split), _evaluate(folder, split))


def _evaluate(folder: Path, split: str) -> dict[str, Any]:
    """Ranks, groups and fusion weight of a trained run, as :class:`RunScores` has them."""
    model, config = load_run(folder)
    store = load_data(config.data)
    val = encode_pairs(model, store.split("val"), seed=0)
    alpha = choose_alpha(val)
    found: dict[str, Any] = {"ranks": {name: {} for name in SCORINGS}, "groups": {}, "alpha": alpha}
    pairs = val if split == "val" else encode_pairs(model, store.split(split), seed=0)
    for pair, query, gallery in directions(pairs):
        name = f"{query} -> {gallery}"
        for scoring in SCORINGS:
            scores = rank_direction(pair, query, gallery, scoring, alpha)
            found["ranks"][scoring][name] = scores.values["rank"].long().tolist()
        found["groups"][name] = scores.groups.tolist()
    return found


def compare(grid: Grid, output: Path, split: str, failures: Mapping[str, str], *, replicates: int) -> Ablation:
    """The table of what is finished below ``output``."""
    finished: dict[str, dict[int, RunScores]] = {name: {} for name in grid.variants}
    for run in grid.runs():
        file = _scores_file(run, output, split)
        if file.is_file():
            seconds = run.folder(output) / "seconds.json"
            finished[run.variant][run.seed] = RunScores(
                **json.loads(file.read_text(encoding="utf-8")),
                seconds=json.loads(seconds.read_text(encoding="utf-8")) if seconds.is_file() else None,
            )
    variants = []
    for name, twin in grid.twins().items():
        row = Variant(name, grid.changes(name), None if twin == name else twin, list(finished[twin]))
        if row.seeds:
            _fill(row, finished[twin], finished[grid.reference], replicates)
        variants.append(row)
    return Ablation(
        split=split,
        reference=grid.reference,
        seeds=list(grid.seeds),
        steps=sorted({config.train.steps for config in grid.variants.values()}),
        directions=list(
            dict.fromkeys(name for runs in finished.values() for run in runs.values() for name in run.groups)
        ),
        variants=variants,
        failures=dict(failures),
    )


def _fill(row: Variant, own: Mapping[int, RunScores], reference: Mapping[int, RunScores], replicates: int) -> None:
    """Means of a variant, and differences under the seeds in which the reference answered the same queries."""
    times = [run.seconds for run in own.values() if run.seconds is not None]
    row.seconds = float(np.mean(times)) if times else None
    shared = [seed for seed in own if seed in reference and own[seed].groups == reference[seed].groups]
    for scoring in SCORINGS:
        row.cells[scoring], row.directions[scoring] = {}, {}
        for metric in METRICS:
            values = _by_direction([own[seed].values(scoring, metric) for seed in own])
            groups = _by_direction([own[seed].concepts() for seed in own])
            mean = bootstrap_strata([(values[name], groups[name]) for name in values], resamples=replicates)
            difference = None
            if shared:
                mine = _by_direction([own[seed].values(scoring, metric) for seed in shared])
                theirs = _by_direction([reference[seed].values(scoring, metric) for seed in shared])
                groups = _by_direction([own[seed].concepts() for seed in shared])
                strata = [(mine[name] - theirs[name], groups[name]) for name in mine]
                difference = bootstrap_strata(strata, resamples=replicates)
            row.cells[scoring][metric] = Cell(mean, difference)
            row.directions[scoring][metric] = {name: float(values[name].mean()) for name in values}


def _by_direction(runs: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The queries of several runs as those of one, by direction."""
    return {name: np.concatenate([run[name] for run in runs if name in run]) for run in runs for name in run}


def _scores_file(run: GridRun, output: Path, split: str) -> Path:
    return run.folder(output) / f"ranks-{split}.json"


def _write_json(path: Path, content: Any) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")
