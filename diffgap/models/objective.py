"""Bidirectional split training: which rows are denoised in which direction in one step.

A direction is a target modality and the source modalities it is recovered from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, combinations
from typing import NamedTuple

import torch
from torch import Tensor

from diffgap.models.condition import Condition
from diffgap.models.randomness import STREAM_DIRECTION, pass_seeds, uniform
from diffgap.models.settings import SplitMode


class Direction(NamedTuple):
    """Modality indices: what is recovered, and from which others."""

    target: int
    sources: tuple[int, ...]


class DenoisingBatch(NamedTuple):
    """Rows that one denoiser call can take together.

    Attributes:
        clean: What is to be noised and recovered, (R, D) or (R, T, D).
        clean_mask: (R, T) bool, the frames that are there; ``None`` for vectors.
        target: (R,) int64, its modality.
        conditions: What it is recovered from: vectors in slots, each row's own modality in each, then sequences.
        seeds: (R,) int64, for all that is random.
    """

    clean: Tensor
    clean_mask: Tensor | None
    target: Tensor
    conditions: list[Condition]
    seeds: Tensor


class _Passes(NamedTuple):
    """Rows to denoise, P of them: one for each direction that a row is trained in.

    Attributes:
        row: (P,) int64, in the batch.
        seeds: (P,) int64.
        target: (P,) int64 modality.
        sources: (P, modalities) bool.
    """

    row: Tensor
    seeds: Tensor
    target: Tensor
    sources: Tensor

    def pick(self, index: Tensor) -> _Passes:
        return _Passes(*(x.index_select(0, index) for x in self))


class _Layout(NamedTuple):
    """The tensors a denoiser call needs for a direction: rows of one layout go together, whatever their vectors are."""

    target: int | None
    """The sequence modality that is recovered; ``None`` for vectors."""
    vectors: bool
    """Whether there are vectors among the sources."""
    sequences: tuple[int, ...]
    """The sequence modalities among the sources."""


def frames_present(mask: Tensor) -> Tensor:
    """(B,) bool from a mask (B,) of vectors or (B, T) of frames: the rows that have something."""
    return mask if mask.dim() == 1 else mask.any(1)


def all_directions(allowed: Sequence[Sequence[bool]], *, several: bool) -> list[Direction]:
    """The directions that training takes, one source each or, with ``several``, any non-empty set of sources.

    Args:
        allowed: ``allowed[target][source]``: whether that pair is trained.
    """
    found = []
    for target, row in enumerate(allowed):
        sources = [source for source, trained in enumerate(row) if trained and source != target]
        subsets = _subsets(sources) if several else combinations(sources, 1)
        found += [Direction(target, subset) for subset in subsets]
    return found


def _subsets(items: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All but the empty one, small ones first."""
    return chain.from_iterable(combinations(items, size) for size in range(1, len(items) + 1))


def split_directions(mode: SplitMode, complete: Tensor, seeds: Tensor, step: int) -> Tensor:
    """The directions each row is trained in: int64 (passes, B), rows of ``complete``.

    ``alternate``: all rows in one direction, the next one at the next step. ``half``: an equal share of the rows of a
    call in each direction, by their order. ``random``: one drawn for each row, of those it has everything for.
    ``joint``: every row in every direction.

    Args:
        complete: (directions, B) bool: whether the row has the target and all sources.
        seeds: (B,) int64.
        step: Training step.
    """
    directions, rows = complete.shape
    numbers = torch.arange(max(directions, rows), device=complete.device)
    if mode == "joint":
        return numbers[:directions, None].expand(directions, rows)
    if mode == "alternate":
        return numbers.new_full((1, rows), step % directions)
    if mode == "half":
        # Turned by the step, so that a batch smaller than the number of directions reaches them all in time.
        return ((numbers[:rows] * directions // max(rows, 1) + step) % directions)[None]
    drawn = (uniform(seeds, 1, STREAM_DIRECTION)[:, 0] * complete.sum(0)).long()
    # As many directions come before the wanted one as have at most `drawn` complete ones up to themselves.
    index = (complete.cumsum(0) <= drawn).sum(0)
    return index.clamp(max=directions - 1)[None]


def denoising_batches(
    embeddings: Mapping[int, Tensor],
    masks: Mapping[int, Tensor],
    directions: Sequence[Direction],
    modalities: int,
    *,
    split: SplitMode,
    step: int,
    seeds: Tensor,
    complete: bool = False,
) -> Iterator[DenoisingBatch]:
    """Assign directions to the rows of a batch and gather what each is denoised from and towards.

    A row that lacks a direction's target, or all of its sources, takes no part in it; one that lacks some of several
    sources is conditioned on the others (under ``random`` and ``joint`` it has directions of its own for what is
    there). How many batches there are does not depend on the rows, so that all processes call the denoiser equally
    often; a batch may be empty.

    Args:
        embeddings: By modality index, (B, D) vectors or (B, T, D) sequences.
        masks: By modality index, (B,) or (B, T) bool, True where there is something.
        directions: To choose from.
        modalities: Number of modality indices.
        split: See :func:`split_directions`.
        step: Training step.
        seeds: (B,) int64, one a row.
        complete: Every row has every modality, so that nothing needs to be looked up.
    """
    present = next(iter(masks.values())).new_zeros(modalities, len(seeds))
    for index, mask in masks.items():
        present[index] = frames_present(mask)
    passes, taken = _passes(present, directions, split, seeds, step)
    vectors = [index for index, x in embeddings.items() if x.dim() == 2]
    sequences = [index for index, x in embeddings.items() if x.dim() == 3]
    possible = [directions[step % len(directions)]] if split == "alternate" else directions
    whole = complete or split in _OWN_DIRECTIONS
    layouts = {
        _Layout(
            direction.target if direction.target in sequences else None,
            any(source in vectors for source in subset),
            tuple(source for source in subset if source in sequences),
        )
        for direction in possible
        for subset in ([direction.sources] if whole else _subsets(direction.sources))
        if {direction.target, *subset} <= embeddings.keys()
    }
    slots = max(sum(source in vectors for source in direction.sources) for direction in possible)
    stacked = _stacked(embeddings, vectors, modalities)
    for layout in sorted(layouts, key=str):
        if complete and len(layouts) == 1:
            own = passes
        else:
            own = passes.pick((taken & _has(layout, passes, vectors, sequences)).nonzero().squeeze(1))
        given = []
        if layout.vectors:
            of_vectors = own.sources & _members(vectors, own.sources)
            # True sorts before False: a row's own vectors first.
            here, source = of_vectors.int().sort(dim=1, descending=True, stable=True)
            for slot in range(slots):
                modality, known = source[:, slot], here[:, slot].bool()
                given.append(Condition(stacked[modality, own.row], modality, None if slot == 0 else known))
        given += [Condition(embeddings[m][own.row], m, masks[m][own.row]) for m in layout.sequences]
        yield DenoisingBatch(
            clean=stacked[own.target, own.row] if layout.target is None else embeddings[layout.target][own.row],
            clean_mask=None if layout.target is None else masks[layout.target][own.row],
            target=own.target,
            conditions=given,
            seeds=own.seeds,
        )


#: Splits that give a row only directions that it has everything for.
_OWN_DIRECTIONS = ("random", "joint")


def _passes(
    present: Tensor, directions: Sequence[Direction], split: SplitMode, seeds: Tensor, step: int
) -> tuple[_Passes, Tensor]:
    """The directions of all rows, and which of them take part (P,)."""
    modalities, rows = present.shape
    target_of = torch.tensor([target for target, _ in directions], device=present.device)
    sources_of = present.new_tensor([[m in sources for m in range(modalities)] for _, sources in directions])
    complete = present[target_of] & (present | ~sources_of[..., None]).all(1)
    chosen = split_directions(split, complete, seeds, step)
    passes = _Passes(
        torch.arange(rows, device=present.device).repeat(len(chosen)),
        pass_seeds(seeds, len(chosen)).flatten(),
        target_of[chosen].flatten(),
        (sources_of[chosen] & present.T).flatten(0, 1),
    )
    if split in _OWN_DIRECTIONS:
        return passes, complete.gather(0, chosen).flatten()
    return passes, present[passes.target, passes.row] & passes.sources.any(1)


def _members(modalities: Sequence[int], sources: Tensor) -> Tensor:
    """(modalities,) bool: those named."""
    return sources.new_tensor([m in modalities for m in range(sources.shape[1])])


def _has(layout: _Layout, passes: _Passes, vectors: Sequence[int], sequences: Sequence[int]) -> Tensor:
    """(P,) bool: the passes of a layout."""
    of_vectors = (passes.sources & _members(vectors, passes.sources)).any(1)
    wanted = _members(layout.sequences, passes.sources)
    of_sequences = ((passes.sources == wanted) | ~_members(sequences, passes.sources)).all(1)
    if layout.target is None:
        target = _members(vectors, passes.sources)[passes.target]
    else:
        target = passes.target == layout.target
    return target & (of_vectors == layout.vectors) & of_sequences


def _stacked(embeddings: Mapping[int, Tensor], vectors: Sequence[int], modalities: int) -> Tensor:
    """All vectors as (modalities, B, D), zeros for what is none."""
    some = next(iter(embeddings.values()))
    absent = some.new_zeros(len(some), some.shape[-1])
    return torch.stack([embeddings[m] if m in vectors else absent for m in range(modalities)])
