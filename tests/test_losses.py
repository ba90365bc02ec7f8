"""ClipLoss and SigLipLoss beside open_clip's, alone and in two processes."""

from __future__ import annotations

import importlib.util
import inspect
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

from diffgap.losses import ClipLoss, SigLipLoss
from tests.ops.contrastive_cases import LargestTensor

WORLD = 2
CLIP_OPTIONS = [
    {"local_loss": local, "gather_with_grad": with_grad} for local in (False, True) for with_grad in (False, True)
]
SIGLIP_OPTIONS: list[dict[str, Any]] = [{"dist_impl": name} for name in ("bidir", "shift", "reduce", "gather")]


def load_peer() -> Any:
    """open_clip's loss.py by itself, without the seconds that importing all of it takes; None if missing."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        return None
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).with_name("loss.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PEER = load_peer()
needs_peer = pytest.mark.skipif(PEER is None, reason="open_clip is not installed: pip install open-clip-torch")


def features(rows: int, width: int = 24, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, rows, width, generator=generator)
    return F.normalize(image, dim=1).to(dtype), F.normalize(image / 4 + text, dim=1).to(dtype)


def evaluate(loss: Callable[..., Any], image: Tensor, text: Tensor, *scalars: Tensor) -> list[Tensor]:
    """The loss and the gradients of everything it was given."""
    inputs = [x.detach().clone().requires_grad_() for x in (image, text, *scalars)]
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


@needs_peer
@pytest.mark.parametrize("rows", [1, 7, 70, 100])
@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("bias", [None, -5.0])
def test_clip_loss_module_equals_open_clip(rows: int, scale: float, bias: float | None) -> None:
    scalars = [torch.tensor(x) for x in (scale, bias) if x is not None]
    expected = evaluate(PEER.ClipLoss(), *features(rows), *scalars)
    actual = evaluate(ClipLoss(), *features(rows), *scalars)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    if bias is not None:
        assert actual[-1] == 0


@needs_peer
@pytest.mark.parametrize("rows", [1, 7, 70, 100])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, 0.0)])
def test_siglip_loss_module_equals_open_clip(rows: int, scale: float, bias: float) -> None:
    inputs = *features(rows), torch.tensor(scale), torch.tensor(bias)
    expected = evaluate(PEER.SigLipLoss(), *inputs)
    torch.testing.assert_close(evaluate(SigLipLoss(), *inputs), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(evaluate(SigLipLoss(chunk_size=3), *inputs), expected, rtol=1e-4, atol=1e-5)


@needs_peer
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_losses_take_the_arguments_of_open_clip(name: str) -> None:
    ours, theirs = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}[name], getattr(PEER, name)
    for method in ("__init__", "forward"):
        expected = inspect.signature(getattr(theirs, method)).parameters
        actual = inspect.signature(getattr(ours, method)).parameters
        assert list(actual)[: len(expected)] == list(expected)
        defaults = {key: p.default for key, p in expected.items() if p.default is not p.empty}
        assert {key: actual[key].default for key in defaults} == defaults


@pytest.mark.parametrize("loss", [ClipLoss(), SigLipLoss()])
def test_losses_return_a_dict_on_request(loss: nn.Module) -> None:
    inputs = *features(5), torch.tensor(10.0), torch.tensor(-5.0)
    result = loss(*inputs, output_dict=True)
    assert list(result) == ["contrastive_loss"]
    torch.testing.assert_close(result["contrastive_loss"], loss(*inputs))


@pytest.mark.parametrize("loss", [ClipLoss(), SigLipLoss()])
def test_losses_take_numbers_and_towers_of_unequal_dtype(loss: nn.Module) -> None:
    image, text = features(5)
    value = loss(image.bfloat16(), text, 10.0, -5.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(image.bfloat16().float(), text, torch.tensor(10.0), torch.tensor(-5.0)))


@needs_peer
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
@pytest.mark.parametrize(
    "scale", [np.float32(10), np.int64(10), 10, torch.tensor(10), torch.tensor([10.0]), torch.tensor(10.0).half()]
)
def test_losses_take_the_scales_of_open_clip(name: str, scale: Any) -> None:
    ours, theirs = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}[name](), getattr(PEER, name)()
    expected = theirs(*features(5), scale, -scale) if name == "SigLipLoss" else theirs(*features(5), scale)
    torch.testing.assert_close(ours(*features(5), scale, -scale), expected.reshape(()))
    assert vars(theirs).keys() - {"prev_num_logits", "labels"} <= vars(ours).keys()


@pytest.mark.parametrize("make", [ClipLoss, SigLipLoss])
def test_losses_refuse(make: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"rank=2, world_size=2"):
        make(rank=2, world_size=2)
    with pytest.raises(RuntimeError, match="init_process_group"):
        make(world_size=2)(*features(3), 10.0, 0.0)


def test_clip_loss_module_refuses_horovod() -> None:
    with pytest.raises(ValueError, match="use_horovod"):
        ClipLoss(use_horovod=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dist_impl": "ring"}, "dist_impl must be one of bidir, .* got 'ring'"),
        ({"chunk_size": -1}, "chunk_size"),
    ],
)
def test_siglip_loss_module_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SigLipLoss(**options)


class Towers(nn.Module):
    """Two linear towers and a learnt scale and bias: what DDP averages the gradients of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(24, 16), nn.Linear(24, 16)
        self.scale, self.bias = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(-5.0))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        return (
            F.normalize(self.image(image), dim=1),
            F.normalize(self.text(text), dim=1),
            self.scale,
            self.bias,
        )


def train_step(model: nn.Module, loss: nn.Module, image: Tensor, text: Tensor) -> list[Tensor]:
    """The loss and the gradients of all parameters."""
    model.zero_grad()
    value = loss(*model(image, text))
    value.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    return [value.detach(), *gradients]


def run_rank(rank: int, port: int, results: Any) -> None:
    """Every configuration of ours and of open_clip's, under DDP on this rank's half of the batch."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    model = nn.parallel.DistributedDataParallel(Towers())
    local = [x.chunk(WORLD)[rank] for x in features(14)]
    with pytest.raises(ValueError, match=r"built for rank 0 of 3, but the process group says rank \d of 2"):
        ClipLoss(world_size=3)(*local, 10.0)
    for options in CLIP_OPTIONS[:3]:  # a last batch that is smaller on one rank
        with pytest.raises(ValueError, match=r"\[7, 24\], rank 1 \[6, 24\] and .* set drop_last=True in the data"):
            ClipLoss(**options, rank=rank, world_size=WORLD)(*(x[rank:] for x in local), 10.0)
    found = {}
    for name, ours, options in configurations():
        place = {"rank": rank, "world_size": WORLD}
        with warnings.catch_warnings(), LargestTensor() as largest:
            warnings.simplefilter("error", FutureWarning)  # torch deprecates its collectives with one
            evaluate(ours(**options, **place), *local, torch.tensor(10.0), torch.tensor(-5.0))
        found[f"{name} {options} largest"] = largest.elements
        actual = train_step(model, ours(**options, **place), *local)
        expected = train_step(model, getattr(PEER, name)(**options, **place), *local) if PEER else None
        found[f"{name} {options}"] = actual, expected
    torch.save(found, os.path.join(results, f"{rank}.pt"))
    dist.destroy_process_group()


def configurations() -> list[tuple[str, type[nn.Module], dict[str, Any]]]:
    clip = [("ClipLoss", ClipLoss, options) for options in CLIP_OPTIONS]
    return [*clip, *(("SigLipLoss", SigLipLoss, options) for options in SIGLIP_OPTIONS)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two gloo processes found."""
    results = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run_rank, (port, str(results)), nprocs=WORLD)
    return [torch.load(results / f"{rank}.pt") for rank in range(WORLD)]


@needs_peer
@pytest.mark.parametrize(("name", "ours", "options"), configurations())
def test_losses_equal_open_clip_under_ddp(
    ranks: list[dict[str, Any]], name: str, ours: type[nn.Module], options: dict[str, Any]
) -> None:
    for found in ranks:
        actual, expected = found[f"{name} {options}"]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [("ClipLoss", {"local_loss": True, "gather_with_grad": True}), ("SigLipLoss", {"dist_impl": "bidir"})],
)
def test_losses_under_ddp_equal_one_process_with_the_whole_batch(
    ranks: list[dict[str, Any]], name: str, options: dict[str, Any]
) -> None:
    ours = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}[name]
    whole = train_step(Towers(), ours(), *features(14))
    local = [found[f"{name} {options}"][0] for found in ranks]
    torch.testing.assert_close(torch.stack([x[0] for x in local]).mean(), whole[0])
    torch.testing.assert_close(local[0][1:], whole[1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "ours", "options"), configurations())
def test_losses_that_ride_the_ring_gather_no_features(
    ranks: list[dict[str, Any]], name: str, ours: type[nn.Module], options: dict[str, Any]
) -> None:
    features_of_a_rank = 7 * 24
    rings = name == "SigLipLoss" or all(options.values())
    for found in ranks:
        assert (found[f"{name} {options} largest"] == features_of_a_rank) == rings
