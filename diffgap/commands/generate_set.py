"""``diffgap generate-set``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from diffgap.commands.arguments import Device, Guidance, Seed, Steps, Within
from diffgap.commands.console import open_console

__all__ = ["generate_set"]


def generate_set(
    generator: str,
    output: Annotated[Path, arg(aliases=["-o"])],
    data: str = "",
    source: str = "text",
    split: Literal["train", "val", "test", "all"] = "test",
    systems: tuple[Literal["reference", "vocoder", "audio", "bridged", "sampled", "raw", "none"], ...] = (
        "raw",
        "bridged",
    ),
    label: str = "",
    limit: int = 200,
    media: Path | None = None,
    bridge: str | None = None,
    clap: str = "",
    seconds: Annotated[float | None, Within(-math.inf, 3600)] = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    vocoder: str = "griffin-lim",
    autoencoder: str = "",
    device: Device = "cpu",
    seed: Seed = 0,
    overwrite: bool = False,
) -> None:
    """Generate a set of sounds for comparison: the same rows of a store under several conditions.

    `diffgap metrics`, `diffgap report` and `diffgap listen` take it.

    Args:
        generator: As in `diffgap generate`.
        output: Folder of the set.
        data: Embedding store; the generator's training data by default.
        source: Modality to generate from.
        split: Rows of the store.
        systems: Conditions: bridged (the bridge's translation of the query), sampled (one sample of the bridge), raw
            (the query's own vector), none; beside them audio (the recording's own embedding), vocoder (the recording's
            spectrogram through the vocoder) and reference (the recording).
        label: Column whose classes `diffgap metrics` asks for.
        limit: Rows at most, drawn by the seed.
        media: Folder of the recordings, for the reference: what `diffgap embed` was given.
        bridge: Run folder or saved model of the bridge; by default the one that the generator was trained with.
        clap: For a generator of diffusers: the CLAP that DATA was embedded with, held against the generator's own.
        seconds: Length of every sound; that of each recording by default.
        steps: Sampling steps; the generator's own by default.
        guidance_scale: Guidance, 1 is none; the generator's own by default.
        vocoder: griffin-lim, hifigan:FOLDER or vocos:FOLDER.
        autoencoder: Folder of the autoencoder, for a generator of latents.
        device: Where the generator runs.
        seed: Of the noise, and of the rows that are drawn.
        overwrite: Replace an existing set.
    """
    from diffgap.generation.build import build_generator, build_space, check_clap, check_generator, own_bridge
    from diffgap.generation.generated import check_set_folder
    from diffgap.generation.make_set import SetOptions, make_set
    from diffgap.generation.native import data_of
    from diffgap.training.config import DataConfig
    from diffgap.training.runs import load_data

    check_set_folder(output, overwrite=overwrite)
    data = data or data_of(Path(generator))
    if not data:
        check_generator(generator)
        raise ValueError("--data is not given, and the generator names no training data; give a store")
    store = load_data(DataConfig(path=data))
    store = store if split == "all" else store.split(split)
    known = store.encoder("audio") if "audio" in store.modalities else ""
    space = build_space(generator, bridge, known)
    made = build_generator(generator, vocoder=vocoder, autoencoder=autoencoder, device=device)
    made.check(space)
    check_clap(made, space, clap)
    options = SetOptions(source, systems, label, limit, seconds, media, steps, guidance_scale, seed)
    about = {
        "generator": generator, "bridge": own_bridge(generator) if bridge is None else bridge, "data": data,
        "split": split, "seed": seed, "steps": steps, "guidance_scale": guidance_scale, "vocoder": vocoder,
        "label": label, "space": space.fingerprint,
    }  # fmt: skip
    console = open_console()

    def progress(system: str) -> None:
        console.print(f"{system} ...", highlight=False)

    found = make_set(made, space, store, output, options, about=about, overwrite=overwrite, progress=progress)
    console.print(f"{len(found.items)} items of {len(found.systems)} systems in {output}", markup=False)
