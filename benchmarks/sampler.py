"""The whole sampler: embeddings of one modality from those of another, by the recommended bridge.

Ours is ``bridge.diffusion.sample``. The rivals to beat run the same network with diffusers' DPM-Solver++, the way one
writes it: both branches in one batch, each step's conditions encoded anew, the lines of the guidance, the scheduler's
step. Their x0 is put on the sphere as ours is, and they are given the initial noise that ours draws. Other networks of
as many parameters answer the same question in their own way; they have no oracle here.

Where our time goes, the cases of ``sampler_parts`` tell (:mod:`benchmarks.parts`).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import Case, Gate, Inputs, Outputs, Peer, Run
from benchmarks.parts import PARTS, Recording, part_peer
from diffgap.diffusion import Guidance, SamplingLoop, build_solver, sample
from diffgap.models.bridge import DiffGAP
from diffgap.models.contrastive_diffusion import ContrastiveDiffusion
from diffgap.models.denoiser import Condition
from diffgap.models.settings import BridgeSettings
from diffgap.ops._dispatch import backend
from diffgap.ops.random import normal, sample_seeds

#: Conditions and steps.
SIZES = {"ci": ((64, 8),), "full": ((256, 8), (256, 25), (4096, 8), (4096, 25))}
MODALITIES = {"audio": 512, "text": 512}
SOURCE, TARGET = "text", "audio"
SETTINGS = BridgeSettings.preset("recommended")
SOLVER, GUIDANCE = "dpmpp", 2.0
_CPU = torch.device("cpu")


def cases(size: str) -> Iterator[Case]:
    """The cases of ``--size ci`` or ``full``."""
    for conditions, steps in SIZES[size]:
        yield sampler_case(conditions, steps)
        yield parts_case(conditions, steps)


def sampler_case(conditions: int, steps: int, settings: BridgeSettings = SETTINGS) -> Case:
    """One sample of every condition, with guidance."""
    return Case(
        f"sampler/{_label(conditions, steps, settings)}",
        torch.float32,
        partial(_inputs, conditions, steps, settings),
        _ours,
        PEERS,
        flops=_flops(conditions, steps, settings),
        expected=partial(_expected, conditions, steps, settings),
        infeasible=lambda device: {"compile": "only the network compiles as one graph"},
    )


def parts_case(conditions: int, steps: int, settings: BridgeSettings = SETTINGS) -> Case:
    """The same, beside what it is made of."""
    elsewhere = "in the rows of sampler"
    return Case(
        f"sampler_parts/{_label(conditions, steps, settings)}",
        torch.float32,
        partial(_recorded_inputs, conditions, steps, settings),
        _ours,
        tuple(map(part_peer, PARTS)),
        flops=_flops(conditions, steps, settings),
        expected=partial(_expected, conditions, steps, settings),
        infeasible=lambda device: {"eager": elsewhere, "compile": elsewhere},
    )


def _recorded_inputs(conditions: int, steps: int, settings: BridgeSettings, device: torch.device) -> Inputs:
    inputs = _inputs(conditions, steps, settings, device)
    return inputs | {"recording": Recording(partial(_ours, **inputs))}


def _label(conditions: int, steps: int, settings: BridgeSettings) -> str:
    return f"{SOLVER}_{steps}_cfg/{conditions}x{settings.width}/fp32"


def diffusion_of(settings: BridgeSettings) -> ContrastiveDiffusion:
    """A bridge's diffusion in evaluation mode, its modulation and output, which begin at zero, off that."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        diffusion = DiffGAP(MODALITIES, settings).diffusion
        for module in (diffusion.denoiser.rows, *diffusion.denoiser.head.children()):
            assert isinstance(module, nn.Linear)
            nn.init.xavier_uniform_(module.weight)
    return diffusion.eval().requires_grad_(False)


def _inputs(conditions: int, steps: int, settings: BridgeSettings, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(conditions, settings.width, generator=generator), dim=-1)
    return {
        "diffusion": diffusion_of(settings).to(device),
        "z": z.to(device),
        "seeds": sample_seeds(conditions, generator).to(device),
        "steps": steps,
    }


def _ours(
    *,
    diffusion: ContrastiveDiffusion,
    z: Tensor,
    seeds: Tensor,
    steps: int,
    recording: Recording | None = None,
) -> Outputs:
    samples = diffusion.sample(
        {SOURCE: z}, {}, TARGET, (z.shape[1],), seeds[:, None],
        solver=SOLVER, steps=steps, guidance_scale=GUIDANCE,
    )  # fmt: skip
    return (samples[:, 0],)


def _graphed(*, diffusion: ContrastiveDiffusion, z: Tensor, seeds: Tensor, steps: int) -> Run:
    """Our loop recorded once and replayed, as for the second of several batches, conditions encoded beforehand."""
    solver, scaler = build_solver(SOLVER, diffusion.schedule, steps), diffusion.scaler(TARGET)
    condition = Condition(diffusion.scaler(SOURCE).scale(z), diffusion.modalities.index(SOURCE))
    with torch.no_grad():
        model = diffusion._model([condition], TARGET, 1, (z.shape[1],), solver.timesteps, both=True)
    loop = SamplingLoop(
        model, solver, len(z), (z.shape[1],), device=z.device, guidance=Guidance(GUIDANCE), x0_norm=scaler.radius
    )
    loop.capture()
    return lambda: (F.normalize(scaler.unscale(loop(seeds)), dim=-1),)


@cache
def _expected(conditions: int, steps: int, settings: BridgeSettings, device: torch.device) -> Outputs:
    """By the network's own ``forward`` at every step, eager and in float64."""
    inputs = _inputs(conditions, steps, settings, device)
    diffusion, z = inputs["diffusion"].double(), inputs["z"].double()
    network = _both_branches(diffusion.denoiser, diffusion, z)
    solver = build_solver(SOLVER, diffusion.schedule, steps)
    scaler = diffusion.scaler(TARGET)
    with backend("eager"):
        drawn = sample(
            lambda x, step: network(x, solver.timesteps[step]),
            solver, inputs["seeds"], (settings.width,),
            guidance=Guidance(GUIDANCE), dtype=torch.float64, x0_norm=scaler.radius,
        )  # fmt: skip
    return (F.normalize(scaler.unscale(drawn), dim=-1),)


def _both_branches(
    network: Callable[..., Tensor], diffusion: ContrastiveDiffusion, z: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """The network as a function of a batch (2 B, width), conditional and then unconditional, and one time."""
    source, target = (diffusion.modalities.index(name) for name in (SOURCE, TARGET))
    scaled = diffusion.scaler(SOURCE).scale(z)
    condition = Condition(torch.cat((scaled, scaled)), source)
    drop = torch.arange(2 * len(z), device=z.device) >= len(z)
    return lambda x, t: network(x, t.to(z.device).expand(len(x)), target, [condition], drop=drop)


@cache
def _flops(conditions: int, steps: int, settings: BridgeSettings) -> int:
    """Operations of the matrix products of ours; they grow linearly with the conditions."""

    def counted(rows: int) -> int:
        inputs = _inputs(rows, steps, settings, _CPU)
        with backend("eager"), FlopCounterMode(display=False) as counter:
            _ours(**inputs)
        return counter.get_total_flops()

    one, two = counted(1), counted(2)
    return one + (conditions - 1) * (two - one)


# the same network, as one writes the loop


def _scheduler(settings: BridgeSettings) -> Any:
    import diffusers

    return diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=settings.num_train_timesteps,
        beta_schedule=settings.schedule,
        prediction_type=settings.prediction,
    )


def _diffusers_loop(
    compiled: dict[str, Any] | None, *, diffusion: ContrastiveDiffusion, z: Tensor, seeds: Tensor, steps: int
) -> Run:
    """diffusers' scheduler around the eager network, or around that compiled with the options given."""
    denoiser: Callable[..., Tensor] = diffusion.denoiser
    if compiled is not None:
        denoiser = torch.compile(denoiser, fullgraph=True, dynamic=False, options=compiled)
    scheduler, scaler = _scheduler(diffusion.settings), diffusion.scaler(TARGET)
    start = normal(seeds, (z.shape[1],))

    @torch.no_grad()
    def run() -> Outputs:
        with backend("eager"):
            network = _both_branches(denoiser, diffusion, z)
            scheduler.set_timesteps(steps, device=z.device)
            x = start
            for t in scheduler.timesteps:
                guided = _guided(network(torch.cat((x, x)), t))
                guided = guided * (scaler.radius / guided.norm(dim=-1, keepdim=True))
                x = scheduler.step(guided, t, x, return_dict=False)[0]
            return (F.normalize(scaler.unscale(x), dim=-1),)

    return run


def _guided(output: Tensor) -> Tensor:
    conditional, unconditional = output.chunk(2)
    return unconditional + GUIDANCE * (conditional - unconditional)


# other networks of as many parameters


def dalle2_prior(settings: BridgeSettings) -> Any:
    """lucidrains' ``DiffusionPrior`` for embeddings alone, without the 256 tokens of padding it has for a text."""
    package = import_module("dalle2_pytorch")
    times = settings.num_train_timesteps
    network = package.DiffusionPriorNetwork(
        dim=settings.width, num_timesteps=times, max_text_len=0, depth=2, heads=4, dim_head=32, ff_mult=1
    )
    return package.DiffusionPrior(
        network,
        image_embed_dim=settings.width,
        timesteps=times,
        cond_drop_prob=settings.condition_dropout,
        condition_on_text_encodings=False,
        sampling_clamp_l2norm=True,
        sampling_final_clamp_l2norm=True,
    ).eval()


def _dalle2(*, diffusion: ContrastiveDiffusion, z: Tensor, seeds: Tensor, steps: int) -> Run:
    prior = dalle2_prior(diffusion.settings).to(z.device)

    def run() -> Outputs:
        # One step lies between each two of its timesteps; and it draws a bar of progress.
        with contextlib.redirect_stderr(io.StringIO()):
            return (prior.p_sample_loop(z.shape, {"text_embed": z}, cond_scale=GUIDANCE, timesteps=steps + 1),)

    return run


def prior_transformer(settings: BridgeSettings) -> nn.Module:
    """diffusers' ``PriorTransformer`` for embeddings alone: tokens of the condition, the time, the sample, a query."""
    import diffusers

    transformer: Any = diffusers.PriorTransformer(
        num_attention_heads=settings.heads,
        attention_head_dim=settings.denoiser_width // settings.heads,
        num_layers=4,
        embedding_dim=settings.width,
        num_embeddings=0,
        encoder_hid_proj_type=None,
    )
    network: nn.Module = transformer.eval()
    return network


def _prior_transformer(*, diffusion: ContrastiveDiffusion, z: Tensor, seeds: Tensor, steps: int) -> Run:
    """In the loop of diffusers' own pipeline for it, with this schedule's scheduler."""
    prior = prior_transformer(diffusion.settings).to(z.device)
    scheduler, start = _scheduler(diffusion.settings), normal(seeds, (z.shape[1],))
    condition = torch.cat((z, torch.zeros_like(z)))

    @torch.no_grad()
    def run() -> Outputs:
        scheduler.set_timesteps(steps, device=z.device)
        x = start
        for t in scheduler.timesteps:
            output = prior(torch.cat((x, x)), t, condition, return_dict=False)[0]
            x = scheduler.step(_guided(output), t, x, return_dict=False)[0]
        return (x,)

    return run


def _answered(z: Tensor, **_: Any) -> Gate:
    """Judges another network: one finite embedding for every condition, no two alike."""

    def gate(outputs: Outputs) -> str | None:
        (x,) = outputs
        if x.shape != z.shape or not torch.isfinite(x).all():
            return f"gave {tuple(x.shape)}, or what is not finite"
        return None if len(x.unique(dim=0)) == len(z) else "gave two conditions the same sample"

    return gate


PEERS = (
    Peer("cuda_graph", _graphed, "torch", module="torch", devices=("cuda",)),
    Peer("diffusers", partial(_diffusers_loop, None), "diffusers"),
    Peer("diffusers_compile", partial(_diffusers_loop, {}), "diffusers", module="diffusers"),
    # Weights become constants of the graph, which inductor lays out beforehand for the processor's matrix products.
    Peer(
        "diffusers_freezing",
        partial(_diffusers_loop, {"freezing": True}),
        "diffusers",
        module="diffusers",
        devices=("cpu",),
    ),
    Peer("dalle2_pytorch", _dalle2, "dalle2-pytorch", gate=_answered),
    Peer("prior_transformer", _prior_transformer, "diffusers", module="diffusers", gate=_answered),
)
