"""``python -m diffgap``: the command line."""

from diffgap.cli import main

main()
