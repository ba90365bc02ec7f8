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

    A thread of gloo that frees the tensors of a collective while Python shuts down may abort its process (``terminate
    called without an active exception``; pytorch's pull request 179291), and the launcher calls a job failed whose work
    is done. The threads end with the last reference to the group, so what holds it, such as a trainer, must be gone at
    the end of the block. After a failure the group is left alone: its destruction may wait for a process that hangs.
    """
    given = dist.is_initialized()
    yield
    if dist.is_initialized() and not given:
        dist.destroy_process_group()
