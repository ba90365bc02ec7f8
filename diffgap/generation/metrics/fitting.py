"""A linear classifier fitted to recordings that the evaluated set does not hold."""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from diffgap.data.media import Source
from diffgap.data.store import EmbeddingStore
from diffgap.generation.metrics._rows import Floats
from diffgap.generation.metrics.backbone import Backbone
from diffgap.generation.metrics.cache import FeatureCache
from diffgap.generation.metrics.classifier import ClassifierBackbone, LinearClassifier
from diffgap.generation.metrics.clips import clip_of, list_clips
from diffgap.generation.metrics.describing import describe_sets

__all__ = ["with_classifier"]


def with_classifier(
    backbones: Sequence[Backbone],
    path: Path,
    column: str,
    *,
    recordings: Sequence[str | os.PathLike[str]] = (),
    ids: Collection[str] = (),
    regularisation: float = 1.0,
    cache: str | os.PathLike[str] | None = None,
) -> list[Backbone]:
    """``backbones``, those with features but without logits with a classifier of ``column``, where it can be fitted.

    Features are averaged over a clip's frames. What is evaluated is never learned from.

    Args:
        path: An embedding store, whose train rows are taken, for the backbones of an encoder that it was made by; or a
            .csv of recordings, one a line, their files relative to it in its column "file", for every backbone.
        column: Of the labels; recordings without one are left out.
        recordings: The evaluated ones; files of the same bytes are left out of a .csv.
        ids: Of the evaluated ones, as those of a set have other bytes than their sources: rows of these ids are left
            out, of a .csv by its column "id", or "file" where it has none.
        regularisation: Of :meth:`LinearClassifier.fit`.
        cache: Folder for features.

    Raises:
        ValueError: No such column, no label, fewer than two classes, or no backbone that the classifier can be for.
        FileNotFoundError: ``path`` is neither.
    """
    able = [backbone for backbone in backbones if "features" in backbone.outputs and "logits" not in backbone.outputs]
    if not able:
        names = ", ".join(backbone.name for backbone in backbones)
        raise ValueError(
            f"a classifier needs the features of a backbone that has none of its own; of {names} none does"
        )
    found = {
        backbone.name: fitted
        for backbone in able
        if (fitted := _rows(backbone, able, path, column, recordings, ids, cache)) is not None
    }
    made: list[Backbone] = []
    for backbone in backbones:
        if backbone.name not in found:
            made.append(backbone)
            continue
        rows, labels = found[backbone.name]
        classifier = LinearClassifier.fit(rows, labels, fingerprint=backbone.fingerprint, regularisation=regularisation)
        made.append(ClassifierBackbone(backbone, classifier))
    return made


def _rows(
    backbone: Backbone,
    able: Sequence[Backbone],
    path: Path,
    column: str,
    recordings: Sequence[str | os.PathLike[str]],
    ids: Collection[str],
    cache: str | os.PathLike[str] | None,
) -> tuple[Floats, list[str]] | None:
    """Features and labels to learn from; None where a store holds none of the backbone's."""
    if path.suffix == ".csv":
        return _of_files(backbone, path, column, recordings, ids, cache)
    store = EmbeddingStore.open(path).split("train")
    matching = [name for name in store.modalities if store.encoder(name) == backbone.fingerprint]
    if matching:
        return _of_store(store, matching[0], column, ids, path)
    encoders = {store.encoder(name) for name in store.modalities}
    if not any(other.fingerprint in encoders for other in able):
        raise ValueError(
            f"classifier {path} holds embeddings of {', '.join(sorted(encoders))}, none of the backbones' "
            f"{', '.join(other.fingerprint for other in able)}; embed with one of these, or give a .csv of recordings"
        )
    return None


def _of_store(
    store: EmbeddingStore, modality: str, column: str, ids: Collection[str], path: Path
) -> tuple[Floats, list[str]]:
    if column not in store.index.column_names:
        raise ValueError(f"classifier {path} has no column {column!r}; it has {', '.join(store.index.column_names)}")
    labels, evaluated = store.column(column), set(ids)
    rows = [
        row
        for row in store.unique_rows(modality)
        if labels[row] not in (None, "") and store.column("id")[row] not in evaluated
    ]
    if not rows:
        raise ValueError(f"classifier {path}: no train row has a {column} and {modality}; name another column")
    x, lengths = store.embeddings(modality, rows).double().numpy(), store.lengths(modality, rows)
    if lengths is not None:
        x = x.sum(1) / lengths.double().numpy()[:, None]  # what is beyond a length is zero
    return x, [str(labels[row]) for row in rows]


def _of_files(
    backbone: Backbone,
    path: Path,
    column: str,
    recordings: Sequence[str | os.PathLike[str]],
    ids: Collection[str],
    cache: str | os.PathLike[str] | None,
) -> tuple[Floats, list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        lines = [line for line in reader if line.get(column)]
        columns = reader.fieldnames or []
    if missing := [name for name in ("file", column) if name not in columns]:
        raise ValueError(f"classifier {path} has no column {missing[0]!r}; it has {', '.join(columns)}")
    evaluated = {clip.sha256 for clip in list_clips("recordings", recordings)} if recordings else set()
    labels = {line["file"]: line[column] for line in lines if (line.get("id") or line["file"]) not in set(ids)}
    clips = [clip_of(name, Source(path=path.parent / name)) for name in labels]
    clips = [clip for clip in clips if not clip.sha256 or clip.sha256 not in evaluated]
    if not clips:
        raise ValueError(f"classifier {path} lists no recording with a {column} that is not evaluated")
    (found,), _ = describe_sets([backbone], {path.name: clips}, FeatureCache(cache), skip_broken=False)
    return np.stack([found[0][clip.name]["features"].mean(0) for clip in clips]).astype(np.float64), [
        labels[clip.name] for clip in clips
    ]
