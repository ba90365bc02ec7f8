"""``diffgap``, ``python -m diffgap``: the command line, or in one line why this environment cannot run it."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of the ``diffgap`` command."""
    try:
        from diffgap import cli
    except (ImportError, ValueError) as error:  # the latter: an environment variable that is none of its values
        fix = f"; run: pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
        print(f"diffgap: {error}{fix}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # torch takes seconds to import
        print("diffgap: interrupted", file=sys.stderr)
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
