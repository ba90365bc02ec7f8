"""All checks of a store and of a bridge, in the order of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from pathlib import Path

import numpy as np

from diffgap.data.store import EmbeddingStore
from diffgap.diagnose.bridge import check_collapse, check_condition, check_gap, check_trajectory
from diffgap.diagnose.data import check_duplicates, check_groups, check_rows, check_spread, distinct_rows, sound_rows
from diffgap.diagnose.finding import Finding
from diffgap.diagnose.observe import denoising_errors, draw, pairs
from diffgap.diagnose.pairing import MIN_GROUPS, check_pairing
from diffgap.models.bridge import DiffGAP
from diffgap.training.config import BUNDLED, DataConfig
from diffgap.training.runs import is_run, load_data, load_run


@dataclass(frozen=True)
class Diagnosis:
    """What was looked at, and what was found."""

    subject: str
    split: str
    findings: tuple[Finding, ...]

    def count(self, verdict: str) -> int:
        """Findings of one verdict."""
        return sum(finding.verdict == verdict for finding in self.findings)


def diagnose(path: Path, *, split: str = "val", seed: int = 0) -> Diagnosis:
    """The checks of a run folder, or of a store alone (a folder, or the name of bundled data).

    The data are checked whole, a bridge on the rows of ``split``.

    Raises:
        FileNotFoundError: ``path`` is neither.
        ValueError: The run or the store is damaged, or the split is empty.
    """
    if is_run(path):
        bridge, config = load_run(path)
        store = load_data(config.data)
        findings = check_store(store, bridge.modalities, seed=seed)
        findings += check_bridge(bridge, store.split(split), seed=seed)
        return Diagnosis(f"run {path.name}", split, tuple(findings))
    if str(path) in BUNDLED:
        store = load_data(DataConfig(path=str(path)))
    elif (path / "index.parquet").is_file():
        store = EmbeddingStore.open(path, check=False)  # degenerate rows are findings here, not an error
    else:
        raise FileNotFoundError(
            f"{path} is neither a run folder of `diffgap train` nor an embedding store of `diffgap import`; name one"
        )
    if not len(store):
        raise ValueError(f"{path} is a store without rows; there is nothing to check")
    return Diagnosis(f"store {path.name}", "all", tuple(check_store(store, seed=seed)))


def check_store(store: EmbeddingStore, modalities: Sequence[str] = (), *, seed: int = 0) -> list[Finding]:
    """Groups, degenerate rows and pairs of the modalities (all of the store by default); no model is needed."""
    names = tuple(modalities) or store.modalities
    findings = [check_groups(store, names)]
    for name in names:
        rows = distinct_rows(store, name)
        findings.append(check_rows(rows, name))
        sound = rows.select(np.flatnonzero(sound_rows(rows.x)))
        if len(np.unique(sound.groups)) > 1:
            findings += [check_duplicates(sound, name), check_spread(sound.x, sound.groups, name)]
    return findings + [check_pairing(store, a, b, seed=seed) for a, b in combinations(names, 2)]


def check_bridge(
    bridge: DiffGAP,
    store: EmbeddingStore,
    *,
    seed: int = 0,
    max_pairs: int = 256,
    num_samples: int = 8,
    gap: bool = True,
) -> list[Finding]:
    """The contrastive space of every modality, and every direction that the bridge was trained in.

    Args:
        store: Rows it was not trained on.
        max_pairs: Pairs, one a group, for each direction: at 256 the 95% interval of a mean cosine is about 0.03 wide
            where single cosines have a standard deviation of 0.1.
        num_samples: Samples of each pair; two or more.
        gap: Measure the modality gap too, which costs more than all the rest.
    """
    findings, skipped = [], []
    for name in bridge.modalities:
        side, codes = pairs(bridge, store, name, name, max_pairs)[0], np.arange(len(store))
        if not side.z.isfinite().all():
            findings.append(_not_finite(f"{name}, projected"))
        elif len(side.x) > 1:
            findings.append(check_spread(side.pooled(), codes[: len(side.x)], f"{name}, projected"))
    for source, target in permutations(bridge.modalities, 2):
        if not bridge.settings.trains(source, target):
            continue
        direction = f"{source} -> {target}"
        one, other = pairs(bridge, store, source, target, max_pairs)
        if len(one.x) < MIN_GROUPS:
            skipped.append(_too_few(direction, len(one.x)))
            continue
        samples = draw(bridge, one, other, num_samples=num_samples, seed=seed)
        errors = denoising_errors(bridge, one, other, seed=seed)
        if not all(values.isfinite().all() for values in (samples.drawn, samples.cosines, samples.translated, *errors)):
            findings.append(_not_finite(direction))
            continue
        findings.append(check_trajectory(samples, direction))
        findings.append(check_condition(errors, direction, null_trained=bridge.settings.condition_dropout > 0))
        findings.append(check_collapse(samples, direction))
        if gap:
            findings.append(check_gap(samples, direction, seed=seed))
    return findings + skipped


def _too_few(direction: str, count: int) -> Finding:
    return Finding(
        "pairs", direction, "warn", {"groups": float(count)},
        f"warn: fewer than {MIN_GROUPS} groups of the split have both modalities", "nothing can be said of so few",
        "use a split with more pairs, e.g. --split train",
    )  # fmt: skip


def _not_finite(subject: str) -> Finding:
    return Finding(
        "finite", subject, "bad", {}, "bad: what the bridge gives is NaN or infinite", "nothing else can be measured",
        "train again with a lower learning_rate or max_grad_norm",
    )  # fmt: skip
