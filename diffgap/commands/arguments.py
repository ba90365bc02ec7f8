"""Arguments that several commands have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

from tyro.conf import Positional, arg

__all__ = ["Output", "Run", "option"]

Output: TypeAlias = Annotated[Positional[Path], arg(metavar="OUTPUT")]
Run: TypeAlias = Annotated[Positional[Path], arg(metavar="RUN")]


def option(arguments: Sequence[str], name: str) -> str | None:
    """The value of an option that decides the defaults of the others; None if it is not given.

    Raises:
        ValueError: It is given without a value.
    """
    found = None
    for index, argument in enumerate(arguments):
        given, equals, value = argument.partition("=")
        if given == name:
            found = value if equals else next(iter(arguments[index + 1 :]), "")
            if not found:
                raise ValueError(f"{name} is given without a value; see diffgap {arguments[0]} --help")
    return found
