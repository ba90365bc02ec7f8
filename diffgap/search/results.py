"""Results as people and programs read them."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from diffgap.search.index import Queries, SearchIndex, describe
from diffgap.search.media import MediaFiles


def result_lists(index: SearchIndex, media: MediaFiles, queries: Queries, k: int) -> list[dict[str, Any]]:
    """For each query ``{"before": [item, ...]}``, and "after" where it was bridged; the nearest item first.

    An item has "row" (of the index's store), "id", "group", "caption" if the store has captions, "score", and "media",
    its files by modality. The score is cos(q, k) before, and cos(q, k) + alpha cos(q^, k) after.
    """
    lists: list[dict[str, Any]] = [{} for _ in queries.plain]
    for name, vectors in (("before", queries.plain), ("after", queries.fused)):
        if vectors is None:
            continue
        found = index.search(vectors, k)
        for one, scores, rows in zip(lists, found.scores.tolist(), found.rows.tolist(), strict=True):
            one[name] = [
                {
                    "row": row,
                    **describe(index.store, row),
                    "score": score,
                    "media": {modality: str(path) for modality, path in media.of(row).items()},
                }
                for score, row in zip(scores, rows, strict=True)
                if row >= 0 and math.isfinite(score)
            ]
    return lists


def results_table(title: str, lists: dict[str, Any], alpha: float | None, root: Path | None) -> Table:
    """One query's results for a terminal: what is nearest before and after bridging, side by side.

    ``root`` is the folder that paths of media are shown from. At weight ``alpha`` 0 both are the same, and shown once.
    """
    note = None
    if alpha == 0 and "after" in lists:
        lists, note = {"before": lists["before"]}, "the index's weight of the bridge is 0: bridging changes nothing"
    table = Table(title=escape(title), title_justify="left", caption=note, caption_justify="left")
    table.add_column("", justify="right")
    headings = {
        "before": ("before bridging", "cos") if "after" in lists else ("nearest", "cos"),
        "after": ("after bridging", f"cos + {alpha:g} cos bridged" if alpha is not None else ""),
    }
    for name in lists:
        table.add_column(headings[name][0], overflow="fold")
        table.add_column(headings[name][1], justify="right")
    for place in range(max(map(len, lists.values()))):
        cells = []
        for found in lists.values():
            if place < len(found):
                cells += [_cell(found[place], root), f"{found[place]['score']:.3f}"]
            else:
                cells += ["", ""]
        table.add_row(str(place + 1), *cells)
    return table


def _cell(item: dict[str, Any], root: Path | None) -> str:
    told = (item["id"], item.get("caption"))
    group = "" if item["group"] in told else f" ({item['group']})"
    media = [path if root is None else os.path.relpath(path, root) for path in item["media"].values()]
    lines = [item.get("caption") or "", item["id"] + group, *media]
    return escape("\n".join(line for line in lines if line))
