"""Four gloo processes that wait for calls of the losses of ranks, so that a random case costs no start of processes."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffgap.losses import ClipLoss, SigLipLoss
from diffgap.ring_loss import ring_clip_loss, ring_siglip_loss

RANKS = 4

LOSSES = {"clip": ring_clip_loss, "siglip": ring_siglip_loss}
#: Of all ranks alone.
MODULES = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}


def call(
    loss: str,
    inputs: Sequence[Tensor],
    upstream: float,
    group: dist.ProcessGroup | None,
    ids: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> list[Tensor]:
    """This rank's loss, the gradients of ``upstream`` times it, and the loss where no gradient is wanted."""
    function: Callable[..., Tensor]
    if loss in MODULES:
        function = MODULES[loss](rank=dist.get_rank(), world_size=dist.get_world_size(), **options)
    else:
        ids_a, ids_b = ids or (None, None)
        function = partial(LOSSES[loss], ids_a=ids_a, ids_b=ids_b, group=group, **options)
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = function(*leaves)
    grads = torch.autograd.grad(value * upstream, leaves)
    with torch.no_grad():
        plain = function(*inputs)
    return [value.detach(), *grads, plain]


def serve(rank: int, meeting: Path, calls: Connection) -> None:
    """Answer calls until there are no more. The four ranks are two nodes; fewer of them are one."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS, timeout=wait)
    groups = {world: dist.new_group(list(range(world)), timeout=wait) for world in range(2, RANKS)}
    while (message := pickle.loads(calls.recv_bytes())) is not None:  # our own, from the test's process
        world, arguments = message
        try:
            answer: list[Tensor] | str = call(**arguments, group=groups.get(world))
        except Exception as error:
            answer = f"rank {rank}: {type(error).__name__}: {error}"
        calls.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


class Ranks:
    """The processes, while the context lasts."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(RANKS)]
        self._calls = [own for own, _ in pairs]
        self._processes = [
            context.Process(target=serve, args=(rank, folder / "meeting", theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]

    def __enter__(self) -> Ranks:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for calls in self._calls:
            calls.send_bytes(pickle.dumps(None))
        for process in self._processes:
            process.join()

    def __call__(self, arguments: Sequence[dict[str, Any]]) -> list[list[Tensor]]:
        """What as many of the first ranks as there are arguments answer.

        Raises:
            AssertionError: One of them failed.
        """
        world = len(arguments)
        # Tensors are pickled by value, with their storage and strides.
        for calls, own in zip(self._calls, arguments, strict=False):
            calls.send_bytes(pickle.dumps((world, own)))
        answers = [pickle.loads(calls.recv_bytes()) for calls in self._calls[:world]]
        failures = [answer for answer in answers if isinstance(answer, str)]
        assert not failures, "; ".join(failures)
        return answers
