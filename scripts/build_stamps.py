"""Rebuilds the bundled stamps data set (``diffgap/data/stamps``) from Debian's package of the media.

    apt-get download tuxpaint-stamps-default=2022.06.04-1
    dpkg-deb -x tuxpaint-stamps-default_2022.06.04-1_all.deb media
    pip install -e '.[offline]'
    python scripts/build_stamps.py media

The embeddings are those of ``diffgap embed stamps``; this makes the split lists too. About ten minutes on two cores; an
interrupted build goes on where it stopped. The saved speech projection is used again, so that a rebuild gives the same
vectors; ``--refit`` fits it anew.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from stamps_splits import near_pairs, split_lists

from diffgap.data.items.stamps import EXCLUDED, LANGUAGES, Stamp, find_media, scan
from diffgap.data.stamps import NUM_SEEDS, STAMPS_FOLDER
from diffgap.data.store import EmbeddingStore, write_store
from diffgap.embed.stamps import embed_stamps
from diffgap.encoders import Encoder
from diffgap.encoders.offline import WhisperSpeech

FloatArray = npt.NDArray[np.float32]

EMBEDDED = "embedded"
PROJECTION = STAMPS_FOLDER / "speech_projection.npz"
SPEECH_DIM = 1024
NEAR = 0.95  # cosine from which two rows count as the same recording or picture
LEVELS = 7  # the projection's axes are integers in -7..7, which deflate to under 4 bits each


class Cache:
    """Embeddings of one encoder by the content of the file, one small file each, kept across runs."""

    def __init__(self, embed: Callable[[Path], FloatArray], fingerprint: str, folder: Path) -> None:
        self._embed = embed
        self._folder = folder / fingerprint.replace(":", "-")
        self._folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def of(cls, encoder: Encoder, folder: Path) -> Cache:
        """Of what the encoder makes of one file."""
        return cls(lambda item: np.asarray(encoder.encode([item])[0]), encoder.fingerprint, folder)

    def __call__(self, item: Path) -> FloatArray:
        """The embedding of a file."""
        path = self._folder / f"{hashlib.sha256(item.read_bytes()).hexdigest()}.npy"
        if not path.is_file():
            partial = path.with_suffix(".partial")
            with open(partial, "wb") as file:
                np.save(file, self._embed(item))
            os.replace(partial, path)
        return np.asarray(np.load(path), dtype=np.float32)


def recordings_outside(stamps: list[Stamp], kept: Iterable[Path], languages: Sequence[str]) -> list[Path]:
    """Distinct recordings of the excluded category, to fit projections on.

    A few are in a split too, under another stamp: those take no part.
    """
    split = {path.read_bytes() for path in kept}
    symbols = [stamp.recordings for stamp in stamps if stamp.category == EXCLUDED]
    paths = [path for spoken in symbols for language, path in spoken.items() if language in languages]
    return list({content: path for path in paths if (content := path.read_bytes()) not in split}.values())


def fit_projection(features: FloatArray, path: Path, dim: int) -> None:
    """Writes the statistics of ``project``; the ``dim`` principal axes are stored as small integers."""
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    _, _, axes = np.linalg.svd((features - mean) / deviation, full_matrices=False)
    axes = axes[:dim]
    axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]
    step = np.abs(axes).max(axis=1) / LEVELS
    np.savez_compressed(
        path,
        mean=mean.astype(np.float32),
        deviation=deviation.astype(np.float32),
        axes=np.rint(axes / step[:, None]).astype(np.int8),
        scale=(step / np.sqrt(features.shape[1])).astype(np.float32),
    )


def with_progress(items: list[Path], what: str, embed: Callable[[Path], FloatArray]) -> dict[Path, FloatArray]:
    """Embeds files one by one and prints how far it is."""
    found = {}
    for count, item in enumerate(items, 1):
        found[item] = embed(item)
        if count % 500 == 0 or count == len(items):
            print(f"{what}: {count} of {len(items)}", flush=True)
    return found


def inseparable(store: EmbeddingStore) -> list[tuple[str, str]]:
    """Pairs of groups that share a recording or hold nearly the same one (of one language) or picture."""
    groups, languages = store.column("group"), store.column("language")
    owners: dict[int, set[str]] = defaultdict(set)
    for row, group in zip(store.rows("audio"), groups, strict=True):
        owners[int(row)].add(group)
    pairs = {(min(found), name) for found in owners.values() for name in found - {min(found)}}
    print(f"{len(pairs)} pairs of captions share a recording: {sorted(pairs)}")
    for name in ("audio", "image"):
        first = store.unique_rows(name)
        parts = [first[languages[first] == language] for language in LANGUAGES] if name == "audio" else [first]
        for part in parts:
            rows = store.embeddings(name, part).numpy()
            rows = rows - rows.mean(axis=0) if name == "audio" else rows
            for a, b, cosine in near_pairs(rows, groups[part], NEAR):
                print(f"kept together ({name}, cosine {cosine:.3f}): {a} | {b}")
                pairs.add((a, b))
    return sorted(pairs)


def write(store: EmbeddingStore, work: Path) -> None:
    """Writes the store and its split lists to the package, every file by rename."""
    folders: dict[str, set[str]] = defaultdict(set)
    for group, folder in zip(store.column("group"), store.column("folder"), strict=True):
        folders[group].add(folder)
    lists = split_lists(folders, inseparable(store), NUM_SEEDS)
    parts = dict(zip(lists["group"], lists["concept_0"], strict=True))
    final = write_store(work / "store", store.with_split(parts), overwrite=True)
    pq.write_table(pa.table(lists), final / "splits.parquet")
    for path in sorted(final.iterdir()):
        partial = STAMPS_FOLDER / f".{path.name}.partial"
        partial.write_bytes(path.read_bytes())
        os.replace(partial, STAMPS_FOLDER / path.name)


def fit(media: Path, work: Path) -> None:
    """Fits the speech projection on the recordings that belong to no split."""
    stamps = scan(media)
    kept = [path for stamp in stamps if stamp.category != EXCLUDED for path in stamp.recordings.values()]
    symbols = recordings_outside(stamps, kept, LANGUAGES)
    features = with_progress(symbols, "speech of symbols", Cache.of(WhisperSpeech(), work))
    fit_projection(np.stack(list(features.values())), PROJECTION, SPEECH_DIM)
    # Of an interrupted build, made with the projection before; the fingerprint is Whisper's alone.
    shutil.rmtree(work / f"{EMBEDDED}.parts", ignore_errors=True)


def main() -> int:
    """Builds the data set; exit status 0, or 1 with one line on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("media", type=Path, help="folder the Debian package was extracted to")
    parser.add_argument("--work", type=Path, default=Path("build/stamps"), help="work folder (build/stamps)")
    parser.add_argument("--refit", action="store_true", help="fit the speech projection anew")
    options = parser.parse_args()
    try:
        media = find_media(options.media)
        if options.refit or not PROJECTION.is_file():
            fit(media, options.work)
        report = embed_stamps(media, options.work / EMBEDDED, overwrite=True)
    except (ModuleNotFoundError, ValueError) as error:
        print(f"build_stamps: {error}", file=sys.stderr)
        return 1
    assert report is not None  # there are no ranks
    print(f"left out: {report.left_out} recordings, {dict(report.failures)}")
    store = EmbeddingStore.open(report.output)
    write(store, options.work)
    print(f"{len(store)} recordings, {len(set(store.column('caption')))} captions")
    print(f"by language: {dict(Counter(store.column('language')))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
