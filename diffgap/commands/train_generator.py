"""``diffgap train-generator``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diffgap.commands.arguments import Output, option
from diffgap.commands.console import open_console
from diffgap.generation.trainer import GeneratorData, GeneratorRunConfig, GeneratorSettings
from diffgap.training.config import TrainConfig

__all__ = ["requested_generator", "train_generator_command"]

#: Steps from one line to the next where there is no terminal to draw a bar on; validations are much further apart.
_EVERY = 100


def train_generator_command(defaults: GeneratorRunConfig) -> Callable[..., None]:
    """``diffgap train-generator`` with other defaults than those of the classes."""

    def train_generator(
        output: Output,
        config: Path | None = None,
        data: GeneratorData = defaults.data,
        generator: GeneratorSettings = defaults.generator,
        train: TrainConfig = defaults.train,
    ) -> None:
        """Train a generator of sounds on a store with spectrograms. Run again on the same folder to resume.

        Args:
            output: Run folder: config.yaml, metrics.jsonl, checkpoints/, model/.
            config: YAML file of settings; flags given beside it win.
            data: Spectrograms, and what they are generated from.
            generator: The model.
            train: Optimisation.
        """
        _run(GeneratorRunConfig(data=data, generator=generator, train=train), output)

    return train_generator


def requested_generator(arguments: Sequence[str]) -> GeneratorRunConfig:
    """The settings that ``--config`` asks for, which the other flags then change."""
    path = option(arguments, "--config")
    return GeneratorRunConfig() if path is None else GeneratorRunConfig.load(Path(path))


def _run(config: GeneratorRunConfig, output: Path) -> None:
    from diffgap.data.store import EmbeddingStore
    from diffgap.generation.trainer import GeneratorTrainer
    from diffgap.training.group import ending_process_group

    if not config.data.path:
        raise ValueError("--data.path is not given; name a store that `diffgap embed ... --mel log-mel` made")
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = open_console(quiet=os.environ.get("RANK", "0") != "0")  # of a run's processes the first speaks
    shown = Progress(*columns, TextColumn("{task.fields[losses]}"), console=console, disable=not sys.stderr.isatty())
    with shown as progress:
        task = progress.add_task("training", total=config.train.steps, losses="")
        validated = ""

        def report(step: int, values: dict[str, float]) -> None:
            nonlocal validated
            if "val/loss" in values:
                gain = values["val/shuffled"] / values["val/loss"] - 1
                validated = f"validation {values['val/loss']:.4f}, {gain:+.1%} with others' conditions"
            if not sys.stderr.isatty() and ("val/loss" in values or step == 1 or step % _EVERY == 0):
                console.print(f"step {step}: loss {values['loss']:.4f} {validated}".rstrip(), highlight=False)
            progress.update(task, completed=step, losses=f"loss {values['loss']:.4f} {validated}")

        store = EmbeddingStore.open(config.data.path)
        with ending_process_group():
            result = GeneratorTrainer(config, store, output, report=report).train()
    console.print(
        f"trained {result.step} steps; least validation loss {-result.best_score:.4f} at step {result.best_step}; "
        f"model in {escape(str(output / 'model'))}"
    )
