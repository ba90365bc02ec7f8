"""The cases that :mod:`benchmarks.attention_model` and :mod:`benchmarks.model` have times for, to be measured on a GPU,
and the modelled times of a chip.

The cases run on request only: they are sized for a GPU. (:mod:`benchmarks.schedule_model` has those of the schedule
family.)
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from itertools import product

import torch

from benchmarks import attention_model, contrastive, model, schedule_model
from benchmarks.attention import attention_case
from benchmarks.cases import DIRECTIONS, Case
from benchmarks.gpus import OF_CHIP, Gpu
from benchmarks.runner import Row, in_one_line

#: Rows of the batch whose oracle the modelled batches have (:func:`benchmarks.contrastive.clip_large_case`).
_ORACLE_ROWS = 8192


def cases(size: str) -> Iterator[Case]:
    """All of them, whatever ``size``: the models have one."""
    sizes = (attention_model.HEADS, attention_model.HEAD_DIM)
    for direction, batch, n in product(DIRECTIONS, attention_model.BATCHES, attention_model.LENGTHS):
        yield attention_case(direction, batch, n, n, "bf16", None, *sizes)
    for rows, width in product(model.BATCHES, model.WIDTHS):
        yield contrastive.clip_large_case(rows, width, rows // _ORACLE_ROWS, torch.bfloat16)


def _clip_rows(gpu: Gpu) -> Iterable[Row]:
    return model.model(gpu, model.compiled_counts(gpu)).result.rows


def _schedule_rows(gpu: Gpu) -> Iterable[Row]:
    return schedule_model.model(gpu, map(schedule_model.counted, schedule_model.modelled_cases()))


#: By name: the chips that a model can be made for, and its rows on a GPU.
MODELS: dict[str, tuple[Container[str], Callable[[Gpu], Iterable[Row]]]] = {
    "attention": (attention_model.CHIPS, attention_model.model),
    "clip_loss": (model.CHIPS, _clip_rows),
    "schedule": (schedule_model.CHIPS, _schedule_rows),
}


def rows(chip: str) -> tuple[list[Row], list[str]]:
    """All modelled rows of a chip's GPU, computed here, and a line for each model that failed or has no such chip."""
    found: list[Row] = []
    without: list[str] = []
    for name, (chips, rows_on) in MODELS.items():
        if chip not in chips:
            without.append(f"the model of {name} is not made for {chip}")
            continue
        try:
            found += rows_on(OF_CHIP[chip])
        except Exception as error:  # for want of the C++ kernels perhaps; the other models are left to compare with
            without.append(f"the model of {name}: {in_one_line(error)}")
    return found, without
