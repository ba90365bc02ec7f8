"""The bundled real data: spoken descriptions, English captions and images of the Tux Paint stamps, as
embeddings.

A recording is one row: one description of one stamp, spoken by a person in one of nine languages (be bg ca da
el es fr ro ru). Its caption is the stamp's English text, its image the stamp's own picture; rows of equal
caption are of one group.

    audio   (R, 1024) int8   Whisper-base encoder, pooled (``WhisperSpeech``), then ``project_speech``
    text    (R, 384) float16 all-MiniLM-L6-v2 of the English caption (``MiniLMText``)
    image   (R, 1280) int8   EfficientNet-lite0, pooled (``EfficientNetImage``)

The media are not in the repository; ``scripts/build_stamps.py`` makes these files from them and
``stamps/NOTICE`` names their source and licence.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from diffgap.data._bundled import check_choice
from diffgap.data.store import EmbeddingStore

__all__ = ["MODALITIES", "NUM_SEEDS", "STAMPS_FOLDER", "load_stamps", "project_speech"]

STAMPS_FOLDER = Path(__file__).parent / "stamps"
MODALITIES = ("audio", "text", "image")
NUM_SEEDS = 30
Split = Literal["concept", "folder"]


def load_stamps(
    split: Split = "concept",
    seed: int = 0,
    modalities: Sequence[str] = MODALITIES,
    center_languages: bool = True,
) -> EmbeddingStore:
    """Opens the bundled stamps with the ``split`` column of one of the fixed train/val/test lists (70/10/20).

    ``split="concept"`` (default) keeps every English caption in one part; ``"folder"`` keeps every folder of
    the collection (birds, fruit, tools ...) in one part and is much harder for images. In both, captions that
    share a recording or hold nearly the same one or the same picture are in one part too. ``seed`` 0..29 picks
    the list. ``center_languages`` subtracts from each recording the mean of the training recordings of its
    language, without which the languages are far apart and a linear map must spend itself on that.

    Index columns: id (path of the recording without ``.ogg``), group, split, caption, source, language,
    category, folder, image_file (path of the picture). Recordings of one stamp share its image row and
    recordings of one caption share its text row; a recording used by several stamps is one audio row.
    Embeddings are float32 in memory, not normalised.

    Raises ValueError for an unknown split, seed or modality.
    """
    check_choice(split, seed, modalities, splits=get_args(Split), num_seeds=NUM_SEEDS, known=MODALITIES)
    lists = pq.read_table(STAMPS_FOLDER / "splits.parquet", columns=["group", f"{split}_{seed}"])
    parts = dict(zip(*(column.to_pylist() for column in lists.columns), strict=True))
    stored = EmbeddingStore.open(STAMPS_FOLDER).with_split(parts)
    index, arrays = stored.index, {}
    for name in modalities:
        first = stored.unique_rows(name)
        embeddings = stored.embeddings(name, first).numpy()
        if name == "audio" and center_languages:
            language, train = stored.column("language")[first], stored.column("split")[first] == "train"
            embeddings = subtract_means(embeddings, language, train)
        # Rows of the file in the order of `first`.
        order = np.empty(len(first), dtype=np.int64)
        order[stored.rows(name)[first]] = np.arange(len(first))
        arrays[name] = embeddings
        index = index.append_column(f"row_{name}", [order[stored.rows(name)]])
    return EmbeddingStore.from_arrays(arrays, index, encoders={name: stored.encoder(name) for name in modalities})


def project_speech(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Reduces speech features (n, 3584) of ``WhisperSpeech`` to the (n, 1024) of the bundled set, float32.

    ``y = ((x - mean) / deviation) @ basis``: 1,024 principal axes of the standardised features, over the
    square root of 3,584 so that a typical recording has norm about 1. Fitted on the recordings of category
    "symbols" (letters, numbers, signs), which belong to no split, so that no concept of the set took part.
    Raises ValueError for another width.
    """
    return project(features, "speech_projection.npz", "WhisperSpeech")


def project(features: npt.NDArray[np.float32], file: str, maker: str) -> npt.NDArray[np.float32]:
    """``((x - mean) / deviation) @ basis`` with the statistics in a file of the stamps' folder.

    Raises ValueError for another width than those of the features that ``maker`` gives.
    """
    mean, deviation, basis = _projection(file)
    if features.ndim != 2 or features.shape[1] != len(mean):
        raise ValueError(f"features must have shape (n, {len(mean)}), from {maker}; got {features.shape}")
    return np.asarray(((features - mean) / deviation) @ basis, dtype=np.float32)


@cache
def _projection(name: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """mean (D,), deviation (D,) and basis (D, d)."""
    with np.load(STAMPS_FOLDER / name, allow_pickle=False) as file:
        return file["mean"], file["deviation"], file["axes"].astype(np.float32).T * file["scale"]


def subtract_means(
    rows: npt.NDArray[np.float32], labels: npt.NDArray[np.object_], train: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float32]:
    """Rows less the mean of the training rows of the same label."""
    centred = rows.copy()
    for label in np.unique(labels.astype(str)):
        of_label = labels == label
        centred[of_label] -= rows[of_label & train].mean(axis=0)
    return centred
