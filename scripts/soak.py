"""Runs the soak tests at their full length, and prints what they found.

    python scripts/soak.py

10,000 training steps and 10,000 sampler calls with memory and time, 20 kills of a training run and 20 of embedding
runs, a full disk, a read-only file system, damaged files and a clock that jumps. ``pytest tests/soak`` is the short
version.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    command = [sys.executable, "-m", "pytest", "tests/soak", *sys.argv[1:]]
    sys.exit(subprocess.run(command, cwd=ROOT, env={**os.environ, "DIFFGAP_SOAK": "long"}).returncode)


if __name__ == "__main__":
    main()
