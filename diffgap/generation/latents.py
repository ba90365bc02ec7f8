"""Latents of a spectrogram autoencoder: what latent diffusion draws instead of the spectrogram itself.

An ``AutoencoderKL`` of diffusers, the ``vae`` folder of an AudioLDM say, takes a log-mel spectrogram (F, M) as a
picture of one channel and gives latents (C, F / f, M / f). With s its ``scaling_factor``:

    z = s mean(encoder(x)),    x = decoder(z / s)

For :class:`~diffgap.models.mel_generator.MelGenerator` they are spectrograms of F / f frames and C M / f bands. F is
filled up to a multiple of f with silence.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError

from diffgap.data.media import Reader
from diffgap.data.media.audio import AudioReader
from diffgap.encoders import Encoded
from diffgap.encoders._packages import require
from diffgap.encoders._towers import file_digest
from diffgap.generation.mel import INSTALL, MelSettings

__all__ = ["AUDIOLDM", "LatentMel", "LatentSettings", "MelAutoencoder", "parse_settings"]

FloatArray = npt.NDArray[np.float32]

#: Spectrograms of AudioLDM's autoencoder and vocoder.
AUDIOLDM = MelSettings(sample_rate=16_000, n_fft=1024, hop=160, bands=64, low=0.0, high=8_000.0)


@dataclass(frozen=True)
class LatentSettings:
    """What latents are of."""

    mel: MelSettings
    """The spectrograms behind them."""
    channels: int
    """C."""
    factor: int
    """f, of frames and of bands."""
    weights: str
    """Digest of the autoencoder."""

    @property
    def bands(self) -> int:
        """Values of a frame, C M / f."""
        return self.channels * self.mel.bands // self.factor

    def frames(self, seconds: float) -> int:
        """Frames of latents of a recording."""
        return -(-self.mel.frames(seconds) // self.factor)

    def seconds(self, frames: int) -> float:
        """Length of what ``frames`` frames of latents stand for."""
        return self.mel.seconds(frames * self.factor)

    @property
    def description(self) -> str:
        """All of it in one line; :func:`parse_settings` reads it."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))


def parse_settings(description: str) -> MelSettings | LatentSettings:
    """The settings behind the description of a spectrogram or of latents. Raises ValueError for anything else."""
    try:
        content = json.loads(description)
        if isinstance(content, dict) and "weights" in content:
            return LatentSettings(**{**content, "mel": MelSettings(**content["mel"])})
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(description)[:80]!r} describes neither spectrograms nor latents ({error})") from error
    return MelSettings.parse(description)


class MelAutoencoder:
    """An ``AutoencoderKL`` between spectrograms and latents.

    Args:
        folder: Where diffusers saved it: config.json and weights.
        mel: Of its spectrograms; AudioLDM's by default.

    Raises:
        FileNotFoundError: The folder holds none.
        ValueError: It is damaged, not of one channel, or its bands are no multiple of its factor.
    """

    def __init__(self, folder: str | Path, mel: MelSettings = AUDIOLDM) -> None:
        require("diffusers", "diffusers", INSTALL)
        import diffusers

        path = Path(folder)
        weights = [*path.glob("diffusion_pytorch_model*.safetensors")] or [*path.glob("diffusion_pytorch_model*.bin")]
        if not (path / "config.json").is_file() or not weights:
            raise FileNotFoundError(f"{path} holds no config.json and weights; give the folder of an AutoencoderKL")
        try:
            self._model = diffusers.AutoencoderKL.from_pretrained(str(path), local_files_only=True).eval()
        except (OSError, SafetensorError, ValueError, RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} is no whole AutoencoderKL ({reason}); copy it again") from error
        config = self._model.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        if config.in_channels != 1 or mel.bands % factor:
            raise ValueError(
                f"{path} takes {config.in_channels} channels and divides by {factor}; an autoencoder of spectrograms "
                f"takes 1, and {mel.bands} bands must be a multiple of what it divides by"
            )
        self.settings = LatentSettings(mel, int(config.latent_channels), factor, file_digest(weights)[:32])

    @torch.inference_mode()
    def encode(self, log_mel: FloatArray) -> FloatArray:
        """(F, M) -> (ceil(F / f), C M / f)."""
        mel, factor = self.settings.mel, self.settings.factor
        if log_mel.ndim != 2 or not len(log_mel) or log_mel.shape[1] != mel.bands:
            raise ValueError(f"log_mel is {log_mel.shape}; pass (frames, {mel.bands}), 1 frame or more")
        silence = np.full((-len(log_mel) % factor, mel.bands), np.log(mel.floor), np.float32)
        picture = torch.from_numpy(np.concatenate([log_mel.astype(np.float32), silence]))[None, None]
        z = self._model.encode(picture).latent_dist.mean[0] * self._model.config.scaling_factor
        return np.ascontiguousarray(z.permute(1, 0, 2).flatten(1).numpy())

    @torch.inference_mode()
    def decode(self, latents: FloatArray) -> FloatArray:
        """(F', C M / f) -> (F' f, M) log-mel."""
        settings = self.settings
        if latents.ndim != 2 or not len(latents) or latents.shape[1] != settings.bands:
            raise ValueError(f"latents are {latents.shape}; pass (frames, {settings.bands}), 1 frame or more")
        z = torch.from_numpy(np.ascontiguousarray(latents, np.float32)).unflatten(1, (settings.channels, -1))
        x = self._model.decode(z.permute(1, 0, 2)[None] / self._model.config.scaling_factor).sample
        return np.ascontiguousarray(x[0, 0].numpy())


class LatentMel:
    """Recordings to latents, as an encoder of the modality "mel": waveforms (n,) to (B, T, C M / f) with lengths.

    Args:
        folder, mel: See :class:`MelAutoencoder`.
        max_seconds: Longer recordings are refused.
    """

    modality = "mel"
    sequence = True
    normalized = False
    space = ""

    def __init__(self, folder: str | Path, mel: MelSettings = AUDIOLDM, max_seconds: float = 30.0) -> None:
        self.autoencoder = MelAutoencoder(folder, mel)
        self.dim = self.autoencoder.settings.bands
        self.fingerprint = f"latent-mel:{self.autoencoder.settings.description}"
        self.reader: Reader = AudioReader(mel.sample_rate, max_seconds=max_seconds)

    def encode(self, batch: Sequence[FloatArray]) -> Encoded:
        """Zeros beyond the lengths. A recording is encoded alone, so that no other's length shows in its latents."""
        mel = self.autoencoder.settings.mel
        latents = [self.autoencoder.encode(mel.log_mel(wave)) for wave in batch]
        lengths = np.array([len(one) for one in latents], dtype=np.int64)
        values = np.zeros((len(latents), lengths.max(initial=0), self.dim), dtype=np.float32)
        for row, one in zip(values, latents, strict=True):
            row[: len(one)] = one
        return values, lengths
