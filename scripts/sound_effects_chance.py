"""Prints what chance, and knowledge of the package alone, give on the test splits of the bundled sound effects.

    python scripts/sound_effects_chance.py [SEEDS]

Percent, mean over the first SEEDS (5) lists of each kind: the levels beside which retrieval on this set is to be read.
"""

from __future__ import annotations

import sys
from statistics import fmean

from diffgap.data.sound_effects import chance_recall, load_sound_effects

RANKS = (1, 5, 10)


def main() -> int:
    """Prints a table in Markdown."""
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print("| split | query -> gallery | items in the gallery | chance R@1/5/10 | the package alone R@1/5/10 |")
    print("|---|---|---|---|---|")
    for split in ("concept", "source"):
        tests = [load_sound_effects(split, seed, ("audio", "text")).split("test") for seed in range(seeds)]
        for query, gallery in (("audio", "text"), ("text", "audio")):
            sizes = [len(test.unique_rows(gallery)) for test in tests]
            levels = [
                "/".join(
                    f"{100 * fmean(chance_recall(test, query, gallery, k, knowing=column) for test in tests):.1f}"
                    for k in RANKS
                )
                for column in ("split", "package")
            ]
            print(f"| {split} | {query} -> {gallery} | {min(sizes)}-{max(sizes)} | {levels[0]} | {levels[1]} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
