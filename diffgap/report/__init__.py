"""A run and the sounds made with it as one HTML page that needs nothing else."""

from __future__ import annotations

from diffgap.report.page import ReportOptions, write_report

__all__ = ["ReportOptions", "write_report"]
