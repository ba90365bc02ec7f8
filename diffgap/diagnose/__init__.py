"""Diagnostics of embeddings and bridges: each check has a verdict, a threshold with its reason, and a fix to try."""

from diffgap.diagnose.callback import DiagnosticsCallback
from diffgap.diagnose.checks import Diagnosis, check_bridge, check_store, diagnose
from diffgap.diagnose.finding import Finding, Verdict

__all__ = ["Diagnosis", "DiagnosticsCallback", "Finding", "Verdict", "check_bridge", "check_store", "diagnose"]
