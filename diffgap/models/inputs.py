"""What a bridge is given: embeddings by modality, which of them are there, and the checks of all that."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Inputs:
    """The modalities that a bridge knows.

    Attributes:
        dims: Width of each modality's embedding.
        sequences: Those that are sequences (B, T, D) rather than vectors (B, D).
    """

    dims: Mapping[str, int]
    sequences: Sequence[str]

    def check_names(self, reserved: Collection[str], width: int | None) -> None:
        """Raise ValueError for modalities that no bridge can have; ``width`` is what all of them need, if anything."""
        if len(self.dims) < 2:
            raise ValueError(
                f"modalities has {len(self.dims)} entries; a bridge needs two or more, e.g. audio and text"
            )
        for name, dim in self.dims.items():
            if not name.isidentifier() or name in reserved:
                raise ValueError(
                    f"modality name {name!r} is no identifier or an option of sample(); use letters and digits"
                )
            if dim < 1:
                raise ValueError(f"modality {name!r} has width {dim}; use 1 or more")
            if width is not None and dim != width:
                raise ValueError(
                    f"head 'identity' needs width {width} of every modality, but {name!r} has {dim}; "
                    "use head='linear' or change settings.width"
                )
        for name in self.sequences:
            if name not in self.dims:
                raise ValueError(f"sequences names {name!r}, which is not among the modalities {', '.join(self.dims)}")

    def known(self, modality: str) -> None:
        """Raise ValueError for a modality that the bridge does not have."""
        if modality not in self.dims:
            names = ", ".join(sorted(self.dims))
            raise ValueError(f"modality {modality!r} is unknown to this bridge; it has {names}")

    def check(self, modality: str, x: Tensor) -> None:
        """Raise ValueError unless ``x`` has the shape of the modality's embeddings, TypeError for another type."""
        self.known(modality)
        dim = self.dims[modality]
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{modality} is of type {got}; pass a floating-point tensor")
        expected = "(B, T, D)" if modality in self.sequences else "(B, D)"
        if x.dim() != len(expected.split(",")) or x.shape[-1] != dim:
            raise ValueError(f"{modality} has shape {tuple(x.shape)}; this bridge takes {expected} with D = {dim}")

    def check_rows(self, embeddings: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless these are embeddings of some of the modalities, equally many of each."""
        for name, x in embeddings.items():
            self.check(name, x)
        if len({len(x) for x in embeddings.values()}) != 1:
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in embeddings.items())
            raise ValueError(f"embeddings must have equally many rows of each modality; got {shapes or 'nothing'}")

    def checked(self, embeddings: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The embeddings after :meth:`check_rows`, in ``dtype``, the bridge's own."""
        self.check_rows(embeddings)
        return {name: x.to(dtype) for name, x in embeddings.items()}

    def check_sources(self, target: str, sources: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless ``target`` can be sampled from ``sources``."""
        self.known(target)
        example = next(name for name in sorted(self.dims) if name != target)
        if not sources:
            raise ValueError(f"give at least one source modality beside target {target!r}, e.g. {example}=...")
        self.check_rows(sources)
        if target in sources:
            raise ValueError(f"source and target are both {target!r}; use another source, e.g. {example}")

    def masks(
        self,
        embeddings: Mapping[str, Tensor],
        present: Mapping[str, Tensor | Sequence[bool]] | None,
        lengths: Mapping[str, Tensor | Sequence[int]] | None,
    ) -> dict[str, Tensor]:
        """By modality (B,) or (B, T) bool, the vectors or frames that are there; only where something may be missing.

        Raises:
            ValueError: ``present`` or ``lengths`` names what is not given, or has another shape or dtype.
            TypeError: their values are not numbers.
        """
        found: dict[str, Tensor] = {}
        for name, frames in (lengths or {}).items():
            x = _named("lengths", name, embeddings)
            if name not in self.sequences:
                raise ValueError(f"lengths names {name!r}, which is no sequence; leave it out")
            found[name] = frame_mask(integers(f"lengths of {name}", frames, x), x.shape[1])
        for name, here in (present or {}).items():
            x = _named("present", name, embeddings)
            here = _each(f"present of {name}", here, x)
            if here.dtype != torch.bool:
                raise ValueError(f"present of {name} is {here.dtype}; pass bool")
            if name in self.sequences:
                here = here[:, None].expand(x.shape[:2])
            found[name] = found[name] & here if name in found else here
        return found

    def lengths_by_name(
        self,
        lengths: Tensor | Sequence[int] | Mapping[str, Tensor | Sequence[int]] | None,
        sources: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor | Sequence[int]]:
        """``lengths`` by modality; those without one are of the only sequence among the sources.

        Raises:
            ValueError: No modality is named, and there is not one sequence.
        """
        if lengths is None or isinstance(lengths, Mapping):
            return lengths or {}
        sequences = [name for name in sources if name in self.sequences]
        if len(sequences) != 1:
            raise ValueError(
                f"lengths is one tensor, but the sequences given are {', '.join(sequences) or 'none'}; "
                "pass a dictionary by modality"
            )
        return {sequences[0]: lengths}

    def target_frames(
        self,
        target: str,
        frames: int | Tensor | Sequence[int] | None,
        sources: Mapping[str, Tensor],
        lengths: Mapping[str, Tensor | Sequence[int]],
    ) -> tuple[int | None, Tensor | None]:
        """How many frames T to sample, ``None`` for a vector, and which of them (B, T) bool, ``None`` for all.

        By default as many as the source has, if that is one sequence.

        Raises:
            ValueError: ``frames`` is missing, below 1 or of another shape.
        """
        if target not in self.sequences:
            return None, None
        if frames is None:
            given = [name for name in sources if name in self.sequences]
            if len(given) != 1:
                raise ValueError(
                    f"frames is not given, and the sources {', '.join(sources)} have no one number of frames to copy; "
                    f"give the number of frames to sample, as {target!r} is a sequence"
                )
            (source,) = given
            x = sources[source]
            if source not in lengths:
                return x.shape[1], None
            return x.shape[1], frame_mask(integers(f"lengths of {source}", lengths[source], x), x.shape[1])
        if isinstance(frames, int):
            if frames < 1:
                raise ValueError(f"frames is {frames}; use 1 or more")
            return frames, None
        each = integers(f"frames of {target}", frames, next(iter(sources.values())))
        count = int(each.max()) if len(each) else 1
        return count, frame_mask(each, count)


def _named(argument: str, name: str, embeddings: Mapping[str, Tensor]) -> Tensor:
    if name not in embeddings:
        raise ValueError(f"{argument} names {name!r}, of which no embeddings are given; got {', '.join(embeddings)}")
    return embeddings[name]


def _each(argument: str, values: Tensor | Sequence[Any], x: Tensor) -> Tensor:
    """``values``, a tensor, array or list with one number for each row of ``x``, as a tensor on its device."""
    if not isinstance(values, Tensor):
        try:
            values = torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{argument} is no list of numbers; pass a tensor ({len(x)},), one a row") from None
    if values.shape != (len(x),):
        raise ValueError(f"{argument} has shape {tuple(values.shape)}; pass ({len(x)},), one a row")
    return values.to(x.device)


def integers(argument: str, values: Tensor | Sequence[int], x: Tensor) -> Tensor:
    """``values`` as int64 (B,) on the device of ``x`` (B, ...).

    Raises:
        ValueError: they are of another shape, or no integers.
        TypeError: they are not numbers.
    """
    values = _each(argument, values, x)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{argument} is {values.dtype}; pass integers")
    return values.to(torch.int64)


def frame_mask(lengths: Tensor, frames: int) -> Tensor:
    """(B, frames) bool: the first ``lengths`` (B,) of each row."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def everything(x: Tensor) -> Tensor:
    """The mask (B,) or (B, T) of embeddings that are all there."""
    return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)


def hidden(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros where ``mask`` is False, whatever stands there, NaN too: neither values nor gradients come through."""
    return x if mask is None else x.masked_fill(~mask[..., None], 0.0)


def pool(z: Tensor, mask: Tensor | None) -> Tensor:
    """Unit mean (B, D) over the frames of z (B, T, D) that are there; a vector as it is."""
    return z if z.dim() == 2 else F.normalize(hidden(z, mask).sum(1), dim=-1)
