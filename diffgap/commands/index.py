"""``diffgap index``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tyro.conf import Positional, arg

from diffgap.commands.console import open_console


def index(
    source: Annotated[Positional[Path], arg(metavar="STORE|RUN")],
    output: Annotated[Positional[Path], arg(metavar="INDEX")],
    modality: str,
    run: Path | None = None,
    split: Literal["all", "train", "val", "test"] = "all",
    kind: Literal["exact", "ivf", "hnsw"] = "exact",
    nlist: int | None = None,
    nprobe: int | None = None,
    m: int = 32,
    ef_construction: int = 200,
    ef_search: int = 64,
    alpha: float | None = None,
    text: str = "",
    audio: str = "",
    image: str = "",
    video: str = "",
    media: Path | None = None,
    check: bool = False,
    overwrite: bool = False,
) -> None:
    """Build an index of one modality of an embedding store, for `diffgap search`.

    With a run the items are searched in the bridge's contrastive space, by queries of every modality that it knows:
    plain, q, and bridged, q + alpha q^.

    Args:
        source: Folder of an embedding store, or "stamps"; or a run folder of `diffgap train`, for its own data.
        output: Folder of the new index.
        modality: What is searched: a modality of the store.
        run: Run folder whose bridge is used with the store.
        split: Rows of the store that are searched.
        kind: "exact" reads every vector for every query. "ivf" and "hnsw" are faiss's (pip install 'diffgap[search]'):
            faster on large stores, and they miss some items; --check measures both.
        nlist: ivf: lists; 4 sqrt(items) by default.
        nprobe: ivf: lists that a query looks at; a sixteenth, and 32 or more, by default.
        m: hnsw: links of an item.
        ef_construction: hnsw: candidates kept while building.
        ef_search: hnsw: candidates kept while searching.
        alpha: Weight of the bridged query; the best on the run's validation data by default.
        text: Encoder of text queries, as in `diffgap embed`; remembered in the index, like the next three.
        audio: Encoder of sounds.
        image: Encoder of pictures.
        video: Encoder of videos.
        media: Folder that the paths of media in the store's columns start from, for `diffgap search --serve`.
        check: Print recall@10 against exact search, and queries per second of both.
        overwrite: Replace an existing index.
    """
    from diffgap.search.check import check_index, check_table
    from diffgap.search.index import SearchIndex, build_index
    from diffgap.search.vectors import FaissOptions

    specs = {"text": text, "audio": audio, "image": image, "video": video}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=open_console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(f"{modality} vectors", total=None)
        meta = build_index(
            source, output, modality=modality, run=run, split=split, kind=kind,
            options=FaissOptions(nlist, nprobe, m, ef_construction, ef_search),
            alpha=alpha, encoders={name: spec for name, spec in specs.items() if spec}, media=media,
            overwrite=overwrite, progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    console = open_console()
    used = "".join(f", {name} {value}" for name, value in meta.options.items())
    said = f"{meta.count} {modality} items of width {meta.dim} in {output} ({kind}{used})"
    if meta.alpha is not None:
        said += f"; a bridged query weighs {meta.alpha:g}" + (", the best on validation data" if alpha is None else "")
    console.print(said, markup=False, soft_wrap=True)
    if check:
        queries, found = check_index(SearchIndex.open(output))
        console.print(f"searched for {queries}:", markup=False, soft_wrap=True)
        console.print(check_table(found))
