"""HTML from nested calls: whatever is not :class:`Html` already is text, and is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["Html", "Section", "details", "element", "figure", "grid", "joined", "paragraph", "table"]

_VOID = frozenset({"img"})


class Html(str):
    """Markup, as opposed to text."""

    __slots__ = ()


class Section(NamedTuple):
    """A part of the page; ``name`` is its address."""

    name: str
    title: str
    body: Html


def element(tag: str, *children: str, **attributes: str) -> Html:
    """``<tag attributes>children</tag>``; ``class_`` is the attribute class, ``aria_label`` is aria-label."""
    named = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items())
    head = " ".join([tag, *(f'{name}="{html.escape(value)}"' for name, value in named)])
    return Html(f"<{head}>" if tag in _VOID else f"<{head}>{joined(children)}</{tag}>")


def joined(parts: Iterable[str]) -> Html:
    """Text and markup in one."""
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts))


def paragraph(*children: str) -> Html:
    """Text in which `a command` stands between backticks."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        else:
            parts += [element("code", part) if odd % 2 else part for odd, part in enumerate(child.split("`"))]
    return element("p", *parts)


def table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table that scrolls by itself where it is too wide; the first cell of a row is its heading."""
    head = element("tr", *(element("th", heading, scope="col") for heading in headings))
    body = (
        element("tr", element("th", row[0], scope="row"), *(element("td", _cell(cell)) for cell in row[1:]))
        for row in rows
    )
    content = element("table", element("caption", caption), element("thead", head), element("tbody", *body))
    return element("div", content, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _cell(text: str) -> Html:
    """Intervals, "[low, high]", are set smaller and stay on one line."""
    parts = re.split(r"(\[[^\]]*\])", text)
    return joined(element("span", part, class_="interval") if odd % 2 else part for odd, part in enumerate(parts))


def figure(content: Html, caption: str) -> Html:
    """A picture with its caption."""
    return element("figure", content, element("figcaption", caption))


def grid(*figures: Html) -> Html:
    """Figures side by side as far as there is room."""
    return element("div", *figures, class_="grid")


def details(summary: str, *children: str) -> Html:
    """What is shown when asked for."""
    return element("details", element("summary", summary), *children)
