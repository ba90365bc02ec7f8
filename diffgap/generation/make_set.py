"""Makes a :class:`GeneratedSet`: one generator, several conditions, the rows of a store."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from diffgap._files import atomic_folder
from diffgap.data.media import Source
from diffgap.data.media.audio import AudioReader
from diffgap.data.store import EmbeddingStore
from diffgap.generation.generated import REFERENCE, SYSTEMS, GeneratedItem, GeneratedSet
from diffgap.generation.generator import Generator
from diffgap.generation.native import NativeGenerator
from diffgap.generation.pipeline import condition, generate
from diffgap.generation.sounds import write_sound
from diffgap.generation.space import AudioSpace
from diffgap.generation.trainer import spectrogram_settings

__all__ = ["SetOptions", "make_set"]

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SetOptions:
    """What is generated, and how.

    Attributes:
        source: Modality of the queries.
        systems: Names of :data:`SYSTEMS`.
        label: Column of the store that classifiers are asked for; "" for none.
        limit: Rows, drawn by ``seed``.
        seconds: Length of every sound; that of its recording, by the store's spectrograms, if None.
        media: Folder that the store's ``path_audio`` begins at; for the reference.
        steps, guidance_scale: The generator's own by default.
        seed: Of rows and noise.
    """

    source: str = "text"
    systems: tuple[str, ...] = ("raw", "bridged")
    label: str = ""
    limit: int = 200
    seconds: float | None = None
    media: Path | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0


def make_set(
    generator: Generator,
    space: AudioSpace,
    store: EmbeddingStore,
    output: Path,
    options: SetOptions,
    *,
    about: dict[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda system: None,
) -> GeneratedSet:
    """Generate for the rows of ``store`` and write the set, whole or not at all.

    Args:
        generator, space: What makes sound, and where conditions live.
        store: The rows, with embeddings of ``options.source``, and of the audio side for the system "audio".
        output: Folder of the set.
        about: Goes into set.json.
        progress: Called with the name of each system before it is made.

    Raises:
        ValueError: An unknown system, rows or media that are lacking.
        FileExistsError: ``output`` exists, without ``overwrite``.
    """
    systems = _checked(generator, space, store, options)
    mel = next((name for name in store.modalities if store.encoder(name).startswith(("log-mel:", "latent-mel:"))), "")
    needed = {options.source} | {space.modality} & set(store.modalities) | ({mel} if mel else set())
    rows = store.present(*needed)
    if not len(rows):
        raise ValueError(f"no row has all of {', '.join(sorted(needed))}")
    drawn = np.random.default_rng(options.seed).permutation(len(rows))[: options.limit]
    store = store.select(rows[np.sort(drawn)])
    seconds = _seconds(store, mel, options)
    items = _items(store, options, seconds)
    with atomic_folder(output, overwrite=overwrite) as folder:
        made = GeneratedSet(folder, generator.sample_rate, options.source, systems, items, about or {})
        for system in systems:
            progress(system)
            (folder / system).mkdir()
            vectors = _conditions(system, space, store, options)
            if vectors is not None:
                (folder / "conditions").mkdir(exist_ok=True)
                np.save(folder / "conditions" / f"{system}.npy", vectors[:, 0].cpu().numpy())
            waves = _waves(system, generator, store, mel, vectors, items, options)
            for item, wave in zip(items, waves, strict=True):
                write_sound(made.path(system, item), wave, generator.sample_rate)
        made.write()
    return GeneratedSet.open(output)


def _checked(generator: Generator, space: AudioSpace, store: EmbeddingStore, options: SetOptions) -> tuple[str, ...]:
    """The systems in their order, once all that they need is known to be there."""
    unknown = sorted(set(options.systems) - set(SYSTEMS))
    if unknown or not options.systems:
        raise ValueError(f"unknown system {', '.join(unknown) or 'none given'}; there are {', '.join(SYSTEMS)}")
    if options.limit < 1:
        raise ValueError(f"limit is {options.limit}; use 1 or more")
    systems = tuple(name for name in SYSTEMS if name in options.systems)
    if options.source not in store.modalities:
        raise ValueError(f"source {options.source!r} is not in the store; it has {', '.join(store.modalities)}")
    if "audio" in systems and space.modality not in store.modalities:
        raise ValueError(f"system audio needs embeddings of {space.modality}; the store has none")
    if "vocoder" in systems and not isinstance(generator, NativeGenerator):
        raise ValueError("system vocoder is of generators of `diffgap train-generator` alone; leave it out")
    if REFERENCE in systems and (options.media is None or "path_audio" not in store.index.column_names):
        raise ValueError(
            "system reference needs the recordings: name their folder, for a store of `diffgap embed`, whose column "
            "path_audio says where they are in it"
        )
    if options.label and options.label not in store.index.column_names:
        raise ValueError(f"label {options.label!r} is no column; there are {', '.join(store.index.column_names)}")
    return systems


def _seconds(store: EmbeddingStore, mel: str, options: SetOptions) -> list[float]:
    if options.seconds is not None:
        return [options.seconds] * len(store)
    if not mel:
        raise ValueError("seconds is not given, and the store has no spectrograms to take lengths from")
    settings = spectrogram_settings(store, mel)
    lengths = store.lengths(mel)
    assert lengths is not None
    return [settings.seconds(max(2, int(frames))) for frames in lengths]


def _items(store: EmbeddingStore, options: SetOptions, seconds: Sequence[float]) -> tuple[GeneratedItem, ...]:
    names = store.index.column_names
    captions = store.column("caption") if "caption" in names else [""] * len(store)
    labels = store.column(options.label) if options.label else [""] * len(store)
    return tuple(
        GeneratedItem(f"{number:04d}-{_slug(str(caption or id))}", str(id), str(caption or ""), str(label), length)
        for number, (id, caption, label, length) in enumerate(
            zip(store.column("id"), captions, labels, seconds, strict=True)
        )
    )


def _slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:40].strip("-") or "sound"


def _conditions(system: str, space: AudioSpace, store: EmbeddingStore, options: SetOptions) -> Tensor | None:
    """(rows, 1, D)"""
    if system in (REFERENCE, "vocoder", "none"):
        return None
    modality = space.modality if system == "audio" else options.source
    how: Any = "raw" if system == "audio" else system
    x, lengths = store.embeddings(modality), store.lengths(modality)
    return condition(space, how, modality, x, lengths, seed=options.seed)


def _waves(
    system: str,
    generator: Generator,
    store: EmbeddingStore,
    mel: str,
    vectors: Tensor | None,
    items: Sequence[GeneratedItem],
    options: SetOptions,
) -> list[FloatArray]:
    seconds = [item.seconds for item in items]
    if system == REFERENCE:
        assert options.media is not None
        reader = AudioReader(generator.sample_rate)
        paths = [options.media / path for path in store.column("path_audio")]
        return [reader(Source(path=path, start=0.0, stop=length)) for path, length in zip(paths, seconds, strict=True)]
    if system == "vocoder":
        assert isinstance(generator, NativeGenerator)
        lengths = store.lengths(mel)
        assert lengths is not None
        return [
            generator.sound(
                generator.spectrogram(store.embeddings(mel, [row])[0, : int(lengths[row])].numpy(), length), length
            )
            for row, length in enumerate(seconds)
        ]
    said = [item.caption for item in items] if options.source == "text" and system != "none" else None
    drawn = generate(
        generator, vectors, seconds, steps=options.steps, guidance_scale=options.guidance_scale, seed=options.seed,
        captions=said,
    )  # fmt: skip
    return [samples[0] for samples in drawn]
