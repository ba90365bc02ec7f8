"""Embedding stores, importers and the bundled sample data."""

from __future__ import annotations

from diffgap.data.sound_effects import load_sound_effects
from diffgap.data.stamps import load_stamps
from diffgap.data.store import SPLITS, EmbeddingStore, write_store

__all__ = ["SPLITS", "EmbeddingStore", "load_sound_effects", "load_stamps", "write_store"]
