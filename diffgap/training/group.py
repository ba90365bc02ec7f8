"""The process group that a run begins, ended before Python is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

# The functions of this module keep, as a default argument, the group that exists when it is imported, and torch imports
# it with the first optimizer. That group would outlive its destruction, with its threads: so it is imported before.
import torch.distributed.nn.functional  # noqa: F401

__all__ = ["ending_process_group"]


@contextmanager
def ending_process_group() -> Iterator[None]:
    """Destroys the default process group that was begun inside the block.

    A thread of gloo that frees the tensors of a collective while Python shuts down aborts its process (``terminate
    called without an active exception``), and the launcher calls a job failed whose work is done. After a failure the
    group is left alone: its destruction may wait for a process that hangs.
    """
    given = dist.is_initialized()
    yield
    if dist.is_initialized() and not given:
        dist.destroy_process_group()
