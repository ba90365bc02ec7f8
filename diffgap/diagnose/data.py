"""Checks of embeddings that need no model: groups, and rows that are broken, copied or all alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffgap.data.store import EmbeddingStore
from diffgap.diagnose.finding import Finding, judge
from diffgap.diagnose.statistics import effective_rank
from diffgap.retrieval.diagnostics import unpaired_cosine
from diffgap.retrieval.tasks import items

#: Rows of one modality that are looked at, evenly spaced: enough for every figure here to two digits.
MAX_ROWS = 20_000
#: Rows whose copies are looked for among those.
_QUERIES = 4096
#: Rows of the effective rank, one eigenvalue problem of that size.
_RANK_ROWS = 1024
#: Rounding to int8, the coarsest format of a store, costs a coordinate up to 1 / 254 of the largest and so leaves the
#: cosine of a row and its copy above this.
_COPY_COSINE = 0.9999


class Rows(NamedTuple):
    """Distinct embeddings of a modality, pooled: float32 (N, D), the group code (N,) and the id of each."""

    x: Tensor
    groups: np.ndarray
    ids: np.ndarray

    def select(self, kept: np.ndarray) -> Rows:
        """Some of them."""
        return Rows(self.x[torch.from_numpy(kept)], self.groups[kept], self.ids[kept])


def distinct_rows(store: EmbeddingStore, modality: str) -> Rows:
    """One row for each (embedding, group) of a modality, at most :data:`MAX_ROWS` of them."""
    present, codes = store.present(modality), store.group_ids().numpy()
    keys = np.stack((store.rows(modality)[present], codes[present]), 1)
    rows = evenly(present[np.sort(np.unique(keys, axis=0, return_index=True)[1])], MAX_ROWS)
    return Rows(items(store, modality, rows).pooled(), codes[rows], store.column("id")[rows].astype(str))


def check_groups(store: EmbeddingStore, modalities: Sequence[str]) -> Finding:
    """Whether groups tell pairs from strangers: several groups, most of them with a pair, each in one split."""
    codes = store.group_ids().numpy()
    sizes = np.bincount(codes)
    held = np.stack([np.bincount(codes[store.present(name)], minlength=len(sizes)) > 0 for name in modalities])
    splits = np.unique(np.stack((codes, np.unique(store.column("split"), return_inverse=True)[1]), 1), axis=0)[:, 0]
    values = {
        "groups": float(len(sizes)),
        "without_pair": float((held.sum(0) < 2).mean()),
        "in_several_splits": float((np.bincount(splits) > 1).sum()),
        "largest_share": float(sizes.max() / len(codes)),
        "of_one_row": float((sizes == 1).mean()),
    }
    verdict, fix = judge(
        (
            (
                values["largest_share"] > 0.5,
                "bad",
                "name the column that holds the clip or concept (`diffgap import --group`)",
            ),
            (values["in_several_splits"] > 0, "bad", "split by group: `diffgap import --fractions`, or `with_split`"),
            (values["without_pair"] > 0.5, "warn", "check that ids and groups agree across the modalities' files"),
        )
    )
    return Finding(
        "groups", ", ".join(modalities), verdict, values,
        "bad: one group holds more than half of the rows, or a group is in two splits; warn: more than half of the "
        "groups have a single modality",
        "rows of one group are never negatives of each other, a group in two splits is tested on what it was trained "
        "on, and a group without a pair adds nothing to the contrastive loss",
        fix,
    )  # fmt: skip


def check_rows(rows: Rows, modality: str) -> Finding:
    """Whether every embedding is finite and not zero."""
    finite, bad = rows.x.isfinite().all(1), ~sound_rows(rows.x)
    not_finite = float((~finite).sum())
    values = {"rows": float(len(bad)), "not_finite": not_finite, "zero": float(bad.sum()) - not_finite}
    verdict, fix = judge(((bool(bad.any()), "bad", "drop these rows or embed them again"),))
    return Finding(
        "rows", modality, verdict, values, "bad: any row that is NaN, infinite or all zero",
        "one of them makes a loss NaN, or has no direction to compare", fix, tuple(rows.ids[bad][:10]),
    )  # fmt: skip


def check_duplicates(rows: Rows, modality: str) -> Finding:
    """Share of rows that have a copy in another group, up to the rounding of the coarsest format."""
    u, groups = normalize(rows.x, dim=1), torch.from_numpy(rows.groups)
    picked = torch.from_numpy(evenly(np.arange(len(u)), _QUERIES))
    copied = torch.cat(
        [
            ((u[part] @ u.T > _COPY_COSINE) & (groups[part][:, None] != groups)).any(1)
            for part in picked.split(256)
        ]
    ).numpy()  # fmt: skip
    share, noise = float(copied.mean()), len(np.unique(rows.groups)) ** -0.5
    verdict, _ = judge(((share > 0, "warn", ""), (share > noise, "bad", "")))
    return Finding(
        "duplicates", modality, verdict, {"share": share, "limit": noise},
        "warn: any row has a copy (cosine above 0.9999) in another group; bad: more than 1 / sqrt(groups) of the rows",
        "copies in two groups are each other's false negatives and cap recall at 1 - share; beyond 1 / sqrt(groups), "
        "the half-width of a recall's 95% interval, the cap can be seen in the results",
        "" if verdict == "good" else "give copies one group, or drop all but one",
        tuple(rows.ids[picked.numpy()[copied]][:10]),
    )  # fmt: skip


def check_spread(x: Tensor, groups: np.ndarray, subject: str) -> Finding:
    """Whether the embeddings (N, D) of different groups differ enough to be told apart."""
    codes = np.unique(groups, return_inverse=True)[1]
    cosine = unpaired_cosine(u := normalize(x.double(), dim=1), u, codes)
    deviation = x.double().std(0)
    constant = float((deviation <= 1e-6 * deviation.square().mean().sqrt()).double().mean())
    rank = effective_rank(x[torch.from_numpy(evenly(np.arange(len(x)), _RANK_ROWS))])
    needed = math.log(codes.max() + 1, 4)
    verdict, fix = judge(
        (
            (cosine > 0.99, "bad", "check the encoder's tokenizer, weights and pooling: it has collapsed"),
            (0.93 < cosine <= 0.99, "warn", "subtract the mean: heads other than 'identity' do"),
            (rank < needed, "warn", "take another layer of the encoder, or another encoder"),
            (constant > 0.5, "warn", "drop the coordinates that never vary: padding, or a dead layer"),
        )
    )
    return Finding(
        "spread", subject, verdict,
        {"mean_cosine": cosine, "effective_rank": rank, "needed_rank": needed, "constant_coordinates": constant},
        "bad: mean cosine of different groups above 0.99; warn: above 0.93, effective rank below log4(groups), or more "
        "than half of the coordinates constant",
        "at logit scale 100, CLIP's largest, logits of cosines above 0.99 differ by less than 1 nat, at 14, its first, "
        "those above 0.93; four levels in each of fewer than log4(groups) directions do not tell the groups apart",
        fix,
    )  # fmt: skip


def sound_rows(x: Tensor) -> np.ndarray:
    """(N,) bool: finite and not all zero."""
    kept: np.ndarray = (x.isfinite().all(1) & (x != 0).any(1)).numpy()
    return kept


def evenly(rows: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of the rows, evenly spaced."""
    return rows if len(rows) <= count else rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]
