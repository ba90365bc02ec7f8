"""Where commands print."""

from __future__ import annotations

import os
import sys

from rich.console import Console

__all__ = ["open_console"]

#: Wider than any line or table.
_WITHOUT_LIMIT = 10_000


def open_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console as wide as its terminal; in a file or a pipe, lines and tables are as wide as they need.

    ``COLUMNS`` sets the width of either.
    """
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _WITHOUT_LIMIT
    return Console(stderr=stderr, quiet=quiet, width=width)
