"""The mel generator: a training step, and drawing spectrograms for conditions.

Spectrograms have 64 bands at 62.5 frames a second (16 kHz, hop 256), so that 10 s are 626 frames and, at four frames a
token, 157 tokens; conditions are CLAP's, of 512 coordinates. A training step is loss, gradients, clipping, AdamW and
the average of the weights, at a learning rate of zero, so that every call does the same step
(:mod:`benchmarks.training`). Sampling is ``MelGenerator.sample``, all steps with guidance.

``eager`` has to draw our random numbers, which takes it 64-bit integer arithmetic. ``torch`` is the rival to beat: the
same network in plain torch as one writes it, with ``F.scaled_dot_product_attention`` and ``torch.randn_like``, and for
sampling diffusers' DPM-Solver++, given the initial noise that ours draws. ``compile`` and ``torch_compile`` are these
two with the network compiled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import Case, Gate, Inputs, Outputs, Peer, Run
from diffgap.diffusion import Guidance, build_solver, sample
from diffgap.models import blocks, mel_generator
from diffgap.models.mel_generator import MelGenerator, MelGeneratorConfig
from diffgap.ops._dispatch import backend
from diffgap.ops.random import normal, sample_seeds
from diffgap.training.config import TrainConfig

#: Sounds and frames of a training step; sounds, frames and steps of sampling.
STEPS_OF = {"ci": ((2, 64),), "full": ((8, 626),)}
SAMPLES_OF = {"ci": ((2, 64, 4),), "full": ((1, 626, 25), (8, 626, 25))}
CONFIG = MelGeneratorConfig.of_size("tiny", 512)
_TRAIN = TrainConfig()
_CPU = torch.device("cpu")


def cases(size: str) -> Iterator[Case]:
    """The cases of ``--size ci`` or ``full``."""
    for sounds, frames in STEPS_OF[size]:
        yield step_case(sounds, frames)
    for sounds, frames, steps in SAMPLES_OF[size]:
        yield sample_case(sounds, frames, steps)


def step_case(sounds: int, frames: int, config: MelGeneratorConfig = CONFIG) -> Case:
    """A training step."""
    return Case(
        f"generator_step/{sounds}x{frames}x{config.bands}/fp32",
        torch.float32,
        partial(_step_inputs, sounds, frames, config),
        _our_step,
        STEP_PEERS,
        flops=sounds * _step_flops(frames, config),
        expected=partial(_expected_step, sounds, frames, config),
    )


def sample_case(sounds: int, frames: int, steps: int, config: MelGeneratorConfig = CONFIG) -> Case:
    """One sample of every condition, with guidance."""
    return Case(
        f"generator_sample/{config.solver}_{steps}_cfg/{sounds}x{frames}x{config.bands}/fp32",
        torch.float32,
        partial(_sample_inputs, sounds, frames, steps, config),
        _our_sample,
        SAMPLE_PEERS,
        flops=sounds * _sample_flops(frames, steps, config),
        expected=partial(_expected_sample, sounds, frames, steps, config),
    )


def _generator(config: MelGeneratorConfig) -> MelGenerator:
    """Modulation and output, which begin at zero, are off that, so that whatever is wrong anywhere shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = MelGenerator(config)
        for layer in (generator.rows, generator.head):
            nn.init.xavier_uniform_(layer.weight)
    return generator


def _conditions(sounds: int, config: MelGeneratorConfig) -> Tensor:
    return F.normalize(torch.randn(sounds, config.condition_dim, generator=torch.Generator().manual_seed(0)), dim=-1)


# a training step


class Training:
    """A generator in training, with its optimizer and the average of its weights."""

    def __init__(self, generator: MelGenerator) -> None:
        self.generator = generator
        groups = generator.parameter_groups(_TRAIN.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), fused=True)
        self.average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(_TRAIN.ema_decay))
        self.average.update_parameters(generator)  # the first copies, the others average

    def step(self, network: Callable[..., dict[str, Tensor]], mel: Tensor, condition: Tensor, seeds: Tensor) -> Outputs:
        """The loss, and the gradients as clipped."""
        with torch.enable_grad():
            loss = network(mel, condition, seeds=seeds)["loss"]
            loss.backward()
        learned = [p for p in self.generator.parameters() if p.grad is not None]
        nn.utils.clip_grad_norm_(learned, _TRAIN.max_grad_norm)
        gradients = [p.grad for p in learned if p.grad is not None]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.generator)
        return (loss.detach(), *gradients)


def _step_inputs(sounds: int, frames: int, config: MelGeneratorConfig, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return {
        "training": Training(_generator(config).to(device).train()),
        "mel": torch.randn(sounds, frames, config.bands, generator=generator).to(device),
        "condition": _conditions(sounds, config).to(device),
        "seeds": sample_seeds(sounds, generator).to(device),
    }


def _our_step(*, training: Training, mel: Tensor, condition: Tensor, seeds: Tensor) -> Outputs:
    return training.step(training.generator, mel, condition, seeds)


@cache
def _expected_step(sounds: int, frames: int, config: MelGeneratorConfig, device: torch.device) -> Outputs:
    inputs = _step_inputs(sounds, frames, config, device)
    training = Training(copy.deepcopy(inputs["training"].generator).double())
    with backend("eager"):
        return _our_step(
            training=training, mel=inputs["mel"].double(), condition=inputs["condition"].double(), seeds=inputs["seeds"]
        )


@cache
def _step_flops(frames: int, config: MelGeneratorConfig) -> int:
    """Operations of the matrix products of one sound."""
    inputs = _step_inputs(1, frames, config, _CPU)
    with backend("eager"), FlopCounterMode(display=False) as counter:
        _our_step(**inputs)
    return counter.get_total_flops()


# sampling


def _sample_inputs(sounds: int, frames: int, steps: int, config: MelGeneratorConfig, device: torch.device) -> Inputs:
    return {
        "generator": _generator(config).to(device).eval().requires_grad_(False),
        "condition": _conditions(sounds, config).to(device),
        "seeds": sample_seeds(sounds, torch.Generator().manual_seed(0)).to(device),
        "frames": frames,
        "steps": steps,
    }


def _our_sample(*, generator: MelGenerator, condition: Tensor, seeds: Tensor, frames: int, steps: int) -> Outputs:
    lengths = [frames] * len(condition)
    return (generator.sample(condition, lengths, steps=steps, seeds=seeds[:, None])[:, 0],)


@cache
def _expected_sample(sounds: int, frames: int, steps: int, config: MelGeneratorConfig, device: torch.device) -> Outputs:
    """By the network's own layers at every step, both branches whole, eager and in float64."""
    inputs = _sample_inputs(sounds, frames, steps, config, device)
    generator, condition = inputs["generator"].double(), inputs["condition"].double()
    solver = build_solver(config.solver, config.noise_schedule(), steps)
    network = _both_branches(generator.denoise, generator, condition, frames)
    with backend("eager"):
        x = sample(
            lambda x, step: network(x, solver.timesteps[step].to(x)),
            solver, inputs["seeds"], (frames, config.bands),
            guidance=Guidance(config.guidance_scale), dtype=torch.float64, x0_clamp=config.x0_clamp,
        )  # fmt: skip
    return (x * generator.deviation + generator.mean,)


def _both_branches(
    denoise: Callable[..., Tensor], generator: MelGenerator, condition: Tensor, frames: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """The network as a function of a batch (2 B, F, M), conditional and then unconditional, and one time."""
    rows = 2 * len(condition)
    lengths = torch.full((rows,), frames, device=condition.device)
    hidden = torch.arange(rows, device=condition.device) >= len(condition)
    drive = generator._drive(torch.cat((condition, condition)), lengths, hidden)
    return lambda x, t: denoise(x, generator.modulation(generator.time(t.expand(rows)), drive), lengths)


@cache
def _sample_flops(frames: int, steps: int, config: MelGeneratorConfig) -> int:
    inputs = _sample_inputs(1, frames, steps, config, _CPU)
    with backend("eager"), FlopCounterMode(display=False) as counter:
        _our_sample(**inputs)
    return counter.get_total_flops()


def _loop(
    denoise: Callable[..., Tensor],
    *,
    generator: MelGenerator,
    condition: Tensor,
    seeds: Tensor,
    frames: int,
    steps: int,
) -> Run:
    """diffusers' scheduler around the network, both branches in one batch, x0 clamped as ours is."""
    import diffusers

    config = generator.config
    scheduler: Any = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=config.num_train_timesteps, beta_schedule=config.schedule, prediction_type="sample"
    )
    start = normal(seeds, (frames, config.bands))

    @torch.no_grad()
    def run() -> Outputs:
        scheduler.set_timesteps(steps, device=condition.device)
        network = _both_branches(denoise, generator, condition, frames)
        x = start
        for t in scheduler.timesteps:
            conditional, unconditional = network(torch.cat((x, x)), t.to(x)).chunk(2)
            x0 = unconditional + config.guidance_scale * (conditional - unconditional)
            x = scheduler.step(x0.clamp(-config.x0_clamp, config.x0_clamp), t, x, return_dict=False)[0]
        return (x * generator.deviation + generator.mean,)

    return run


# as one writes it in plain torch


def _torch_attention(
    q: Tensor, k: Tensor, v: Tensor, *, q_weight: Tensor, k_weight: Tensor, key_mask: Tensor | None
) -> Tensor:
    q, k = (F.rms_norm(x, x.shape[-1:], w, 1e-6) for x, w in ((q, q_weight), (k, k_weight)))
    mask = None if key_mask is None else key_mask[:, None, None]
    mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return mixed.transpose(1, 2)


def _torch_q_sample(x0: Tensor, t: Tensor, table: Tensor, seeds: Tensor, target: str) -> tuple[Tensor, Tensor]:
    if target != "sample":
        raise ValueError(f"target is {target!r}; the generator of this benchmark predicts 'sample'")
    alpha, sigma = table[t][:, :, None, None].unbind(1)
    return alpha * x0 + sigma * torch.randn_like(x0), x0


def _torch_uniform(seeds: Tensor, count: int, stream: int) -> Tensor:
    return torch.rand(len(seeds), count, dtype=torch.float64, device=seeds.device)


def plain_torch() -> ExitStack:
    """While it is open, generators attend by torch's own function and draw by its own generator."""
    stack = ExitStack()
    stack.enter_context(backend("eager"))
    stack.enter_context(mock.patch.object(blocks, "attention", _torch_attention))
    stack.enter_context(mock.patch.object(mel_generator, "q_sample", _torch_q_sample))
    stack.enter_context(mock.patch.object(mel_generator, "uniform", _torch_uniform))
    return stack


def _stepped(*, compiled: bool, plain: bool, training: Training, **inputs: Tensor) -> Run:
    network = torch.compile(training.generator, fullgraph=True, dynamic=False) if compiled else training.generator

    def run() -> Outputs:
        with plain_torch() if plain else backend("eager"):
            return training.step(network, **inputs)

    return run


def _sampled(*, compiled: bool, plain: bool, generator: MelGenerator, **inputs: Any) -> Run:
    denoise = generator.denoise
    loop = _loop(
        torch.compile(denoise, fullgraph=True, dynamic=False) if compiled else denoise, generator=generator, **inputs
    )

    def run() -> Outputs:
        with plain_torch() if plain else backend("eager"):
            return loop()

    return run


#: Relative difference of losses that two draws of a batch may have. Eight sounds draw eight noise levels of very
#: different weight: of twelve seeds the losses lie at 0.4 to 1.5 times that of the first. So this shows another scale
#: only; that the rival does our step when it is given our random numbers is tested.
_LOSS_ROOM = 0.9


def _similar(*, training: Training, **inputs: Tensor) -> Gate:
    """Judges a step with other random numbers: a loss near ours, and as many gradients, finite and not all zero."""
    expected = _our_step(training=training, **inputs)

    def gate(outputs: Outputs) -> str | None:
        if [x.shape for x in outputs] != [x.shape for x in expected]:
            return "gave another loss or other gradients than ours"
        for found, wanted in zip(outputs, expected, strict=True):
            if not torch.isfinite(found).all() or (wanted.dim() > 1 and wanted.any() and not found.any()):
                return "gave a gradient that is not finite, or zeros"
        if abs(outputs[0] - expected[0]) > _LOSS_ROOM * expected[0]:
            return f"gave a loss of {outputs[0]:.4g} where ours is {expected[0]:.4g}"
        return None

    return gate


STEP_PEERS = (
    # In place of the frame's, whose one graph cannot hold a backward pass and an optimizer.
    Peer("compile", partial(_stepped, compiled=True, plain=False), "torch", module="torch"),
    Peer("torch", partial(_stepped, compiled=False, plain=True), "torch", gate=_similar),
    Peer("torch_compile", partial(_stepped, compiled=True, plain=True), "torch", module="torch", gate=_similar),
)
SAMPLE_PEERS = (
    # In place of the frame's, as the loop around the network is no part of a graph.
    Peer("compile", partial(_sampled, compiled=True, plain=False), "diffusers", module="diffusers"),
    Peer("torch", partial(_sampled, compiled=False, plain=True), "diffusers", module="diffusers"),
    Peer("torch_compile", partial(_sampled, compiled=True, plain=True), "diffusers", module="diffusers"),
)
