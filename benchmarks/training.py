"""One training step of the recommended bridge: losses, gradients, clipping, AdamW, average of the weights.

The modalities are CLAP's, audio and text of 512 coordinates each, the width of CLIP's and most of its kin. A bridge
trains its heads first and then the diffusion, or all together; each of these stages has its cases. The learning rate is
zero: what is computed is the same, but the weights stay, so that every call does the same step and its losses and
gradients can be held against the oracle's.

``eager`` has to draw our random numbers, which takes it 64-bit integer arithmetic. ``torch`` is the rival to beat: the
same network in plain torch as one writes it, with ``F.dropout`` and ``torch.randn_like``. ``compile`` and
``torch_compile`` are these two with the network and the losses compiled, and their gradients with them.

Where our time goes, the cases of ``training_parts`` tell (:mod:`benchmarks.parts`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import cache, partial
from typing import Any, get_args
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import Case, Gate, Inputs, Outputs, Peer, Run
from benchmarks.parts import TRAINING_PARTS, Recording, part_peer
from diffgap.models import contrastive_diffusion
from diffgap.models.bridge import DiffGAP, Stage
from diffgap.models.randomness import Dropout
from diffgap.models.settings import BridgeSettings
from diffgap.ops._dispatch import backend
from diffgap.ops.random import sample_seeds
from diffgap.training.config import TrainConfig

BATCHES = {"ci": (64,), "full": (256, 1024, 8192)}
#: Compiling a bridge and its gradients takes a minute; "joint" has all that the other stages have.
STAGES_OF: dict[str, tuple[Stage, ...]] = {"ci": ("joint",), "full": get_args(Stage)}
MODALITIES = {"audio": 512, "text": 512}
SETTINGS = BridgeSettings.preset("recommended")
_TRAIN = TrainConfig()
_FITTED_ROWS = 1024
_CPU = torch.device("cpu")
Losses = Callable[..., dict[str, Tensor]]


def cases(size: str) -> Iterator[Case]:
    """The cases of ``--size ci`` or ``full``."""
    for batch in BATCHES[size]:
        for stage in STAGES_OF[size]:
            yield step_case(stage, batch)
            yield parts_case(stage, batch)


def step_case(stage: Stage, batch: int, settings: BridgeSettings = SETTINGS) -> Case:
    """A step beside those of the rivals."""
    return Case(
        f"training_step/{_label(stage, batch)}",
        torch.float32,
        partial(_inputs, stage, batch, settings),
        _ours,
        PEERS,
        flops=_flops(stage, batch, settings),
        expected=partial(_expected, stage, batch, settings),
    )


def parts_case(stage: Stage, batch: int, settings: BridgeSettings = SETTINGS) -> Case:
    """A step beside what it is made of."""
    elsewhere = "in the rows of training_step"
    return Case(
        f"training_parts/{_label(stage, batch)}",
        torch.float32,
        partial(_recorded_inputs, stage, batch, settings),
        _ours,
        tuple(part_peer(kind) for kind in TRAINING_PARTS if kind in _CALLED[stage]),
        flops=_flops(stage, batch, settings),
        expected=partial(_expected, stage, batch, settings),
        infeasible=lambda device: dict.fromkeys(("eager", "compile"), elsewhere),
    )


_DENOISER = {"gemm", "attention", "adaln", "activation", "noise", "optimizer", "other", "calls"}
_HEADS = {"gemm", "contrastive", "noise", "optimizer", "other", "calls"}
#: The kinds of operations that a stage has.
_CALLED: Mapping[Stage, set[str]] = {"joint": _DENOISER | _HEADS, "heads": _HEADS, "diffusion": _DENOISER}


def _label(stage: Stage, batch: int) -> str:
    return f"{stage}/{batch}x{MODALITIES['audio']}/fp32"


class Training:
    """A bridge in training, with its optimizer and the average of its weights, as the trainer has them."""

    def __init__(self, bridge: DiffGAP) -> None:
        self.bridge = bridge
        self.optimizer = torch.optim.AdamW(
            bridge.parameter_groups(_TRAIN.weight_decay), lr=0.0, betas=(0.9, 0.99), fused=True
        )
        self.average = AveragedModel(bridge, multi_avg_fn=get_ema_multi_avg_fn(_TRAIN.ema_decay))
        self.average.update_parameters(bridge)  # the first copies, the others average

    def step(self, losses: Losses, embeddings: Mapping[str, Tensor], seeds: Tensor) -> Outputs:
        """The losses, and the gradients as clipped."""
        with torch.enable_grad():  # which a recording turns off
            found = losses(embeddings, seeds=seeds)
            found["loss"].backward()
        learned = [p for p in self.bridge.parameters() if p.grad is not None]
        nn.utils.clip_grad_norm_(learned, _TRAIN.max_grad_norm)
        gradients = [p.grad for p in learned]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.bridge)
        return (*(x.detach() for x in found.values()), *(x for x in gradients if x is not None))


def _bridge(stage: Stage, settings: BridgeSettings) -> DiffGAP:
    """A bridge fitted to pairs that agree a little; modulation and output, which begin at zero, are off that."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bridge = DiffGAP(MODALITIES, settings)
        bridge.fit(_embeddings(_FITTED_ROWS))
        for module in (bridge.diffusion.denoiser.rows, *bridge.diffusion.denoiser.head.children()):
            assert isinstance(module, nn.Linear)
            nn.init.xavier_uniform_(module.weight)
    bridge.stage = stage
    return bridge.train()


def _embeddings(rows: int) -> dict[str, Tensor]:
    """Unit vectors, those of a row at a cosine of about 0.5 to one another."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(rows, MODALITIES["audio"], generator=generator)
    return {
        name: F.normalize(shared + torch.randn(rows, width, generator=generator), dim=-1)
        for name, width in MODALITIES.items()
    }


def _inputs(stage: Stage, batch: int, settings: BridgeSettings, device: torch.device) -> Inputs:
    embeddings = {name: x.to(device) for name, x in _embeddings(batch).items()}
    return {
        "training": Training(_bridge(stage, settings).to(device)),
        "seeds": sample_seeds(batch, torch.Generator().manual_seed(0)).to(device),
        **embeddings,
    }


def _recorded_inputs(stage: Stage, batch: int, settings: BridgeSettings, device: torch.device) -> Inputs:
    inputs = _inputs(stage, batch, settings, device)
    return inputs | {"recording": Recording(partial(_ours, **inputs), TRAINING_PARTS)}


def _ours(*, training: Training, seeds: Tensor, recording: Recording | None = None, **embeddings: Tensor) -> Outputs:
    return training.step(training.bridge, embeddings, seeds)


@cache
def _expected(stage: Stage, batch: int, settings: BridgeSettings, device: torch.device) -> Outputs:
    """Losses and gradients of the eager network in float64."""
    inputs = _inputs(stage, batch, settings, device)
    training = Training(copy.deepcopy(inputs["training"].bridge).double())
    embeddings = {name: inputs[name].double() for name in MODALITIES}
    with backend("eager"):
        return training.step(training.bridge, embeddings, inputs["seeds"])


@cache
def _flops(stage: Stage, batch: int, settings: BridgeSettings) -> int:
    """Operations of the matrix products: of the layers, linear in the batch, and the four of ``clip_loss``."""

    def counted(rows: int) -> int:
        inputs = _inputs(stage, rows, settings, _CPU)
        with backend("eager"), FlopCounterMode(display=False) as counter:
            _ours(**inputs)
        return counter.get_total_flops()

    one, two = counted(1), counted(2)  # l + q and 2 l + 4 q, where the eager loss has q
    layers = (4 * one - two) // 2
    contrastive = 0 if stage == "diffusion" else 4 * 2 * batch * batch * settings.width
    return layers * batch + contrastive


# as one writes it in plain torch


def _torch_dropout(module: Dropout, x: Tensor, seeds: Tensor | None = None) -> Tensor:
    return F.dropout(x, module.p, module.training)


def _torch_q_sample(x0: Tensor, t: Tensor, table: Tensor, seeds: Tensor, target: str) -> tuple[Tensor, Tensor]:
    if target != "sample":
        raise ValueError(f"target is {target!r}; the recommended bridge predicts 'sample'")
    alpha, sigma = table[t].unsqueeze(-1).unbind(1)
    return alpha * x0 + sigma * torch.randn_like(x0), x0


def torch_randomness() -> ExitStack:
    """While it is open, a bridge draws its noise and dropout by torch's own functions and generator."""
    stack = ExitStack()
    stack.enter_context(mock.patch.object(Dropout, "forward", _torch_dropout))
    stack.enter_context(mock.patch.object(contrastive_diffusion, "q_sample", _torch_q_sample))
    return stack


def _eager(*, compiled: bool, own_randomness: bool, training: Training, seeds: Tensor, **embeddings: Tensor) -> Run:
    losses: Losses = training.bridge
    if compiled:
        losses = torch.compile(training.bridge, fullgraph=True, dynamic=False)

    def run() -> Outputs:
        with backend("eager"), ExitStack() if own_randomness else torch_randomness():
            return training.step(losses, embeddings, seeds)

    return run


#: Relative difference of losses that two draws of a batch may have. Of 64 rows and more, those of ten seeds lie within
#: 0.1 of their mean; without its dropout or its noise a loss is further off.
_LOSS_ROOM = 0.25


def _similar(*, training: Training, seeds: Tensor, **embeddings: Any) -> Gate:
    """Judges a step with other random numbers: losses near ours, and as many gradients, finite and not all zero."""
    expected = _ours(training=training, seeds=seeds, **embeddings)

    def gate(outputs: Outputs) -> str | None:
        if [x.shape for x in outputs] != [x.shape for x in expected]:
            return "gave other losses or gradients than ours"
        for found, wanted in zip(outputs, expected, strict=True):
            if not torch.isfinite(found).all() or (wanted.any() and not found.any()):
                return "gave a gradient that is not finite, or zeros"
            if found.dim() == 0 and abs(found - wanted) > _LOSS_ROOM * abs(wanted):
                return f"gave a loss of {found:.4g} where ours is {wanted:.4g}"
        return None

    return gate


PEERS = (
    # In place of the frame's, whose one graph cannot hold a backward pass and an optimizer.
    Peer("compile", partial(_eager, compiled=True, own_randomness=True), "torch", module="torch"),
    Peer("torch", partial(_eager, compiled=False, own_randomness=False), "torch", gate=_similar),
    Peer(
        "torch_compile",
        partial(_eager, compiled=True, own_randomness=False),
        "torch",
        module="torch",
        gate=_similar,
    ),
)
