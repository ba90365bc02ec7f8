"""What is searched: the distinct embeddings of one modality of a store, as unit vectors, made a chunk at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffgap.data.store import EmbeddingStore
from diffgap.models.bridge import DiffGAP
from diffgap.models.inputs import frame_mask, pool

#: Numbers of float32 in a chunk: 16 MB.
_CHUNK = 1 << 22
#: Rows of a store that its fingerprint reads; a smaller store is read whole.
_FINGERPRINT_ROWS = 4096


class Gallery:
    """The distinct embeddings of ``modality``: of a bridge, in its contrastive space; else as their encoder gave them.

    Attributes:
        rows: (M,) int64, the first index row of the store that has each.
        dim: Width of the vectors.
    """

    def __init__(self, store: EmbeddingStore, modality: str, bridge: DiffGAP | None) -> None:
        self._store, self._modality, self._bridge = store, modality, bridge
        self.rows = store.unique_rows(modality)
        self.dim = store.dim(modality) if bridge is None else bridge.settings.width

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, numbers: np.ndarray) -> Tensor:
        """(n, dim) float32 unit vectors of some items, in the order given."""
        rows = self.rows[numbers]
        embeddings, lengths = self._store.embeddings(self._modality, rows), self._store.lengths(self._modality, rows)
        return unit_vectors(self._bridge, self._modality, embeddings, lengths)

    def chunks(self) -> Iterator[Tensor]:
        """All vectors, in order."""
        row = self._store.dim(self._modality) * (self._store.num_frames(self._modality) or 1)
        step = max(1, _CHUNK // max(row, self.dim))
        for start in range(0, len(self), step):
            yield self.take(np.arange(start, min(start + step, len(self))))


@torch.no_grad()
def unit_vectors(bridge: DiffGAP | None, modality: str, embeddings: Tensor, lengths: Tensor | None) -> Tensor:
    """(N, D) or (N, T, D) embeddings as (N, dim) float32 unit vectors, projected by the bridge's head if there is one.

    Of a sequence, the direction of the mean over its frames.
    """
    z = embeddings if bridge is None else bridge.project(modality, embeddings)
    z = pool(z, None if lengths is None or z.dim() == 2 else frame_mask(lengths, z.shape[1]))
    return F.normalize(z.float(), dim=-1)


def store_fingerprint(store: EmbeddingStore, modality: str) -> str:
    """Digest that tells whether an index belongs to a store: ids, groups, and embeddings of one modality.

    Every id and group, every number in the modality's column of rows, the encoder's fingerprint and shape count; of
    the embeddings, 4,096 at equal distances, so that opening an index stays cheap: a store whose other embeddings
    were changed and nothing else is not told apart.
    """
    digest = hashlib.sha256(f"{modality} {store.dim(modality)} {store.encoder(modality)}".encode())
    for column in ("id", "group"):
        digest.update("\0".join(store.column(column)).encode())
    digest.update(store.rows(modality).tobytes())
    present = store.present(modality)
    sample = present[:: max(1, -(-len(present) // _FINGERPRINT_ROWS))]
    digest.update(store.embeddings(modality, sample).numpy().tobytes())
    return digest.hexdigest()


def run_fingerprint(run: Path) -> str:
    """Digest of a run's model, weights and configuration."""
    digest = hashlib.sha256()
    for file in sorted(path for path in (run / "model").iterdir() if path.suffix in (".json", ".safetensors")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
