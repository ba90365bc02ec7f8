"""``diffgap demo``."""

from __future__ import annotations

from pathlib import Path

from diffgap.commands.arguments import Bootstrap
from diffgap.commands.evaluate import evaluate
from diffgap.commands.sample import sample
from diffgap.commands.train import run_training
from diffgap.training.config import RunConfig, TrainConfig

__all__ = ["demo"]


def demo(output: Path = Path("demo-run"), steps: int = 1200, bootstrap: Bootstrap = 500) -> None:
    """The main job on bundled real data: train a bridge between spoken words, text and images; retrieve; sample.

    Args:
        output: Run folder. A demo that was interrupted goes on from its last checkpoint.
        steps: Training steps.
        bootstrap: Bootstrap replicates for the intervals.
    """
    checkpoint_every = max(1, min(100, steps // 2))
    settings = TrainConfig(steps=steps, eval_every=max(1, steps // 3), checkpoint_every=checkpoint_every)
    run_training(RunConfig(train=settings), output)
    evaluate((output,), bootstrap=bootstrap)
    sample(output, "text", "audio", output / "samples", num_samples=4, overwrite=True)
