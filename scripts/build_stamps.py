"""Rebuilds the bundled stamps data set (``diffgap/data/stamps``) from Debian's package of the media.

    apt-get download tuxpaint-stamps-default=2022.06.04-1
    dpkg-deb -x tuxpaint-stamps-default_2022.06.04-1_all.deb media
    pip install -e '.[offline]'
    python scripts/build_stamps.py media

About ten minutes on two cores. Embeddings are kept in the work folder as they are made, so an interrupted
build goes on where it stopped. The saved speech projection is used again, so that a rebuild gives the same
vectors; ``--refit`` fits it anew.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from stamps_splits import near_pairs, split_lists

from diffgap.data.stamps import NUM_SEEDS, STAMPS_FOLDER, project_speech
from diffgap.data.store import EmbeddingStore, write_store
from diffgap.encoders import Encoder
from diffgap.encoders.offline import EfficientNetImage, MiniLMText, WhisperSpeech

FloatArray = npt.NDArray[np.float32]

PROJECTION = STAMPS_FOLDER / "speech_projection.npz"
VERSION = "2022.06.04-1"
PACKAGE = "tuxpaint-stamps-default"
MEDIA_SHA256 = "91d5d12f3fc951f555127d8ebf5821381deed7f4c4cdb55c52f2d17e26675ff6"
# The other four languages have under 100 recordings each.
LANGUAGES = ("be", "bg", "ca", "da", "el", "es", "fr", "ro", "ru")
EXCLUDED = "symbols"  # letters of both cases and languages share recordings: not concepts of their own
SPEECH_DIM = 1024
NEAR = 0.95  # cosine from which two rows count as the same recording or picture
LEVELS = 7  # the projection's axes are integers in -7..7, which deflate to under 4 bits each
DTYPES = {"audio": "int8", "text": "float16", "image": "int8"}


@dataclass(frozen=True)
class Stamp:
    """One stamp: its name is the path below the stamps folder without a suffix."""

    name: str
    caption: str
    image: Path
    recordings: dict[str, Path] = field(repr=False)

    @property
    def folder(self) -> str:
        return self.name.rpartition("/")[0]

    @property
    def category(self) -> str:
        return self.name.partition("/")[0]


def find_media(root: Path) -> Path:
    """The stamps folder below an extracted package (or that folder itself), after its digest was checked."""
    below = root / "usr/share/tuxpaint/stamps"
    media = below if below.is_dir() else root
    files = sorted(p for p in media.rglob("*") if p.suffix in {".txt", ".png", ".svg", ".ogg"})
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(media).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest())
    if digest.hexdigest() != MEDIA_SHA256:
        raise ValueError(
            f"{media}: its {len(files)} media files are not those of {PACKAGE} {VERSION}; "
            f"get them with: apt-get download {PACKAGE}={VERSION} && dpkg-deb -x {PACKAGE}_*.deb DIR"
        )
    return media


def scan(media: Path) -> list[Stamp]:
    """Stamps with a text, a picture and a recording, by name; mirrored and flipped variants are left out."""
    stamps = []
    for text in sorted(media.rglob("*.txt")):
        if text.stem.endswith(("_mirror", "_flip")):
            continue
        pictures = [p for suffix in (".png", ".svg") if (p := text.with_suffix(suffix)).is_file()]
        spoken = {lang: text.with_name(f"{text.stem}_desc_{lang}.ogg") for lang in LANGUAGES}
        spoken = {lang: path for lang, path in spoken.items() if path.is_file()}
        if pictures and spoken:
            name = text.relative_to(media).with_suffix("").as_posix()
            caption = text.read_text(encoding="utf-8").splitlines()[0].strip()
            stamps.append(Stamp(name, caption, pictures[0], spoken))
    return stamps


class Cache:
    """Embeddings of one encoder by the content of the file, one small file each, kept across runs."""

    def __init__(self, embed: Callable[[Path], FloatArray], fingerprint: str, folder: Path) -> None:
        self._embed = embed
        self._folder = folder / fingerprint.replace(":", "-")
        self._folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def of(cls, encoder: Encoder, folder: Path) -> Cache:
        """Of what an encoder makes of one file."""
        return cls(lambda item: encoder.encode([item])[0], encoder.fingerprint, folder)

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


def render_all(stamps: list[Stamp], embed: Callable[[Path], FloatArray]) -> dict[str, FloatArray]:
    """Image embedding by stamp name; a stamp whose picture cannot be rendered is reported and left out."""
    images = {}
    for stamp in stamps:
        try:
            images[stamp.name] = embed(stamp.image)
        except ValueError as error:
            print(f"left out: {error}")
    return images


def with_progress(items: list[Path], what: str, embed: Callable[[Path], FloatArray]) -> dict[Path, FloatArray]:
    """Embeds files one by one and prints how far it is."""
    found = {}
    for count, item in enumerate(items, 1):
        found[item] = embed(item)
        if count % 500 == 0 or count == len(items):
            print(f"{what}: {count} of {len(items)}", flush=True)
    return found


class Rows:
    """Distinct embeddings of a modality, in the order they were first asked for."""

    def __init__(self) -> None:
        self._at: dict[str, int] = {}
        self._rows: list[FloatArray] = []

    def add(self, key: str, row: FloatArray) -> int:
        """Row number of ``key``, appended if new."""
        if key not in self._at:
            self._at[key] = len(self._rows)
            self._rows.append(row)
        return self._at[key]

    def stack(self) -> FloatArray:
        """(R, D)"""
        return np.stack(self._rows)


def build_store(
    stamps: list[Stamp],
    speech: dict[Path, FloatArray],
    images: dict[str, FloatArray],
    embed: dict[str, Encoder],
) -> EmbeddingStore:
    """One index row per recording; equal files, captions and pictures share an embedding row."""
    rows = {"audio": Rows(), "text": Rows(), "image": Rows()}
    texts = sorted({stamp.caption for stamp in stamps})
    captions = dict(zip(texts, embed["text"].encode(texts), strict=True))
    columns: dict[str, list[str] | list[int]] = defaultdict(list)
    for stamp in stamps:
        for language, path in sorted(stamp.recordings.items()):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            record: dict[str, str | int] = {
                "id": f"{stamp.name}_desc_{language}",
                "group": stamp.caption,
                "split": "train",
                "caption": stamp.caption,
                "source": f"{PACKAGE} {VERSION}",
                "language": language,
                "category": stamp.category,
                "folder": stamp.folder,
                "image_file": stamp.name + stamp.image.suffix,
                # The same file under two languages would be centred twice, so it is one row per language.
                "row_audio": rows["audio"].add(f"{content} {language}", speech[path]),
                "row_text": rows["text"].add(stamp.caption, captions[stamp.caption]),
                "row_image": rows["image"].add(stamp.name, images[stamp.name]),
            }
            for name, value in record.items():
                columns[name].append(value)  # type: ignore[arg-type]
    arrays = {name: of.stack() for name, of in rows.items()}
    return EmbeddingStore.from_arrays(arrays, columns, encoders={name: e.fingerprint for name, e in embed.items()})


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
    quantized = EmbeddingStore.open(write_store(work / "quantized", store, dtype=DTYPES, overwrite=True))
    lists = split_lists(folders, inseparable(quantized), NUM_SEEDS)
    parts = dict(zip(lists["group"], lists["concept_0"], strict=True))
    final = write_store(work / "store", quantized.with_split(parts), overwrite=True)
    pq.write_table(pa.table(lists), final / "splits.parquet")
    for path in sorted(final.iterdir()):
        partial = STAMPS_FOLDER / f".{path.name}.partial"
        partial.write_bytes(path.read_bytes())
        os.replace(partial, STAMPS_FOLDER / path.name)


def explained(features: Iterable[FloatArray], languages: Iterable[str]) -> float:
    """Share of the standardised features' variance, language means removed, inside the projection."""
    with np.load(PROJECTION, allow_pickle=False) as file:
        deviation, axes = file["deviation"], file["axes"].astype(np.float32)
    rows, labels = np.stack(list(features)) / deviation, np.array(list(languages))
    for label in np.unique(labels):
        rows[labels == label] -= rows[labels == label].mean(axis=0)
    span = np.linalg.qr(axes.T)[0]
    return float(np.square(rows @ span).sum() / np.square(rows).sum())


def main() -> int:
    """Builds the data set; exit status 0, or 1 with one line on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("media", type=Path, help="folder the Debian package was extracted to")
    parser.add_argument("--work", type=Path, default=Path("build/stamps"), help="cache folder (build/stamps)")
    parser.add_argument("--refit", action="store_true", help="fit the speech projection anew")
    options = parser.parse_args()
    try:
        stamps = scan(find_media(options.media))
        embed: dict[str, Encoder] = {
            "audio": WhisperSpeech(),
            "text": MiniLMText(),
            "image": EfficientNetImage(),
        }
    except (ModuleNotFoundError, ValueError) as error:
        print(f"build_stamps: {error}", file=sys.stderr)
        return 1
    kept = [stamp for stamp in stamps if stamp.category != EXCLUDED]
    images = render_all(kept, Cache.of(embed["image"], options.work))
    kept = [stamp for stamp in kept if stamp.name in images]
    hear = Cache.of(embed["audio"], options.work)
    paths = {path: language for stamp in kept for language, path in stamp.recordings.items()}
    if options.refit or not PROJECTION.is_file():
        rows = with_progress(recordings_outside(stamps, paths, LANGUAGES), "speech of symbols", hear)
        fit_projection(np.stack(list(rows.values())), PROJECTION, SPEECH_DIM)
    features = with_progress(list(paths), "speech", hear)
    share = explained(features.values(), paths.values())
    print(f"variance of the kept recordings inside the projection: {share:.3f}")
    speech = dict(zip(features, project_speech(np.stack(list(features.values()))), strict=True))
    store = build_store(kept, speech, images, embed)
    write(store, options.work)
    print(f"{len(store)} recordings of {len(kept)} stamps, {len(set(store.column('caption')))} captions")
    print(f"by language: {dict(Counter(store.column('language')))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
