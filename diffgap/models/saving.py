"""Saving and loading of models: whole or not at all, and with one clear error for what is damaged."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any, cast

from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import nn
from typing_extensions import Self

from diffgap._files import atomic_folder

#: What loading raises on files that are damaged: of the weights, or by classes built from a configuration's values.
_DAMAGES = (SafetensorError, RuntimeError, TypeError, AttributeError, KeyError, MemoryError, ValueError)


class SavedModel(PyTorchModelHubMixin):
    """``save_pretrained`` and ``from_pretrained`` of the Hugging Face hub, made safe."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> str | None:
        """Write weights (safetensors) and configuration (JSON) to a folder, whole or not at all."""
        with atomic_folder(save_directory, overwrite=True) as folder:
            result: str | None = super().save_pretrained(folder, **options)
        return result

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path: str | os.PathLike[str], **options: Any
    ) -> Self:
        """Load what :meth:`save_pretrained` wrote, from a folder or by hub name; in evaluation mode.

        Raises:
            ValueError: The weights or the configuration are damaged, missing, or do not belong together.
        """
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the hub prints where it loads from
                model: Self = super().from_pretrained(str(path), **options)
        except FileNotFoundError:  # which the hub makes a ValueError too
            raise
        except _DAMAGES as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{path} does not hold a whole {cls.__name__} model ({reason}); save or fetch it again"
            ) from error
        cast(nn.Module, model).eval()
        return model
