"""ClipLoss and SigLipLoss where they are meant to go: open_clip's training, GradCache, sentence-transformers."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffgap.losses import ClipLoss, SigLipLoss
from diffgap.ops import clip_loss
from tests.helpers import FLOAT32_RTOL, assert_close_to_oracle, relative_l2

STEPS = 20
BATCH = 6


def towers(vision_width: int, text_width: int) -> dict[str, Any]:
    """ViT-B-32-quickgelu with small images and short captions; its own widths are 768 and 512."""
    return {
        "embed_dim": 512,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 64,
            "patch_size": 32,
            "layers": 12,
            "width": vision_width,
            "head_width": vision_width // 12,
        },
        "text_cfg": {"context_length": 16, "vocab_size": 128, "width": text_width, "heads": 8, "layers": 12},
    }


FULL = towers(768, 512)
NARROW = towers(96, 64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


needs_open_clip = pytest.mark.skipif(
    not is_installed("open_clip_train"), reason="open_clip is not installed: pip install open-clip-torch"
)
needs_sentence_transformers = pytest.mark.skipif(
    not is_installed("sentence_transformers"), reason="not installed: pip install sentence-transformers"
)


class Batches:
    """Images and captions in memory, with what open_clip's loop asks of a data loader."""

    def __init__(self, dtype: torch.dtype, num_batches: int) -> None:
        self.dtype, self.num_batches, self.num_samples = dtype, num_batches, num_batches * BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.num_batches):
            captions = torch.randint(1, 127, (BATCH, 16), generator=generator)
            captions[:, -1] = 127  # end of text: open_clip pools at the largest token
            yield torch.randn(BATCH, 3, 64, 64, generator=generator).to(self.dtype), captions


def train_as_open_clip(
    loss: nn.Module,
    size: dict[str, Any],
    dtype: torch.dtype,
    init_bias: float | None,
    accum_freq: int = 1,
    steps: int = STEPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of every call, the gradients of the first step and the parameters after the last, in one vector each.

    Drives ``open_clip_train.train.train_one_epoch``, open_clip's own loop; ``accum_freq`` is the number of batches
    whose features it caches and joins in one loss.
    """
    import open_clip
    from open_clip_train.train import train_one_epoch

    torch.manual_seed(0)
    model = open_clip.CLIP(**size, output_dict=True, init_logit_bias=init_bias).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    losses: list[Tensor] = []
    gradients: list[Tensor] = []

    def record_loss(_: nn.Module, __: Any, output: dict[str, Tensor]) -> None:
        losses.append(output["contrastive_loss"].detach().to(dtype))

    def record_gradients(*_: Any) -> None:
        if not gradients:
            gradients.append(flat(p.grad for p in model.parameters()))

    loss.register_forward_hook(record_loss)
    optimizer.register_step_pre_hook(record_gradients)
    data = {"train": SimpleNamespace(dataloader=Batches(dtype, steps * accum_freq), set_epoch=lambda epoch: None)}
    args = SimpleNamespace(
        device="cpu", precision="fp64" if dtype == torch.float64 else "fp32", distill=False, accum_freq=accum_freq,
        skip_scheduler=True, grad_clip_norm=None, horovod=False, rank=0, local_rank=0, world_size=1, log_local=False,
        log_every_n_steps=steps, batch_size=BATCH, wandb=False,
    )  # fmt: skip
    before = flat(model.parameters())
    train_one_epoch(model, data, loss, 0, optimizer, None, None, None, args)
    assert len(losses) == steps * accum_freq
    after = flat(model.parameters())
    assert relative_l2(after, before) > 100 * FLOAT32_RTOL, "steps that change nothing would compare nothing"
    return torch.stack(losses), gradients[0], after


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


@needs_open_clip
@pytest.mark.parametrize("accum_freq", [1, 2])
@pytest.mark.parametrize(("name", "ours"), [("ClipLoss", ClipLoss), ("SigLipLoss", SigLipLoss)])
def test_open_clip_trains_the_same_with_our_losses(name: str, ours: type[nn.Module], accum_freq: int) -> None:
    import open_clip.loss

    def trained(module: type[nn.Module], dtype: torch.dtype) -> tuple[Tensor, ...]:
        return train_as_open_clip(module(), NARROW, dtype, -10.0 if name == "SigLipLoss" else None, accum_freq)

    theirs = getattr(open_clip.loss, name)
    oracle = trained(theirs, torch.float64)
    for dtype in (torch.float64, torch.float32):
        for actual, expected in zip(trained(ours, dtype), oracle, strict=True):
            assert_close_to_oracle(actual, expected)


@needs_open_clip
@pytest.mark.parametrize(("name", "ours"), [("ClipLoss", ClipLoss), ("SigLipLoss", SigLipLoss)])
def test_open_clip_trains_full_towers_the_same_with_our_losses(name: str, ours: type[nn.Module]) -> None:
    """126 million parameters. Towers and optimizer round alike in both runs, so what differs comes from the losses."""
    import open_clip.loss

    torch.set_num_threads(2)
    init_bias = -10.0 if name == "SigLipLoss" else None
    theirs = getattr(open_clip.loss, name)
    expected, actual = (
        train_as_open_clip(module(), FULL, torch.float32, init_bias, steps=5) for module in (theirs, ours)
    )
    for found, wanted in zip(actual, expected, strict=True):
        assert relative_l2(found, wanted) <= FLOAT32_RTOL


class Pair(nn.Module):
    """Two towers and a learnt scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.x, self.y = nn.Sequential(nn.Linear(12, 16), nn.Tanh()), nn.Linear(10, 16)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-5.0))
        self.double()

    def gradients(self) -> list[Tensor]:
        found = [p.grad.clone() for p in self.parameters() if p.grad is not None]
        self.zero_grad()
        return found


def cached_backward(
    towers: tuple[nn.Module, nn.Module], inputs: tuple[Tensor, Tensor], loss_fn: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """GradCache's step (Gao et al., arXiv 2101.06983): representations in chunks without graph, the loss of all of
    them, then each chunk again with the cached gradient of its representations."""
    chunks = [x.split(4) for x in inputs]
    with torch.no_grad():
        cached = [torch.cat([tower(x) for x in parts]) for tower, parts in zip(towers, chunks, strict=True)]
    leaves = [x.requires_grad_() for x in cached]
    loss = loss_fn(*leaves)
    loss.backward()
    for tower, parts, leaf in zip(towers, chunks, leaves, strict=True):
        assert leaf.grad is not None
        for part, grad in zip(parts, leaf.grad.split(4), strict=True):
            torch.sum(tower(part) * grad).backward()
    return loss.detach()


def bound_scale(loss: nn.Module, model: Pair) -> Callable[[Tensor, Tensor], Tensor]:
    """``loss_fn(x, y)`` with a fixed scale, and for SigLIP a fixed bias."""
    bias = {"logit_bias": -5.0} if isinstance(loss, SigLipLoss) else {}
    return functools.partial(loss, logit_scale=7.0, **bias)


def learnt_scale(loss: nn.Module, model: Pair) -> Callable[[Tensor, Tensor], Tensor]:
    """``loss_fn(x, y)`` that learns the model's scale and bias."""
    return lambda x, y: loss(x, y, model.logit_scale.exp(), model.logit_bias)


@pytest.mark.parametrize("loss", [ClipLoss(), SigLipLoss()])
@pytest.mark.parametrize("bind", [bound_scale, learnt_scale])
def test_losses_are_a_loss_fn_of_grad_cache(loss: nn.Module, bind: Callable[..., Callable[..., Tensor]]) -> None:
    model = Pair()
    inputs = torch.randn(10, 12, dtype=torch.float64), torch.randn(10, 10, dtype=torch.float64)
    loss_fn = bind(loss, model)
    direct = loss_fn(model.x(inputs[0]), model.y(inputs[1]))
    direct.backward()
    expected = model.gradients()
    assert_close_to_oracle(cached_backward((model.x, model.y), inputs, loss_fn), direct)
    found = model.gradients()
    assert len(found) == len(expected) == (6 if bind is learnt_scale else 4)
    for actual, wanted in zip(found, expected, strict=True):
        assert_close_to_oracle(actual, wanted)


class Embedder(nn.Module):
    """What a sentence-transformers loss asks of its model: features in, ``sentence_embedding`` out."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["input"]}


@needs_sentence_transformers
@pytest.mark.parametrize("directions", [("query_to_doc",), ("query_to_doc", "doc_to_query")])
def test_losses_equal_sentence_transformers_in_batch_loss(directions: tuple[str, ...]) -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    theirs = MultipleNegativesRankingLoss(Embedder(), scale=20.0, directions=directions, partition_mode="per_direction")
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(9, 32, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    expected = theirs([{"input": x} for x in inputs], torch.empty(0))
    a, b = (F.normalize(x, dim=1) for x in inputs)
    actual = ClipLoss()(a, b, 20.0) if len(directions) == 2 else clip_loss(a, b, 20.0, one_sided=True)
    assert_close_to_oracle(actual, expected)
    for found, wanted in zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert_close_to_oracle(found, wanted)
