"""LAION's CLAP by its own package, ``laion_clap``, from a local checkpoint.

Checkpoints as published: ``630k-audioset-best.pt``, ``630k-audioset-fusion-best.pt``,
``music_speech_audioset_epoch_15_esc_89.98.pt``, ... The audio architecture and fusion are read off the weights.
Embeddings are those of the package's ``get_audio_embedding_from_data`` and ``get_text_embedding``, except that

- long recordings are not cropped at random: not fused, windows of 10 s, 5 s apart, are embedded each by itself and
  their mean is normalised; fused, the crops are the middle ones of their thirds;
- nothing touches the network, while importing the package or after;
- the checkpoint is read as tensors and numbers only, so that it cannot run code.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from diffgap.data.media.audio import AudioReader
from diffgap.data.media.text import TextReader
from diffgap.encoders._checkpoint import read_state_dict
from diffgap.encoders._packages import require
from diffgap.encoders._towers import MAX_SECONDS, FloatArray, TextTower, Tower, check_vocabulary, file_digest, fuse_mel

__all__ = ["LaionClapAudio", "LaionClapText"]

INSTALL = (
    "pip install --no-deps laion-clap torchlibrosa && pip install torchvision 'transformers>=4.50' librosa h5py pandas "
    "webdataset wget ftfy  (without --no-deps, numpy falls below 2)"
)
TOKENIZER_VARIABLE = "DIFFGAP_ROBERTA_TOKENIZER"
_RATE = 48_000
_SAMPLES = 480_000
# The package cuts captions here (CLAP was trained so), far below what RoBERTa's positions would hold.
_TOKENS = 77
_VOCABULARY = 50_265


@contextmanager
def _without_network() -> Iterator[None]:
    """Within, huggingface_hub answers from its cache or not at all; it reads the variable only when it is imported."""
    import huggingface_hub.constants

    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}))
        stack.enter_context(mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
        yield


def _import_package() -> Any:
    """``laion_clap``. It asks for three tokenizers of the Hub while it is imported, which takes minutes without a
    network, and it appends its own folder to ``sys.path``, which leaks top-level names like ``training``."""
    require("laion_clap", "laion-clap", INSTALL)
    path = list(sys.path)
    try:
        with _without_network():
            import laion_clap
            import laion_clap.training.data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"laion-clap needs {error.name}; run: {INSTALL}", name=error.name) from error
    finally:
        sys.path[:] = path
    return laion_clap


def read_checkpoint(file: Path) -> dict[str, torch.Tensor]:
    """The weights of a published checkpoint, without "module." and ``position_ids``. Raises ValueError."""
    state = read_state_dict(file, "state_dict")
    weights = {key.removeprefix("module."): value for key, value in state.items()}
    return {key: value for key, value in weights.items() if not key.endswith("embeddings.position_ids")}


def architecture(weights: Mapping[str, torch.Tensor], file: Path) -> tuple[str, bool]:
    """Name of the audio architecture and whether it fuses features, read off the weights. Raises ValueError."""
    try:
        width = weights["audio_branch.patch_embed.proj.weight"].shape[0]
        window = weights["audio_branch.spectrogram_extractor.stft.conv_real.weight"].shape[2]
        name = {
            (96, 1024): "HTSAT-tiny",
            (96, 1536): "HTSAT-tiny-win-1536",
            (128, 1024): "HTSAT-base",
            (256, 1024): "HTSAT-large",
        }[width, window]
        for key in ("word_embeddings", "position_embeddings"):
            weights[f"text_branch.embeddings.{key}.weight"]
    except KeyError as error:
        raise ValueError(
            f"{file} is not a CLAP checkpoint of HTSAT and RoBERTa (no {error}); both of its towers must be there"
        ) from error
    return name, "audio_branch.patch_embed.mel_conv2d.weight" in weights


def _build(file: Path, device: str, tokenizer: Any) -> Any:
    """The package's own ``CLAP_Module`` with the checkpoint's weights, in evaluation mode."""
    package = _import_package()
    from clap_module import model as clap_model
    from transformers import RobertaConfig, RobertaModel

    weights = read_checkpoint(file)
    name, fused = architecture(weights, file)
    if fused:
        require("torchaudio", "torchaudio", "pip install torchaudio")
    layers = {key.split(".")[3] for key in weights if key.startswith("text_branch.encoder.layer.")}
    config = RobertaConfig(
        vocab_size=weights["text_branch.embeddings.word_embeddings.weight"].shape[0],
        max_position_embeddings=weights["text_branch.embeddings.position_embeddings.weight"].shape[0],
        num_hidden_layers=len(layers),
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    with ExitStack() as stack:
        # The package fetches both from the Hub; the checkpoint has the model, and the caller the tokenizer.
        stack.enter_context(mock.patch.object(clap_model, "RobertaModel", _Given(RobertaModel(config))))
        stack.enter_context(mock.patch.object(package.hook, "RobertaTokenizer", _Given(tokenizer)))
        module = package.CLAP_Module(enable_fusion=fused, device=torch.device(device), amodel=name)
    try:
        module.model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{file} does not hold the weights of {name}: {' '.join(str(error).split())[:300]}") from error
    return module.eval().requires_grad_(False)


class _Given:
    """Stands for a class of transformers whose ``from_pretrained`` gives what is at hand."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def from_pretrained(self, name: str) -> Any:
        return self._value


class LaionClapAudio(Tower):
    """Recordings to unit vectors (n, 512): the audio tower of a LAION CLAP checkpoint.

    Args:
        checkpoint: The ``.pt`` file.
        device: Where the model runs.

    Raises ModuleNotFoundError, with the command, without laion-clap or what it needs; ValueError for a file that is not
    such a checkpoint.
    """

    def __init__(self, checkpoint: str | os.PathLike[str], device: str = "cpu") -> None:
        file = Path(checkpoint)
        self._module = _build(file, device, None)
        del self._module.model.text_branch
        windows = {} if self._module.enable_fusion else {"window": 10.0, "hop": 5.0}
        super().__init__(
            modality="audio",
            dim=self._module.model.joint_embed_shape,
            family="clap",
            weights=file_digest([file]),
            preparation="laion int16 repeatpad",
            reader=AudioReader(_RATE, max_seconds=MAX_SECONDS, **windows),
            device=device,
        )

    def _rows(self, item: Any) -> Sequence[FloatArray]:
        return list(np.atleast_2d(item))

    def _embed(self, rows: Sequence[Any]) -> torch.Tensor:
        return self._module.model.get_audio_embedding([self._features(wave) for wave in rows])

    def _features(self, wave: FloatArray) -> dict[str, torch.Tensor]:
        from laion_clap.training import data

        config, fused = self._module.model_cfg["audio_cfg"], self._module.enable_fusion
        audio = torch.from_numpy(data.int16_to_float32(data.float32_to_int16(wave)))
        frames = _SAMPLES // config["hop_size"] + 1
        if fused and len(audio) // config["hop_size"] + 1 > frames:
            mel = data.get_mel(audio, config)
            resize = data.torchvision.transforms.Resize([frames, config["mel_bins"]])
            fusion = fuse_mel(mel, frames, lambda whole: resize(whole[None])[0])
            return {"mel_fusion": fusion, "longer": torch.tensor([True]), "waveform": audio[:_SAMPLES]}
        # Within its length the package's own preparation draws nothing at random.
        truncating = "fusion" if fused else "rand_trunc"
        features = data.get_audio_features({}, audio, max(_SAMPLES, len(audio)), truncating, "repeatpad", config)
        return features | {"waveform": features["waveform"][:_SAMPLES]}


class LaionClapText(TextTower):
    """Texts to unit vectors (n, 512): the text tower of a LAION CLAP checkpoint, cut at 77 tokens as the package does.

    Args:
        checkpoint: The ``.pt`` file.
        device: Where the model runs.
        tokenizer: Folder of ``roberta-base``'s tokenizer (vocab.json and merges.txt, or tokenizer.json); else the one
            that the environment variable DIFFGAP_ROBERTA_TOKENIZER names; else what is in the Hugging Face cache.

    Raises ValueError, with the fix, for a tokenizer that lost its vocabulary; else as :class:`LaionClapAudio`.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        device: str = "cpu",
        *,
        tokenizer: str | os.PathLike[str] | None = None,
    ) -> None:
        file = Path(checkpoint)
        self._tokenizer = _roberta_tokenizer(tokenizer)
        self._model = _build(file, device, self._tokenizer).model
        del self._model.audio_branch
        vocabulary = repr(sorted(self._tokenizer.get_vocab().items()))
        super().__init__(
            modality="text",
            dim=self._model.joint_embed_shape,
            family="clap",
            weights=file_digest([file]),
            preparation=f"{_TOKENS} tokens of {vocabulary}",
            reader=TextReader(),
            device=device,
        )

    def _tokens(self, texts: list[str]) -> Sequence[Sequence[int]]:
        return self._tokenizer(texts, truncation=True, max_length=_TOKENS)["input_ids"]

    def _embed(self, rows: Sequence[Any]) -> torch.Tensor:
        # The package pads every text to 77 tokens; the mask takes them out again, so that fewer are the same.
        return self._model.get_text_embedding(self._tokenizer.pad({"input_ids": list(rows)}, return_tensors="pt"))


_TOKENIZER_FIX = (
    "give a folder with roberta-base's vocab.json and merges.txt: laion-clap:/path/to/checkpoint.pt?tokenizer=/path/to/"
    f"roberta-base, or {TOKENIZER_VARIABLE}=/path/to/roberta-base"
)


def _roberta_tokenizer(folder: str | os.PathLike[str] | None) -> Any:
    require("transformers", "transformers", INSTALL)
    from transformers import RobertaTokenizer

    where = folder or os.environ.get(TOKENIZER_VARIABLE) or "roberta-base"
    if where != "roberta-base" and not Path(where).is_dir():
        raise ValueError(f"tokenizer folder {where} does not exist; {_TOKENIZER_FIX}")
    try:
        tokenizer = RobertaTokenizer.from_pretrained(str(where), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"no tokenizer of roberta-base in {where}; {_TOKENIZER_FIX}") from error
    check_vocabulary(len(tokenizer), _VOCABULARY, str(where), _TOKENIZER_FIX)
    return tokenizer
