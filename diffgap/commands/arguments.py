"""Positional arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

from tyro.conf import Positional, arg

__all__ = ["Output", "Run"]

Output: TypeAlias = Annotated[Positional[Path], arg(metavar="OUTPUT")]
Run: TypeAlias = Annotated[Positional[Path], arg(metavar="RUN")]
