"""Tests."""

import os

# Two workers of pytest-xdist have two threads a core. By default a thread that waits for another spins on its core,
# which that other one needs, and small ops take many times as long. OpenMP reads this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A worker of pytest-xdist is told the width of a terminal that it does not have.
os.environ.pop("COLUMNS", None)
