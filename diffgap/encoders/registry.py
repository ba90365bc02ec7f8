"""Encoders by name, as the command line and configurations give them.

==================================================  ==============================================================
spec                                                encoder
==================================================  ==============================================================
``offline``                                         the small one of the extra "offline": text MiniLM, image
                                                    EfficientNet-lite0, audio Whisper-base (speech)
``offline:aisfx``                                   audio: sound effects
``offline:whisper-frames``                          audio: Whisper's frames, a sequence
``transformers:FOLDER``                             ``ClapModel`` (audio, text) or ``CLIPModel`` (image, video, text)
``open-clip:ARCHITECTURE:FILE``                     open_clip (image, video, text); a published tag for FILE
``laion-clap:FILE``                                 LAION's CLAP (audio, text)
``log-mel``, ``log-mel:vocos``                      mel: spectrograms of recordings, for training a generator
``latent-mel:FOLDER``                               mel: latents of an ``AutoencoderKL``, AudioLDM's "vae" say
``package.module:Class``                            your own
==================================================  ==============================================================

Options follow a "?", joined by "&": for video ``fps`` (1), ``max_frames`` (64) and ``frames`` ("pooled", "sequence");
for open-clip ``like`` (the published tag that FILE is like); for laion-clap's text ``tokenizer`` (folder of
roberta-base's); for log-mel and latent-mel the fields of :class:`~diffgap.generation.mel.MelSettings` and
``max_seconds`` (30). So: ``open-clip:ViT-B-32:/path/weights.pt?fps=2&frames=sequence``. Those of a class of your own
are its keyword arguments, as strings.

An encoder of your own is a class with the members of :class:`~diffgap.encoders.Encoder`. This whole file,
``loudness.py`` on the Python path, is ``--audio loudness:Loudness``::

    import numpy as np
    from diffgap.data.media.audio import AudioReader

    class Loudness:
        modality, dim, sequence, normalized = "audio", 2, False, False
        fingerprint, space = "loudness:v1", ""
        reader = AudioReader(16_000)

        def encode(self, batch):
            return np.array([[wave.std(), abs(wave).max()] for wave in batch], dtype=np.float32)
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl

from diffgap.encoders import Encoder

__all__ = ["build_encoder", "check_spaces"]

_FORMS = (
    "offline, offline:aisfx, offline:whisper-frames, transformers:/path/to/folder, "
    "open-clip:ARCHITECTURE:/path/or/tag, laion-clap:/path/to/checkpoint.pt, log-mel, latent-mel:/path/to/vae, "
    "package.module:Class"
)
_VIDEO: dict[str, Callable[[str], Any]] = {"fps": float, "max_frames": int, "frames": str}
_MEMBERS = ("modality", "dim", "sequence", "normalized", "fingerprint", "space", "reader", "encode")


def build_encoder(modality: str, spec: str, device: str = "cpu") -> Encoder:
    """The encoder that ``spec`` names, for ``modality`` ("audio", "image", "text", "video", "mel").

    ``device`` is where its model runs; the offline encoders run on the CPU whatever it says, and a class of your own
    decides for itself. Raises ValueError for a spec that names no encoder of this modality or options that it does not
    have, TypeError for a class of your own that lacks members, ModuleNotFoundError, with the command, for a package
    that is not installed.
    """
    name, _, query = spec.partition("?")
    kind, _, where = name.partition(":")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        raise ValueError(f"options of encoder {spec!r} must read name=value&name=value") from None
    if kind == "offline":
        _parse(spec, options, {})
        return _offline(modality, where, spec)
    if kind == "transformers" and where:
        return _transformers(modality, where, device, options, spec)
    if kind == "open-clip" and where:
        return _open_clip(modality, where, device, options, spec)
    if kind == "laion-clap" and where:
        return _laion_clap(modality, where, device, options, spec)
    if kind == "log-mel" or (kind == "latent-mel" and where):
        return _mel(modality, kind, where, options, spec)
    if kind in ("transformers", "open-clip", "laion-clap", "latent-mel"):
        raise ValueError(f"encoder {spec!r} names no weights; an encoder is one of: {_FORMS}")
    if where.isidentifier() and all(part.isidentifier() for part in kind.split(".")):
        return _custom(modality, kind, where, options)
    raise ValueError(f"unknown encoder {spec!r} for {modality}; it is one of: {_FORMS}")


def check_spaces(encoders: Mapping[str, Encoder]) -> None:
    """Refuses towers of one family but of different checkpoints: their embeddings have nothing to do with one another.

    Text by CLIP beside audio by CLAP is two families, and fine. Raises ValueError naming both fingerprints.
    """
    seen: dict[str, tuple[str, Encoder]] = {}
    for modality, encoder in encoders.items():
        family = encoder.space.partition(":")[0]
        if not family:
            continue
        first, other = seen.setdefault(family, (modality, encoder))
        if other.space != encoder.space:
            raise ValueError(
                f"{first} and {modality} are towers of different {family} checkpoints, {other.space} and "
                f"{encoder.space}: "
                f"{first} has fingerprint {other.fingerprint}, {modality} has {encoder.fingerprint}; "
                "give both the same weights"
            )


def _parse(spec: str, options: Mapping[str, str], known: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"encoder {spec!r} has no option {unknown[0]!r}; here it has {', '.join(known) or 'none'}")
    try:
        parsed = {name: known[name](value) for name, value in options.items()}
    except ValueError as error:
        raise ValueError(f"encoder {spec!r}: {error}") from None
    if parsed.get("frames", "pooled") not in ("pooled", "sequence"):
        raise ValueError(f"encoder {spec!r}: frames must be 'pooled' or 'sequence', not {parsed['frames']!r}")
    return parsed


def _choose(modality: str, classes: Mapping[str, Any], spec: str) -> Any:
    if modality not in classes:
        raise ValueError(f"encoder {spec!r} has no {modality} tower; it embeds {', '.join(classes)}")
    return classes[modality]


def _offline(modality: str, which: str, spec: str) -> Encoder:
    from diffgap.encoders import offline

    if which == "":
        small = {"text": offline.MiniLMText, "image": offline.EfficientNetImage, "audio": offline.WhisperSpeech}
        return _choose(modality, small, spec)()
    if which == "aisfx":
        from diffgap.encoders.aisfx import AisfxAudio

        return _choose(modality, {"audio": AisfxAudio}, spec)()
    if which == "whisper-frames":
        return _choose(modality, {"audio": offline.WhisperFrames}, spec)()
    raise ValueError(f"unknown encoder {spec!r}; it is one of: {_FORMS}")


def _transformers(modality: str, folder: str, device: str, options: Mapping[str, str], spec: str) -> Encoder:
    from pathlib import Path

    from diffgap.encoders import hf_clap, hf_clip
    from diffgap.encoders._transformers import model_type

    towers: dict[str, dict[str, Any]] = {
        "clap": {"audio": hf_clap.ClapAudio, "text": hf_clap.ClapText},
        "clip": {"image": hf_clip.ClipImage, "video": hf_clip.ClipVideo, "text": hf_clip.ClipText},
    }
    found = model_type(Path(folder))
    if found not in towers:
        raise ValueError(f"encoder {spec!r} is a {found!r} model; of transformers, {' and '.join(towers)} are known")
    tower = _choose(modality, towers[found], spec)
    return tower(folder, device, **_parse(spec, options, _VIDEO if modality == "video" else {}))


def _open_clip(modality: str, where: str, device: str, options: Mapping[str, str], spec: str) -> Encoder:
    from diffgap.encoders.openclip import OpenClipImage, OpenClipText, OpenClipVideo

    towers = {"image": OpenClipImage, "video": OpenClipVideo, "text": OpenClipText}
    architecture, _, pretrained = where.partition(":")
    known = {"like": str} | (_VIDEO if modality == "video" else {})
    return _choose(modality, towers, spec)(architecture, pretrained, device, **_parse(spec, options, known))


def _laion_clap(modality: str, file: str, device: str, options: Mapping[str, str], spec: str) -> Encoder:
    from diffgap.encoders.laionclap import LaionClapAudio, LaionClapText

    tower = _choose(modality, {"audio": LaionClapAudio, "text": LaionClapText}, spec)
    return tower(file, device, **_parse(spec, options, {"tokenizer": str} if modality == "text" else {}))


def _mel(modality: str, kind: str, where: str, options: Mapping[str, str], spec: str) -> Encoder:
    from diffgap.encoders.mel import LogMel
    from diffgap.generation.latents import AUDIOLDM, LatentMel
    from diffgap.generation.mel import MelSettings

    presets = {"": MelSettings(), "vocos": MelSettings.vocos()}
    if kind == "log-mel" and where not in presets:
        raise ValueError(f"encoder {spec!r} has no preset {where!r}; use log-mel or log-mel:vocos")
    whole, real = ("sample_rate", "n_fft", "hop", "bands"), ("low", "high", "floor", "max_seconds")
    known: dict[str, Callable[[str], Any]] = {**dict.fromkeys(whole, int), **dict.fromkeys(real, float)}
    fields = _parse(spec, options, {**known, "htk": _flag})
    limit = {"max_seconds": fields.pop("max_seconds")} if "max_seconds" in fields else {}
    if kind == "log-mel":
        return _choose(modality, {"mel": LogMel}, spec)(replace(presets[where], **fields), **limit)
    return _choose(modality, {"mel": LatentMel}, spec)(where, replace(AUDIOLDM, **fields), **limit)


def _flag(value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError(f"{value!r} is neither true nor false")
    return value == "true"


def _custom(modality: str, module: str, name: str, options: Mapping[str, str]) -> Encoder:
    spec = f"{module}:{name}"
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)  # the command is run beside the file, but is not in its folder itself
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks one of its own imports
        raise ValueError(f"unknown encoder {spec!r}: there is no module {error.name}; it is one of: {_FORMS}") from None
    if not hasattr(loaded, name):
        raise ValueError(f"unknown encoder {spec!r}: {loaded.__file__} defines no {name}")
    encoder = getattr(loaded, name)(**options)
    if missing := [member for member in _MEMBERS if not hasattr(encoder, member)]:
        raise TypeError(f"encoder {spec} lacks {', '.join(missing)}; see diffgap.encoders.Encoder")
    if not callable(encoder.reader) or not isinstance(getattr(encoder.reader, "description", None), str):
        raise TypeError(f"encoder {spec}: reader must be a diffgap.data.media.Reader (callable, with a description)")
    if encoder.modality != modality:
        raise ValueError(f"encoder {spec} embeds {encoder.modality}, not {modality}")
    return encoder
