"""The space that a generator's conditions live in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from diffgap.data.store import EmbeddingStore
from diffgap.encoders import Encoder
from diffgap.models.bridge import DiffGAP
from diffgap.models.inputs import everything, pool
from diffgap.training.config import RunConfig
from diffgap.training.runs import is_run, load_bridge, load_data

__all__ = ["AudioSpace", "training_store"]


@dataclass(frozen=True, eq=False)
class AudioSpace:
    """Where conditions come from: the audio side of a bridge, or an audio encoder as it is.

    Attributes:
        bridge: What projects and translates into it; None where the encoder's own embeddings are the conditions.
        modality: The bridge's (and the store's) name of the audio side.
        encoder: Fingerprint of the audio encoder, as the embedding store has it; "" if it is not known.
        others: Fingerprints of the encoders of the bridge's other modalities, where they are known.
    """

    bridge: DiffGAP | None
    modality: str
    encoder: str
    others: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, bridge: str, modality: str, encoder: str) -> AudioSpace:
        """The space of a run folder or saved model; of the encoder itself if ``bridge`` is "".

        Raises:
            FileNotFoundError: There is no such bridge.
            ValueError: It does not know ``modality``, or was trained on what another encoder gives.
        """
        if not bridge:
            return cls(None, modality, encoder)
        model = load_bridge(Path(bridge))
        if modality not in model.modalities:
            raise ValueError(
                f"modality {modality!r} is unknown to bridge {bridge}; it has {', '.join(model.modalities)}"
            )
        store = training_store(Path(bridge))
        known = {} if store is None else {name: store.encoder(name) for name in model.modalities}
        own = known.pop(modality, "")
        if own and encoder and own != encoder:
            raise ValueError(f"bridge {bridge} was trained on {modality} embeddings of {own}; these are of {encoder}")
        return cls(model, modality, encoder or own, known)

    @property
    def fingerprint(self) -> str:
        """Tells one space from another: the trained head's digest where there is one, else the encoder."""
        state = {} if self.bridge is None else self.bridge.heads[self.modality].state_dict()
        if not state:
            return f"encoder:{self.encoder}"
        digest = hashlib.sha256()
        for name, value in sorted(state.items()):
            digest.update(name.encode() + value.detach().cpu().float().numpy().tobytes())
        return f"head:{digest.hexdigest()[:32]}"

    def heard_by(self, encoder: Encoder) -> AudioSpace:
        """The space with ``encoder`` as that of the audio side, if it is one and none is known yet."""
        return self if self.encoder or encoder.modality != self.modality else replace(self, encoder=encoder.fingerprint)

    @torch.no_grad()
    def project(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Audio embeddings (B, D) or (B, T, D) as unit vectors (B, width); those of a sequence are averaged."""
        z = F.normalize(x, dim=-1) if self.bridge is None else self.bridge.project(self.modality, x)
        if z.dim() == 2:
            return z
        inside = everything(z) if lengths is None else torch.arange(z.shape[1], device=z.device) < lengths[:, None]
        return pool(z, inside)


def training_store(bridge: Path) -> EmbeddingStore | None:
    """The embeddings that a run was trained on; None for a model without its run, or data that are gone."""
    if not is_run(bridge):
        return None
    try:
        return load_data(RunConfig.load(bridge / "config.yaml").data)
    except FileNotFoundError:
        return None
