"""How good generated audio is: distributions, pairs, and what it was generated from.

:func:`evaluate_audio` does all, :func:`evaluate_systems` for several systems on the same items; the metrics themselves
are functions of features and logits.
"""

from __future__ import annotations

from diffgap.generation.metrics.backbone import Backbone, EncoderBackbone, build_backbone, load_backbone
from diffgap.generation.metrics.classifier import ClassifierBackbone, LinearClassifier
from diffgap.generation.metrics.conditions import Conditions
from diffgap.generation.metrics.distances import frechet_distance, kernel_distance, median_distance
from diffgap.generation.metrics.evaluate import evaluate_audio
from diffgap.generation.metrics.fitting import with_classifier
from diffgap.generation.metrics.mel import MelStatistics, mel_distances
from diffgap.generation.metrics.report import AudioReport, Figure, IncompatibleScales, compare, side_by_side
from diffgap.generation.metrics.resampling import half_sampled
from diffgap.generation.metrics.scores import clap_scores, generated_ranks, inception_score, kl_divergences
from diffgap.generation.metrics.systems import SystemsReport, evaluate_systems

__all__ = [
    "AudioReport",
    "Backbone",
    "ClassifierBackbone",
    "Conditions",
    "EncoderBackbone",
    "Figure",
    "IncompatibleScales",
    "LinearClassifier",
    "MelStatistics",
    "SystemsReport",
    "build_backbone",
    "clap_scores",
    "compare",
    "evaluate_audio",
    "evaluate_systems",
    "frechet_distance",
    "generated_ranks",
    "half_sampled",
    "inception_score",
    "kernel_distance",
    "kl_divergences",
    "load_backbone",
    "median_distance",
    "mel_distances",
    "side_by_side",
    "with_classifier",
]
