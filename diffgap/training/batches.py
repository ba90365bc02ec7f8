"""From the rows of an embedding store to what a bridge trains on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffgap.data.store import EmbeddingStore
from diffgap.models.bridge import DiffGAP


def fit_data(store: EmbeddingStore, bridge: DiffGAP) -> dict[str, Any]:
    """Keyword arguments of :meth:`DiffGAP.fit`: all rows of a store, whatever modalities each has."""
    batch = collate(store, bridge, torch.arange(len(store)))
    del batch["ids"]
    return batch


def collate(store: EmbeddingStore, bridge: DiffGAP, rows: Tensor, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Keyword arguments of :meth:`DiffGAP.forward` for index rows of a store; absent embeddings are zeros."""
    batch: dict[str, Any] = {"embeddings": {}, "present": {}, "lengths": {}, "ids": store.group_ids(rows).to(device)}
    for name in bridge.modalities:
        present = torch.from_numpy(store.rows(name))[rows] >= 0
        found = store.embeddings(name, rows[present])
        x = found.new_zeros(len(rows), *found.shape[1:])
        x[present] = found
        batch["embeddings"][name], batch["present"][name] = x.to(device), present.to(device)
        frames = store.lengths(name, rows[present])
        if frames is not None:
            lengths = torch.ones(len(rows), dtype=torch.int64)
            lengths[present] = frames
            batch["lengths"][name] = lengths.to(device)
    return batch
