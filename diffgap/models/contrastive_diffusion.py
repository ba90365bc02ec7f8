"""The contrastive diffusion module: denoises unit embeddings of one modality given those of another.

It works on what the heads give, unit vectors of one width (arXiv 2503.12131, "CDM"). With s the schedule's scaling:

    L[m | n] = E_{t, eps} w_t || target - f(alpha_t s(z_m) + sigma_t eps, t, m, s(z_n)) ||^2 / width
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffgap.diffusion.sampler import Callback, Guidance, SamplingLoop
from diffgap.diffusion.scaling import EmbeddingScaler
from diffgap.diffusion.solvers import build_solver
from diffgap.models.denoiser import Condition, Denoiser, DenoiserConfig, EncodedCondition, StepRows
from diffgap.models.objective import DenoisingBatch, all_directions, denoising_batches
from diffgap.models.randomness import STREAM_LEVEL, uniform
from diffgap.models.settings import BridgeSettings
from diffgap.ops import q_sample


class ContrastiveDiffusion(nn.Module):
    """One denoiser for all directions, its noise schedule, and the scaling of each modality.

    Args:
        modalities: Names; their order numbers them for the denoiser.
        sequences: Those that are sequences.
        settings: Of the bridge.

    Raises:
        ValueError: ``settings.directions`` allows none between these modalities.
    """

    noise_table: Tensor
    times: Tensor
    loss_weight: Tensor

    def __init__(self, modalities: tuple[str, ...], sequences: tuple[str, ...], settings: BridgeSettings) -> None:
        super().__init__()
        self.modalities, self.settings = modalities, settings
        allowed = [[settings.trains(source, target) for source in modalities] for target in modalities]
        self.directions = all_directions(allowed, several=settings.sources == "any")
        if settings.diffusion_weight and not self.directions:
            raise ValueError(
                f"settings.directions {settings.directions!r} names no direction between {', '.join(modalities)}"
            )
        self.schedule = schedule = settings.noise_schedule()
        self.scalers = nn.ModuleDict({name: EmbeddingScaler(settings.width, settings.scaling) for name in modalities})
        self.denoiser = Denoiser(
            DenoiserConfig(
                embedding_dim=settings.width,
                kinds=tuple("sequence" if name in sequences else "vector" for name in modalities),
                tokens_per_vector=settings.tokens,
                width=settings.denoiser_width,
                depth=settings.depth,
                heads=settings.heads,
                mlp_ratio=settings.mlp_ratio,
                dropout=settings.dropout,
            ),
            schedule if settings.precondition == "gaussian" else None,
        )
        gamma = settings.min_snr_gamma
        weight = schedule.min_snr_weights(gamma) if gamma else torch.ones(schedule.num_train_timesteps)
        # Derived from the settings, so not saved.
        self.register_buffer("noise_table", schedule.table.float(), persistent=False)
        self.register_buffer("times", schedule.times.float(), persistent=False)
        self.register_buffer("loss_weight", weight.float(), persistent=False)

    def scaler(self, modality: str) -> EmbeddingScaler:
        """Scales a modality's unit vectors for the diffusion, and back."""
        return cast(EmbeddingScaler, self.scalers[modality])

    @torch.no_grad()
    def fit(self, z: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """Take the scalers' statistics and the best linear denoiser from training data.

        Args:
            z: Unit embeddings of every modality, (N, width) or (N, T, width); rows belong together.
            masks: By modality, (N,) or (N, T) bool: what is there.
        """
        for name, x in z.items():
            self.scaler(name).fit(x[masks[name]])
        if (linear := self.denoiser.condition.linear_gaussian) is not None:
            numbered = {self.modalities.index(name): mask for name, mask in masks.items()}
            linear.fit(self._scaled(z), numbered)

    def _scaled(self, z: Mapping[str, Tensor]) -> dict[int, Tensor]:
        return {self.modalities.index(name): self.scaler(name).scale(x) for name, x in z.items()}

    def forward(
        self,
        z: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        seeds: Tensor,
        *,
        step: int,
        complete: bool = False,
    ) -> Tensor:
        """Denoising errors (R,), one for each row and direction that this step trains (``BridgeSettings.split``).

        Args:
            z: Unit embeddings by modality, (B, width) or (B, T, width).
            masks: By modality, (B,) or (B, T) bool: what is there.
            seeds: (B,) int64, one a row: all that is random follows from them.
            step: Training step.
            complete: Everything is there, in every row.
        """
        batches = denoising_batches(
            self._scaled(z),
            {self.modalities.index(name): mask for name, mask in masks.items()},
            self.directions,
            len(self.modalities),
            split=self.settings.split,
            step=step,
            seeds=seeds,
            complete=complete,
        )
        errors = [self._errors(batch) for batch in batches]
        return torch.cat(errors) if errors else self.loss_weight.new_zeros(0)

    def _errors(self, batch: DenoisingBatch) -> Tensor:
        """Weighted mean squared denoising error (R,) at random timesteps with random noise."""
        level, hidden = uniform(batch.seeds, 2, STREAM_LEVEL).unbind(1)
        t = (level * self.schedule.num_train_timesteps).long()
        noisy, wanted = q_sample(batch.clean, t, self.noise_table, batch.seeds, self.settings.prediction)
        predicted = self.denoiser(
            noisy,
            self.times[t],
            batch.target,
            batch.conditions,
            mask=batch.clean_mask,
            drop=hidden < self.settings.condition_dropout,
            seeds=batch.seeds,
        )
        error = (predicted.float() - wanted.float()).square().mean(-1)
        if batch.clean_mask is not None:
            error = (error * batch.clean_mask).sum(-1) / batch.clean_mask.sum(-1)
        return error * self.loss_weight[t]

    @torch.no_grad()
    def sample(
        self,
        sources: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        target: str,
        shape: tuple[int, ...],
        seeds: Tensor,
        *,
        frames: Tensor | None = None,
        solver: str | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        callback: Callback | None = None,
        batch_size: int = 4096,
        cuda_graph: bool = False,
    ) -> Tensor:
        """Unit embeddings (B, K, *shape) of ``target`` given those of one or several sources.

        Args:
            sources: By modality, (B, width) or (B, T, width). Absent ones may hold anything.
            masks: By modality, (B,) or (B, T) bool: what is there; all of a modality that is not named. A row with
                nothing at all is sampled without a condition.
            target: Modality to sample.
            shape: Of a sample, (width,) or (T, width).
            seeds: (B, K) int64, one a sample.
            frames: (B, T) bool: the frames of a sequence to sample; the others are zeros. All if not given.
            batch_size: Samples drawn at a time.
            cuda_graph: On a GPU, record the loop for the first of several batches and replay it for the others.
        """
        device = seeds.device
        if cuda_graph and (callback is not None or device.type != "cuda"):
            reason = f"z is on {device}" if callback is None else "a callback needs the host at every step"
            raise ValueError(f"cuda_graph: {reason}; leave it False")
        table = build_solver(
            solver or self.settings.solver, self.schedule, self.settings.sampling_steps if steps is None else steps
        )
        scale = self.settings.guidance_scale if guidance_scale is None else guidance_scale
        guidance = None if scale == 1 else Guidance(scale)
        scaler, num_samples = self.scaler(target), seeds.shape[1]
        conditions = [
            Condition(self.scaler(name).scale(sources[name]), index, masks.get(name))
            for index, name in enumerate(self.modalities)
            if name in sources
        ]
        parts = torch.arange(len(seeds), device=device).split(max(1, batch_size // num_samples))
        drawn = [conditions[0].embedding.new_zeros(0, num_samples, *shape)]
        loop: SamplingLoop | None = None
        for number, part in enumerate(parts):
            model = self._model(
                [condition.rows(part) for condition in conditions],
                target, num_samples, shape, table.timesteps,
                both=guidance is not None, frames=None if frames is None else frames[part],
            )  # fmt: skip
            if loop is None or not cuda_graph or not cast(_PreparedDenoiser, loop.model).take_over(model):
                loop = SamplingLoop(
                    model, table, seeds[part].numel(), shape,
                    device=device, guidance=guidance, x0_norm=scaler.radius,
                )  # fmt: skip
                if cuda_graph and number + 1 < len(parts):
                    loop.capture()
            result = loop(seeds[part].reshape(-1), callback=callback)
            result = F.normalize(scaler.unscale(result.view(len(part), num_samples, *shape)), dim=-1)
            drawn.append(result if frames is None else result * frames[part, None, :, None])
        return torch.cat(drawn)

    def _model(
        self,
        conditions: Sequence[Condition],
        target: str,
        num_samples: int,
        shape: tuple[int, ...],
        timesteps: Tensor,
        *,
        both: bool,
        frames: Tensor | None = None,
    ) -> _PreparedDenoiser:
        """The denoiser for one batch; with ``both`` it takes the conditional and then the unconditional branch."""
        z = conditions[0].embedding
        rows, drop = torch.arange(len(z), device=z.device), None
        if both:
            drop = torch.arange(2 * len(z), device=z.device) >= len(z)
            rows = rows.repeat(2)
            conditions = [condition.rows(rows) for condition in conditions]
        encoded = self.denoiser.encode_condition(conditions, len(rows), drop=drop).repeat(num_samples)
        encoded = encoded.with_room(self.settings.tokens if len(shape) == 1 else shape[0])
        index = self.modalities.index(target)
        modulation = self.denoiser.precompute(timesteps.to(z.device, z.dtype), index, encoded.sources)
        mask = None if frames is None else frames[rows].repeat_interleave(num_samples, 0)
        return _PreparedDenoiser(self.denoiser, index, encoded, modulation, mask)


@dataclass(frozen=True)
class _PreparedDenoiser:
    """The denoiser with all that does not depend on the sample computed once: conditions, and every step's rows."""

    denoiser: Denoiser
    target: int
    encoded: EncodedCondition
    rows: StepRows
    mask: Tensor | None

    def __call__(self, sample: Tensor, step: int) -> Tensor:
        return self.denoiser.denoise(sample, self.target, self.rows.at(step), self.encoded, mask=self.mask)

    def _tensors(self) -> list[Tensor | None]:
        kept = [context.keys_values for context in self.encoded.contexts]
        return [*kept, self.encoded.mask, self.encoded.sources, self.encoded.means, *self.rows, self.mask]

    def take_over(self, other: _PreparedDenoiser) -> bool:
        """Copy what another batch of equal shapes has into the tensors here, where a CUDA graph reads it."""
        pairs = list(zip(self._tensors(), other._tensors(), strict=True))
        if any((a if a is None else a.shape) != (b if b is None else b.shape) for a, b in pairs):
            return False
        for mine, new in pairs:
            if mine is not None and new is not None:
                mine.copy_(new)
        return True
