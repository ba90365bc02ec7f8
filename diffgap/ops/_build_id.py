"""Which sources a compiled library was built from, so that one that others left behind is refused before it is loaded.

setup.py hands the id to the linker (``--build-id``), which writes it into the library's first page. This file needs
the standard library alone, because setup.py runs it before diffgap and perhaps torch are installed.
"""

from __future__ import annotations

from hashlib import sha1
from pathlib import Path

__all__ = ["sources_id", "version_id"]


def version_id(version: str) -> bytes:
    """The id's first half: 8 bytes of the SHA-1 of diffgap's version."""
    return sha1(version.encode()).digest()[:8]


def sources_id(csrc: Path, library: str) -> bytes:
    """The id's second half: 12 bytes of the SHA-1 of what ``library`` (``_C_cpu``, ``_C_cuda``) is compiled from."""
    digest = sha1()
    for folder in (csrc / "common", csrc / library.rpartition("_")[2]):
        for file in sorted(folder.iterdir()):
            digest.update(f"{folder.name}/{file.name}\0".encode() + file.read_bytes() + b"\0")
    return digest.digest()[:12]
