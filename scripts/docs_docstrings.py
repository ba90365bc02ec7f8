"""Docstrings for the site: the reStructuredText that they hold beside Markdown, as Markdown (a griffe extension).

``.. math::`` blocks and the role ``:math:`` become formulas, references to Python names and indices (``[a][b]``) become
code, and parameters that share a description (``a, b: ...``) get it one by one.
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any

import griffe

_MATH_BLOCK = re.compile(r"^\.\. math::\n\n?((?:[ \t]+\S.*\n|\n(?=[ \t]+\S))+)\n?", re.MULTILINE)
_MATH_ROLE = re.compile(r":math:`([^`]+)`")
_INDICES = re.compile(r"(?<![\w`\])])((?:\[\w+\]){2,})")
_SHARED = re.compile(r"^( +)(\w+(?:, \w+)+)(: .*\n(?:\1 +.*\n)*)", re.MULTILINE)
_NAME_ROLE = re.compile(r":(?:py:)?(?:attr|class|data|exc|func|meth|mod|obj):`~?([^`]+)`")


def to_markdown(docstring: str, parameters: Container[str] = ()) -> str:
    """The docstring with its reStructuredText as Markdown, and each of the ``parameters`` with an entry of its own."""

    def separate(entry: re.Match[str]) -> str:
        names = entry[2].split(", ")
        return "".join(f"{entry[1]}{name}{entry[3]}" for name in names) if names[0] in parameters else entry[0]

    docstring = _MATH_BLOCK.sub(_display, _SHARED.sub(separate, docstring + "\n"))
    docstring = _INDICES.sub(r"`\1`", docstring)
    return _NAME_ROLE.sub(r"`\1`", _MATH_ROLE.sub(r"$\1$", docstring)).rstrip("\n")


def _display(block: re.Match[str]) -> str:
    formula = " ".join(line.strip() for line in block[1].splitlines())
    return f"$$\n{formula.strip()}\n$$\n\n"


class Docstrings(griffe.Extension):
    """Translates every docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once for every module, class, function and attribute."""
        if obj.docstring is not None:
            initialiser = obj.members.get("__init__", obj) if obj.is_class else obj
            parameters = {parameter.name for parameter in getattr(initialiser, "parameters", ())} | set(obj.members)
            obj.docstring.value = to_markdown(obj.docstring.value, parameters)
