"""A small set of generated sounds, made by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile

from diffgap.generation.generated import GeneratedItem, GeneratedSet

RATE = 16_000
HOSTILE = '</script><script>document.title = "broken"</script><!-- &amp; " \''
CAPTIONS = ("a dog barks", HOSTILE, "a bell", "rain on a roof", "a very long caption of a street " * 5)

MakeSet = Callable[..., GeneratedSet]


def make_set(
    folder: Path,
    systems: tuple[str, ...] = ("reference", "bridged", "raw"),
    count: int = 5,
    seconds: float = 0.3,
    rate: int = RATE,
) -> GeneratedSet:
    """A set whose sounds are tones of a pitch and a level of their own."""
    items = tuple(
        GeneratedItem(f"{number:04d}-clip", f"row{number}", CAPTIONS[number % 5], f"class {number}", seconds)
        for number in range(count)
    )
    time = np.arange(round(seconds * rate)) / rate
    for place, system in enumerate(systems):
        (folder / system).mkdir(parents=True)
        for number, item in enumerate(items):
            tone = 0.9 / (1 + place) * np.sin(2 * np.pi * (200 + 40 * number + 300 * place) * time)
            wavfile.write(folder / system / f"{item.name}.wav", rate, tone.astype(np.float32))
    found = GeneratedSet(folder, rate, "text", systems, items, {"generator": "tones"})
    found.write()
    return GeneratedSet.open(folder)


@pytest.fixture
def generated(tmp_path: Path) -> GeneratedSet:
    return make_set(tmp_path / "set")
