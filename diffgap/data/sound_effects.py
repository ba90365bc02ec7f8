"""The bundled sound effects: short recordings, their names as English captions, and for some a picture, as embeddings.

A row is one recording of one of eight Debian packages: the sounds of the Tux Paint stamps (animals, tools,
instruments), nearly all of which have a picture, and named samples of Sonic Pi, Scratch, LMMS, Hydrogen, Minetest,
LibreOffice and sound-icons, which have none. Captions are the stamp's text or the file's name, spelled out by the rule
in ``scripts/sound_effects_files.py``; rows of equal caption are of one group.

    audio   (R, 512) int8     aiSFX, mean over blocks (``AisfxAudio``)
    text    (C, 384) float16  all-MiniLM-L6-v2 of the caption (``MiniLMText``)
    image   (P, 1280) int8    EfficientNet-lite0, pooled (``EfficientNetImage``)

**The package gives much away.** Each package has its own kind of sounds and its own way of naming them, so a method
that knew only the package of every item would be far above chance (``chance_recall`` says how far). Read results
beside that level, and use ``split="source"``, whose test packages were not seen in training, for how well names and
sounds are matched at all.

The media are not in the repository; ``scripts/build_sound_effects.py`` makes these files from them and
``sound_effects/NOTICE`` names sources and licences.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow.parquet as pq

from diffgap.data._bundled import check_choice
from diffgap.data.store import EmbeddingStore

__all__ = ["MODALITIES", "NUM_SEEDS", "SOUND_EFFECTS_FOLDER", "chance_recall", "load_sound_effects"]

SOUND_EFFECTS_FOLDER = Path(__file__).parent / "sound_effects"
MODALITIES = ("audio", "text", "image")
NUM_SEEDS = 30
Split = Literal["concept", "source"]


def load_sound_effects(
    split: Split = "concept",
    seed: int = 0,
    modalities: Sequence[str] = MODALITIES,
    with_images: bool = False,
) -> EmbeddingStore:
    """Opens the bundled sound effects with the ``split`` column of one of the fixed train/val/test lists.

    ``split="concept"`` (default) deals captions 70/10/20. ``"source"`` deals whole packages, of which 15 to 30 % of
    the rows are for testing and 7 to 20 % for validation; there, rows of a caption that a package for testing (or
    validation) also has are left out of training, so that neither caption nor package was seen. In both, captions of
    nearly the same recording or picture are in one part. ``seed`` 0..29 picks the list.

    ``with_images`` keeps only the rows that have a picture: complete (image, audio, text) triples. Otherwise most rows
    lack the modality ``image`` (``store.present("image")`` has the others).

    Index columns: id (package and path without suffix), group, split, caption, source (package and version), package,
    licence, image_file ("" where there is none). Recordings of one caption share its text row. Embeddings are not
    normalised.

    Raises ValueError for an unknown split, seed or modality, and for ``with_images`` with ``split="source"``: all
    pictures are of one package.
    """
    check_choice(split, seed, modalities, splits=get_args(Split), num_seeds=NUM_SEEDS, known=MODALITIES)
    if with_images and split == "source":
        raise ValueError("with_images=True keeps one package, which 'source' cannot split; use split='concept'")
    stored = EmbeddingStore.open(SOUND_EFFECTS_FOLDER)
    parts = pq.read_table(SOUND_EFFECTS_FOLDER / "splits.parquet", columns=[f"{split}_{seed}"])[0].to_pylist()
    rows = stored.present("image") if with_images else range(len(stored))
    kept = [row for row in rows if parts[row] is not None]
    store = stored.select(kept)
    of_group = dict(zip(store.column("group"), [parts[row] for row in kept], strict=True))
    return store.with_split(of_group).only(modalities)


def chance_recall(store: EmbeddingStore, query: str, gallery: str, k: int, *, knowing: str = "package") -> float:
    """Recall at ``k`` that a method would have, on average, if it knew one index column of every item and nothing else.

    It would rank the n items that have a value in common with the query first, in random order: one of the m among them
    that are of the query's group is in the first k with probability ``1 - C(n - m, k) / C(n, k)``. Mean over the
    distinct ``query`` embeddings of ``store``, with its distinct ``gallery`` embeddings. A column of one value, such as
    "split" of one split, gives plain chance.
    """
    both = store.select(store.present(query, gallery))
    groups, values = both.column("group"), both.column(knowing)

    def items(modality: str) -> list[tuple[str, set[str]]]:
        """Group and values of every distinct embedding."""
        row = both.rows(modality)
        return [(groups[first], set(values[row == row[first]])) for first in both.unique_rows(modality)]

    targets, found = items(gallery), []
    for group, known in items(query):
        own = [other for other, theirs in targets if known & theirs]
        n, m = len(own), own.count(group)
        found.append(1 - comb(n - m, k) / comb(n, k) if k < n else 1.0)
    return float(np.mean(found))
