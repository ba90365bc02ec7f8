"""Retrieval by a protocol: of an embedding store as it is, and of trained bridges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any, get_args

from torch.nn.functional import normalize

from diffgap.data.store import EmbeddingStore
from diffgap.models.bridge import DiffGAP
from diffgap.retrieval.bootstrap import Interval
from diffgap.retrieval.evaluate import load_comparable, score_direction, scoring_settings
from diffgap.retrieval.options import METHODS, ScoringOptions
from diffgap.retrieval.protocols import PROTOCOLS, ProtocolName, Task, protocol_task
from diffgap.retrieval.published import Published, published
from diffgap.retrieval.summary import means
from diffgap.retrieval.tasks import Items, Scores, encode_pair, rank
from diffgap.retrieval.weights import Weights, choose_weights, given_weights
from diffgap.training.config import DataConfig, RunConfig
from diffgap.training.runs import is_run, load_data

__all__ = ["RAW", "ProtocolReport", "evaluate_protocol", "raw_scores"]

#: The row of embeddings as they are.
RAW = "raw"


@dataclass
class ProtocolReport:
    """What :func:`evaluate_protocol` found.

    Attributes:
        protocol: Its name.
        subjects: Names of the runs, or of the store.
        split: Split evaluated.
        clips: N.
        items: Number of items by modality.
        notes: What there is to know about the numbers.
        settings: What the numbers of runs depend on.
        alphas, betas: Weights of each run.
        metrics: [method][direction][metric] -> interval over clips; "MedR" has none.
        published: Published numbers of the same protocol and N.
    """

    protocol: ProtocolName
    subjects: list[str]
    split: str
    clips: int
    items: dict[str, int]
    notes: list[str]
    settings: dict[str, object] = field(default_factory=dict)
    alphas: list[float] = field(default_factory=list)
    betas: list[float] = field(default_factory=list)
    metrics: dict[str, dict[str, dict[str, Interval]]] = field(default_factory=dict)
    published: tuple[Published, ...] = ()


def evaluate_protocol(
    name: ProtocolName,
    paths: Sequence[Path],
    *,
    data: str = "",
    modalities: Sequence[str] = (),
    split: str = "test",
    options: ScoringOptions | None = None,
    replicates: int = 1000,
    seed: int = 0,
) -> ProtocolReport:
    """Evaluate one embedding store, or run folders of ``diffgap train``, by a protocol.

    A store is scored by the cosine of its embeddings, runs as :func:`diffgap.retrieval.evaluate.evaluate_runs` scores
    them, with weights chosen on the validation split of their own data, beside that cosine where it exists. Intervals
    resample clips. Several runs are pooled.

    Args:
        name: The protocol.
        paths: A store (a folder, or the name of bundled data), or runs that differ in their training alone.
        data: The store that runs are evaluated on, a folder or a name; their own data by default.
        modalities: The two of "pairs"; by default the only two that there are.
        split: Split evaluated.
        options: How runs are scored.
        replicates: Of the bootstrap.
        seed: Of samples and bootstrap.

    Raises:
        FileNotFoundError: A path is neither a store nor a run.
        ValueError: The store does not have what the protocol needs, or an argument does not fit.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol is {name!r}; use one of {', '.join(get_args(ProtocolName))}")
    if any(map(is_run, paths)):
        return _evaluate_runs(name, paths, data, modalities, split, options or ScoringOptions(), replicates, seed)
    if len(paths) != 1:
        raise ValueError(f"a protocol takes one embedding store, or run folders; got {len(paths)} paths, none a run")
    if data:
        raise ValueError(f"data is {data!r}, but {paths[0]} is no run folder; name a run, or give the store alone")
    if options not in (None, ScoringOptions()):
        raise ValueError(f"{paths[0]} is no run folder: its embeddings are scored by cosine; leave scoring options out")
    task = protocol_task(_open(str(paths[0])), name, modalities, split)
    scores = raw_scores(task.sides)
    if scores is None:
        widths = " and ".join(f"{side.embeddings.shape[-1]} ({name})" for name, side in task.sides.items())
        raise ValueError(
            f"{paths[0]} has embeddings of widths {widths}, which have no cosine; train a bridge with `diffgap train`, "
            f"then `diffgap eval RUN --protocol {name} --data {paths[0]}`"
        )
    report = _report(name, [paths[0].name], split, task)
    return _summarise(report, {RAW: {direction: [one] for direction, one in scores.items()}}, replicates, seed)


def raw_scores(sides: Mapping[str, Items]) -> dict[str, Scores] | None:
    """By direction, the scores of the cosine of embeddings as they are; None where their widths differ."""
    if len({side.embeddings.shape[-1] for side in sides.values()}) > 1:
        return None
    units = {name: normalize(side.pooled(), dim=1) for name, side in sides.items()}
    return {
        f"{query} -> {gallery}": rank(units[query], units[gallery], sides[query].groups, sides[gallery].groups)
        for query, gallery in permutations(sides)
    }


def _open(data: str, own: DataConfig | None = None) -> EmbeddingStore:
    """A store folder or bundled data; of the latter the same split that ``own`` has."""
    return load_data(replace(own or DataConfig(), path=data, modalities=()))


def _evaluate_runs(
    name: ProtocolName,
    paths: Sequence[Path],
    data: str,
    modalities: Sequence[str],
    split: str,
    options: ScoringOptions,
    replicates: int,
    seed: int,
) -> ProtocolReport:
    loaded = load_comparable(paths)
    first, config = loaded[0]
    if not data and any(own.data != config.data for _, own in loaded):
        raise ValueError(f"{paths[0].name} and others have splits of their own; evaluate them apart, or give data")
    store = _open(data, config.data) if data else load_data(config.data)
    task = protocol_task(store, name, modalities or _own_two(name, first, store), split)
    for modality in task.sides:
        if modality not in first.modalities:
            raise ValueError(
                f"protocol {name!r} needs {modality!r}, which is unknown to the bridge in {paths[0]}; "
                f"it has {', '.join(first.modalities)}"
            )
    bridging = {"seed": seed, **options.resolved(first)}
    report = _report(name, [path.name for path in paths], split, task)
    report.settings = scoring_settings(first, bridging)
    pooled: dict[str, dict[str, list[Scores]]] = {}
    raw = raw_scores(task.sides)
    if raw is not None:
        pooled[RAW] = {direction: [scores] for direction, scores in raw.items()}
    for model, own in loaded:
        weights = _weights(model, own, store if data else None, task, options, bridging)
        report.alphas.append(weights.alpha)
        if weights.beta is not None:
            report.betas.append(weights.beta)
        pair = encode_pair(model, task.sides, **bridging)
        for query, gallery in permutations(task.sides):
            for scoring in options.scorings:
                scores, _ = score_direction(model, pair, query, gallery, scoring, options.candidates, weights, seed)
                pooled.setdefault(METHODS[scoring], {}).setdefault(f"{query} -> {gallery}", []).append(scores)
    return _summarise(report, pooled, replicates, seed)


def _own_two(name: ProtocolName, model: DiffGAP, store: EmbeddingStore) -> Sequence[str]:
    """What "pairs" takes of a bridge where nothing is named: what bridge and store both have."""
    return () if PROTOCOLS[name].modalities else tuple(one for one in store.modalities if one in model.modalities)


def _weights(
    model: DiffGAP,
    config: RunConfig,
    other: EmbeddingStore | None,
    task: Task,
    options: ScoringOptions,
    bridging: Mapping[str, Any],
) -> Weights:
    """Weights that are given, or the best on the validation split of the run's own data.

    Raises:
        ValueError: The run's own data and ``other`` were embedded by different encoders.
    """
    weights = given_weights(options)
    if weights is not None:
        return weights
    own = load_data(config.data)
    if other is not None:
        _check_encoders(own, other, task.sides)
    return choose_weights(model, own.split("val"), options, bridging)


def _check_encoders(own: EmbeddingStore, other: EmbeddingStore, modalities: Iterable[str]) -> None:
    for modality in modalities:
        trained, asked = own.encoder(modality), other.encoder(modality)
        if trained and asked and trained != asked:
            raise ValueError(
                f"{modality} of the run's own data was embedded by {trained!r}, but of data by {asked!r}; embed both "
                "with the same encoder"
            )


def _report(name: ProtocolName, subjects: list[str], split: str, task: Task) -> ProtocolReport:
    sizes = {modality: len(side.groups) for modality, side in task.sides.items()}
    beside = published(name, task.clips) if task.comparable else ()
    return ProtocolReport(name, subjects, split, task.clips, sizes, task.notes, published=beside)


def _summarise(
    report: ProtocolReport, pooled: Mapping[str, Mapping[str, list[Scores]]], replicates: int, seed: int
) -> ProtocolReport:
    report.metrics = {
        # No mean over directions: protocols name each.
        method: means(by_direction, (), replicates=replicates, seed=seed)
        for method, by_direction in pooled.items()
    }
    return report
