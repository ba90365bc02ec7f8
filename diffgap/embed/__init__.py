"""Media into an embedding store: in batches, with worker processes, across ranks, and resumable at any moment."""

from __future__ import annotations

from diffgap.embed.pipeline import embed_items
from diffgap.embed.report import EmbedReport

__all__ = ["EmbedReport", "embed_items"]
