"""What a run is: its data, settings, date and versions."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from diffgap._version import __version__
from diffgap.generation.trainer import GeneratorRunConfig
from diffgap.report.html import Section, details, joined, paragraph, table
from diffgap.training.config import RunConfig, YamlConfig
from diffgap.training.runs import is_run

__all__ = ["load_config", "overview"]


def load_config(run: Path) -> RunConfig | GeneratorRunConfig:
    """The configuration of a run of ``diffgap train`` or ``diffgap train-generator``.

    Raises:
        FileNotFoundError: Not a run folder.
        ValueError: config.yaml is damaged.
    """
    if not is_run(run):
        raise FileNotFoundError(
            f"{run} is no run folder (no config.yaml); train one with `diffgap train` or `diffgap train-generator`"
        )
    file = run / "config.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML ({' '.join(str(error).split())[:120]})") from error
    kind = GeneratorRunConfig if isinstance(content, dict) and "generator" in content else RunConfig
    return kind.from_dict(content, str(file))


def overview(run: Path, config: RunConfig | GeneratorRunConfig) -> Section:
    """Facts, the settings that were chosen, and all settings."""
    data = config.data.path or "-"
    if isinstance(config, RunConfig) and config.data.modalities:
        data += f" ({', '.join(config.data.modalities)})"
    log = run / "metrics.jsonl"
    facts = {
        "run": str(run),
        "kind": "bridge" if isinstance(config, RunConfig) else "mel generator",
        "data": data,
        "begun": _date((run / "config.yaml").stat().st_mtime),
        "trained until": _date(log.stat().st_mtime) if log.is_file() else "not begun",
        "page made": _date(datetime.now().timestamp()),
        "made with": f"diffgap {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }
    changed = [[name, _text(value), _text(default)] for name, value, default in _settings(config) if value != default]
    everything = ([name, _text(value)] for name, value, _ in _settings(config))
    body = [
        table("The run", ["what", "value"], facts.items()),
        table("Settings other than the defaults", ["setting", "value", "default"], changed)
        if changed
        else paragraph("All settings are the defaults."),
        details("All settings", table("All settings", ["setting", "value"], everything)),
    ]
    return Section("run", "The run", joined(body))


def _settings(config: YamlConfig) -> Iterator[tuple[str, Any, Any]]:
    """Name, value and default of every field."""
    defaults = type(config)()
    for group in dataclasses.fields(config):  # type: ignore[arg-type]
        for field in dataclasses.fields(getattr(config, group.name)):
            values = (getattr(getattr(one, group.name), field.name) for one in (config, defaults))
            yield f"{group.name}.{field.name}", *values


def _text(value: Any) -> str:
    return ", ".join(value) or "-" if isinstance(value, tuple) else str(value) or "-"


def _date(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp).astimezone().strftime("%Y-%m-%d %H:%M %Z")
