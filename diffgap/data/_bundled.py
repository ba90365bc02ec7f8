"""What the loaders of the bundled sets check of their arguments."""

from __future__ import annotations

from collections.abc import Sequence


def check_choice(
    split: str, seed: int, modalities: Sequence[str], *, splits: Sequence[str], num_seeds: int, known: Sequence[str]
) -> None:
    """Raises ValueError for a split, seed or modality that a bundled set does not have."""
    if split not in splits:
        raise ValueError(f"split {split!r} is unknown; choose {' or '.join(repr(name) for name in splits)}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < num_seeds:
        raise ValueError(f"seed {seed!r} has no split list; choose 0..{num_seeds - 1}")
    if not modalities or isinstance(modalities, str) or any(name not in known for name in modalities):
        raise ValueError(f"modalities {modalities!r} must be a sequence out of {', '.join(known)}")
