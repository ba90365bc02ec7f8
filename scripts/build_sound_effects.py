"""Rebuilds the bundled sound effects (``diffgap/data/sound_effects``) from Debian's packages of the media.

    for p in tuxpaint-stamps-default sonic-pi-samples scratch lmms-common hydrogen-data minetest-data \\
             libreoffice-common sound-icons; do apt-get download $p && dpkg-deb -x ${p}_*.deb media; done
    pip install -e '.[offline]'
    python scripts/build_sound_effects.py media

Some minutes on one core. Embeddings are kept in the work folder as they are made, so an interrupted build goes on where
it stopped. Files that cannot be embedded (silent, under 50 ms, not decodable) are reported and left out.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from build_stamps import Cache, FloatArray
from sound_effects_files import PACKAGES, Effect, Package, scan
from stamps_splits import SHARES, LinkedSets, fill, near_pairs

from diffgap.data.sound_effects import MODALITIES, NUM_SEEDS, SOUND_EFFECTS_FOLDER
from diffgap.data.store import EmbeddingStore, write_store
from diffgap.encoders import Encoder
from diffgap.encoders.aisfx import AisfxAudio
from diffgap.encoders.offline import EfficientNetImage, MiniLMText

NEAR = 0.95  # cosine from which two rows count as the same recording or picture
DTYPES = {"audio": "int8", "text": "float16", "image": "int8"}
TEST_SHARE, VAL_SHARE = (0.15, 0.30), (0.07, 0.20)  # of the rows, when whole packages are dealt


def check_media(package: Package, effects: Sequence[Effect]) -> None:
    """Raises ValueError if the package's files are not those the bundled set was made of."""
    digest = hashlib.sha256()
    for effect in effects:
        for path in (effect.audio, effect.image):
            digest.update(b"" if path is None else hashlib.sha256(path.read_bytes()).digest())
        digest.update(f"{effect.id}\n".encode())
    if digest.hexdigest() != package.sha256:
        raise ValueError(
            f"the {len(effects)} sound effects of {package.name} are not those of version {package.version} "
            f"(sha256 {digest.hexdigest()}); get that version, or enter the new one in scripts/sound_effects_files.py"
        )


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


def embed_all(
    effects: Sequence[Effect], encoders: Mapping[str, Encoder], work: Path
) -> Iterator[tuple[Effect, FloatArray, FloatArray | None]]:
    """Every effect with the embedding of its recording and of its picture, if it has one; others are reported."""
    hear, see = (Cache.of(encoders[name], work) for name in ("audio", "image"))
    for count, effect in enumerate(effects, 1):
        try:
            yield effect, hear(effect.audio), None if effect.image is None else see(effect.image)
        except ValueError as error:
            print(f"left out: {error}")
        if count % 100 == 0 or count == len(effects):
            print(f"{count} of {len(effects)} files", flush=True)


def build_store(effects: Sequence[Effect], encoders: Mapping[str, Encoder], work: Path) -> EmbeddingStore:
    """One index row per effect; equal files, captions and pictures share an embedding row."""
    rows = {name: Rows() for name in MODALITIES}
    captions = sorted({effect.caption for effect in effects})
    texts = dict(zip(captions, encoders["text"].encode(captions), strict=True))
    columns: dict[str, list[str | int]] = defaultdict(list)
    for effect, audio, image in embed_all(effects, encoders, work):
        record: dict[str, str | int] = {
            "id": effect.id,
            "group": effect.caption,
            "split": "train",
            "caption": effect.caption,
            "source": f"{effect.package.name} {effect.package.version}",
            "package": effect.package.name,
            "licence": effect.licence,
            "image_file": "" if effect.image is None else effect.image.name,
            "row_audio": rows["audio"].add(hashlib.sha256(effect.audio.read_bytes()).hexdigest(), audio),
            "row_text": rows["text"].add(effect.caption, np.asarray(texts[effect.caption])),
            "row_image": -1 if image is None else rows["image"].add(effect.id, image),
        }
        for name, value in record.items():
            columns[name].append(value)
    arrays = {name: of.stack() for name, of in rows.items()}
    return EmbeddingStore.from_arrays(arrays, columns, encoders={name: e.fingerprint for name, e in encoders.items()})


def linked_captions(store: EmbeddingStore) -> LinkedSets:
    """Captions, those joined that hold the same recording, or nearly the same one or the same picture.

    Recordings are compared less their mean: aiSFX gives maxima of rectified values, and without any two have a cosine
    near 0.75.
    """
    groups = store.column("group")
    captions = LinkedSets(groups)
    for name in ("audio", "image"):
        present = store.present(name)
        rows = store.embeddings(name, present).numpy()
        rows = rows - rows.mean(axis=0) if name == "audio" else rows
        for a, b, cosine in near_pairs(rows, groups[present], NEAR):
            print(f"kept together ({name}, cosine {cosine:.3f}): {a} | {b}")
            captions.link(a, b)
    return captions


def source_choices(store: EmbeddingStore) -> list[dict[str, str]]:
    """Every way to deal whole packages to train, val and test so that the shares of rows are within their bounds."""
    count = Counter(store.column("package"))
    found = []
    for parts in itertools.product(SHARES, repeat=len(count)):
        share = dict.fromkeys(SHARES, 0.0)
        for part, package in zip(parts, sorted(count), strict=True):
            share[part] += count[package] / len(store)
        if TEST_SHARE[0] <= share["test"] <= TEST_SHARE[1] and VAL_SHARE[0] <= share["val"] <= VAL_SHARE[1]:
            found.append(dict(zip(sorted(count), parts, strict=True)))
    return found


def split_lists(store: EmbeddingStore, captions: LinkedSets) -> dict[str, list[str | None]]:
    """Columns concept_0 .. and source_0 .. of ``splits.parquet``: the part of every row, None where it is left out."""
    groups, packages = store.column("group"), store.column("package")
    columns: dict[str, list[str | None]] = {}
    for seed in range(NUM_SEEDS):
        parts = fill(captions.sets(), seed)
        columns[f"concept_{seed}"] = [parts[group] for group in groups]
    choices = source_choices(store)
    order = np.random.default_rng(0).permutation(len(choices))
    print(f"{len(choices)} ways to deal the packages")
    for seed in range(NUM_SEEDS):
        own = [choices[order[seed]][package] for package in packages]
        # Captions of several parts stay in the one that is dealt first: the test packages stay whole.
        first: dict[str, str] = {}
        for part in ("test", "val", "train"):
            for group, of in zip(groups, own, strict=True):
                if of == part:
                    first.setdefault(captions.find(group), part)
        columns[f"source_{seed}"] = [
            part if first[captions.find(group)] == part else None for group, part in zip(groups, own, strict=True)
        ]
    return columns


def write(store: EmbeddingStore, work: Path) -> None:
    """Writes the store and its split lists to the package, every file by rename."""
    quantized = EmbeddingStore.open(write_store(work / "quantized", store, dtype=DTYPES, overwrite=True))
    lists = split_lists(quantized, linked_captions(quantized))
    parts = {group: str(part) for group, part in zip(store.column("group"), lists["concept_0"], strict=True)}
    final = write_store(work / "store", quantized.with_split(parts), overwrite=True)
    table = pa.table({name: pa.array(column).dictionary_encode() for name, column in lists.items()})
    pq.write_table(table, final / "splits.parquet", compression="zstd", write_statistics=False)
    for path in sorted(final.iterdir()):
        partial = SOUND_EFFECTS_FOLDER / f".{path.name}.partial"
        partial.write_bytes(path.read_bytes())
        os.replace(partial, SOUND_EFFECTS_FOLDER / path.name)


def main() -> int:
    """Builds the data set; exit status 0, or 1 with one line on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("media", type=Path, help="folder the Debian packages were extracted to")
    parser.add_argument("--work", type=Path, default=Path("build/sound_effects"), help="cache (build/sound_effects)")
    options = parser.parse_args()
    try:
        effects = list(scan(options.media))
        for package in PACKAGES:
            check_media(package, [effect for effect in effects if effect.package is package])
        encoders: dict[str, Encoder] = {"audio": AisfxAudio(), "text": MiniLMText(), "image": EfficientNetImage()}
    except (ModuleNotFoundError, FileNotFoundError, ValueError) as error:
        print(f"build_sound_effects: {error}", file=sys.stderr)
        return 1
    store = build_store(effects, encoders, options.work)
    write(store, options.work)
    count = {name: len(store.unique_rows(name)) for name in MODALITIES}
    print(f"{len(store)} rows, distinct embeddings: {count}")
    print(f"by package: {dict(Counter(store.column('package')))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
