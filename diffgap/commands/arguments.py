"""Arguments that several commands have, and what their values must be."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeAlias, get_type_hints, runtime_checkable

from tyro.conf import Positional, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

__all__ = [
    "Bootstrap",
    "Device",
    "Guidance",
    "Output",
    "Run",
    "Samples",
    "Seed",
    "Solver",
    "Steps",
    "Within",
    "check_values",
    "constructors",
    "option",
]


@runtime_checkable
class Check(Protocol):
    """Part of an annotation: what a value that was given must be."""

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError for a value that it is not, naming the argument and what to use."""


@dataclass(frozen=True)
class Within:
    """A finite number from ``least`` to ``most``, both included.

    An upper bound is far beyond use. It is there for the slip of the hand that would run for years, or out of memory.
    """

    least: float
    most: float = math.inf

    def check(self, name: str, value: Any) -> None:
        if not isinstance(value, int) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}; use a finite number")
        if value < self.least:
            raise ValueError(f"{name} is {value}; use {self.least:g} or more")
        if value > self.most:
            raise ValueError(f"{name} is {value}; use {self.most} or less")


@dataclass(frozen=True)
class OneOfSolvers:
    """The name of a solver."""

    def check(self, name: str, value: Any) -> None:
        from diffgap.diffusion.solvers import SOLVERS

        if value not in SOLVERS:
            raise ValueError(f"{name} {value!r} does not exist; use one of {', '.join(SOLVERS)}")


@dataclass(frozen=True)
class OfThisMachine:
    """A device of torch that is there."""

    def check(self, name: str, value: Any) -> None:
        import torch

        try:
            device = torch.device(value)
        except RuntimeError as error:
            raise ValueError(f"{name} is {value!r}; use cpu, cuda, cuda:1 ...") from error
        try:
            torch.empty(0, device=device)  # the only way to find out, whatever kind it is
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"{name} is {value!r}, which this machine or this torch does not have; use cpu") from error


Output: TypeAlias = Annotated[Positional[Path], arg(metavar="OUTPUT")]
Run: TypeAlias = Annotated[Positional[Path], arg(metavar="RUN")]
Seed: TypeAlias = Annotated[int, Within(0, 2**63 - 1)]
Bootstrap: TypeAlias = Annotated[int, Within(1, 1_000_000)]
Samples: TypeAlias = Annotated[int, Within(1, 10_000)]
Steps: TypeAlias = Annotated[int | None, Within(1)]
Solver: TypeAlias = Annotated[str | None, OneOfSolvers()]
Guidance: TypeAlias = Annotated[float | None, Within(0)]
Device: TypeAlias = Annotated[str, OfThisMachine()]


def check_values(command: Callable[..., None], given: Mapping[str, Any]) -> None:
    """Whether the values that were given to a command are what its annotations say.

    Raises:
        ValueError: One of them is not.
    """
    hints = get_type_hints(command, include_extras=True)
    for name in inspect.signature(command).parameters:
        value = given.get(name)
        for check in getattr(hints[name], "__metadata__", ()):
            if isinstance(check, Check) and value is not None:
                for one in value if isinstance(value, tuple) else (value,):
                    check.check(name, one)


constructors = ConstructorRegistry()
"""How tyro reads what it would read too kindly."""


@constructors.primitive_rule
def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """A path, which "" is not: of an unset variable of the shell, Path would make the current folder."""
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1, metavar="PATH", instance_from_str=_path_given, is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )  # fmt: skip


def _path_given(given: list[str]) -> Path:
    if not given[0]:
        raise ValueError("the path is empty; give one, . for this folder")
    return Path(given[0])


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
