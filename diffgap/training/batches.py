"""From the rows of an embedding store to what a bridge trains on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffgap.data.store import EmbeddingStore
from diffgap.models.bridge import DiffGAP


def paired_embeddings(store: EmbeddingStore, bridge: DiffGAP) -> dict[str, Tensor]:
    """The embeddings of the rows that have every modality of the bridge, for :meth:`DiffGAP.fit`.

    Raises:
        ValueError: No row has them all.
    """
    rows = store.present(*bridge.modalities)
    if not len(rows):
        raise ValueError(
            f"no training row has all of {', '.join(bridge.modalities)}; choose modalities that occur together"
        )
    return {name: store.embeddings(name, rows) for name in bridge.modalities}


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
