"""``diffgap train``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diffgap.commands.arguments import Output, option
from diffgap.commands.console import open_console
from diffgap.models.settings import BridgeSettings
from diffgap.training.config import DataConfig, RunConfig, TrainConfig

if TYPE_CHECKING:
    from diffgap.models.bridge import DiffGAP
    from diffgap.training.trainer import TrainResult

__all__ = ["requested_defaults", "run_training", "train_command"]


def run_training(config: RunConfig, output: Path) -> TrainResult[DiffGAP]:
    """Train with a progress bar that shows the loss and the last validation score."""
    from diffgap.diagnose import DiagnosticsCallback
    from diffgap.retrieval.evaluate import validation_scores
    from diffgap.training.group import ending_process_group
    from diffgap.training.runs import load_data
    from diffgap.training.trainer import Trainer

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    console = open_console(quiet=os.environ.get("RANK", "0") != "0")  # of a run's processes the first speaks
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("training", total=config.train.steps, losses="")
        score = ""

        def report(step: int, values: dict[str, float]) -> None:
            nonlocal score
            if "val/score" in values:
                score = f"validation R@5 {values['val/score']:.3f}"
                if not sys.stderr.isatty():
                    console.print(f"step {step}: loss {values['loss']:.3f}, {score}")
            if values.get("diagnose/bad"):
                found = f"{values['diagnose/bad']:.0f} diagnostics are bad"
                console.print(f"step {step}: {found}; see `diffgap diagnose {output}`", markup=False)
            shown = " ".join(f"{name} {values[name]:.3f}" for name in ("contrastive", "diffusion") if name in values)
            progress.update(task, completed=step, losses=f"{shown} {score}")

        store = load_data(config.data)
        callbacks = [DiagnosticsCallback()] if config.train.diagnose else []
        with ending_process_group():
            result = Trainer(
                config, store, output, validate=validation_scores, report=report, callbacks=callbacks
            ).train()
    together = f" in {result.processes} processes" if result.processes > 1 else ""
    console.print(
        f"trained {result.step} steps{together}; "
        f"best validation R@5 {result.best_score:.3f} at step {result.best_step}; "
        f"model in {escape(str(output / 'model'))}"
    )
    return result


def train_command(defaults: RunConfig) -> Callable[..., None]:
    """``diffgap train`` with other defaults than those of the classes."""

    def train(
        output: Output,
        config: Path | None = None,
        preset: Literal["recommended", "paper"] = "recommended",
        data: DataConfig = defaults.data,
        bridge: BridgeSettings = defaults.bridge,
        train: TrainConfig = defaults.train,
    ) -> None:
        """Train a bridge on an embedding store. Run again on the same folder to resume.

        Args:
            output: Run folder: config.yaml, metrics.jsonl, checkpoints/, model/.
            config: YAML file of settings; flags given beside it win.
            preset: Bridge settings to start from.
            data: Embeddings.
            bridge: The model.
            train: Optimisation.
        """
        run_training(RunConfig(data=data, bridge=bridge, train=train), output)

    return train


def requested_defaults(arguments: Sequence[str]) -> RunConfig:
    """The settings that ``--config`` and ``--preset`` ask for, which the other flags then change."""
    path, preset = option(arguments, "--config"), option(arguments, "--preset")
    if path is not None:
        if preset is not None:
            raise ValueError("--preset and --config were both given; put the preset's settings into the config file")
        return RunConfig.load(Path(path))
    return RunConfig(bridge=BridgeSettings.preset(preset or "recommended"))  # type: ignore[arg-type]
