"""The cases that :mod:`benchmarks.attention_model` and :mod:`benchmarks.model` have times for, to be measured on a GPU.

On request only: they are sized for one. (:mod:`benchmarks.schedule_model` has the cases of the schedule family.)
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from benchmarks import attention_model, contrastive, model
from benchmarks.attention import attention_case
from benchmarks.cases import DIRECTIONS, Case

#: Rows of the batch whose oracle the modelled batches have (:func:`benchmarks.contrastive.clip_large_case`).
_ORACLE_ROWS = 8192


def cases(size: str) -> Iterator[Case]:
    """All of them, whatever ``size``: the models have one."""
    sizes = (attention_model.HEADS, attention_model.HEAD_DIM)
    for direction, batch, n in product(DIRECTIONS, attention_model.BATCHES, attention_model.LENGTHS):
        yield attention_case(direction, batch, n, n, "bf16", None, *sizes)
    for rows, width in product(model.BATCHES, model.WIDTHS):
        yield contrastive.clip_large_case(rows, width, rows // _ORACLE_ROWS, torch.bfloat16)
