"""Triton decides at import whether it interprets, so what runs in its interpreter runs in a process of its own."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
