"""Backbones: the networks whose features and logits the metrics are computed from.

Every audio encoder of :mod:`diffgap.encoders` gives features through :class:`EncoderBackbone`; PANNs and VGGish are in
:mod:`diffgap.generation.metrics.networks`. PaSST and the like are plugged in from your own code and weights, as
``load_backbone("mypackage.passt:Passt", weights="passt.pt")``::

    class Passt:
        name, sample_rate, space = "passt", 32_000, ""
        outputs = frozenset({"features", "logits"})

        def __init__(self, weights: str) -> None:
            self.model = load_passt(weights)                    # yours
            self.fingerprint = "passt:" + sha256_of(weights)
            self.reader = AudioReader(self.sample_rate)         # diffgap.data.media.audio

        def __call__(self, waveforms):
            outputs = [self.model(torch.from_numpy(wave)[None]) for wave in waveforms]
            return [{"features": features[0].numpy(), "logits": logits[0].numpy()} for logits, features in outputs]

For figures on ``audioldm_eval``'s scale the logits are those before the sigmoid.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, get_args
from urllib.parse import parse_qsl

import numpy as np
import numpy.typing as npt

from diffgap.data.media import Reader
from diffgap.encoders import Encoder

__all__ = [
    "Backbone",
    "Described",
    "EncoderBackbone",
    "Output",
    "build_backbone",
    "classes_of",
    "describe",
    "load_backbone",
]

FloatArray = npt.NDArray[np.float32]
Output: TypeAlias = Literal["features", "logits", "mel"]
Described: TypeAlias = Mapping[str, FloatArray]


class Backbone(Protocol):
    """What every backbone offers.

    Attributes:
        name: Printed beside every figure.
        sample_rate: Of the waveforms it takes, in Hz.
        fingerprint: Changes whenever weights, preparation or pooling do; figures of two fingerprints never meet.
        space: As of :class:`~diffgap.encoders.Encoder`: what its features share with conditions, "" for nothing.
        outputs: Which of "features", "logits" and "mel" it gives.
        reader: Decodes a file into the waveform it takes; its ``description`` is the preparation.
    """

    name: str
    sample_rate: int
    fingerprint: str
    space: str
    outputs: frozenset[Output]
    reader: Reader

    def __call__(self, waveforms: Sequence[FloatArray]) -> Sequence[Described]:
        """For each waveform "features", (D,) or a row a frame (T, D), and "logits", (C,), before softmax or sigmoid.

        "mel" is what :class:`~diffgap.generation.metrics.mel.MelStatistics` gives. A backbone whose logits belong to
        named classes has their names in an attribute ``classes``; ``label_agreement`` needs them.

        Waveforms are what ``reader`` gives, (samples,) float32, and differ in length. What is said of a clip depends on
        that clip alone.
        """
        ...


class EncoderBackbone:
    """Features of an audio encoder: its embeddings, or its frames where it gives a sequence.

    Args:
        encoder: Of modality "audio".
        sample_rate: In Hz; that of its reader if not given.
        name: What is before the colon of its fingerprint if not given.

    Raises:
        ValueError: another modality, no sample rate.
    """

    outputs: frozenset[Output] = frozenset({"features"})

    def __init__(self, encoder: Encoder, *, sample_rate: int | None = None, name: str | None = None) -> None:
        if encoder.modality != "audio":
            raise ValueError(f"encoder embeds {encoder.modality}; a backbone needs one of audio")
        rate = sample_rate if sample_rate is not None else getattr(encoder.reader, "sample_rate", None)
        if rate is None:
            raise ValueError("sample_rate must be given: the encoder's reader does not say it")
        self.encoder, self.sample_rate, self.reader = encoder, int(rate), encoder.reader
        self.name = name or encoder.fingerprint.partition(":")[0]
        self.fingerprint = encoder.fingerprint
        # An encoder that shares its space with no other still has one: its own.
        self.space = encoder.space or encoder.fingerprint

    def __call__(self, waveforms: Sequence[FloatArray]) -> list[Described]:
        encoded = self.encoder.encode(waveforms)
        if isinstance(encoded, tuple):
            return [{"features": rows[:length]} for rows, length in zip(*encoded, strict=True)]
        return [{"features": row} for row in encoded]


#: What audio encoders of :mod:`diffgap.encoders.registry` begin with.
_ENCODERS = ("offline", "transformers", "open-clip", "laion-clap")


def build_backbone(spec: str, device: str = "cpu") -> Backbone:
    """The backbone that the command line calls ``spec``.

    ``mel`` (spectra, without weights); ``panns:FILE`` or ``vggish:FILE``, with the checkpoint FILE, as of
    :mod:`diffgap.generation.metrics.networks`; an audio encoder of :mod:`diffgap.encoders.registry` (``offline``,
    ``offline:aisfx``, ``laion-clap:FILE`` ...); or ``package.module:Name?option=value``, found in the working folder
    too, as of :func:`load_backbone`, with its options as strings.

    Raises:
        ValueError: a spec that names none, or options that it does not have.
        ModuleNotFoundError: a module, or a package that the encoder needs, is not there.
    """
    from diffgap.encoders.registry import build_encoder
    from diffgap.generation.metrics.mel import MelStatistics
    from diffgap.generation.metrics.networks import NETWORKS

    name, _, query = spec.partition("?")
    if spec == "mel":
        return MelStatistics()
    if name.partition(":")[0] in _ENCODERS:
        return EncoderBackbone(build_encoder("audio", spec, device))
    network, _, weights = spec.partition(":")
    if network in NETWORKS:
        if not weights:
            raise ValueError(f"backbone {spec!r} must name its checkpoint, as in {network}:FILE")
        return NETWORKS[network](weights, device)
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        raise ValueError(f"options of backbone {spec!r} must read name=value&name=value") from None
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)  # the command is run beside the file, but is not in its folder itself
    return load_backbone(name, **options)


def load_backbone(spec: str, **options: Any) -> Backbone:
    """Makes the backbone, or the audio encoder, that ``package.module:Name`` names, with ``options``.

    Raises:
        ValueError: a spec of another form, or one that names neither.
        ModuleNotFoundError: there is no such module.
    """
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise ValueError(
            f"backbone {spec!r} does not exist; use mel, offline, transformers:FOLDER, laion-clap:CHECKPOINT, "
            "panns:CHECKPOINT, vggish:CHECKPOINT, or your own as package.module:Name"
        )
    factory = getattr(importlib.import_module(module), name, None)
    if not callable(factory):
        raise ValueError(f"module {module} has no class or function {name}; check the spec {spec!r}")
    made = factory(**options)
    if hasattr(made, "encode"):
        return EncoderBackbone(made)
    lacking = [member for member in Backbone.__annotations__ if not hasattr(made, member)]
    if lacking or not callable(made):
        raise ValueError(f"{spec} is no backbone: it lacks {', '.join(lacking) or '__call__'}")
    backbone: Backbone = made
    return backbone


def classes_of(backbone: Backbone) -> tuple[str, ...]:
    """Names of the logits; none where the backbone does not say them."""
    return tuple(getattr(backbone, "classes", ()))


def describe(backbone: Backbone, waveforms: Sequence[FloatArray], names: Sequence[str]) -> list[dict[str, FloatArray]]:
    """What ``backbone`` says of the clips ``names``, checked, features always (T, D).

    Raises:
        ValueError: an output that is absent, not finite or not of its shape; the message names backbone and clip.
    """
    given = list(backbone(waveforms))
    if len(given) != len(waveforms):
        raise ValueError(f"backbone {backbone.name} described {len(given)} of {len(waveforms)} clips")
    return [_checked(backbone, one, name) for one, name in zip(given, names, strict=True)]


def _checked(backbone: Backbone, given: Described, name: str) -> dict[str, FloatArray]:
    checked: dict[str, FloatArray] = {}
    for output in sorted(backbone.outputs):
        if output not in get_args(Output) or output not in given:
            raise ValueError(f"backbone {backbone.name} gave no {output} of {name}; its outputs name it")
        values = np.asarray(given[output], dtype=np.float32)
        if output == "features" and values.ndim == 1:
            values = values[None]
        if values.ndim != (2 if output == "features" else 1) or not values.size:
            raise ValueError(f"backbone {backbone.name} gave {output} of shape {values.shape} for {name}")
        if not np.isfinite(values).all():
            raise ValueError(f"backbone {backbone.name} gave {output} of {name} that are not finite")
        checked[output] = np.ascontiguousarray(values)
    return checked
