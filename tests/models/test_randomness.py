from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffgap.models import randomness
from diffgap.models.bridge import DiffGAP
from diffgap.models.objective import DenoisingBatch
from diffgap.models.randomness import STREAM_BRANCHES, STREAM_HEADS, Dropout, pass_seeds, uniform
from diffgap.ops import sample_seeds
from diffgap.ops.random import STREAM_DRAW, STREAM_SEEDS, STREAM_SOLVER
from tests.helpers import relative_l2
from tests.models.test_bridge import batch, make

ROWS = 12
#: Everything that is random in training, on.
RANDOM: dict[str, Any] = {"contrastive": "none", "dropout": 0.2, "head_dropout": 0.3, "condition_dropout": 0.3}


def seeds_of(rows: int) -> Tensor:
    return sample_seeds(rows, torch.Generator().manual_seed(5))


def partial(rows: int) -> dict[str, Tensor]:
    """Every subset of three modalities in turn."""
    return {name: (torch.arange(rows) >> bit) % 2 == 0 for bit, name in enumerate(("text", "audio", "image"))}


def losses_and_gradients(bridge: DiffGAP, rows: Tensor, **settings: Any) -> tuple[Tensor, int, list[Tensor]]:
    """Sum of the denoising errors of some rows, their number, and the gradients of the sum."""
    found: list[Tensor] = []
    original = bridge.diffusion.forward
    bridge.diffusion.forward = lambda *a, **k: found.append(original(*a, **k)) or found[-1]  # type: ignore
    x = {name: values[rows] for name, values in batch(ROWS).items()}
    present = {name: values[rows] for name, values in partial(ROWS).items()}
    bridge(x, present=present, seeds=seeds_of(ROWS)[rows], step=1)
    bridge.diffusion.forward = original  # type: ignore[method-assign]
    total = found[0].sum()
    parameters = [p for p in bridge.parameters() if p.requires_grad]
    return total, len(found[0]), list(torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("sources", ["single", "any"])
@pytest.mark.parametrize("split", ["random", "alternate", "joint"])
def test_cut_or_permuted_batches_give_the_same_loss_and_gradients(split: str, sources: str) -> None:
    """With dropout everywhere, hidden conditions and missing modalities."""
    bridge = make(split=split, sources=sources, diffusion_trains_heads=True, **RANDOM)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    total, count, gradients = losses_and_gradients(bridge, torch.arange(ROWS))
    assert count > 0
    for parts in ([order], list(order.split(5))):
        found = [losses_and_gradients(bridge, part) for part in parts]
        assert sum(n for _, n, _ in found) == count
        assert abs(sum(float(loss) for loss, _, _ in found) / float(total) - 1) < 1e-6
        summed = torch.cat([sum(g).flatten() for g in zip(*(g for _, _, g in found), strict=True)])  # type: ignore[arg-type, misc]
        assert relative_l2(summed, torch.cat([g.flatten() for g in gradients])) < 1e-5


def test_what_is_random_follows_from_the_seeds_alone() -> None:
    bridge = make(split="random", sources="any", **RANDOM)
    x, seeds = batch(ROWS), seeds_of(ROWS)
    losses = []
    for own in (seeds, seeds, seeds + 1):
        torch.rand(len(losses) + 1)  # torch's generator moves on
        losses.append(float(bridge(x, seeds=own)["diffusion"]))
    assert losses[0] == losses[1] != losses[2]
    torch.manual_seed(3)
    drawn = [float(bridge(x)["diffusion"]) for _ in range(2)]
    torch.manual_seed(3)
    assert drawn[0] == float(bridge(x)["diffusion"]) != drawn[1]


def test_joint_directions_of_a_row_have_noise_of_their_own() -> None:
    bridge, parts = make(split="joint", contrastive="none"), []
    original = bridge.diffusion._errors

    def spy(part: DenoisingBatch) -> Tensor:
        parts.append(part)
        return original(part)

    bridge.diffusion._errors = spy  # type: ignore[method-assign]
    bridge(batch(2), seeds=torch.tensor([0, 1]))
    (part,) = parts
    assert len(part.seeds.unique()) == len(part.target) == 12
    assert torch.equal(part.seeds[:2], torch.tensor([0, 1])), "the first pass has the row's own seed"


def test_streams_are_different() -> None:
    streams = [value for name, value in vars(randomness).items() if name.startswith("STREAM_")]
    assert len({*streams, STREAM_DRAW, STREAM_SOLVER, STREAM_SEEDS}) == len(streams) + 3 == 8


def test_no_two_dropouts_share_their_numbers() -> None:
    bridge = make(depth=2, **RANDOM)
    dropouts = [module for module in bridge.modules() if isinstance(module, Dropout)]
    assert len(dropouts) == 3 + 2 * (1 + 2)  # heads; two branches of the condition's block and of both others
    assert len({(module.stream, module.layer) for module in dropouts}) == len(dropouts)
    assert {module.stream for module in dropouts} == {STREAM_HEADS, STREAM_BRANCHES}
    assert not any(isinstance(module, torch.nn.Dropout) for module in bridge.modules())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(p: float) -> None:
    dropout, seeds, x = Dropout(p, STREAM_HEADS, 1), seeds_of(50), torch.ones(50, 20, 30)
    y = dropout(x, seeds)
    kept = (y != 0).float().mean()
    assert abs(kept - (1 - p)) < 6 * (p * (1 - p) / x.numel()) ** 0.5
    torch.testing.assert_close(y.max(), torch.tensor(1 / (1 - p)))
    assert torch.equal(dropout(x[7:9], seeds[7:9]), y[7:9]), "in any batch"
    assert torch.equal(dropout(x[:, :4], seeds), y[:, :4]), "frames beyond do not move those before"
    other = Dropout(p, STREAM_HEADS, 2)(x, seeds)
    agreement = ((y != 0) == (other != 0)).float().mean()
    assert abs(agreement - (p**2 + (1 - p) ** 2)) < 0.02, "layers are independent"
    assert torch.equal(dropout.eval()(x, seeds), x)


def test_dropout_gradient() -> None:
    dropout, x = Dropout(0.3, STREAM_HEADS, 0), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropout(x, torch.arange(4)), (x,))


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_dropout_bad_input(p: float) -> None:
    with pytest.raises(ValueError, match=rf"dropout is {p}; use a value in \[0, 1\)"):
        Dropout(p, STREAM_HEADS, 0)


def test_uniform_lies_strictly_inside() -> None:
    u = uniform(seeds_of(2000), 50, STREAM_HEADS).flatten()
    assert u.dtype == torch.float64 and 0 < u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1
    # Kolmogorov-Smirnov at 1e-6: 2.7 / sqrt(n).
    n = len(u)
    assert (u.sort().values - (torch.arange(n) + 0.5) / n).abs().max() < 2.7 / n**0.5
    # The largest normal there is, sqrt(66 ln 2), still gives less than one.
    assert torch.special.ndtr(torch.tensor(6.77, dtype=torch.float64)) < 1


def test_pass_seeds_do_not_meet() -> None:
    seeds = torch.tensor([0, 1, 2, 2**63 - 1, -(2**63)])
    passes = pass_seeds(seeds, 100)
    assert torch.equal(passes[0], seeds) and len(passes.unique()) == passes.numel()


def test_wrong_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"seed: expected shape \(6,\)"):
        make()(batch(), seeds=torch.arange(5))
    with pytest.raises(TypeError, match="seed: expected an int64 tensor"):
        make()(batch(), seeds=torch.zeros(6))


def test_forward_compiles_to_the_same_loss() -> None:
    bridge, x = make(split="random", **RANDOM), batch()
    compiled = torch.compile(bridge, backend="aot_eager", fullgraph=True)
    expected = bridge(x, seeds=seeds_of(6))["loss"]
    torch.testing.assert_close(compiled(x, seeds=seeds_of(6))["loss"], expected)


def test_forward_in_bfloat16() -> None:
    bridge, x = make(split="random", **RANDOM), batch()
    exact = bridge(x, seeds=seeds_of(6))["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = bridge(x, seeds=seeds_of(6))["loss"]
    loss.backward()
    assert abs(float(loss) / float(exact) - 1) < 0.05
