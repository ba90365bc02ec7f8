"""``diffgap generate``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from diffgap.commands.arguments import Device, Guidance, Samples, Seed, Steps, Within
from diffgap.commands.console import open_console

__all__ = ["generate"]


def generate(
    generator: str,
    output: Annotated[Path, arg(aliases=["-o"])],
    text: str | None = None,
    image: Path | None = None,
    video: Path | None = None,
    audio: Path | None = None,
    encoder: str = "",
    clap: str = "",
    bridge: str | None = None,
    how: Literal["bridged", "sampled", "raw", "none"] | None = None,
    seconds: Annotated[float | None, Within(-math.inf, 3600)] = None,
    num_samples: Samples = 1,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    vocoder: str = "griffin-lim",
    autoencoder: str = "",
    device: Device = "cpu",
    seed: Seed = 0,
    overwrite: bool = False,
) -> None:
    """Generate sound from a text, a picture, a video or another sound.

    The query is embedded, led to the audio side by the bridge, and given to the generator.

    Args:
        generator: Run folder of `diffgap train-generator`; or audioldm, musicldm or audioldm2 of diffusers, with the
            folder of its weights or a hub name behind a colon: audioldm:/path/to/folder.
        output: Sound file to write (.wav, .flac, .ogg); numbered if there are several.
        text: Words to generate from.
        image: Picture to generate from.
        video: Video to generate from.
        audio: Sound to generate from: others with the same embedding.
        encoder: Encoder of the query, as in `diffgap embed`: the one that the bridge was trained on. By default the
            small offline one; for texts CLAP, if given; for a generator of diffusers its own CLAP, which takes texts.
        clap: For a generator of diffusers: the CLAP that the bridge's audio side was embedded with, as in `diffgap
            embed`, to be held against the generator's own; ENCODER by default.
        bridge: Run folder or saved model of the bridge; by default the one that the generator was trained with.
        how: What the generator is given: bridged, the bridge's translation of the query (the default where there is
            something to bridge); sampled, for each sound a sample of the bridge; raw, the query's own vector; none.
        seconds: Length; the typical one of the generator's training sounds by default.
        num_samples: Sounds.
        steps: Sampling steps; the generator's own by default.
        guidance_scale: Guidance, 1 is none; the generator's own by default.
        vocoder: griffin-lim, hifigan:FOLDER or vocos:FOLDER.
        autoencoder: Folder of the autoencoder, for a generator of latents.
        device: Where the generator runs.
        seed: Of the noise.
        overwrite: Replace existing files.
    """
    from diffgap.data.media import Source
    from diffgap.encoders.registry import build_encoder
    from diffgap.generation.build import build_generator, build_space, check_clap
    from diffgap.generation.pipeline import condition, embed_query
    from diffgap.generation.pipeline import generate as generate_sounds
    from diffgap.generation.sounds import check_sound_file, write_sound

    sources = {"text": None if text is None else Source(text=text)}
    sources |= {
        modality: None if path is None else Source(path=path)
        for modality, path in (("image", image), ("video", video), ("audio", audio))
    }
    asked = [(modality, source) for modality, source in sources.items() if source is not None]
    if len(asked) != 1 and not (how == "none" and not asked):
        raise ValueError("give one of --text, --image, --video and --audio")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; use 1 or more")
    numbers = range(1, num_samples + 1)
    files = [output] if num_samples == 1 else [output.with_stem(f"{output.stem}-{number}") for number in numbers]
    for file in files:
        check_sound_file(file, overwrite=overwrite)
    space = build_space(generator, bridge)
    made = build_generator(generator, vocoder=vocoder, autoencoder=autoencoder, device=device)
    vectors = None
    if asked:
        modality, source = asked[0]
        encoder = encoder or (clap if modality == "text" else "")
        own = getattr(made, "encoder", None) if modality == "text" and not encoder else None
        embedder = own or build_encoder(modality, encoder or "offline", device)
        how = how or ("raw" if space.bridge is None or modality == space.modality else "bridged")
        space = space.heard_by(embedder)
        made.check(space)
        if own is None or space.bridge is not None:
            check_clap(made, space, clap or encoder)
        x, lengths = embed_query(embedder, source, space)
        vectors = condition(space, how, modality, x, lengths, num_samples=num_samples, seed=seed)
    length = made.seconds if seconds is None else seconds
    waves = generate_sounds(
        made, vectors, [length], num_samples=num_samples, steps=steps, guidance_scale=guidance_scale, seed=seed,
        captions=[text or ""],
    )[0]  # fmt: skip
    for file, wave in zip(files, waves, strict=True):
        write_sound(file, wave, made.sample_rate)
        seconds_written = len(wave) / made.sample_rate
        open_console().print(f"{file}: {seconds_written:.2f} s, {how or 'none'}", markup=False, highlight=False)
