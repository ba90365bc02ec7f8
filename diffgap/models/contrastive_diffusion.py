"""The contrastive diffusion module: denoises unit embeddings of one modality given those of another.

It works on what the heads give, unit vectors of one width (arXiv 2503.12131, "CDM"). With s the schedule's scaling:

    L[m | n] = E_{t, eps} w_t || target - f(alpha_t s(z_m) + sigma_t eps, t, m, s(z_n)) ||^2 / width
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffgap.diffusion.sampler import Callback, Guidance, SamplingLoop
from diffgap.diffusion.scaling import EmbeddingScaler
from diffgap.diffusion.solvers import build_solver
from diffgap.models.denoiser import Condition, Denoiser, DenoiserConfig, EncodedCondition, StepRows
from diffgap.models.objective import DenoisingBatch, denoising_batches
from diffgap.models.settings import BridgeSettings
from diffgap.ops import q_sample


class ContrastiveDiffusion(nn.Module):
    """One denoiser for all directions, its noise schedule, and the scaling of each modality.

    Args:
        modalities: Names; their order numbers them for the denoiser.
        sequences: Those that are sequences.
        settings: Of the bridge.
    """

    noise_table: Tensor
    times: Tensor
    loss_weight: Tensor

    def __init__(self, modalities: tuple[str, ...], sequences: tuple[str, ...], settings: BridgeSettings) -> None:
        super().__init__()
        self.modalities, self.settings = modalities, settings
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
            )
        )
        self.schedule = schedule = settings.noise_schedule()
        gamma = settings.min_snr_gamma
        weight = schedule.min_snr_weights(gamma) if gamma else torch.ones(schedule.num_train_timesteps)
        # Derived from the settings, so not saved.
        self.register_buffer("noise_table", schedule.table.float(), persistent=False)
        self.register_buffer("times", schedule.times.float(), persistent=False)
        self.register_buffer("loss_weight", weight.float(), persistent=False)

    def scaler(self, modality: str) -> EmbeddingScaler:
        """Scales a modality's unit vectors for the diffusion, and back."""
        return cast(EmbeddingScaler, self.scalers[modality])

    def _scaled(self, z: Mapping[str, Tensor]) -> dict[int, Tensor]:
        return {self.modalities.index(name): self.scaler(name).scale(x) for name, x in z.items()}

    def forward(
        self, targets: Mapping[str, Tensor], conditions: Mapping[str, Tensor], masks: Mapping[str, Tensor], step: int
    ) -> Tensor:
        """Mean denoising error over the rows and directions that this step trains (``BridgeSettings.split``).

        Args:
            targets: Unit embeddings by modality, (B, width) or (B, T, width).
            conditions: The same, perhaps corrupted.
            masks: By modality, (B,) or (B, T) bool: what is there.
            step: Training step.
        """
        batches = denoising_batches(
            self._scaled(targets),
            self._scaled(conditions),
            {self.modalities.index(name): mask for name, mask in masks.items()},
            len(self.modalities),
            split=self.settings.split,
            step=step,
        )
        errors = [self._errors(batch) for batch in batches]
        return torch.cat(errors).mean() if errors else self.loss_weight.new_zeros(())

    def _errors(self, batch: DenoisingBatch) -> Tensor:
        """Weighted mean squared denoising error (R,) at random timesteps with random noise."""
        rows, device = len(batch.target), batch.clean.device
        t = torch.randint(self.schedule.num_train_timesteps, (rows,), device=device)
        seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), device=device)
        noisy, wanted = q_sample(batch.clean, t, self.noise_table, seeds, self.settings.prediction)
        predicted = self.denoiser(
            noisy,
            self.times[t],
            batch.target,
            [Condition(batch.condition, batch.source, batch.condition_mask)],
            mask=batch.clean_mask,
            drop=torch.rand(rows, device=device) < self.settings.condition_dropout,
        )
        error = (predicted.float() - wanted.float()).square().mean(-1)
        if batch.clean_mask is not None:
            error = (error * batch.clean_mask).sum(-1) / batch.clean_mask.sum(-1)
        return error * self.loss_weight[t]

    @torch.no_grad()
    def sample(
        self,
        source: str,
        z: Tensor,
        mask: Tensor | None,
        target: str,
        shape: tuple[int, ...],
        seeds: Tensor,
        *,
        solver: str | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        callback: Callback | None = None,
        batch_size: int = 4096,
        cuda_graph: bool = False,
    ) -> Tensor:
        """Unit embeddings (B, K, *shape) of ``target`` given ``z`` (B, width) or (B, T, width) of ``source``.

        Args:
            seeds: (B, K) int64, one a sample.
            mask: (B, T) bool for a source sequence.
            batch_size: Samples drawn at a time.
            cuda_graph: On a GPU, record the loop for the first of several batches and replay it for the others.
        """
        if cuda_graph and (callback is not None or z.device.type != "cuda"):
            reason = f"z is on {z.device}" if callback is None else "a callback needs the host at every step"
            raise ValueError(f"cuda_graph: {reason}; leave it False")
        table = build_solver(solver or self.settings.solver, self.schedule, steps or self.settings.sampling_steps)
        scale = self.settings.guidance_scale if guidance_scale is None else guidance_scale
        guidance = None if scale == 1 else Guidance(scale)
        scaler, z, num_samples = self.scaler(target), self.scaler(source).scale(z), seeds.shape[1]
        parts = torch.arange(len(z), device=z.device).split(max(1, batch_size // num_samples))
        drawn = [z.new_zeros(0, num_samples, *shape)]
        loop: SamplingLoop | None = None
        for number, part in enumerate(parts):
            condition = Condition(z[part], self.modalities.index(source), None if mask is None else mask[part])
            model = self._model(condition, target, num_samples, shape, table.timesteps, both=guidance is not None)
            if loop is None or not cuda_graph or not cast(_PreparedDenoiser, loop.model).take_over(model):
                loop = SamplingLoop(
                    model, table, seeds[part].numel(), shape,
                    device=z.device, guidance=guidance, x0_norm=scaler.radius,
                )  # fmt: skip
                if cuda_graph and number + 1 < len(parts):
                    loop.capture()
            result = loop(seeds[part].reshape(-1), callback=callback)
            drawn.append(F.normalize(scaler.unscale(result.view(len(part), num_samples, *shape)), dim=-1))
        return torch.cat(drawn)

    def _model(
        self,
        condition: Condition,
        target: str,
        num_samples: int,
        shape: tuple[int, ...],
        timesteps: Tensor,
        *,
        both: bool,
    ) -> _PreparedDenoiser:
        """The denoiser for one batch; with ``both`` it takes the conditional and then the unconditional branch."""
        z, source, mask = condition
        drop = None
        if both:
            drop = torch.arange(2 * len(z), device=z.device) >= len(z)
            z, mask = torch.cat((z, z)), None if mask is None else torch.cat((mask, mask))
        encoded = self.denoiser.encode_condition([Condition(z, source, mask)], len(z), drop=drop).repeat(num_samples)
        encoded = encoded.with_room(self.settings.tokens if len(shape) == 1 else shape[0])
        index = self.modalities.index(target)
        rows = self.denoiser.precompute(timesteps.to(z.device, z.dtype), index, encoded.sources)
        return _PreparedDenoiser(self.denoiser, index, encoded, rows)


@dataclass(frozen=True)
class _PreparedDenoiser:
    """The denoiser with all that does not depend on the sample computed once: conditions, and every step's rows."""

    denoiser: Denoiser
    target: int
    encoded: EncodedCondition
    rows: StepRows

    def __call__(self, sample: Tensor, step: int) -> Tensor:
        return self.denoiser.denoise(sample, self.target, self.rows.at(step), self.encoded)

    def _tensors(self) -> list[Tensor | None]:
        kept = [context.keys_values for context in self.encoded.contexts]
        return [*kept, self.encoded.mask, self.encoded.sources, *self.rows]

    def take_over(self, other: _PreparedDenoiser) -> bool:
        """Copy what another batch of equal shapes has into the tensors here, where a CUDA graph reads it."""
        pairs = list(zip(self._tensors(), other._tensors(), strict=True))
        if any((a if a is None else a.shape) != (b if b is None else b.shape) for a, b in pairs):
            return False
        for mine, new in pairs:
            if mine is not None and new is not None:
                mine.copy_(new)
        return True
