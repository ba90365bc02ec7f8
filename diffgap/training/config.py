"""What a training run is made of: typed, with defaults and units, readable from and written to YAML."""

from __future__ import annotations

import dataclasses
import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import yaml
from typing_extensions import Self

from diffgap._files import atomic_file
from diffgap.models.settings import BridgeSettings

Precision = Literal["no", "bf16", "fp16"]

#: Fields that change how a run goes, but not its result.
_WITHOUT_EFFECT = ("train.timeout_s", "train.diagnose")

#: Values of ``data.path`` that name bundled data, whose splits ``data.split`` and ``data.split_seed`` choose, and the
#: functions that load them.
BUNDLED = {
    "stamps": "diffgap.data.stamps:load_stamps",
    "stamps-frames": "diffgap.data.stamps_frames:load_stamps_frames",
    "sound-effects": "diffgap.data.sound_effects:load_sound_effects",
}


@dataclass(frozen=True)
class DataConfig:
    """Which embeddings to train and evaluate on."""

    path: str = "stamps"
    """Folder of an embedding store, "stamps" for the bundled Tux Paint set, "stamps-frames" for its recordings in two
    languages, frame by frame, with their captions, or "sound-effects" for the bundled sound effects and their names."""
    split: Literal["concept", "folder", "source"] = "concept"
    """Bundled sets only: concepts unseen in training, whole folders of concepts unseen (stamps; harder), or whole
    packages of sounds unseen (sound-effects; harder)."""
    split_seed: int = 0
    """Bundled sets only: which of the thirty fixed splits, 0 to 29."""
    modalities: tuple[str, ...] = ()
    """Modalities to bridge; empty for all in the store."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, validation and checkpoints. AdamW with linear warm-up and cosine decay to zero."""

    steps: int = 3000
    """Optimizer steps."""
    batch_size: int = 256
    """Rows in one optimizer step, over all processes and accumulated micro-batches."""
    gradient_accumulation: int = 1
    """Micro-batches in one step. The contrastive loss sees the negatives of one micro-batch."""
    learning_rate: float = 1e-3
    """Learning rate after the warm-up."""
    weight_decay: float = 0.05
    """AdamW's decay of weight matrices, in units of the learning rate; biases and gains have none."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float = 0.995
    """Decay per step of the weight average that is validated and saved; at most exp(-3 / steps)."""
    eval_every: int = 400
    """Steps between validations."""
    patience: int = 0
    """Stop after this many validations without a better score; 0 never stops early."""
    checkpoint_every: int = 400
    """Steps between checkpoints."""
    seed: int = 0
    """Fixes the weights, the order of the rows, the timesteps and all noise."""
    mixed_precision: Precision = "no"
    """Precision of the forward pass; the weights stay float32. fp16 needs a GPU."""
    timeout_s: float = 600.0
    """Seconds that the processes of a run wait for one another before they give up. One validates while the others
    wait, so more than that takes; torch's own limit between GPUs. Another value resumes a run all the same."""
    diagnose: bool = False
    """Run the cheaper checks of `diffgap diagnose` after every validation and log them as "diagnose/...". They take two
    to three times as long as the validation. Turned on or off, a run resumes all the same."""
    trackers: tuple[str, ...] = ()
    """Experiment trackers of accelerate to log to besides metrics.jsonl, e.g. tensorboard or wandb."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; use 1 or more")
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"train.batch_size {self.batch_size} is not a multiple of train.gradient_accumulation "
                f"{self.gradient_accumulation}; choose one that is"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay is {self.ema_decay}; use a value in [0, 1)")
        for name in ("learning_rate", "timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"train.{name} is {getattr(self, name)}; use a positive value")
        if not 0 < self.max_grad_norm < math.inf:
            raise ValueError(f"train.max_grad_norm is {self.max_grad_norm}; use a positive value, 1e9 for no clipping")
        for name in ("warmup_steps", "weight_decay", "patience"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"train.{name} is {getattr(self, name)}; use 0 or more")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"train.seed is {self.seed}; use a 64-bit integer")
        if self.mixed_precision not in get_args(Precision):
            raise ValueError(
                f"train.mixed_precision is {self.mixed_precision!r}; use one of {', '.join(get_args(Precision))}"
            )


class YamlConfig:
    """A dataclass of dataclasses of plain values that is kept as YAML."""

    def save(self, path: Path) -> None:
        """Write as YAML, whole or not at all."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read YAML; fields left out keep their defaults.

        Raises:
            ValueError: Not YAML, nothing at all, as of a file that was cut off, a field that does not exist, or a value
                of another type.
            FileNotFoundError: No such file.
        """
        if not path.is_file():
            raise FileNotFoundError(f"config file {path} does not exist")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML ({' '.join(str(error).split())[:120]})") from error
        try:
            return cls.from_dict(content, str(path))
        except ValueError as error:
            if str(path) in str(error):
                raise
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, content: Any, where: str) -> Self:
        """From nested mappings as YAML gives them; fields left out keep their defaults.

        Raises:
            ValueError: A field that does not exist, or a value of another type; the message begins with ``where``.
        """
        config: Self = _build(cls, content, where)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Nested mappings of plain values, for YAML and JSON; the inverse of :meth:`from_dict`."""
        # YAML and JSON have no tuples.
        plain: dict[str, Any] = _plain(dataclasses.asdict(cast(Any, self)))
        return plain

    def differences(self, other: Self) -> list[str]:
        """Dotted names of the fields in which two configurations differ, of those that change the result."""
        mine, theirs = _leaves(dataclasses.asdict(cast(Any, self))), _leaves(dataclasses.asdict(cast(Any, other)))
        return [name for name in mine if mine[name] != theirs.get(name) and name not in _WITHOUT_EFFECT]

    def changes_to(self, other: Self) -> str:
        """The first three :meth:`differences` with both values, "train.steps 2 (now 3)"; "" without any."""
        mine, theirs = _leaves(dataclasses.asdict(cast(Any, self))), _leaves(dataclasses.asdict(cast(Any, other)))
        names = self.differences(other)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(f"{name} {mine[name]!r} (now {theirs[name]!r})" for name in names[:3]) + more


@dataclass(frozen=True)
class RunConfig(YamlConfig):
    """Everything that decides the result of ``diffgap train``."""

    data: DataConfig = field(default_factory=DataConfig)
    bridge: BridgeSettings = field(default_factory=BridgeSettings)
    train: TrainConfig = field(default_factory=TrainConfig)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: _plain(value)}
    return flat


def _build(cls: Any, content: Any, where: str) -> Any:
    if not isinstance(content, dict):
        raise ValueError(
            f"{where}: expected a mapping of fields, got {'nothing' if content is None else type(content).__name__}"
        )
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(map(str, set(content) - set(known)))
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; known fields are {', '.join(known)}")
    kinds = get_type_hints(cls)
    values = {}
    for name, value in content.items():
        if dataclasses.is_dataclass(kinds[name]):
            values[name] = _build(kinds[name], value, f"{where}: {name}")
        else:
            values[name] = _convert(kinds[name], value, f"{where}: {name}")
    return cls(**values)


def _convert(kind: Any, value: Any, where: str) -> Any:
    """A YAML value as the type of its field, forgiving what YAML 1.1 makes of "1e-3" (text) and "no" (false)."""
    if get_origin(kind) is Literal:
        value = "no" if value is False and "no" in get_args(kind) else value
        if value in get_args(kind):
            return value
        expected = f"one of {', '.join(get_args(kind))}"
    elif get_origin(kind) is tuple:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        expected = "a list of names"
    elif kind is float:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            with suppress(ValueError):
                return float(value)
        expected = "a number"
    else:
        if type(value) is kind:
            return value
        expected = {int: "a whole number", bool: "true or false", str: "text"}[kind]
    raise ValueError(f"{where} is {value!r}; use {expected}")
