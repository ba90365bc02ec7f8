from __future__ import annotations

import pytest
import torch

from diffgap.models.objective import denoising_batches, split_directions


@pytest.mark.parametrize("rows", [1, 7, 12])
def test_split_directions(rows: int) -> None:
    assert torch.equal(split_directions("joint", 3, rows, 5), torch.tensor([[0] * rows, [1] * rows, [2] * rows]))
    assert torch.equal(split_directions("alternate", 3, rows, 5), torch.full((1, rows), 2))
    half = split_directions("half", 3, rows, 0)
    counts = half.flatten().bincount(minlength=3)
    assert half.shape == (1, rows) and counts.max() - counts.min() <= 1
    random = split_directions("random", 3, rows, 0)
    assert random.shape == (1, rows) and random.min() >= 0 and random.max() < 3


def test_half_reaches_every_direction_in_time() -> None:
    seen = {int(split_directions("half", 6, 1, step)[0, 0]) for step in range(6)}
    assert seen == set(range(6))


@pytest.mark.parametrize("split", ["joint", "half", "random", "alternate"])
def test_denoising_batches_pair_rows_of_one_item(split: str) -> None:
    """Every value says which modality and row it is, so that the pairing can be read off."""
    rows, lengths = 5, (3, 4)
    mark = {m: 100.0 * m + torch.arange(rows).float() for m in range(4)}
    embeddings = {m: mark[m][:, None].expand(rows, 2) for m in (0, 1)}
    embeddings |= {m: mark[m][:, None, None].expand(rows, t, 2) for m, t in zip((2, 3), lengths, strict=True)}
    masks = {m: torch.ones(embeddings[m].shape[:-1], dtype=torch.bool) for m in embeddings}
    masks[1] = torch.tensor([True, True, True, True, False])
    masks[2][:, 2] = False
    total = 0
    for step in range(12):
        for part in denoising_batches(embeddings, embeddings, masks, 5, split=split, step=step):  # type: ignore[arg-type]
            clean, condition = (x.flatten(1)[:, 0] for x in (part.clean, part.condition))
            assert torch.equal(clean // 100, part.target.float())
            assert torch.equal(condition // 100, part.source.float())
            assert torch.equal(clean % 100, condition % 100), "target and condition are of one row"
            assert not (part.target == part.source).any()
            assert not ((clean == 104) | (condition == 104)).any(), "the absent row takes no part"
            assert (part.clean_mask is not None) == (part.clean.dim() == 3)
            if (part.target == 2).all():
                assert part.clean_mask is not None and not part.clean_mask[:, 2].any()
            total += len(part.target)
    # 12 directions of 5 rows; the absent row is lost to the 6 directions that modality 1 is in.
    expected = {"joint": 12 * (12 * 5 - 6), "alternate": 12 * 5 - 6}
    assert split not in expected or total == expected[split]
    assert total > 0


def test_nothing_present() -> None:
    embeddings = {0: torch.zeros(2, 3), 1: torch.zeros(2, 3)}
    masks = {0: torch.ones(2, dtype=torch.bool), 1: torch.zeros(2, dtype=torch.bool)}
    assert list(denoising_batches(embeddings, embeddings, masks, 2, split="joint", step=0)) == []
