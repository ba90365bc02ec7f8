"""Features kept from one evaluation to the next, never from one network, preparation or recording to another."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from diffgap._files import atomic_file
from diffgap.generation.metrics.backbone import Backbone
from diffgap.generation.metrics.clips import Clip

__all__ = ["FeatureCache"]


class FeatureCache:
    """A folder with one file for each (content of a clip, fingerprint and preparation of a backbone).

    The name of the clip plays no part: a file that was written anew under its old name is described anew. ``reused``
    and ``computed`` count what was found and what was added. ``folder`` None keeps nothing.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self._folder = None if folder is None else Path(folder)
        self.reused = self.computed = 0

    def get(self, clip: Clip, backbone: Backbone) -> dict[str, npt.NDArray[np.float32]] | None:
        """What ``put`` kept, or None. Raises ValueError for a file that is damaged or of another backbone."""
        from safetensors import SafetensorError, safe_open

        path = self._path(clip, backbone)
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                kept = file.metadata() or {}
                values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"cached features {path} are damaged; delete the file: {error}") from error
        if kept != _about(backbone) or set(values) != set(backbone.outputs):
            raise ValueError(f"cached features {path} are not of {backbone.fingerprint}; delete the file")
        self.reused += 1
        return values

    def put(self, clip: Clip, backbone: Backbone, values: dict[str, npt.NDArray[np.float32]]) -> None:
        """Keeps ``values``."""
        from safetensors.numpy import save_file

        self.computed += 1
        path = self._path(clip, backbone)
        if path is not None:
            with atomic_file(path) as temporary:
                save_file(values, temporary, metadata=_about(backbone))

    def _path(self, clip: Clip, backbone: Backbone) -> Path | None:
        if self._folder is None or not clip.sha256:
            return None
        key = hashlib.sha256("\n".join(_about(backbone).values()).encode()).hexdigest()
        return self._folder / key[:32] / f"{clip.sha256}.safetensors"


def _about(backbone: Backbone) -> dict[str, str]:
    return {"fingerprint": backbone.fingerprint, "preparation": backbone.reader.description}
