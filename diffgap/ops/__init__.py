"""Fused operations: one module each, with its formula, eager reference and registration."""

from diffgap.ops._dispatch import backend, explain
from diffgap.ops.adaln import adaln
from diffgap.ops.attention import attention
from diffgap.ops.clip_loss import clip_loss
from diffgap.ops.linear import linear, swiglu
from diffgap.ops.q_sample import q_sample
from diffgap.ops.random import normal, sample_seeds
from diffgap.ops.siglip_loss import siglip_loss
from diffgap.ops.silu_mul import silu_mul
from diffgap.ops.similarity import similarity_ranks, similarity_topk
from diffgap.ops.solver_step import solver_step

__all__ = [
    "adaln",
    "attention",
    "backend",
    "clip_loss",
    "explain",
    "linear",
    "normal",
    "q_sample",
    "sample_seeds",
    "siglip_loss",
    "silu_mul",
    "similarity_ranks",
    "similarity_topk",
    "solver_step",
    "swiglu",
]
