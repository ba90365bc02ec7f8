"""Checkpoints in the layout of transformers' ``save_pretrained``, from a local folder and from nowhere else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffgap.data.media.text import TextReader
from diffgap.encoders._packages import require
from diffgap.encoders._towers import TextTower, check_vocabulary, file_digest

INSTALL = "pip install 'transformers>=4.50'"


def model_type(folder: Path) -> str:
    """``model_type`` of the folder's config.json. Raises ValueError when there is none."""
    try:
        return str(json.loads((folder / "config.json").read_text())["model_type"])
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{folder} is not a transformers checkpoint: its config.json with a model_type is missing or damaged; "
            "give a folder written by save_pretrained, or a copy of a repository of the Hugging Face Hub"
        ) from error


def weights_digest(folder: Path) -> str:
    """Digest of the weights. Raises ValueError when there are none."""
    files = [*folder.glob("model*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
    if not files:
        raise ValueError(f"{folder} holds no weights (model*.safetensors or pytorch_model*.bin); copy them there")
    return file_digest(files)


def settings_digest(folder: Path) -> str:
    """Digest of everything else that decides an embedding: configurations, preprocessing, vocabulary."""
    return file_digest([*folder.glob("*.json"), *folder.glob("*.txt")])


def load_model(name: str, folder: Path, device: str) -> tuple[Any, str]:
    """The transformers class ``name`` with all of its weights, float32, in evaluation mode; and their digest.

    Weights that the class does not know (``position_ids``, written by older versions) are left out; weights that the
    folder lacks are an error, where transformers draws them at random. Raises ValueError.
    """
    require("transformers", "transformers", INSTALL)
    import transformers

    expected = {"ClapModel": "clap", "CLIPModel": "clip"}[name]
    if (found := model_type(folder)) != expected:
        raise ValueError(f"{folder} holds a {found!r} model, not {expected!r}")
    digest = weights_digest(folder)
    model, info = getattr(transformers, name).from_pretrained(
        str(folder), local_files_only=True, output_loading_info=True
    )
    missing = sorted({*info["missing_keys"], *(key for key, *_ in info.get("mismatched_keys", ()))})
    if missing := [key for key in missing if not key.endswith("position_ids")]:
        raise ValueError(
            f"{folder} lacks {len(missing)} weights of {name}, {missing[0]} for one; copy the whole checkpoint"
        )
    return model.float().eval().requires_grad_(False).to(device), digest


def load_tokenizer(folder: Path, embeddings: int) -> Any:
    """The folder's tokenizer. Raises ValueError if it is not that of a model with ``embeddings`` tokens."""
    import transformers

    fix = (
        "copy tokenizer.json (or vocab.json and merges.txt) and tokenizer_config.json of the checkpoint into the folder"
    )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} holds no tokenizer that can be read: {fix}") from error
    check_vocabulary(len(tokenizer), embeddings, str(folder), fix)
    return tokenizer


def features(output: Any) -> Any:
    """The embeddings in what ``get_*_features`` gives: a tensor up to transformers 4, an output object since."""
    return getattr(output, "pooler_output", output)


class FolderText(TextTower):
    """The text tower of a dual encoder in ``folder``: batches padded to their longest text, with attention masks."""

    def __init__(self, name: str, family: str, folder: Path, device: str, other_tower: Sequence[str]) -> None:
        self._model, weights = load_model(name, folder, device)
        for part in other_tower:
            delattr(self._model, part)
        config = self._model.config.text_config
        self._tokenizer = load_tokenizer(folder, config.vocab_size)
        self._limit = min(self._positions(config), self._tokenizer.model_max_length)
        super().__init__(
            modality="text",
            dim=self._model.config.projection_dim,
            family=family,
            weights=weights,
            preparation=f"{settings_digest(folder)} {self._limit} tokens",
            reader=TextReader(),
            device=device,
        )

    def _positions(self, config: Any) -> int:
        """Tokens that the model has positions for."""
        return int(config.max_position_embeddings)

    def _tokens(self, texts: list[str]) -> Sequence[Sequence[int]]:
        return self._tokenizer(texts, truncation=True, max_length=self._limit)["input_ids"]

    def _embed(self, rows: Sequence[Any]) -> torch.Tensor:
        inputs = self._tokenizer.pad({"input_ids": list(rows)}, return_tensors="pt").to(self._device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        return features(self._model.get_text_features(input_ids=ids, attention_mask=mask))
