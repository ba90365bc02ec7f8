"""Benchmarks of diffgap's fused operations; see README.md in this folder."""
