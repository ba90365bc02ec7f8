"""Media: where they are, how they are read, and why some of them cannot be."""

from __future__ import annotations

from diffgap.data.media.source import MediaError, Reader, Reason, Source

__all__ = ["MediaError", "Reader", "Reason", "Source"]
