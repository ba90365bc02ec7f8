"""``diffgap doctor``."""

from __future__ import annotations

from diffgap.commands.console import open_console

__all__ = ["doctor"]


def doctor() -> None:
    """Versions, devices, the backend each op takes and why, and what to install for the rest."""
    from diffgap.doctor import show

    show(open_console())
