"""The baselines' scores on the tasks of a bridge: fitted on its training pairs, chosen on its validation pairs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffgap.data.store import EmbeddingStore
from diffgap.retrieval.baselines import Baseline, make_baselines, validation_mrr
from diffgap.retrieval.tasks import Scores, items, paired_items, rank


def baseline_scores(
    modalities: tuple[str, ...], parts: Mapping[str, EmbeddingStore], split: str, seed: int
) -> dict[str, dict[str, Scores]]:
    """Scores of every baseline in both directions of every pair of modalities that can be fitted.

    Args:
        modalities: Those of the bridge.
        parts: The store's splits "train", "val" and ``split``.
        split: The one to score.
    """
    found: dict[str, dict[str, Scores]] = {}
    for sides in paired_items(parts[split], modalities):
        a, b = sides
        for name, (x, y, baseline) in _fitted(a, b, parts, seed).items():
            space = {
                x: baseline.encode_x(sides[x].pooled()),
                y: baseline.encode_y(sides[y].pooled()),
            }
            for query, gallery in ((a, b), (b, a)):
                scores = rank(space[query], space[gallery], sides[query].groups, sides[gallery].groups)
                found.setdefault(name, {})[f"{query} -> {gallery}"] = scores
    return found


def _fitted(a: str, b: str, parts: Mapping[str, EmbeddingStore], seed: int) -> dict[str, tuple[str, str, Baseline]]:
    """By name, the modality taken as x, that taken as y, and the fitted baseline; none where no row has both.

    A regression may run either way. The way in which ridge has the better validation MRR serves every baseline and both
    directions: the MLP agrees with it, and the others are the same either way.
    """
    pairs = {name: _distinct_pairs(parts[name], a, b) for name in ("train", "val")}
    if not all(len(part) for part in pairs.values()):
        return {}
    rows = {
        (name, side): items(pairs[name], side, np.arange(len(pairs[name]))).pooled()
        for name in pairs
        for side in (a, b)
    }
    ids = pairs["val"].group_ids()

    def fit(name: str, x: str, y: str) -> tuple[float, str, str, Baseline]:
        baseline = make_baselines(rows["train", x].shape[1], rows["train", y].shape[1], seed)[name]
        baseline.fit(rows["train", x], rows["train", y], rows["val", x], rows["val", y], ids)
        encoded = baseline.encode_x(rows["val", x]), baseline.encode_y(rows["val", y])
        return validation_mrr(*encoded, ids), x, y, baseline

    ridge = max((fit("ridge", *way) for way in ((a, b), (b, a))), key=lambda found: found[0])
    names = make_baselines(rows["train", a].shape[1], rows["train", b].shape[1], seed)
    fitted = {name: ridge if name == "ridge" else fit(name, *ridge[1:3]) for name in names}
    return {name: (x, y, baseline) for name, (_, x, y, baseline) in fitted.items()}


def _distinct_pairs(part: EmbeddingStore, a: str, b: str) -> EmbeddingStore:
    """The rows that have both modalities, one for each pair of embeddings."""
    present = part.present(a, b)
    pairs = np.stack((part.rows(a)[present], part.rows(b)[present]), axis=1)
    return part.select(present[np.sort(np.unique(pairs, axis=0, return_index=True)[1])])
