"""The spoken descriptions of the bundled stamps as sequences: one embedding for every 160 ms of a recording.

For bridges of sequences (B, T, D), such as between CAVP's frames. Two of the nine languages of ``load_stamps``, Spanish
and French; the same captions and the same train, validation and test lists.

    audio   (R, 16, 192) int8 with lengths   Whisper-base encoder, averaged over 8 of its 20-ms frames
                                             (``average_frames``), then ``project_frames``

A recording is cut after 16 frames, 2.56 s, which nine in ten are shorter than. ``scripts/build_stamps_frames.py`` makes
the file from the media.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from diffgap.data.stamps import STAMPS_FOLDER, Split, load_stamps, project, subtract_means
from diffgap.data.store import EmbeddingStore

__all__ = ["FRAMES_FOLDER", "LANGUAGES", "MAX_FRAMES", "average_frames", "load_stamps_frames", "project_frames"]

FloatArray = npt.NDArray[np.float32]

FRAMES_FOLDER = STAMPS_FOLDER / "frames"
LANGUAGES = ("es", "fr")
MAX_FRAMES = 16
WINDOW = 8  # of the encoder's frames in one of ours: 160 ms, about a syllable


def load_stamps_frames(split: Split = "concept", seed: int = 0, *, by_language: bool = False) -> EmbeddingStore:
    """Opens the recordings as sequences, with their English captions; ``split`` and ``seed`` as in ``load_stamps``.

    A row is a recording, with modalities ``audio`` (R, 16, 192) and ``text`` (C, 384). With ``by_language`` a row is a
    stamp, with modalities ``audio_es``, ``audio_fr`` (missing where the stamp has no such recording) and ``text``: two
    sequences that say the same at different lengths.

    From every frame the mean of all training frames of its language is subtracted, as ``load_stamps`` does with
    recordings. Frames beyond a recording's length are zero. Embeddings are float32 in memory, not normalised.

    Raises ValueError for an unknown split or seed.
    """
    stored = EmbeddingStore.open(FRAMES_FOLDER)
    stamps = load_stamps(split, seed, ["text"])
    at = {name: row for row, name in enumerate(stamps.column("id"))}
    spoken = stamps.select([at[name] for name in stored.column("id")])
    sequences, lengths = _centred(stored, spoken)

    index, rows = spoken.index, {"audio": stored.rows("audio")}
    row_text = spoken.rows("text")
    if by_language:
        names = np.array([name.rpartition("_desc_")[0] for name in spoken.column("id")])
        ids, first, number = np.unique(names, return_index=True, return_inverse=True)
        index = index.take(first).drop_columns(["id", "language"]).append_column("id", [ids])
        row_text, every = row_text[first], rows["audio"]
        rows = {f"audio_{language}": np.full(len(ids), -1) for language in LANGUAGES}
        for row, stamp, language in zip(every, number, spoken.column("language"), strict=True):
            rows[f"audio_{language}"][stamp] = row

    arrays, counts = {"text": stamps.embeddings("text", stamps.unique_rows("text")).numpy()}, {}
    index = index.append_column("row_text", [row_text])
    for name, row in rows.items():
        kept = np.unique(row[row >= 0])
        arrays[name], counts[name] = sequences[kept], lengths[kept]
        index = index.append_column(f"row_{name}", [np.where(row < 0, -1, np.searchsorted(kept, row))])
    encoders = dict.fromkeys(rows, stored.encoder("audio")) | {"text": stamps.encoder("text")}
    return EmbeddingStore.from_arrays(arrays, index, lengths=counts, encoders=encoders)


def _centred(stored: EmbeddingStore, spoken: EmbeddingStore) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Sequences (R, 16, 192) and lengths (R,) in the order of the file, less the training mean of their language."""
    first = stored.unique_rows("audio")  # a row of the index for each of the file
    sequences, lengths = stored.embeddings("audio", first).numpy(), stored.lengths("audio", first)
    assert lengths is not None
    here = np.arange(MAX_FRAMES) < lengths.numpy()[:, None]
    row = first[here.nonzero()[0]]  # of each frame
    train = spoken.column("split") == "train"
    centred = np.zeros_like(sequences)
    centred[here] = subtract_means(sequences[here], spoken.column("language")[row], train[row])
    return centred, lengths.numpy()


def project_frames(features: FloatArray) -> FloatArray:
    """Reduces averaged frames (n, 512) of Whisper's encoder to the (n, 192) of the bundled set, float32.

    The formula of ``project_speech``, fitted on frames of the same category. Raises ValueError for another width.
    """
    return project(features, "frame_projection.npz", "average_frames")


def average_frames(frames: FloatArray) -> FloatArray:
    """The encoder's frames (T, D) of a recording as (min(ceil(T / 8), 16), D): the mean of every 8, at the end of those
    that are left."""
    kept = frames[: WINDOW * MAX_FRAMES]
    starts = np.arange(0, len(kept), WINDOW)
    counts = np.diff(np.append(starts, len(kept)))
    return np.asarray(np.add.reduceat(kept, starts, axis=0) / counts[:, None], dtype=np.float32)
