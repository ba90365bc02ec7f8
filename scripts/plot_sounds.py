"""Spectrograms of a set of generated sounds as one picture: a row an item, a column a system.

python scripts/plot_sounds.py SET picture.png --items 6 --seed 0
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import soundfile

from diffgap.generation.generated import GeneratedSet
from diffgap.generation.mel import MelSettings

_LEAST = 1e-3
"""Magnitude that is drawn black."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--items", type=int, default=6, help="drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--systems", nargs="+", help="all by default")
    arguments = parser.parse_args()
    found = GeneratedSet.open(arguments.set)
    settings = MelSettings(sample_rate=found.sample_rate, high=found.sample_rate / 2)
    systems = arguments.systems or found.systems
    chosen = np.random.default_rng(arguments.seed).permutation(len(found.items))[: arguments.items]
    size = (1.9 * len(systems), 1.3 * len(chosen) + 0.4)
    figure, axes = plt.subplots(len(chosen), len(systems), figsize=size, squeeze=False, layout="constrained")
    for row, number in zip(axes, sorted(chosen), strict=True):
        item = found.items[number]
        for axis, system in zip(row, systems, strict=True):
            wave = soundfile.read(found.path(system, item), dtype="float32")[0]
            extent = (0.0, item.seconds, 0.0, 1.0)
            axis.imshow(
                settings.log_mel(wave).T, origin="lower", aspect="auto", extent=extent, cmap="magma",
                vmin=np.log(_LEAST), vmax=np.log(_LEAST) + 7,
            )  # fmt: skip
            axis.set(yticks=[])
            axis.tick_params(labelsize=6)
        label = f" [{item.label}]" if item.label else ""
        row[0].set_ylabel(f"{item.caption[:24]}\n{label}", fontsize=6)
    for axis, system in zip(axes[0], systems, strict=True):
        axis.set_title(system, fontsize=8)
    figure.supxlabel("seconds", fontsize=7)
    figure.savefig(arguments.picture, dpi=110)


if __name__ == "__main__":
    main()
