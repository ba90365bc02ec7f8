"""A bridge under FSDP2, sharded over two processes, beside DistributedDataParallel."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from diffgap.models.bridge import DiffGAP
from tests.synthetic import DIMS, TINY

PROCESSES = 2
ROWS = 6
STEPS = 4
WHOLE = StateDictOptions(full_state_dict=True)


def make_bridge() -> DiffGAP:
    torch.manual_seed(0)
    return DiffGAP(DIMS, TINY).train()


def batch(step: int, rank: int) -> dict[str, Any]:
    """Rows of one rank, some without an image, some of one id with rows of the other rank."""
    generator = torch.Generator().manual_seed(step)
    every = {name: torch.randn(PROCESSES * ROWS, dim, generator=generator) for name, dim in DIMS.items()}
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    ids = torch.arange(PROCESSES * ROWS) % (ROWS + 2)
    return {
        "embeddings": {name: x[own] for name, x in every.items()},
        "present": {"image": torch.arange(ROWS) % (rank + 2) > 0},
        "ids": ids[own],
        "seeds": 100 * step + torch.arange(PROCESSES * ROWS)[own],
        "step": step,
    }


def train(bridge: DiffGAP, model: nn.Module, rank: int) -> dict[str, Any]:
    """A few steps of ``model``, which wraps ``bridge`` or is it; losses and, whole, what was learnt."""
    optimizer = torch.optim.AdamW(bridge.parameter_groups(0.05), lr=3e-3)
    losses = []
    for step in range(STEPS):
        loss = model(**batch(step, rank))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return {
        "losses": torch.stack(losses),
        "model": get_model_state_dict(bridge, options=WHOLE),
        "optimizer": get_optimizer_state_dict(bridge, optimizer, options=WHOLE)["state"],
    }


def work(rank: int, port: str, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    plain, sharded = make_bridge(), make_bridge()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for module in (*sharded.heads.values(), sharded.diffusion.denoiser, sharded):
        fully_shard(module, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    found = {
        "ddp": train(plain, DistributedDataParallel(plain), rank),
        "fsdp": train(sharded, sharded, rank),
    }
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_fsdp_trains_as_ddp_does_and_its_state_is_gathered(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    mp.spawn(work, args=(port, str(tmp_path)), nprocs=PROCESSES)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES))
    for found in (first, second):
        torch.testing.assert_close(found["fsdp"]["losses"], found["ddp"]["losses"], rtol=1e-5, atol=0)
    assert not torch.equal(first["ddp"]["losses"], second["ddp"]["losses"]), "each has its own rows"
    # Rank 0 has the whole state, of the model's own shapes, and a plain bridge takes it up.
    states: list[dict[str, Tensor]] = [first[name]["model"] for name in ("fsdp", "ddp")]
    bridge = make_bridge()
    start = {name: value.clone() for name, value in bridge.state_dict().items()}
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)
    bridge.load_state_dict(states[0])
    assert any(not torch.allclose(value, start[name], atol=1e-3) for name, value in bridge.state_dict().items())
    optimizers = [first[name]["optimizer"] for name in ("fsdp", "ddp")]
    assert optimizers[0].keys() == {name for name, p in bridge.named_parameters() if p.requires_grad}
    torch.testing.assert_close(optimizers[0], optimizers[1], rtol=1e-4, atol=1e-6)
