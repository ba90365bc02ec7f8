"""Stores with a modality gap, and a small bridge over each, trained in a second, for the diagnostics to look at."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import normalize

from diffgap.data.store import EmbeddingStore
from diffgap.models.bridge import DiffGAP
from diffgap.training.batches import collate, fit_data
from tests.synthetic import TINY

#: Embeddings as two encoders of one contrastive space give them: the heads leave the gap to the bridge.
SETTINGS = replace(TINY, head="identity", contrastive="none", precondition="gaussian", sampling_steps=8)


def gapped_arrays(groups: int = 240, noise: float = 0.4) -> dict[str, torch.Tensor]:
    """Unit rows (groups, 16) of two modalities: one latent, turned and moved by each in its own way, with noise."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(groups, SETTINGS.width, generator=generator)
    arrays = {}
    for name in ("audio", "text"):
        turn = torch.linalg.qr(torch.randn(SETTINGS.width, SETTINGS.width, generator=generator)).Q
        offset = torch.randn(SETTINGS.width, generator=generator)
        own = noise * torch.randn(groups, SETTINGS.width, generator=generator)
        arrays[name] = normalize(latent @ turn + own + offset, dim=1)
    return arrays


def as_store(arrays: dict[str, torch.Tensor], **index: list[str]) -> EmbeddingStore:
    """Row i is group i; of four rows in turn two are for training, one for validation, one for the test."""
    count = len(next(iter(arrays.values())))
    columns = {"split": [("train", "train", "val", "test")[i % 4] for i in range(count)], **index}
    return EmbeddingStore.from_arrays(arrays, columns)


def trained(store: EmbeddingStore, steps: int = 100) -> DiffGAP:
    """A bridge over a store of two modalities, in evaluation mode."""
    train = store.split("train")
    torch.manual_seed(0)
    bridge = DiffGAP({name: store.dim(name) for name in store.modalities}, SETTINGS)
    bridge.fit(**fit_data(train, bridge))
    optimizer = torch.optim.AdamW(bridge.parameter_groups(0.05), lr=2e-3)
    bridge.train()
    for step in range(steps):
        rows = torch.randint(len(train), (64,))
        loss = bridge(**collate(train, bridge, rows), step=step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return bridge.eval()
