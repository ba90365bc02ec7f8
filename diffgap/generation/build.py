"""Generators by name, with the space that their conditions live in."""

from __future__ import annotations

from pathlib import Path

from diffgap.encoders.registry import build_encoder
from diffgap.generation.generator import Generator
from diffgap.generation.native import bridge_of, load_generator, weights_of
from diffgap.generation.space import AudioSpace

__all__ = ["PRETRAINED", "build_generator", "build_space", "check_clap", "check_generator", "own_bridge"]

PRETRAINED = {"audioldm": "cvssp/audioldm-m-full", "musicldm": "ucsd-reach/musicldm", "audioldm2": "cvssp/audioldm2"}
"""Generators of diffusers, and the weights on the hub that a name alone stands for."""


def _pretrained(spec: str) -> tuple[str, str] | None:
    """Kind and weights of a generator of diffusers; None for a run folder."""
    kind, _, path = spec.partition(":")
    return (kind, path or PRETRAINED[kind]) if kind in PRETRAINED else None


def build_generator(
    spec: str, *, vocoder: str = "griffin-lim", autoencoder: str = "", device: str = "cpu"
) -> Generator:
    """The generator that ``spec`` names.

    Args:
        spec: Run folder of ``diffgap train-generator``; or "audioldm", "musicldm", "audioldm2", with a folder or a hub
            name behind a colon.
        vocoder: See :func:`load_vocoder`; a generator of diffusers has its own.
        autoencoder: Folder of the autoencoder of a generator of latents.
        device: Where it runs.

    Raises:
        FileNotFoundError: There is no such run or folder.
        ValueError: Damaged weights, or a vocoder that does not fit.
    """
    found = _pretrained(spec)
    if found is None:
        return load_generator(Path(spec), vocoder=vocoder, autoencoder=autoencoder, device=device)
    from diffgap.generation.pretrained import load_pretrained

    if vocoder != "griffin-lim" or autoencoder:
        raise ValueError(
            f"{found[0]} has a vocoder and an autoencoder of its own; leave --vocoder and --autoencoder out"
        )
    return load_pretrained(*found, device=device)


def check_generator(spec: str) -> None:
    """Raises FileNotFoundError unless ``spec`` names a generator of diffusers, or a folder that holds our own."""
    if _pretrained(spec) is None:
        weights_of(Path(spec))


def check_clap(generator: Generator, space: AudioSpace, clap: str) -> None:
    """Raises ValueError unless the audio side of ``space`` is the CLAP of a generator of diffusers.

    Args:
        generator: What is to be driven; of our own nothing is asked.
        space: Where the conditions come from.
        clap: Spec of the CLAP that the audio side was embedded with, as of :func:`build_encoder`.
    """
    from diffgap.generation.pretrained import DiffusersGenerator

    if not isinstance(generator, DiffusersGenerator):
        return
    if not clap:
        raise ValueError(
            "--clap is not given: name the CLAP whose vectors are the conditions; it must be the generator's"
        )
    audio = build_encoder("audio", clap)
    if space.encoder and audio.fingerprint != space.encoder:
        raise ValueError(f"the bridge's audio side was embedded by {space.encoder}; {clap} is {audio.fingerprint}")
    generator.check_tower(build_encoder("text", clap))
    generator.check_tower(audio)


def build_space(spec: str, bridge: str | None, encoder: str = "") -> AudioSpace:
    """The space of a generator's conditions: that of ``bridge``, or of the one that it was trained with.

    Args:
        spec: The generator, as in :func:`build_generator`.
        bridge: Run folder or saved model; None for the generator's own, "" for none.
        encoder: Fingerprint of the audio encoder, if it is known otherwise than from the bridge's run.
    """
    own, modality = _trained_with(spec)
    return AudioSpace.load(own if bridge is None else bridge, modality, encoder)


def own_bridge(spec: str) -> str:
    """The bridge that a generator was trained with, "" for none."""
    return _trained_with(spec)[0]


def _trained_with(spec: str) -> tuple[str, str]:
    """Bridge and audio modality; of a generator of diffusers, none and "audio"."""
    return ("", "audio") if _pretrained(spec) else bridge_of(Path(spec))
