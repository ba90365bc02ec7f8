"""Bidirectional split training: which rows are denoised in which direction in one step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor

from diffgap.models.settings import SplitMode


class DenoisingBatch(NamedTuple):
    """Rows that one denoiser call can take together: all targets are vectors or one sequence modality, and all
    conditions likewise.

    Attributes:
        clean: What is to be noised and recovered, (R, D) or (R, T, D).
        clean_mask: (R, T) bool, the frames that are there; ``None`` for vectors.
        target: (R,) int64, its modality.
        condition: What it is recovered from, (R, D) or (R, T', D).
        condition_mask: (R, T') bool; ``None`` for vectors.
        source: (R,) int64, its modality.
    """

    clean: Tensor
    clean_mask: Tensor | None
    target: Tensor
    condition: Tensor
    condition_mask: Tensor | None
    source: Tensor


def frames_present(mask: Tensor) -> Tensor:
    """(B,) bool from a mask (B,) of vectors or (B, T) of frames: the rows that have something."""
    return mask if mask.dim() == 1 else mask.any(1)


def split_directions(mode: SplitMode, directions: int, rows: int, step: int) -> Tensor:
    """The directions each row is trained in: int64 (times, rows), values below ``directions``.

    ``alternate``: all rows in one direction, the next one at the next step. ``half``: an equal share of the rows in
    each direction. ``random``: one drawn for each row. ``joint``: every row in every direction.
    """
    if mode == "joint":
        return torch.arange(directions)[:, None].expand(directions, rows)
    if mode == "alternate":
        return torch.full((1, rows), step % directions)
    if mode == "half":
        # Turned by the step, so that a batch smaller than the number of directions reaches them all in time.
        return ((torch.arange(rows) * directions // max(rows, 1) + step) % directions)[None]
    return torch.randint(directions, (1, rows))


def denoising_batches(
    targets: Mapping[int, Tensor],
    conditions: Mapping[int, Tensor],
    masks: Mapping[int, Tensor],
    modalities: int,
    *,
    split: SplitMode,
    step: int,
) -> Iterator[DenoisingBatch]:
    """Assign directions to the rows of a batch and gather what each is denoised from and towards.

    Args:
        targets: By modality index, (B, D) vectors or (B, T, D) sequences, to be recovered.
        conditions: The same embeddings as conditions, perhaps corrupted; shapes of ``targets``.
        masks: By modality index, (B,) or (B, T) bool, True where there is something. Rows that lack the target or
            the source of their direction are left out.
        modalities: Number of modality indices.
        split: See :func:`split_directions`.
        step: Training step.
    """
    some = next(iter(targets.values()))
    rows, device = len(some), some.device
    present = torch.zeros(modalities, rows, dtype=torch.bool, device=device)
    for index, mask in masks.items():
        present[index] = frames_present(mask)
    directions = torch.tensor(list(permutations(sorted(targets), 2)), device=device)
    chosen = directions[split_directions(split, len(directions), rows, step).to(device)]  # (times, rows, 2)
    target, source = chosen.flatten(0, 1).unbind(1)
    row = torch.arange(rows, device=device).repeat(len(chosen))

    vectors = [index for index, x in targets.items() if x.dim() == 2]

    def stack(embeddings: Mapping[int, Tensor]) -> Tensor:
        """All vector modalities as (modalities, B, D), zeros elsewhere."""
        absent = some.new_zeros(rows, some.shape[-1])
        return torch.stack([embeddings[index] if index in vectors else absent for index in range(modalities)])

    stacked_targets, stacked_conditions = stack(targets), stack(conditions)
    # Vectors go together, whatever their modality; each sequence modality by itself.
    kind = torch.tensor([-1 if index in vectors else index for index in range(modalities)], device=device)
    key = torch.stack((kind[target], kind[source]), 1)
    key[~(present[target, row] & present[source, row])] = modalities

    for pair in key.unique(dim=0):
        target_kind, source_kind = pair.tolist()
        if target_kind == modalities:
            continue
        picked = (key == pair).all(1).nonzero().squeeze(1)
        row_, target_, source_ = row[picked], target[picked], source[picked]
        yield DenoisingBatch(
            clean=stacked_targets[target_, row_] if target_kind < 0 else targets[target_kind][row_],
            clean_mask=None if target_kind < 0 else masks[target_kind][row_],
            target=target_,
            condition=stacked_conditions[source_, row_] if source_kind < 0 else conditions[source_kind][row_],
            condition_mask=None if source_kind < 0 else masks[source_kind][row_],
            source=source_,
        )
