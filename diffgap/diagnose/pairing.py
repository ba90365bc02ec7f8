"""Whether positives share a context: are true partners more alike than shuffled ones?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffgap.data.store import EmbeddingStore
from diffgap.diagnose.data import MAX_ROWS, Rows, evenly, sound_rows
from diffgap.diagnose.finding import Finding, judge
from diffgap.diagnose.statistics import permutation_p_value
from diffgap.models.heads import shared_space
from diffgap.retrieval.tasks import items

#: Fewer groups are not checked: a map of one half of them would follow the noise of three.
MIN_GROUPS = 8
_PERMUTATIONS = 999
_MAP_WIDTH = 64
#: In units of the mean variance of a coordinate; of 0.1, 1 and 10 the one with which the pairs of the stamps, which are
#: right, stand out most from shuffled ones.
_RIDGE = 1.0
_RIDGES = (1.0, 1.0)


def check_pairing(store: EmbeddingStore, a: str, b: str, *, seed: int = 0) -> Finding:
    """Paired against shuffled similarity of two modalities, for groups that the map between them has not seen.

    The groups are cut in two halves and a regularised CCA (:func:`diffgap.models.heads.shared_space`) of either maps
    the other one. The similarity of groups g and h is the mean cosine of all embeddings of g in ``a`` with all of h in
    ``b``; a shuffle permutes the partners within a half.
    """
    x, y = _pairs(store, a, b)
    names = np.unique(x.groups)
    if len(names) < MIN_GROUPS:
        return Finding(
            "pairing", f"{a}, {b}", "warn", {"groups": float(len(names))},
            f"warn: fewer than {MIN_GROUPS} groups have both modalities", "too few to tell pairs from chance",
            "check that ids and groups agree across the modalities' files",
        )  # fmt: skip
    first = np.isin(x.groups, np.random.default_rng(seed).permutation(names)[: len(names) // 2])
    halves = (first, ~first)
    similarities, cosines = [], torch.zeros(len(x.x), dtype=torch.float64)
    for held_out in halves:
        u, v = _mapped(x.x, y.x, torch.from_numpy(held_out))
        cosines[torch.from_numpy(held_out)] = (u * v).sum(1)
        codes = torch.from_numpy(np.unique(x.groups[held_out], return_inverse=True)[1])
        similarities.append(_group_means(u, codes) @ _group_means(v, codes).T)
    paired = torch.cat([s.diagonal() for s in similarities])
    groups = np.concatenate([np.unique(x.groups[held_out]) for held_out in halves])
    shuffled = torch.cat([s[~torch.eye(len(s), dtype=torch.bool)] for s in similarities])
    middle = float(np.median(shuffled.numpy()))
    values = {
        "p_value": permutation_p_value(similarities, _PERMUTATIONS, seed),
        "below_shuffled_median": float((paired < middle).double().mean()),
        "paired_cosine": float(paired.mean()),
        "shuffled_cosine": float(shuffled.mean()),
        "groups": float(len(names)),
    }
    fix = (
        "compare the listed rows by eye: an id off by one, files in another order; if they do match, the encoders have "
        "little in common, and so will retrieval"
    )
    verdict, fix = judge(
        (
            (values["p_value"] > 0.05, "bad", fix),
            (values["p_value"] <= 0.05 and values["below_shuffled_median"] > 0.25, "warn", fix),
        )
    )
    return Finding(
        "pairing", f"{a}, {b}", verdict, values,
        f"bad: p above 0.05 over {_PERMUTATIONS} shuffles of the partners; warn: more than a quarter of the groups "
        "less alike than the median of shuffled ones",
        "wrong pairs lie below the shuffled median half of the time: at a quarter, half of the pairs may be wrong, or "
        "a linear map sees little of what right ones share",
        fix,
        _suspects(x, groups, paired.numpy(), cosines.numpy(), middle),
        {"paired": paired.tolist(), "shuffled": _sample(shuffled).tolist()},
    )  # fmt: skip


def _pairs(store: EmbeddingStore, a: str, b: str) -> tuple[Rows, Rows]:
    """The sound rows that have both modalities, one for each pair of embeddings; at most :data:`MAX_ROWS`."""
    present, codes = store.present(a, b), store.group_ids().numpy()
    keys = np.stack((store.rows(a)[present], store.rows(b)[present]), 1)
    rows = evenly(present[np.sort(np.unique(keys, axis=0, return_index=True)[1])], MAX_ROWS)
    ids = store.column("id")[rows].astype(str)
    x, y = (Rows(items(store, name, rows).pooled(), codes[rows], ids) for name in (a, b))
    kept = np.flatnonzero(sound_rows(x.x) & sound_rows(y.x))
    return x.select(kept), y.select(kept)


def _mapped(x: Tensor, y: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor]:
    """The held-out rows as unit vectors (n, width), float64, of the shared space of the others."""
    views = [normalize(side.double(), dim=1) for side in (x, y)]
    means = [view[~held_out].mean(0) for view in views]
    centred = [view[~held_out] - mean for view, mean in zip(views, means, strict=True)]
    weights = shared_space(centred, _MAP_WIDTH, [_RIDGE] * 2)
    u, v = (
        normalize((view[held_out] - mean) @ weight, dim=1)
        for view, mean, weight in zip(views, means, weights, strict=True)
    )
    return u, v


def _group_means(rows: Tensor, codes: Tensor) -> Tensor:
    counts = torch.bincount(codes)
    return rows.new_zeros(len(counts), rows.shape[1]).index_add_(0, codes, rows) / counts[:, None]


def _suspects(x: Rows, groups: np.ndarray, paired: np.ndarray, cosines: np.ndarray, middle: float) -> tuple[str, ...]:
    """Ids of the least similar pair of each of the ten least similar groups below ``middle``."""
    worst = groups[np.argsort(paired)[: min(10, int((paired < middle).sum()))]]
    rows = [np.flatnonzero(x.groups == group) for group in worst]
    return tuple(str(x.ids[members[cosines[members].argmin()]]) for members in rows)


def _sample(values: Tensor, count: int = 2000) -> Tensor:
    """Evenly spaced values, enough for a histogram."""
    return values[torch.from_numpy(evenly(np.arange(len(values)), count))]
