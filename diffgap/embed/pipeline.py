"""From items to an embedding store: read, encode, keep in parts, merge."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diffgap.data._modality import DTYPES, validate_modality_name
from diffgap.data.items import ItemList
from diffgap.data.store import check_replaceable
from diffgap.embed.folder import PartsFolder, Plan
from diffgap.embed.merge import merge, plan_of
from diffgap.embed.ranks import Ranks
from diffgap.embed.report import EmbedReport
from diffgap.embed.survey import survey
from diffgap.embed.work import Progress, Work
from diffgap.encoders import Encoder

_MOST_WORKERS = 16


def embed_items(
    items: ItemList,
    encoders: Mapping[str, Encoder],
    output: str | os.PathLike[str],
    *,
    batch_size: int = 32,
    workers: int | None = None,
    dtype: str | Mapping[str, str] | None = None,
    chunk: int = 512,
    min_modalities: int | None = None,
    overwrite: bool = False,
    keep_parts: bool = False,
    progress: Progress | None = None,
    wait_seconds: float = 1800.0,
) -> EmbedReport | None:
    """Embeds the media of ``items`` and writes an embedding store to ``output``.

    Items are taken in chunks. Worker processes read a chunk's media, the encoders embed them here in batches, and the
    chunk becomes a part below ``<output>.parts``; when all parts are there they are merged. Run again after an
    interruption of any kind, the same call goes on from the parts that are whole and gives the same store, bit by bit.
    Equal sources of a modality are embedded once. Memory holds a chunk's embeddings, the media of two batches, 24 bytes
    an item and modality, and, for the merge, the index.

    A medium that cannot be read or encoded goes into ``<output>/failures.parquet`` (id, modality, source, reason,
    message), once for every item that lists it. An item with fewer than ``min_modalities`` embeddings is left out, and
    is in that table too.

    Under ``torchrun`` or ``accelerate launch`` (RANK and WORLD_SIZE in the environment) rank r embeds the chunks r,
    r + world, ..., in the same folder; rank 0 waits for the rest and merges. The store does not depend on the number of
    ranks.

    Args:
        items: What to embed.
        encoders: By the modality's name in the store and in ``Item.media``; media of other modalities are not read.
        output: Folder of the store.
        batch_size: Media that an encoder takes at a time.
        workers: Processes that read; the cores of this machine by default, at most 16, shared by its ranks. With 0 this
            process reads.
        dtype: "float32" (default), "float16" or "int8", for all modalities or by modality.
        chunk: Items of a part: what a kill loses at most.
        min_modalities: Of the encoders' modalities, how many a row needs: 2 by default, or 1 where there is 1.
        overwrite: Replace a store at ``output``, and discard parts of a run with other settings.
        keep_parts: Leave the parts where they are.
        progress: Called with the media done, the media of this rank, and how many of them failed.
        wait_seconds: How long rank 0 waits without a new part of the others.

    Returns:
        The report; None in ranks other than 0.

    Raises:
        ValueError: A wrong argument or item list; parts of other settings; nothing could be embedded, with the
            commonest reason; embeddings that are all alike. Parts are kept.
        FileExistsError: ``output`` exists.
        RuntimeError: Another run works on ``output``, or another rank is missing.
        OSError: The output cannot be written, for one because the disk is full. Parts are kept.
    """
    began = time.monotonic()
    target, ranks = Path(output), Ranks.of_environment()
    formats = _formats(encoders, dtype)
    workers = default_workers() if workers is None else workers
    least = min(2, len(encoders)) if min_modalities is None else min_modalities
    for name, value, lowest in (("batch_size", batch_size, 1), ("workers", workers, 0), ("chunk", chunk, 1)):
        if value < lowest:
            raise ValueError(f"{name} is {value}; use {lowest} or more")
    if not 1 <= least <= len(encoders):
        raise ValueError(f"min_modalities is {least}; use 1 to {len(encoders)}, the number of encoders")
    listed = survey(items, list(encoders))
    fingerprints = {name: encoder.fingerprint for name, encoder in encoders.items()}
    plan = Plan(items.description, listed.count, listed.digest, fingerprints, formats, chunk, batch_size)
    folder = PartsFolder(target, ranks)

    def finished() -> bool:
        # Killed after the store was in place, and before the parts were removed.
        return not overwrite and folder.path.is_dir() and plan_of(target) == plan.key()

    if ranks.rank == 0 and not finished():
        check_replaceable(target, overwrite=overwrite)
    with folder.locked():
        if not folder.begin(plan, overwrite=overwrite, finished=finished, wait_seconds=wait_seconds):
            return None
        work = Work(items, encoders, listed, folder, plan, progress)
        if not finished():
            folder.check_room(_bytes(work, encoders, formats))
            work.run(workers)
            if ranks.rank == 0:
                folder.wait_for(plan.parts, wait_seconds)
                merge(folder, plan, listed, encoders, target, least=least, overwrite=overwrite)
        if ranks.rank:
            return None
        if not keep_parts:
            folder.remove()
    return EmbedReport.of_store(
        target,
        items=listed.count,
        listed={name: int((owners >= 0).sum()) for name, owners in listed.owners.items()},
        encoded=work.encoded,
        encode_seconds=work.seconds,
        seconds=time.monotonic() - began,
        notes=items.notes,
    )


def default_workers() -> int:
    """Processes that read, of one rank: its share of the cores this process may use, 1 to 16."""
    given = os.environ.get("LOCAL_WORLD_SIZE") or "1"
    if not given.isdecimal():
        raise ValueError(f"LOCAL_WORLD_SIZE={given!r} is no number of processes; unset it")
    local = max(1, int(given))
    return max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0)) // local))


def _formats(encoders: Mapping[str, Encoder], dtype: str | Mapping[str, str] | None) -> dict[str, str]:
    """The number format of every modality."""
    if not encoders:
        raise ValueError("encoders is empty; give one for every modality to embed")
    for name in encoders:
        validate_modality_name(name)
    given = dict.fromkeys(encoders, dtype) if dtype is None or isinstance(dtype, str) else dict(dtype)
    for name, kind in given.items():
        if name not in encoders:
            raise ValueError(f"dtype names modality {name!r}; the encoders have {', '.join(encoders)}")
        if kind is not None and kind not in DTYPES:
            raise ValueError(f"dtype {kind!r} is not supported; choose one of {', '.join(DTYPES)}")
    return {name: given.get(name) or "float32" for name in encoders}


def _bytes(work: Work, encoders: Mapping[str, Encoder], formats: Mapping[str, str]) -> int:
    """Of the parts that are missing and of the store, with one frame a sequence."""
    media = work.sizes[:, work.missing].sum(axis=1) + work.sizes.sum(axis=1)
    widths = [encoder.dim * DTYPES[formats[name]].itemsize for name, encoder in encoders.items()]
    return int(media @ np.array(widths))
