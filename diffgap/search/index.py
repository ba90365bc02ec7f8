"""A search index: one folder over one modality of an embedding store, before and after bridging.

    meta.json             what it was built from and how: store, run, fingerprints of both, kind, weight, options
    rows.safetensors      "rows" (M,) int64: the store's index row of each vector
    vectors.safetensors   "embeddings" (M, D) float32 unit vectors (kind exact), or
    vectors.faiss         faiss's own file (kinds ivf and hnsw)

With a run the vectors are k, the items in the bridge's contrastive space, and one index serves queries of every
modality, plain and bridged. With q a query and q^ what the bridge makes of it, all of norm 1, the score is

    cos(q, k) + alpha cos(q^, k) = <q, k> + alpha <q^, k> = <q + alpha q^, k>

so that q searches before bridging, and q + alpha q^ after: no item has to be bridged, and nothing but the query
changes. (:func:`diffgap.models.scoring.score_features` also bridges the items, each to the queries' modality; its
"fusion" is the mean of this score and that of the opposite direction.)
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from diffgap._files import atomic_folder, check_writable
from diffgap.data.store import SPLITS, EmbeddingStore
from diffgap.models.bridge import DiffGAP
from diffgap.models.scoring import Encoded
from diffgap.retrieval.tasks import EncodedPair, directions, encode_pairs, rank
from diffgap.retrieval.weights import ALPHAS
from diffgap.search.encode import QueryEncoders
from diffgap.search.gallery import Gallery, run_fingerprint, store_fingerprint, unit_vectors
from diffgap.search.vectors import FaissOptions, Kind, Vectors, check_kind, open_vectors, write_vectors
from diffgap.training.config import BUNDLED, DataConfig, RunConfig
from diffgap.training.runs import is_run, load_data, load_run

_FORMAT_VERSION = "1"
_KINDS: dict[str, Any] = {
    "split": str, "modality": str, "kind": str, "count": int, "dim": int, "store_fingerprint": str, "run": str | None,
    "run_fingerprint": str | None, "alpha": float | int | None, "options": dict, "encoders": dict, "media": str | None,
}  # fmt: skip
_FILES = {"meta.json", "rows.safetensors", "vectors.safetensors", "vectors.faiss"}


@dataclass(frozen=True)
class Meta:
    """What ``meta.json`` holds.

    Attributes:
        data: The store: its folder, or the bundled set and which of its splits.
        split: Rows of the store that are searched: "train", "val", "test" or "all".
        modality, kind: Of the items, and of the index.
        count, dim: M and D.
        store_fingerprint, run_fingerprint: See :mod:`diffgap.search.gallery`.
        run: Run folder whose bridge projects the items and bridges the queries.
        alpha: Weight of the bridged query.
        options: Those of faiss.
        encoders: Spec of the encoder of queries, by modality.
        media: Folder that the paths of media in the store's index columns start from.
    """

    data: DataConfig
    split: str
    modality: str
    kind: Kind
    count: int
    dim: int
    store_fingerprint: str
    run: str | None
    run_fingerprint: str | None
    alpha: float | None
    options: dict[str, int]
    encoders: dict[str, str]
    media: str | None

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"format_version": _FORMAT_VERSION, **asdict(self)}, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Meta:
        """Raises FileNotFoundError for a missing file, ValueError for one that is damaged or of another version."""
        if not path.is_file():
            raise FileNotFoundError(f"{path.parent} is no search index (no {path.name}); make one with `diffgap index`")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content.pop("format_version")
            if version == _FORMAT_VERSION:
                for name, kind in _KINDS.items():
                    if not isinstance(content[name], kind):
                        raise TypeError(f"{name} is {content[name]!r}")
                check_kind(content["kind"])
                if content["split"] not in (*SPLITS, "all"):
                    raise ValueError(f"split is {content['split']!r}")
                return cls(**{**content, "data": RunConfig.from_dict({"data": content["data"]}, str(path)).data})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}); build the index again") from error
        raise ValueError(
            f"{path} has format version {version!r}, this diffgap reads {_FORMAT_VERSION!r}; build it again"
        )


class Queries(NamedTuple):
    """What an index is searched with: (N, D) float32, as they are and, where a bridge takes part, q + alpha q^."""

    plain: Tensor
    fused: Tensor | None


class Found(NamedTuple):
    """The nearest items of each query, best first.

    Attributes:
        scores: (N, K) float32; minus infinity where an approximate index found no more.
        rows: (N, K) int64 index rows of the store; -1 there.
    """

    scores: Tensor
    rows: Tensor


class SearchIndex:
    """An opened index.

    Attributes:
        meta: What it was built from.
        store: The rows that are searched.
        bridge: The run's, if it was built with one.
        vectors: The items, row i of them of index row ``rows[i]`` of the store.
    """

    def __init__(
        self, meta: Meta, store: EmbeddingStore, bridge: DiffGAP | None, vectors: Vectors, rows: Tensor
    ) -> None:
        self.meta, self.store, self.bridge, self.vectors, self.rows = meta, store, bridge, vectors, rows

    @classmethod
    def open(cls, path: Path, *, store: str = "", run: Path | None = None) -> SearchIndex:
        """Opens an index, with the store and the run that it was built from.

        Args:
            path: Its folder.
            store, run: Where they are now, if they have moved.

        Raises:
            FileNotFoundError: The index, its store or its run is not there.
            ValueError: One of them is damaged, or the store or the run is another one than the index was built from.
        """
        meta = Meta.load(path / "meta.json")
        if store:
            meta = replace(meta, data=replace(meta.data, path=_absolute(store)))
        if run is not None:
            if meta.run is None:
                raise ValueError(
                    f"run was given, but {path} was built without one; build it again: diffgap index {run}"
                )
            meta = replace(meta, run=str(run.resolve()))
        with _named_by(path):
            opened = open_store(meta.data, meta.split)
        if meta.modality not in opened.modalities or meta.store_fingerprint != store_fingerprint(opened, meta.modality):
            raise ValueError(
                f"{path} was not built from store {meta.data.path} as it is now; build it again with --overwrite, or "
                "name the store that it was built from"
            )
        bridge = None
        if meta.run is not None:
            with _named_by(path):
                bridge = load_run(Path(meta.run))[0]
            if run_fingerprint(Path(meta.run)) != meta.run_fingerprint:
                raise ValueError(
                    f"{path} was not built with run {meta.run} as it is now; build it again with --overwrite, or name "
                    "the run that it was built with"
                )
        vectors = open_vectors(meta.kind, path)
        try:
            rows = load_file(path / "rows.safetensors")["rows"]
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"{path / 'rows.safetensors'} is damaged; build the index again") from error
        if not len(vectors) == len(rows) == meta.count:
            raise ValueError(f"{path} holds {len(vectors)} vectors of {meta.count} items; build the index again")
        if vectors.dim != meta.dim:
            raise ValueError(f"{path} holds vectors of width {vectors.dim}, not {meta.dim}; build the index again")
        if rows.dtype != torch.int64 or (len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(opened)):
            raise ValueError(f"{path / 'rows.safetensors'} names rows that the store does not have; build it again")
        return cls(meta, opened, bridge, vectors, rows)

    @property
    def query_modalities(self) -> tuple[str, ...]:
        """Modalities that queries can be of: all that the bridge knows; without one, any of the vectors' width."""
        if self.bridge is not None:
            return self.bridge.modalities
        return tuple(name for name in self.store.modalities if self.store.dim(name) == self.meta.dim)

    def encoders(self, specs: Mapping[str, str] | None = None) -> QueryEncoders:
        """The encoders of queries: of ``specs``, and those that the index remembers."""
        chosen = {**self.meta.encoders, **(specs or {})}
        return QueryEncoders(chosen, self.store, self.bridge, self.meta.modality)

    def queries(self, modality: str, embeddings: Tensor, lengths: Tensor | None = None) -> Queries:
        """Embeddings (N, D) or (N, T, D) of a modality as queries, bridged where the bridge was trained for that.

        Raises:
            ValueError: A modality or a width that cannot be compared with the items.
        """
        if self.bridge is None:
            if embeddings.shape[-1] != self.meta.dim:
                raise ValueError(
                    f"{modality} queries have width {embeddings.shape[-1]}, the {self.meta.modality} items "
                    f"{self.meta.dim}; what does not share a space is searched through a bridge: build the index "
                    "from its run, diffgap index RUN"
                )
            return Queries(unit_vectors(None, modality, embeddings, lengths), None)
        self.bridge.inputs.check(modality, embeddings)
        if not self.bridge.settings.trains(modality, self.meta.modality):
            return Queries(unit_vectors(self.bridge, modality, embeddings, lengths), None)
        frames = self.store.lengths(self.meta.modality, self.rows.numpy())
        options = {"seed": 0, "lengths": lengths, "frames": None if frames is None else int(frames.median())}
        encoded = self.bridge.encode(modality, embeddings, self.meta.modality, **options)
        return Queries(encoded.own, fuse(encoded, self.meta.alpha or 0.0))

    def search(self, queries: Tensor, k: int) -> Found:
        """The ``k`` nearest items of each query (N, D). Raises ValueError unless k is 1 or more."""
        if k < 1:
            raise ValueError(f"k is {k}; use 1 or more")
        scores, numbers = self.vectors.search(queries.float().contiguous(), k)
        return Found(scores, torch.where(numbers < 0, -1, self.rows[numbers.clamp_min(0)]))


def build_index(
    source: Path,
    output: Path,
    *,
    modality: str,
    run: Path | None = None,
    split: str = "all",
    kind: Kind = "exact",
    options: FaissOptions | None = None,
    alpha: float | None = None,
    encoders: Mapping[str, str] | None = None,
    media: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Meta:
    """Builds an index in the folder ``output``, whole or not at all; returns what it was built from.

    Args:
        source: Folder of a store, "stamps" or "stamps-frames"; or a run, for its own data and bridge.
        modality: Of the items.
        run: Run folder, for a bridge to other data than its own.
        split: "train", "val", "test" or "all" rows of the store.
        alpha: Weight of the bridged query; by default the best on the run's validation data.
        encoders: Specs of :func:`diffgap.encoders.registry.build_encoder` by modality, remembered for queries.
        media: Folder that the paths of media in the store's index columns start from.
        progress: Called with the items done, and their number.

    Raises:
        FileNotFoundError: No store or run, or no folder ``media``.
        FileExistsError: ``output`` exists, and is no index or ``overwrite`` is false.
        ValueError: ``modality`` is not in the store, or unknown to the bridge; an option is out of range.
    """
    check_kind(kind)
    options = options or FaissOptions()
    _check_replaceable(output, overwrite)
    if alpha is not None and not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha is {alpha}; use a finite number, 0 or more")
    if media is not None and not media.is_dir():
        raise FileNotFoundError(f"media folder {media} does not exist")
    if is_run(source):
        if run is not None:
            raise ValueError(f"{source} is a run folder, and run {run} was given too; give a store, or one run")
        run = source
    if run is None:
        if alpha is not None:
            raise ValueError("alpha is the weight of a bridge; give a run too, or leave alpha out")
        bridge, data = None, DataConfig(path=str(source))
    else:
        bridge, config = load_run(run)
        data = config.data if is_run(source) else replace(config.data, path=str(source))
        bridge.inputs.known(modality)
    data = replace(data, path=_absolute(data.path), modalities=())
    store = open_store(data, split)
    gallery = Gallery(store, modality, bridge)
    if not len(gallery):
        raise ValueError(f"no row of split {split!r} has {modality!r}; there is nothing to search")
    if bridge is not None:
        bridge.inputs.check(modality, store.embeddings(modality, gallery.rows[:1]))
    if kind == "ivf":
        options.lists(len(gallery))
    named = QueryEncoders(encoders or {}, store, bridge, modality)
    for name in named.specs:
        named.build(name)
    if run is not None and bridge is not None and alpha is None:
        alpha = choose_alpha(bridge, load_data(RunConfig.load(run / "config.yaml").data).split("val"), modality)
    meta = Meta(
        data=data, split=split, modality=modality, kind=kind, count=len(gallery), dim=gallery.dim,
        store_fingerprint=store_fingerprint(store, modality),
        run=None if run is None else str(run.resolve()),
        run_fingerprint=None if run is None else run_fingerprint(run),
        alpha=alpha, options={}, encoders=named.specs, media=None if media is None else str(media.resolve()),
    )  # fmt: skip
    with atomic_folder(output, overwrite=overwrite) as folder:
        count = len(gallery)
        report = None if progress is None else lambda done: progress(done, count)
        used = write_vectors(kind, folder, gallery, options, report)
        (folder / "rows.safetensors").write_bytes(save({"rows": torch.from_numpy(gallery.rows)}))
        meta = replace(meta, options=used)
        meta.save(folder / "meta.json")
    return meta


@contextmanager
def _named_by(path: Path) -> Iterator[None]:
    """What is wrong with a store or a run, with the index that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def open_store(data: DataConfig, split: str = "all") -> EmbeddingStore:
    """The rows that an index is over. Raises FileNotFoundError for no store, ValueError for an unknown split."""
    # Its rows were checked when it was written; to open an index is not to read a store from end to end.
    store = load_data(data) if data.path in BUNDLED else EmbeddingStore.open(data.path, check=False)
    return store if split == "all" else store.split(split)


def fuse(encoded: Encoded, alpha: float) -> Tensor:
    """q + alpha q^; see the module's text."""
    return encoded.own + alpha * encoded.bridged


def choose_alpha(bridge: DiffGAP, val: EmbeddingStore, modality: str) -> float:
    """The weight with the best MRR on validation data, mean over the modalities that are bridged to this one.

    Raises:
        ValueError: The bridge was trained for no such direction, or no group of ``val`` has two modalities.
    """
    into = [
        one
        for one in directions(encode_pairs(bridge, val, seed=0))
        if one[2] == modality and bridge.settings.trains(one[1], modality)
    ]
    if not into:
        raise ValueError(f"the run was trained to bridge nothing to {modality!r}; choose alpha, 0 for none")

    def mrr(pair: EncodedPair, query: str, items: str, alpha: float) -> float:
        groups = pair.sides[query].groups, pair.sides[items].groups
        return float(rank(fuse(pair.encoded[query], alpha), pair.encoded[items].own, *groups).values["MRR"].mean())

    return max(ALPHAS, key=lambda alpha: statistics.fmean(mrr(*one, alpha) for one in into))


def _absolute(path: str) -> str:
    return path if path in BUNDLED else str(Path(path).resolve())


def _check_replaceable(output: Path, overwrite: bool) -> None:
    check_writable(output.parent, output)
    if not output.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists; pass --overwrite or choose another path")
    foreign = sorted({file.name for file in output.iterdir()} - _FILES) if output.is_dir() else [output.name]
    if foreign:
        raise FileExistsError(f"{output} holds {foreign[0]!r}, not part of an index; choose another path")


def describe(store: EmbeddingStore, row: int) -> dict[str, Any]:
    """id, group and, where the store has one, caption of an index row."""
    columns = [name for name in ("id", "group", "caption") if name in store.index.column_names]
    return {name: store.column(name)[row] for name in columns}
