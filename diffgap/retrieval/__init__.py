"""Retrieval: ranks and metrics, confidence intervals, baselines and modality-gap diagnostics."""
