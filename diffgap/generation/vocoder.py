"""Vocoders: log-mel spectrograms to waveforms."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import yaml

from diffgap.encoders._checkpoint import read_state_dict
from diffgap.encoders._packages import require
from diffgap.generation.mel import INSTALL, MelSettings

__all__ = ["GriffinLim", "HiFiGAN", "Vocoder", "Vocos", "load_vocoder"]

FloatArray = npt.NDArray[np.float32]


class Vocoder(Protocol):
    """What every vocoder offers; ``settings`` are those of the spectrograms that it takes."""

    settings: MelSettings

    def __call__(self, log_mel: FloatArray) -> FloatArray:
        """(F, bands) -> (n,) float32 samples at ``settings.sample_rate``."""
        ...


class GriffinLim:
    """Griffin and Lim's iteration (1984) with momentum (Perraudin et al. 2013), by librosa: no weights, no training.

    Phases that a spectrogram does not have are found by going back and forth between signal and spectrogram; the result
    sounds hollow beside a trained vocoder's.

    Args:
        settings: Of the spectrograms.
        iterations: Rounds.
        seed: Of the phases that it starts from.
    """

    def __init__(self, settings: MelSettings, iterations: int = 60, seed: int = 0) -> None:
        if iterations < 1:
            raise ValueError(f"iterations is {iterations}; use 1 or more")
        require("librosa", "librosa", INSTALL)
        self.settings, self.iterations, self.seed = settings, iterations, seed

    def __call__(self, log_mel: FloatArray) -> FloatArray:
        import librosa

        _check(log_mel, self.settings)
        settings = self.settings
        wave = librosa.griffinlim(
            settings.magnitudes(log_mel), n_iter=self.iterations, hop_length=settings.hop, n_fft=settings.n_fft,
            length=(len(log_mel) - 1) * settings.hop or 1, random_state=self.seed, pad_mode="constant",
        )  # fmt: skip
        return np.asarray(wave, np.float32)


class HiFiGAN:
    """transformers' ``SpeechT5HifiGan``, the vocoder of AudioLDM, from a local folder (its ``vocoder`` sub-folder).

    Args:
        path: Folder with config.json and weights.
        settings: Of the spectrograms that it was trained on; AudioLDM's by default, whose hop follows from the folder.

    Raises:
        FileNotFoundError: No config.json.
        ValueError: A file that is damaged, weights that are missing, or settings of another hop or number of bands.
    """

    def __init__(self, path: str | os.PathLike[str], settings: MelSettings | None = None) -> None:
        require("transformers", "transformers", INSTALL)
        from transformers import SpeechT5HifiGan

        if not (Path(path) / "config.json").is_file():
            raise FileNotFoundError(f"{path} holds no config.json; give the folder of a saved SpeechT5HifiGan")
        try:
            loaded: Any = SpeechT5HifiGan.from_pretrained(path, local_files_only=True, output_loading_info=True)
        except Exception as error:  # of many packages
            raise _damaged(path, "SpeechT5HifiGan", error) from error
        model, found = loaded
        # transformers would leave them as they were drawn.
        if missing := sorted(found["missing_keys"]):
            raise _damaged(path, "SpeechT5HifiGan", f"no weights {missing[0]}")
        self._model = model.eval()
        config = self._model.config
        hop = int(np.prod(config.upsample_rates))
        self.settings = settings or MelSettings(config.sampling_rate, 1024, hop, config.model_in_dim)
        if (self.settings.hop, self.settings.bands) != (hop, config.model_in_dim):
            raise ValueError(
                f"settings have hop {self.settings.hop} and {self.settings.bands} bands; "
                f"{path} takes hop {hop} and {config.model_in_dim} bands"
            )

    def __call__(self, log_mel: FloatArray) -> FloatArray:
        _check(log_mel, self.settings)
        with torch.inference_mode():
            wave = self._model(torch.from_numpy(np.ascontiguousarray(log_mel, np.float32)))
        return np.asarray(wave.numpy(), np.float32)


class Vocos:
    """charactr's Vocos (arXiv 2306.00814) from a local folder with config.yaml and pytorch_model.bin.

    The configuration names classes to import; none but Vocos's own backbone and head are.

    Args:
        path: The folder.
    """

    _PARTS = ("vocos.models.VocosBackbone", "vocos.heads.ISTFTHead")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        folder = Path(path)
        for name in ("config.yaml", "pytorch_model.bin"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}; give the folder of a Vocos model")
        require("vocos", "vocos", INSTALL)
        from vocos.heads import ISTFTHead
        from vocos.models import VocosBackbone

        try:
            content = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise _damaged(folder, "Vocos", error) from error
        features = _part(content, "feature_extractor", "vocos.feature_extractors.MelSpectrogramFeatures", folder)
        backbone, head = (
            _part(content, name, expected, folder)
            for name, expected in zip(("backbone", "head"), self._PARTS, strict=True)
        )
        state = read_state_dict(folder / "pytorch_model.bin", "state_dict")
        try:
            self._backbone, self._head = VocosBackbone(**backbone).eval(), ISTFTHead(**head).eval()
            for prefix, module in (("backbone.", self._backbone), ("head.", self._head)):
                module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
            rate = int(features.get("sample_rate", 24_000))
            self.settings = MelSettings(
                rate, int(features.get("n_fft", 1024)), int(features.get("hop_length", 256)),
                int(features.get("n_mels", 100)), 0.0, rate / 2, htk=True, floor=1e-7,
            )  # fmt: skip
        except Exception as error:  # of Vocos's own classes, by what the configuration gives them
            raise _damaged(folder, "Vocos", error) from error

    def __call__(self, log_mel: FloatArray) -> FloatArray:
        _check(log_mel, self.settings)
        with torch.inference_mode():
            features = torch.from_numpy(np.ascontiguousarray(log_mel.T, np.float32))[None]
            wave = self._head(self._backbone(features))[0]
        return np.asarray(wave.numpy(), np.float32)


def load_vocoder(spec: str, settings: MelSettings) -> Vocoder:
    """The vocoder that ``spec`` names, which must take spectrograms of ``settings``.

    Args:
        spec: "griffin-lim", "hifigan:FOLDER" or "vocos:FOLDER".

    Raises:
        FileNotFoundError: The folder lacks a file.
        ValueError: Another spec, a vocoder that is damaged, or one of other spectrograms.
    """
    kind, _, path = spec.partition(":")
    if kind == "griffin-lim" and not path:
        return GriffinLim(settings)
    if kind not in ("hifigan", "vocos") or not path:
        raise ValueError(f"vocoder {spec!r} is unknown; use griffin-lim, hifigan:FOLDER or vocos:FOLDER")
    vocoder: Vocoder = HiFiGAN(path, settings) if kind == "hifigan" else Vocos(path)
    if vocoder.settings != settings:
        raise ValueError(
            f"vocoder {spec} takes {vocoder.settings.description}, the spectrograms are {settings.description}; "
            "train the generator on spectrograms of the vocoder's settings, or use griffin-lim"
        )
    return vocoder


def _check(log_mel: FloatArray, settings: MelSettings) -> None:
    if log_mel.ndim != 2 or not len(log_mel) or log_mel.shape[1] != settings.bands:
        raise ValueError(f"log_mel is {log_mel.shape}; pass (frames, {settings.bands}), 1 frame or more")
    if not np.isfinite(log_mel).all():
        raise ValueError("log_mel holds values that are not finite")


def _part(content: Any, name: str, expected: str, folder: Path) -> dict[str, Any]:
    """``init_args`` of one part of a Vocos configuration, whose class must be the one expected."""
    part = content.get(name) if isinstance(content, dict) else None
    found = part.get("class_path") if isinstance(part, dict) else None
    if found != expected:
        raise ValueError(
            f"{folder / 'config.yaml'}: {name} is {json.dumps(found, default=str)}; only {expected} is supported"
        )
    arguments = part.get("init_args") or {} if isinstance(part, dict) else {}
    if not isinstance(arguments, dict):
        raise ValueError(
            f"{folder / 'config.yaml'}: init_args of {name} is {json.dumps(arguments, default=str)}, no mapping"
        )
    return arguments


def _damaged(folder: str | os.PathLike[str], kind: str, error: Exception | str) -> ValueError:
    """The one error for a folder of a vocoder in which something is wrong."""
    return ValueError(f"{folder} does not hold a whole {kind} ({' '.join(str(error).split())[:200]}); copy it again")
