"""Our own generator as a whole: the mel generator of a run folder, and a vocoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import yaml
from torch import Tensor

from diffgap.generation.latents import LatentSettings, MelAutoencoder, parse_settings
from diffgap.generation.space import AudioSpace
from diffgap.generation.trainer import GeneratorData, GeneratorRunConfig
from diffgap.generation.vocoder import Vocoder, load_vocoder
from diffgap.models.mel_generator import MelGenerator
from diffgap.ops import sample_seeds

__all__ = ["NativeGenerator", "bridge_of", "data_of", "load_generator", "weights_of"]

FloatArray = npt.NDArray[np.float32]

_TOGETHER = 32
"""Sounds drawn at a time."""


class NativeGenerator:
    """The :class:`~diffgap.generation.generator.Generator` of a :class:`MelGenerator` and a vocoder.

    Args:
        model: The generator.
        vocoder: Of the same spectrograms.
        autoencoder: That of the latents, for a generator of latents.

    Raises:
        ValueError: A vocoder or an autoencoder that is not the generator's.
    """

    def __init__(self, model: MelGenerator, vocoder: Vocoder, autoencoder: MelAutoencoder | None = None) -> None:
        self.model, self.vocoder, self.autoencoder = model.eval(), vocoder, autoencoder
        self.drawn = parse_settings(model.config.mel)
        self.settings = self.drawn.mel if isinstance(self.drawn, LatentSettings) else self.drawn
        own = None if autoencoder is None else autoencoder.settings
        if own != (self.drawn if isinstance(self.drawn, LatentSettings) else None):
            given = own.description if own else "not given"
            raise ValueError(
                f"the generator draws {model.config.mel}, the autoencoder is {given}; give the one that its latents "
                "were made with, and none for spectrograms"
            )
        if vocoder.settings != self.settings:
            raise ValueError(f"the vocoder takes {vocoder.settings.description}, the generator gives {self.settings}")
        self.sample_rate = self.settings.sample_rate
        self.dim = model.config.condition_dim
        typical = self.drawn.seconds(model.config.typical_frames)
        self.seconds = typical if typical > 0 else 5.0

    def check(self, space: AudioSpace) -> None:
        """Raises ValueError for conditions of another space than the generator was trained on."""
        trained = self.model.config.space
        if space.fingerprint == trained:
            return
        wanted = f"the generator was trained on conditions of {trained or 'an unknown space'}"
        if space.bridge is None and not space.encoder:
            raise ValueError(
                f"{wanted}, and no bridge leads the query there; give the run of one with --bridge, or ask with a sound"
            )
        raise ValueError(
            f"{wanted}, these are of {space.fingerprint}; use the bridge and the audio encoder that it was trained with"
        )

    def generate(
        self,
        conditions: Tensor | None,
        seconds: Sequence[float],
        *,
        num_samples: int = 1,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        captions: Sequence[str] | None = None,
    ) -> list[list[FloatArray]]:
        """See :meth:`diffgap.generation.generator.Generator.generate`; captions are not read."""
        drawn = self.spectrograms(
            conditions, seconds, num_samples=num_samples, steps=steps, guidance_scale=guidance_scale, seed=seed
        )
        return [[self.sound(mel, length) for mel in samples] for samples, length in zip(drawn, seconds, strict=True)]

    def spectrograms(
        self,
        conditions: Tensor | None,
        seconds: Sequence[float],
        *,
        num_samples: int = 1,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
    ) -> list[list[FloatArray]]:
        """Log-mel spectrograms (frames, bands) in place of the waveforms of :meth:`generate`."""
        for one in seconds:
            if not 0 < one < float("inf"):
                raise ValueError(f"seconds has {one}; use positive numbers")
        lengths = torch.tensor([self.drawn.frames(one) for one in seconds], dtype=torch.int64)
        by_row = [seed] * len(lengths) if isinstance(seed, int) else list(seed)
        if len(by_row) != len(lengths):
            raise ValueError(f"seed has {len(by_row)} numbers for {len(lengths)} sounds; pass one, or one for each")
        rows = [sample_seeds(num_samples, torch.Generator().manual_seed(one)) for one in by_row]
        seeds = torch.stack(rows) if rows else torch.zeros(0, num_samples, dtype=torch.int64)
        device = self.model.mean.device
        found: list[list[FloatArray]] = [[] for _ in seconds]
        # Like lengths together: a batch is as long as its longest.
        for part in lengths.argsort(stable=True).split(max(1, _TOGETHER // num_samples)):
            mels = self.model.sample(
                None if conditions is None else conditions[part.to(conditions.device)].to(device), lengths[part],
                num_samples=num_samples, steps=steps, guidance_scale=guidance_scale, seeds=seeds[part].to(device),
            )  # fmt: skip
            for row, drawn in zip(part.tolist(), mels.cpu().numpy(), strict=True):
                found[row] = [self.spectrogram(mel[: int(lengths[row])], seconds[row]) for mel in drawn]
        return found

    def spectrogram(self, drawn: FloatArray, seconds: float) -> FloatArray:
        """The log-mel spectrogram (frames, bands) behind what the generator draws."""
        return drawn if self.autoencoder is None else self.autoencoder.decode(drawn)[: self.settings.frames(seconds)]

    def sound(self, log_mel: FloatArray, seconds: float) -> FloatArray:
        """What the vocoder makes of a spectrogram, no longer than ``seconds`` and within -1..1."""
        wave = self.vocoder(log_mel)[: max(1, int(seconds * self.sample_rate))]
        loudest = float(np.abs(wave).max(initial=0.0))
        return wave / loudest if loudest > 1 else wave


def load_generator(
    run: Path, *, vocoder: str = "griffin-lim", autoencoder: str = "", device: str = "cpu"
) -> NativeGenerator:
    """The generator of a run folder of ``diffgap train-generator``, or of :meth:`MelGenerator.save_pretrained`.

    Raises:
        FileNotFoundError: Neither, or its training has not reached a validation yet.
        ValueError: Weights that are damaged, a vocoder or an autoencoder of other spectrograms.
    """
    model = MelGenerator.from_pretrained(weights_of(run))
    try:
        drawn = parse_settings(model.config.mel)
    except ValueError as error:
        raise ValueError(f"{run}: {error}; train the generator again") from error
    mel = drawn.mel if isinstance(drawn, LatentSettings) else drawn
    coder = MelAutoencoder(autoencoder, mel) if autoencoder else None
    return NativeGenerator(model.to(device), load_vocoder(vocoder, mel), coder)


def weights_of(run: Path) -> Path:
    """The folder of a generator's weights, in a run folder or itself.

    Raises:
        FileNotFoundError: There are none.
        ValueError: They are a bridge's.
    """
    _check_no_bridge(run)
    folder = run if (run / "config.json").is_file() else run / "model"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{run} holds no generator; train one with `diffgap train-generator {run}`")
    return folder


def bridge_of(run: Path) -> tuple[str, str]:
    """Bridge and audio modality that a generator was trained with, as its run's configuration names them."""
    data = _data(run)
    return (data.bridge, data.condition) if data else ("", "audio")


def data_of(run: Path) -> str:
    """The store that a generator was trained on, as its run's configuration names it; "" without one."""
    data = _data(run)
    return data.path if data else ""


def _data(run: Path) -> GeneratorData | None:
    _check_no_bridge(run)
    config = run / "config.yaml"
    return GeneratorRunConfig.load(config).data if config.is_file() else None


def _check_no_bridge(run: Path) -> None:
    """Raises ValueError for a run folder of ``diffgap train``, or a bridge that was saved alone."""
    for file, entry in ((run / "config.yaml", "bridge"), (run / "config.json", "modalities")):
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))  # of JSON too
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue  # what is missing or damaged is named where it is needed
        if isinstance(content, dict) and entry in content:
            raise ValueError(
                f"{run} holds a bridge of `diffgap train`, not a generator; name the folder of `diffgap "
                "train-generator`, and the bridge with --bridge"
            )
