"""Training state on disk: safetensors and JSON, written whole or not at all.

checkpoints/step-00000500/
    model.safetensors       the weights being trained
    ema.safetensors         their exponential moving average
    optimizer.safetensors   one entry per parameter and buffer of the optimizer, "<parameter index>.<name>"
    state.json              step, best validation score, loss scale
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffgap._files import atomic_folder, remove_leftovers

_PREFIX = "step-"


def save(
    folder: Path,
    step: int,
    *,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write ``folder/step-<step>`` atomically and delete all but the newest ``keep`` checkpoints."""
    target = folder / f"{_PREFIX}{step:08d}"
    with atomic_folder(target, overwrite=True) as temporary:
        save_file(_owned(model.state_dict()), temporary / "model.safetensors")
        save_file(_owned(ema.state_dict()), temporary / "ema.safetensors")
        save_file(_owned(_flatten(optimizer)), temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")
    prune(folder, keep=keep)
    return target


def prune(folder: Path, *, keep: int = 2) -> None:
    """Delete all but the newest ``keep`` checkpoints, and what a killed process left half deleted or half written."""
    remove_leftovers(folder)
    for old in _all(folder)[:-keep]:
        # Under a temporary name first, so that a kill in between never leaves half a checkpoint under its own.
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.tmp-old")))


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint below ``folder``, or ``None``."""
    found = _all(folder)
    return found[-1] if found else None


def load(
    checkpoint: Path,
    *,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Restore model, average and optimizer in place; return the saved ``state``, with "step".

    A ``state`` given says what the saved one must hold: an entry of each name, of the type that its value has.

    Raises:
        ValueError: A file is missing, damaged, or belongs to another configuration.
    """
    try:
        model.load_state_dict(load_file(checkpoint / "model.safetensors"))
        ema.load_state_dict(load_file(checkpoint / "ema.safetensors"))
        _unflatten(optimizer, load_file(checkpoint / "optimizer.safetensors"))
        saved: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        _check_state(saved, state or {})
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"checkpoint {checkpoint} cannot be restored ({reason}); delete that folder to resume from an earlier "
            "one, or train into another output folder"
        ) from error
    return saved


def _check_state(saved: Any, expected: Mapping[str, Any]) -> None:
    if not isinstance(saved, dict):
        raise ValueError(f"state.json holds a {type(saved).__name__}")
    for name, value in expected.items():
        if type(saved[name]) is not type(value):
            raise ValueError(f"state.json has {name} {saved[name]!r}")


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*")) if folder.is_dir() else []


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory.
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def _unflatten(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        # torch would find out at the next step.
        if not 0 <= int(index) < len(parameters) or (value.dim() and value.shape != parameters[int(index)].shape):
            raise ValueError(f"optimizer.safetensors has {key} of shape {tuple(value.shape)}")
        state.setdefault(int(index), {})[name] = value
    names = {frozenset(entry) for entry in state.values()}
    if len(names) > 1:
        raise ValueError(f"optimizer.safetensors has {' or '.join(', '.join(sorted(x)) for x in names)} of a parameter")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
