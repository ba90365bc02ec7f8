from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from diffgap.models.objective import (
    DenoisingBatch,
    Direction,
    all_directions,
    denoising_batches,
    frames_present,
    split_directions,
)
from diffgap.ops import sample_seeds

ROWS = 64
SPLITS = ["alternate", "half", "random", "joint"]


def all_true(size: int) -> list[list[bool]]:
    return [[True] * size for _ in range(size)]


def marked(rows: int = ROWS) -> dict[int, Tensor]:
    """Two vector and two sequence modalities; every value is 100 * modality + row."""
    marks = {m: 100.0 * m + torch.arange(rows).float() for m in range(4)}
    vectors = {m: marks[m][:, None].expand(rows, 2) for m in (0, 1)}
    return vectors | {m: marks[m][:, None, None].expand(rows, frames, 2) for m, frames in ((2, 3), (3, 4))}


def partial_masks(rows: int = ROWS) -> dict[int, Tensor]:
    """Every subset of the four modalities in turn; the last frame of modality 2 is never there."""
    present = {m: (torch.arange(rows) >> m) % 2 == 1 for m in range(4)}
    masks = {0: present[0], 1: present[1]}
    masks |= {m: present[m][:, None].repeat(1, frames) for m, frames in ((2, 3), (3, 4))}
    masks[2][:, 2] = False
    return masks


def seen(part: DenoisingBatch) -> list[tuple[int, Direction]]:
    """(row, direction) of every row of a batch, read off its values; its own account of them must agree."""
    clean = part.clean.flatten(1)[:, 0]
    found: list[set[int]] = [set() for _ in clean]
    for embedding, source, mask in part.conditions:
        marks = embedding.flatten(1)[:, 0]
        here = torch.ones(len(marks), dtype=torch.bool) if mask is None else frames_present(mask)
        modality = (marks / 100).floor().long()
        assert torch.equal(modality[here], torch.as_tensor(source).expand(len(marks))[here])
        assert torch.equal((marks % 100)[here], (clean % 100)[here]), "target and condition are of one row"
        for row in here.nonzero()[:, 0].tolist():
            assert int(modality[row]) not in found[row], "no source is shown twice"
            found[row].add(int(modality[row]))
    assert torch.equal((clean / 100).floor().long(), part.target)
    assert (part.clean_mask is not None) == (part.clean.dim() == 3)
    return [
        (int(mark) % 100, Direction(int(mark) // 100, tuple(sorted(sources))))
        for mark, sources in zip(clean, found, strict=True)
    ]


def test_all_directions() -> None:
    single = all_directions(all_true(3), several=False)
    assert single == [Direction(t, (s,)) for t, s in permutations(range(3), 2)]
    several = all_directions(all_true(3), several=True)
    assert several == [
        Direction(t, s) for t in range(3) for a, b in [sorted({0, 1, 2} - {t})] for s in ((a,), (b,), (a, b))
    ]
    only = [[False, True, False], [False, False, False], [True, True, False]]
    assert all_directions(only, several=True) == [(0, (1,)), (2, (0,)), (2, (1,)), (2, (0, 1))]


@pytest.mark.parametrize("rows", [0, 1, 7, 12])
def test_split_directions(rows: int) -> None:
    complete, seeds = torch.ones(3, rows, dtype=torch.bool), torch.arange(rows)
    assert torch.equal(
        split_directions("joint", complete, seeds, 5), torch.tensor([[0] * rows, [1] * rows, [2] * rows])
    )
    assert torch.equal(split_directions("alternate", complete, seeds, 5), torch.full((1, rows), 2))
    half = split_directions("half", complete, seeds, 0)
    counts = half.flatten().bincount(minlength=3)
    assert half.shape == (1, rows) and counts.max() - counts.min() <= 1
    random = split_directions("random", complete, seeds, 0)
    assert random.shape == (1, rows) and ((random >= 0) & (random < 3)).all()


def test_half_reaches_every_direction_in_time() -> None:
    complete = torch.ones(6, 1, dtype=torch.bool)
    assert {int(split_directions("half", complete, torch.zeros(1).long(), step)) for step in range(6)} == set(range(6))


def test_random_directions_are_uniform_over_what_a_row_has() -> None:
    rows = 9000
    complete = torch.tensor([[True, True], [False, True], [True, True]]).repeat_interleave(rows, 1)
    seeds = sample_seeds(2 * rows, torch.Generator().manual_seed(0))
    chosen = split_directions("random", complete, seeds, 0)[0]
    # Six standard deviations of a binomial count.
    assert (chosen[:rows].bincount(minlength=3) - torch.tensor([4500, 0, 4500])).abs().max() < 6 * 48
    assert not (chosen[:rows] == 1).any()
    assert (chosen[rows:].bincount() - 3000).abs().max() < 6 * 45


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_every_row_is_trained_in_what_it_has_and_nothing_else(split: str, several: bool) -> None:
    """All allowed directions, no other, none from or to what is absent; every subset of modalities in some row."""
    allowed = all_true(4)
    allowed[1] = [False] * 4  # never a target
    directions = all_directions(allowed, several=several)
    masks, embeddings = partial_masks(), marked()
    has = [{m for m in range(4) if masks[m][row].any()} for row in range(ROWS)]
    found: set[tuple[int, Direction]] = set()
    for step in range(len(directions)):
        seeds = sample_seeds(ROWS, torch.Generator().manual_seed(step))
        parts = denoising_batches(
            embeddings, masks, directions, 4, split=split, step=step, seeds=seeds  # type: ignore[arg-type]
        )  # fmt: skip
        for part in parts:
            pairs = seen(part)
            assert split == "joint" or len({row for row, _ in pairs}) == len(pairs)
            assert part.target.numel() == 0 or not (part.target == 2).all() or not part.clean_mask[:, 2].any()  # type: ignore[index]
            found.update(pairs)
    for row, direction in found:
        assert {direction.target, *direction.sources} <= has[row]
        assert direction in directions
    if split in ("alternate", "joint"):  # exactly what could be
        possible = {(r, d) for r in range(ROWS) for d in directions if {d.target, *d.sources} <= has[r]}
        assert found == possible
    assert {direction for _, direction in found} == set(directions)


def test_joint_shows_each_direction_once() -> None:
    directions = all_directions(all_true(4), several=True)
    embeddings = marked()
    seeds = sample_seeds(ROWS, torch.Generator().manual_seed(0))
    parts = denoising_batches(embeddings, partial_masks(), directions, 4, split="joint", step=0, seeds=seeds)
    pairs, keys = [], []
    for part in parts:
        pairs += seen(part)
        keys += part.seeds.tolist()
    assert len(pairs) == len(set(pairs)) and len(set(keys)) == len(keys), "each has a seed of its own"


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_complete_rows_need_no_look_up(split: str, several: bool) -> None:
    directions = all_directions(all_true(4), several=several)
    embeddings, seeds = marked(), torch.arange(ROWS)
    masks = {m: torch.ones(x.shape[:-1], dtype=torch.bool) for m, x in embeddings.items()}
    for some in ({0, 1}, {0, 1, 2, 3}):
        given = {m: embeddings[m] for m in some}
        own = [d for d in directions if {d.target, *d.sources} <= some]
        found = [
            sorted(
                pair
                for part in denoising_batches(
                    given, {m: masks[m] for m in some}, own, 4,
                    split=split, step=3, seeds=seeds, complete=complete,  # type: ignore[arg-type]
                )
                for pair in seen(part)
            )
            for complete in (False, True)
        ]  # fmt: skip
        assert found[0] == found[1] != []


@pytest.mark.parametrize("split", SPLITS)
def test_the_number_of_batches_does_not_depend_on_the_rows(split: str) -> None:
    """Processes that shard the denoiser must call it equally often."""
    directions = all_directions(all_true(4), several=True)
    masks, embeddings = partial_masks(), marked()
    nothing = {m: torch.zeros_like(mask) for m, mask in masks.items()}
    counts = []
    for own in (masks, nothing):
        parts = list(
            denoising_batches(
                embeddings, own, directions, 4, split=split, step=5, seeds=torch.arange(ROWS)  # type: ignore[arg-type]
            )
        )  # fmt: skip
        counts.append(len(parts))
    assert counts[0] == counts[1] > 0
    assert all(len(part.target) == 0 for part in parts), "nothing present, nothing trained"
