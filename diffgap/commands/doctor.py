"""``diffgap doctor``."""

from __future__ import annotations

from rich.console import Console

__all__ = ["doctor"]


def doctor() -> None:
    """Versions, devices, the backend each op takes and why, and what to install for the rest."""
    from diffgap.doctor import show

    show(Console())
