"""Noise schedules, solvers as coefficient tables, and the sampler that applies them."""

from __future__ import annotations

from diffgap.diffusion.sampler import Guidance, SamplingLoop, sample
from diffgap.diffusion.scaling import EmbeddingScaler
from diffgap.diffusion.schedule import NoiseSchedule
from diffgap.diffusion.solvers import build_solver
from diffgap.diffusion.table import SolverTable

__all__ = ["EmbeddingScaler", "Guidance", "NoiseSchedule", "SamplingLoop", "SolverTable", "build_solver", "sample"]
