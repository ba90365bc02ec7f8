"""diffgap: fused kernels and a small diffusion model that bridge text, video and audio embeddings.

The operations are in :mod:`diffgap.ops`; the names below are what most code needs. They are imported on first use, so
that ``import diffgap`` costs little beside ``import torch``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffgap._version import __version__

if TYPE_CHECKING:
    from diffgap.data.sound_effects import load_sound_effects
    from diffgap.data.stamps import load_stamps
    from diffgap.data.store import EmbeddingStore
    from diffgap.diffusion.schedule import NoiseSchedule
    from diffgap.integrations import (
        memory_efficient_attention,
        restore_attention,
        scaled_dot_product_attention,
        swap_attention,
    )
    from diffgap.losses import ClipLoss, SigLipLoss
    from diffgap.models.bridge import DiffGAP
    from diffgap.models.settings import BridgeSettings
    from diffgap.ops import adaln, attention, backend, explain
    from diffgap.ring_loss import ring_clip_loss, ring_siglip_loss

_HOMES = {
    "BridgeSettings": "diffgap.models.settings",
    "ClipLoss": "diffgap.losses",
    "DiffGAP": "diffgap.models.bridge",
    "EmbeddingStore": "diffgap.data.store",
    "NoiseSchedule": "diffgap.diffusion.schedule",
    "SigLipLoss": "diffgap.losses",
    "adaln": "diffgap.ops",
    "attention": "diffgap.ops",
    "backend": "diffgap.ops",
    "explain": "diffgap.ops",
    "load_sound_effects": "diffgap.data.sound_effects",
    "load_stamps": "diffgap.data.stamps",
    "memory_efficient_attention": "diffgap.integrations",
    "restore_attention": "diffgap.integrations",
    "ring_clip_loss": "diffgap.ring_loss",
    "ring_siglip_loss": "diffgap.ring_loss",
    "scaled_dot_product_attention": "diffgap.integrations",
    "swap_attention": "diffgap.integrations",
}

__all__ = [
    "BridgeSettings",
    "ClipLoss",
    "DiffGAP",
    "EmbeddingStore",
    "NoiseSchedule",
    "SigLipLoss",
    "__version__",
    "adaln",
    "attention",
    "backend",
    "explain",
    "load_sound_effects",
    "load_stamps",
    "memory_efficient_attention",
    "restore_attention",
    "ring_clip_loss",
    "ring_siglip_loss",
    "scaled_dot_product_attention",
    "swap_attention",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'diffgap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
