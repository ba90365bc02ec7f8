"""The retrieval protocols of published numbers, for an embedding store as it is and for a trained bridge.

    audiocaps, clotho   N clips with five captions each. text -> audio: each of the 5N captions is a query, the N clips
                        are the gallery. audio -> text: each clip is a query, the 5N captions are the gallery.
    vggsound            N clips, audio and video: only a clip's own other half is right. There is no standard.
    pairs               Two modalities of any store: distinct embeddings, and items of equal group are right.

Of a query's P right answers with ranks r_1 < ... < r_P, 1-based,

    R@k = [r_1 <= k]        mAP@10 = sum_j [r_j <= 10] j / r_j / min(P, 10)

which for P of 1 and 5 are those of WavCaps (``t2a``, ``a2t`` in ``retrieval/tools/utils.py``) and of LAION-CLAP
(``evaluate_clotho_audiocaps`` in ``training/train.py``), with two differences:

* Both sort with argsort, which ranks equal scores by chance; here they count against the method. Captions repeat (of
  the 4,785 in WavCaps' AudioCaps list 4,549 are distinct), so ties are real; how many there are is in the report.
* LAION's text says that the ranks of a clip's five captions are sorted for mAP@10 of audio -> text, but its code leaves
  them in the captions' order, which gives a higher number, above 1 at worst. Here they are sorted, as in WavCaps.

A store has a row for each caption; the rows of a clip share its group, and its audio is one embedding. Groups that lack
one of the two modalities are left out and counted, as N must say how many clips were searched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from diffgap.data.store import EmbeddingStore
from diffgap.retrieval.tasks import Items, codes, items

__all__ = ["PROTOCOLS", "Protocol", "ProtocolName", "Task", "protocol_task"]

ProtocolName = Literal["audiocaps", "clotho", "vggsound", "pairs"]

#: What the items of a modality are: one a group, every row, or every distinct embedding.
Kind: TypeAlias = Literal["clip", "caption", "embedding"]

_CAPTIONS = 5

#: Below this cosine, two embeddings are not of one clip embedded twice.
_SAME = 0.999


@dataclass(frozen=True)
class Protocol:
    """What is searched with what.

    Attributes:
        modalities: The two, if the protocol has them fixed.
        kinds: What the items of either are.
        sets: Known test sets by their number of clips, the official one first.
        remark: What to say beside the numbers.
    """

    modalities: tuple[str, str] | None
    kinds: tuple[Kind, Kind]
    sets: Mapping[int, str] = field(default_factory=dict)
    remark: str = ""


PROTOCOLS: dict[ProtocolName, Protocol] = {
    "audiocaps": Protocol(
        ("audio", "text"),
        ("clip", "caption"),
        {
            975: "the official test set, https://github.com/LAION-AI/CLAP/issues/54",
            957: "WavCaps' list, https://github.com/XinhaoMei/WavCaps",
            816: "the retrieval split of Oncescu et al., https://arxiv.org/abs/2305.18500, table 9",
        },
    ),
    "clotho": Protocol(
        ("audio", "text"),
        ("clip", "caption"),
        {1045: "the official evaluation set, https://arxiv.org/abs/2305.18500, table 9"},
    ),
    "vggsound": Protocol(
        ("audio", "video"),
        ("clip", "clip"),
        {15446: "the official test set, https://github.com/heng-hw/V2A-Mapper"},
        "There is no standard for audio and video retrieval on VGGSound: galleries from 1,000 clips to all are in use, "
        "so state N. Clips share 309 classes, and only a clip's own other half is right.",
    ),
    "pairs": Protocol(None, ("embedding", "embedding"), remark="Distinct embeddings; items of equal group are right."),
}


class Task(NamedTuple):
    """What a store gives for a protocol.

    Attributes:
        sides: Items by modality, the one of the clips first.
        clips: N, groups that have both.
        comparable: Whether numbers on it can stand beside published ones.
        notes: What there is to know about it.
    """

    sides: dict[str, Items]
    clips: int
    comparable: bool
    notes: list[str]


def protocol_task(store: EmbeddingStore, name: ProtocolName, modalities: Sequence[str], split: str) -> Task:
    """The items of a protocol in a split of a store; arguments as in :func:`.evaluate_protocol`.

    Raises:
        ValueError: A modality is missing, no group or one alone has both, or a clip has several different embeddings
            where the protocol takes one.
    """
    protocol = PROTOCOLS[name]
    sides = _modalities(protocol, name, modalities, store.modalities)
    part = store.split(split)
    groups = part.column("group").astype(str)
    having = {side: np.unique(groups[part.present(side)]) for side in sides}
    both = np.intersect1d(having[sides[0]], having[sides[1]])
    if len(both) < 2:
        found = ", ".join(f"{len(there)} have {side}" for side, there in having.items())
        raise ValueError(
            f"{len(both)} groups of split {split!r} have both {' and '.join(sides)} ({found}); retrieval needs two or "
            "more: rows that match must have the same group"
        )
    chosen = part.select(np.flatnonzero(np.isin(groups, both)))
    found_items = {side: _items(chosen, side, kind, name) for side, kind in zip(sides, protocol.kinds, strict=True)}
    notes = [protocol.remark] if protocol.remark else []
    comparable = True
    if protocol.sets:
        comparable = split == "test" and len(both) in protocol.sets
        notes.append(_size_note(protocol, len(both), split))
    if "caption" in protocol.kinds:
        each = np.unique(found_items[sides[1]].groups, return_counts=True)[1]
        other = int((each != _CAPTIONS).sum())
        if other:
            comparable = False
            notes.append(
                f"{other:,} of {len(both):,} clips do not have {_CAPTIONS} captions, but {each.min()} to {each.max()}: "
                "not comparable with published numbers"
            )
    for side, there in having.items():
        (rival,) = (other for other in sides if other != side)
        alone = len(there) - len(both)
        if alone:
            notes.append(f"{alone:,} groups have {side} but no {rival}: left out")
    for side, one in found_items.items():
        tied = _tied(one)
        if tied:
            notes.append(
                f"{tied:,} of {len(one.groups):,} {side} embeddings are those of another group too: they tie, and "
                "a tie counts against the method, where argsort decides by chance"
            )
    return Task(found_items, len(both), comparable, notes)


def _modalities(protocol: Protocol, name: ProtocolName, asked: Sequence[str], there: Sequence[str]) -> tuple[str, str]:
    """The two modalities that are searched."""
    if protocol.modalities is not None and asked:
        raise ValueError(f"modalities belongs to protocol 'pairs'; {name!r} has {' and '.join(protocol.modalities)}")
    chosen = protocol.modalities or tuple(asked or there)
    if len(set(chosen)) != 2 or len(chosen) != 2:
        raise ValueError(f"protocol {name!r} takes two modalities; got {', '.join(chosen)}: name two with --modalities")
    for one in chosen:
        if one not in there:
            raise ValueError(f"protocol {name!r} needs modality {one!r}; the store has {', '.join(there) or 'none'}")
    return chosen[0], chosen[1]


def _items(store: EmbeddingStore, modality: str, kind: Kind, name: ProtocolName) -> Items:
    """The items of one modality in a store of the groups that take part."""
    if kind == "embedding":
        return items(store, modality)
    rows = store.present(modality)
    if kind == "caption":
        return items(store, modality, rows)
    groups = store.column("group")[rows].astype(str)
    first, of = np.unique(groups, return_index=True, return_inverse=True)[1:]
    file_rows = store.rows(modality)[rows]
    others = np.flatnonzero(file_rows != file_rows[first][of])
    again, original = (items(store, modality, rows[at]) for at in (others, first[of[others]]))
    apart = cosine_similarity(again.pooled(), original.pooled(), dim=1) < _SAME
    if apart.any():
        group = str(again.groups[int(apart.nonzero()[0])])
        raise ValueError(
            f"group {group!r} has several different {modality} embeddings; protocol {name!r} takes one a clip: give "
            "each clip a group of its own, or use protocol 'pairs'"
        )
    return items(store, modality, rows[np.sort(first)])


def _size_note(protocol: Protocol, clips: int, split: str) -> str:
    official, *rest = protocol.sets.items()
    if split != "test":
        return f"N = {clips:,} of split {split!r}: not comparable with published numbers, which are of the test split"
    if clips in protocol.sets:
        return f"N = {clips:,}: as many as {protocol.sets[clips]}"
    beside = "".join(f", nor with N = {size:,} ({what})" for size, what in rest)
    relation = "of" if clips < official[0] else "instead of"
    return f"N = {clips:,} {relation} {official[0]:,}: not comparable with published numbers on {official[1]}{beside}"


def _tied(side: Items) -> int:
    """Items whose embedding is that of an item of another group too."""
    embedding = torch.unique(side.pooled(), dim=0, return_inverse=True)[1]
    pairs = torch.unique(torch.stack((embedding, *codes(side.groups))), dim=1)[0]
    return int((pairs.bincount()[embedding] > 1).sum())
