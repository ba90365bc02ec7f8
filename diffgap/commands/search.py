"""``diffgap search``."""

from __future__ import annotations

import contextlib
import json as json_format
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from diffgap.commands.arguments import Within
from diffgap.commands.console import open_console


def search(
    index: Annotated[Positional[Path], arg(metavar="INDEX")],
    query: Annotated[Positional[tuple[str, ...]], arg(metavar="QUERY ...")] = (),
    rows: Path | None = None,
    rows_modality: str = "text",
    k: Annotated[int, Within(1)] = 10,
    json: bool = False,
    serve: bool = False,
    port: Annotated[int, Within(0, 65535)] = 0,
    text: str = "",
    audio: str = "",
    image: str = "",
    video: str = "",
    store: str = "",
    run: Path | None = None,
) -> None:
    """Search an index of `diffgap index` with texts, files or embeddings; before and after bridging if it has a run.

    Args:
        index: Folder of the index.
        query: Texts, and files of sounds or pictures (known by their ending).
        rows: Queries that are embedded already, instead: a .npy file (N, D) or (N, T, D), or a store's distinct rows.
        rows_modality: Modality of those rows.
        k: Items shown for each query.
        json: Print one JSON object a query, a line each, instead of tables.
        serve: Serve a page to search by typing a caption or dropping a file, on this machine's loopback alone.
        port: Port of the page; 0 takes a free one.
        text: Encoder of text queries, as in `diffgap embed`, if the index does not remember it; so the next three.
        audio: Encoder of sounds.
        image: Encoder of pictures.
        video: Encoder of videos.
        store: Where the index's store is now, if it has moved.
        run: Where the index's run is now, if it has moved.
    """
    from diffgap.search.encode import read_query, read_rows
    from diffgap.search.index import SearchIndex
    from diffgap.search.media import MediaFiles
    from diffgap.search.results import result_lists, results_table
    from diffgap.search.server import SearchServer
    from diffgap.training.config import BUNDLED

    if sum((bool(query), rows is not None, serve)) != 1:
        raise ValueError("give queries, or --rows, or --serve: one of the three")
    if port and not serve:
        raise ValueError("port belongs to --serve; add it, or leave --port out")
    asked = [read_query(one) for one in query]
    opened = SearchIndex.open(index, store=store, run=run)
    meta = opened.meta
    specs = {"text": text, "audio": audio, "image": image, "video": video}
    encoders = opened.encoders({name: spec for name, spec in specs.items() if spec})
    root = None if meta.media is None else Path(meta.media)
    media = MediaFiles(opened.store, root, recordings=meta.data.path in BUNDLED)
    console = open_console()
    if serve:
        with SearchServer(opened, encoders, media, port) as server:  # first, as the encoders may take a minute
            for modality in encoders.specs:
                encoders.build(modality)
            console.print(f"serving {server.url} (to this machine only); Ctrl-C ends it", markup=False, soft_wrap=True)
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()
        return
    if rows is not None:
        names, embeddings, lengths = read_rows(rows, rows_modality)
        found = result_lists(opened, media, opened.queries(rows_modality, embeddings, lengths), k)
    else:
        names, found = list(query), []
        for modality, source in asked:
            found += result_lists(opened, media, opened.queries(modality, *encoders.encode(modality, [source])), k)
    for name, lists in zip(names, found, strict=True):
        if json:
            print(json_format.dumps({"query": name, **lists}))
        else:
            console.print(results_table(name, lists, meta.alpha, root))
