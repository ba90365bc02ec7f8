"""Sounds of a :class:`GeneratedSet` to hear and see, side by side."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from diffgap.encoders._packages import require
from diffgap.generation.generated import SYSTEMS, GeneratedItem, GeneratedSet
from diffgap.generation.mel import INSTALL, MelSettings
from diffgap.report.html import Html, Section, element, figure, joined, paragraph, table

__all__ = ["choose", "sounds"]

FloatArray = npt.NDArray[np.float32]

#: Range of the colours, decibels below the loudest point of an item's spectrograms.
_RANGE = 80.0
_FRAMES = 300


def sounds(generated: GeneratedSet, *, count: int, systems: Sequence[str], megabytes: float, seed: int) -> Section:
    """Players and spectrograms of some items, drawn by the seed.

    Args:
        generated: The set.
        count: Items at most.
        systems: Those to show; all of the set if empty.
        megabytes: Of the page that they may take; items beyond are left out, and that is said.
        seed: Of the draw.

    Raises:
        ValueError: A system that the set lacks, or a sound that cannot be read.
        ModuleNotFoundError: librosa or soundfile is missing.
    """
    shown = [name for name in generated.systems if name in systems or not systems]
    lacking = [name for name in systems if name not in generated.systems]
    if lacking:
        raise ValueError(f"systems names {lacking[0]!r}; {generated.folder} has {', '.join(generated.systems)}")
    for package in ("soundfile", "librosa"):
        require(package, package, INSTALL)
    chosen = choose(generated, count, seed)
    cards: list[Html] = []
    left = megabytes * 1e6
    for item in chosen:
        card = _card(generated, item, shown)
        left -= len(card)
        if left < 0 and cards:
            break
        cards.append(card)
    drawn = f"{len(cards)} of {len(generated.items)} items, drawn by seed {seed}"
    if len(cards) < len(chosen):
        drawn += f" ({len(chosen)} were asked for, but the page may hold {megabytes:g} MB of sound)"
    about = [[name, _told(value)] for name, value in generated.about.items()]
    parts = [
        paragraph(
            f"{drawn}. Queries are of modality {generated.source}. Spectrograms are mel-scaled, from 0 to "
            f"{generated.sample_rate / 2000:g} kHz upwards; the colours of one item span {_RANGE:g} dB below its "
            "loudest point."
        ),
        table("What the sounds are", ["sound", "made"], [[name, SYSTEMS[name]] for name in shown]),
        *([table("How the set was made", ["setting", "value"], about)] if about else []),
        *cards,
    ]
    return Section("sounds", "Sounds", joined(parts))


def _told(value: object) -> str:
    """A setting of a set: None was left to the generator, "" was not asked for."""
    return "the generator's own" if value is None else str(value) or "none"


def choose(generated: GeneratedSet, count: int, seed: int) -> list[GeneratedItem]:
    """At most ``count`` items, in the order of the draw, so that a smaller page holds the first of a larger one."""
    order = np.random.default_rng(seed).permutation(len(generated.items))
    return [generated.items[row] for row in order[:count]]


def _card(generated: GeneratedSet, item: GeneratedItem, systems: Sequence[str]) -> Html:
    """One item: its query, and each system's sound."""
    title = item.caption or item.id
    waves = {system: _read(generated.path(system, item), generated.sample_rate) for system in systems}
    players = []
    for (system, wave), picture in zip(waves.items(), _spectrograms(waves, generated.sample_rate), strict=True):
        seconds = len(wave) / generated.sample_rate
        image = element("img", src=_data("image/png", picture), alt=f"Spectrogram, {seconds:.1f} s: {system}, {title}")
        sound = _data("audio/flac", _flac(wave, generated.sample_rate))
        player = element("audio", src=sound, controls="", preload="metadata", aria_label=f"{system}: {title}")
        players.append(figure(joined([image, player]), f"{system}, {seconds:.1f} s"))
    facts = ", ".join(part for part in (item.id, item.label) if part and part != title)
    heading = [element("h3", title), *([element("p", facts, class_="quiet")] if facts else [])]
    return element("article", *heading, element("div", *players, class_="grid sounds"))


def _read(file: Path, sample_rate: int) -> FloatArray:
    """(n,) samples, the mean over the channels."""
    import soundfile

    try:
        wave, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError(f"{file} cannot be read ({error}); generate the set again") from error
    mono: FloatArray = wave.mean(axis=1)
    if rate != sample_rate or not len(mono) or not np.isfinite(mono).all():
        raise ValueError(f"{file} is empty, not finite, or not of {sample_rate} Hz; generate the set again")
    return mono


def _spectrograms(waves: dict[str, FloatArray], sample_rate: int) -> Iterator[bytes]:
    """PNGs of all systems in the same colours; as wide as their sounds are long."""
    window = 1 << round(math.log2(0.064 * sample_rate))
    longest = max(map(len, waves.values()))
    hop = min(window, max(window // 4, longest // _FRAMES))
    mel = MelSettings(sample_rate, window, hop, bands=64, high=sample_rate / 2)
    decibels = [20 / math.log(10) * mel.log_mel(wave) for wave in waves.values()]
    top = max(float(x.max()) for x in decibels)
    for x in decibels:
        levels = ((x - top) / _RANGE + 1).clip(0, 1)
        yield _png((255 * levels.T[::-1]).round().astype(np.uint8))


def _png(levels: npt.NDArray[np.uint8]) -> bytes:
    """(height, width) 0..255 in the colours of magma, one byte a pixel."""
    from matplotlib import colormaps
    from PIL import Image

    image = Image.fromarray(levels)
    palette = (255 * colormaps["magma"](np.arange(256))[:, :3]).round().astype(np.uint8)
    image.putpalette(palette.tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _flac(wave: FloatArray, sample_rate: int) -> bytes:
    """16 bits a sample, without further loss."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, wave.clip(-1, 1), sample_rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
