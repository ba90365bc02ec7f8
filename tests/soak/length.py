"""How long the soak tests are: some turns in every test run, or thousands (scripts/soak.py), and what they found."""

from __future__ import annotations

import os

#: DIFFGAP_SOAK=long sets it.
LONG = os.environ.get("DIFFGAP_SOAK") == "long"

#: Training steps, and calls of the sampler.
TURNS = 10_000 if LONG else 60

#: Deaths of a run by SIGKILL.
KILLS = 20 if LONG else 2

#: What to report, in words.
found: list[str] = []
