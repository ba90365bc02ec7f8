"""The vectors of an index: exact search over a memory-mapped file, or a faiss index built chunk by chunk.

All vectors have norm 1, so that the inner product with a query of norm 1 is their cosine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from diffgap.data._modality import read_modality, write_modality
from diffgap.ops.similarity import similarity_topk
from diffgap.search.gallery import Gallery

Kind: TypeAlias = Literal["exact", "ivf", "hnsw"]

_EXACT_FILE = "vectors.safetensors"
_FAISS_FILE = "vectors.faiss"
#: Far beyond use; faiss would run out of memory, or take another number than was given.
_MOST = {"nlist": 2**24, "nprobe": 2**24, "m": 1024, "ef_construction": 2**24, "ef_search": 2**24}
# What faiss's own k-means asks for: no fewer vectors for a list, and no more are looked at.
_MIN_PER_LIST, _MAX_PER_LIST = 39, 256


class Vectors(Protocol):
    """Vectors that can be searched.

    Attributes:
        dim: Their width D.
    """

    dim: int

    def __len__(self) -> int: ...

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The nearest vectors of each query, best first.

        Args:
            queries: (N, D) float32.
            k: 1 or more; fewer are found where there are fewer vectors.

        Returns:
            scores: (N, min(k, M)) float32 inner products; minus infinity where an approximate index found no more.
            numbers: (N, min(k, M)) int64 vectors; -1 there.
        """
        ...


@dataclass(frozen=True)
class FaissOptions:
    """Options of a faiss index, by faiss's own names.

    Attributes:
        nlist: Lists of an inverted file; 4 sqrt(M) of M vectors by default, each with 39 vectors or more on average.
        nprobe: Lists that a query looks at; a sixteenth of them, and 32 or more, by default. All of them is exact.
        m: Links of a vector in HNSW.
        ef_construction, ef_search: Candidates that HNSW keeps while it builds, and while it searches.
    """

    nlist: int | None = None
    nprobe: int | None = None
    m: int = 32
    ef_construction: int = 200
    ef_search: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; use 1 or more")
            if value is not None and value > _MOST[name]:
                raise ValueError(f"{name} is {value}; use {_MOST[name]} or less")
        if self.m < 2:
            raise ValueError(f"m is {self.m}; HNSW needs 2 links or more, 16 to 64 are usual")
        if self.nlist is not None and self.nprobe is not None and self.nprobe > self.nlist:
            raise ValueError(f"nprobe is {self.nprobe}, of {self.nlist} lists; use no more than nlist")

    def lists(self, count: int) -> tuple[int, int]:
        """nlist and nprobe for ``count`` vectors. Raises ValueError if nlist is more than there are vectors."""
        if self.nlist is not None and self.nlist > count:
            raise ValueError(f"nlist is {self.nlist}, of {count} vectors; use fewer lists, or kind exact")
        nlist = self.nlist or max(1, min(int(4 * math.sqrt(count)), count // _MIN_PER_LIST))
        return nlist, min(nlist, self.nprobe or max(32, round(nlist / 16)))


class ExactVectors:
    """A file of vectors, memory-mapped and streamed through by :func:`similarity_topk`.

    Equal scores keep the order of the vectors.
    """

    def __init__(self, folder: Path) -> None:
        self._vectors = read_modality(folder / _EXACT_FILE).data
        if self._vectors.ndim != 2 or self._vectors.dtype != torch.float32:
            raise ValueError(f"{folder / _EXACT_FILE} is damaged; build the index again")
        self.dim = self._vectors.shape[1]

    def __len__(self) -> int:
        return len(self._vectors)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return similarity_topk(queries, self._vectors, min(k, len(self)))


class FaissVectors:
    """A faiss index. Of equal scores that it found, the lower number comes first."""

    def __init__(self, folder: Path) -> None:
        faiss = _faiss()
        try:
            self.faiss_index: Any = faiss.read_index(str(folder / _FAISS_FILE))
        except RuntimeError as error:
            raise ValueError(f"{folder / _FAISS_FILE} is damaged; build the index again") from error
        self.dim = int(self.faiss_index.d)

    def __len__(self) -> int:
        return int(self.faiss_index.ntotal)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores, numbers = self.faiss_index.search(np.ascontiguousarray(queries.numpy()), min(k, len(self)))
        scores[numbers < 0] = -np.inf
        order = np.lexsort((numbers, -scores), axis=1)
        return tuple(torch.from_numpy(np.take_along_axis(found, order, 1)) for found in (scores, numbers))  # type: ignore[return-value]

    @property
    def effort(self) -> tuple[str, int, int]:
        """What decides between speed and recall: its name, its value, and the value beyond which it changes nothing."""
        if hasattr(self.faiss_index, "nprobe"):
            return "nprobe", int(self.faiss_index.nprobe), int(self.faiss_index.nlist)
        return "efSearch", int(self.faiss_index.hnsw.efSearch), len(self)

    def set_effort(self, value: int) -> None:
        """Another value of :attr:`effort`, in memory."""
        holder = self.faiss_index if hasattr(self.faiss_index, "nprobe") else self.faiss_index.hnsw
        setattr(holder, self.effort[0], value)


def open_vectors(kind: Kind, folder: Path) -> Vectors:
    """What :func:`write_vectors` wrote. Raises ValueError if it is damaged."""
    return ExactVectors(folder) if kind == "exact" else FaissVectors(folder)


def check_kind(kind: str) -> None:
    """Raises ValueError for an unknown kind, ModuleNotFoundError for one whose package is missing."""
    if kind not in get_args(Kind):
        raise ValueError(f"kind {kind!r} is unknown; use {', '.join(get_args(Kind))}")
    if kind != "exact":
        _faiss()


def write_vectors(
    kind: Kind, folder: Path, gallery: Gallery, options: FaissOptions, progress: Callable[[int], None] | None = None
) -> dict[str, int]:
    """Writes the vectors of a gallery into ``folder``, chunk by chunk; returns the options that were used.

    ``progress`` is called with the number of vectors done.
    """
    done = 0

    def counted() -> Any:
        nonlocal done
        for chunk in gallery.chunks():
            yield chunk
            done += len(chunk)
            if progress is not None:
                progress(done)

    if kind == "exact":
        rows = ((chunk, None) for chunk in counted())
        write_modality(folder / _EXACT_FILE, rows, (len(gallery), gallery.dim), torch.float32)
        return {}
    faiss = _faiss()
    used: dict[str, int]
    if kind == "ivf":
        nlist, nprobe = options.lists(len(gallery))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(gallery.dim), gallery.dim, nlist, faiss.METRIC_INNER_PRODUCT)
        wanted = min(len(gallery), nlist * _MAX_PER_LIST)
        sample = np.sort(np.random.default_rng(0).choice(len(gallery), wanted, replace=False))
        # Asked for by name, few vectors a list are the caller's choice and no news to him.
        index.cp.min_points_per_centroid = 1
        index.train(gallery.take(sample).numpy())
        index.nprobe = nprobe
        used = {"nlist": nlist, "nprobe": nprobe}
    else:
        index = faiss.IndexHNSWFlat(gallery.dim, options.m, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = options.ef_construction, options.ef_search
        used = {"m": options.m, "ef_construction": options.ef_construction, "ef_search": options.ef_search}
    for chunk in counted():
        index.add(chunk.numpy())
    faiss.write_index(index, os.fspath(folder / _FAISS_FILE))
    return used


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "package faiss-cpu is not installed; run: pip install 'diffgap[search]', or use kind exact", name="faiss"
        ) from None
    return faiss
