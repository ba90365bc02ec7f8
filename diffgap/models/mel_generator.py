"""A compact diffusion transformer over log-mel spectrograms, conditioned on one embedding of an audio-side space.

A spectrogram x (F frames, M bands), brought to mean 0 and variance 1 a band, is cut into patches of ``patch_frames`` by
``patch_bands``; each is a token. DiT blocks (arXiv 2212.09748) attend over the tokens that are there, modulated by the
time, the condition c and the number of frames n. With t, noise and target as in :mod:`diffgap.ops.q_sample`:

    L = E_{t, eps} w_t mean over the n frames of || target - f(alpha_t x + sigma_t eps, t, c, n) ||^2

c enters as sqrt(D) c, with coordinates of order 1, and is hidden with probability ``condition_dropout``, for
classifier-free guidance (arXiv 2207.12598).
Latents of an autoencoder are spectrograms too (:mod:`diffgap.generation.latents`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffgap.diffusion.sampler import Callback, Guidance, SamplingLoop
from diffgap.diffusion.schedule import NoiseSchedule, Prediction, ScheduleKind
from diffgap.diffusion.solvers import build_solver
from diffgap.models.blocks import ROWS_PER_BLOCK, DiTBlock, Residual, TimestepEmbedding
from diffgap.models.layers import Linear
from diffgap.models.randomness import STREAM_LEVEL, draw_seeds, uniform
from diffgap.models.saving import SavedModel
from diffgap.models.tokens import sinusoidal_embedding
from diffgap.ops import q_sample, sample_seeds
from diffgap.ops.random import check_seed

__all__ = ["MelGenerator", "MelGeneratorConfig"]

Size = Literal["tiny", "small", "base"]

_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 192, "depth": 6, "heads": 6},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
}


# Annotations are real types, not strings: the hub mixin rebuilds `config` from config.json by its annotation.
@dataclass(frozen=True)
class MelGeneratorConfig:
    """Shape and noise schedule of a :class:`MelGenerator`."""

    condition_dim: int
    """Coordinates of the condition, an embedding of the audio-side space."""
    bands: int = 64
    """Mel bands of a frame."""
    mel: str = ""
    """What the spectrograms or latents are, the description of :class:`diffgap.generation.mel.MelSettings` or
    :class:`diffgap.generation.latents.LatentSettings`, for whoever makes sound of them."""
    space: str = ""
    """What the conditions are, :attr:`diffgap.generation.space.AudioSpace.fingerprint`, so that no others are given."""
    typical_frames: int = 0
    """Median length of the training spectrograms, drawn where no length is asked for; 0 if it is not known."""
    patch_frames: int = 4
    """Frames of a patch; a sample's length is a multiple of it."""
    patch_bands: int = 64
    """Bands of a patch; divides ``bands``. All of them keep sequences short, fewer give finer tokens."""
    width: int = 192
    """Features of a token; an even multiple of ``heads``."""
    depth: int = 6
    """Blocks."""
    heads: int = 6
    """Attention heads."""
    mlp_ratio: float = 2.0
    """Hidden width of the gated MLP in units of ``width``."""
    dropout: float = 0.0
    """On the output of every attention and MLP."""
    condition_dropout: float = 0.1
    """Probability that training hides the condition."""
    schedule: ScheduleKind = "squaredcos_cap_v2"
    """Noise schedule, by its diffusers name."""
    num_train_timesteps: int = 1000
    """Noise levels of the schedule."""
    prediction: Prediction = "sample"
    """What the network predicts. A patch has more values than a small network has features: noise, which epsilon and v
    hold, does not fit through them, and a spectrogram does (arXiv 2511.13720)."""
    min_snr_gamma: float = 0.0
    """Gamma of the min-SNR weight of a noise level (arXiv 2303.09556); 0 weighs all levels alike. Min-SNR leaves next
    to no weight to the noisiest levels, which are where the condition decides what a sound becomes."""
    solver: str = "dpmpp"
    """Solver of :func:`diffgap.diffusion.build_solver`."""
    sampling_steps: int = 25
    """Network calls a sample."""
    guidance_scale: float = 2.0
    """Classifier-free guidance; 1 is none."""
    x0_clamp: float = 5.0
    """Predicted spectrograms are clamped to this many standard deviations of a band in every step."""

    def __post_init__(self) -> None:
        for name in ("condition_dim", "bands", "patch_frames", "patch_bands", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more")
        if self.bands % self.patch_bands:
            raise ValueError(
                f"bands {self.bands} is not a multiple of patch_bands {self.patch_bands}; change one of them"
            )
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} is not an even multiple of heads {self.heads}; change one of them")
        for name in ("mlp_ratio", "x0_clamp"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use a positive number")
        for name in ("dropout", "condition_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use a value in [0, 1)")
        if self.typical_frames < 0:
            raise ValueError(f"typical_frames is {self.typical_frames}; use 0 or more")
        if self.min_snr_gamma < 0:
            raise ValueError(f"min_snr_gamma is {self.min_snr_gamma}; use 0 or more")
        build_solver(self.solver, self.noise_schedule(), self.sampling_steps)

    @classmethod
    def of_size(cls, size: Size, condition_dim: int, **changes: Any) -> "MelGeneratorConfig":
        """ "tiny" (about 4 million parameters), "small" (29) or "base" (115); ``changes`` are other fields."""
        if size not in _SIZES:
            raise ValueError(f"size {size!r} is unknown; use one of {', '.join(get_args(Size))}")
        return cls(condition_dim, **{**_SIZES[size], **changes})

    def noise_schedule(self) -> NoiseSchedule:
        """The schedule and prediction type."""
        return NoiseSchedule(
            self.schedule, num_train_timesteps=self.num_train_timesteps, prediction_type=self.prediction
        )


class MelGenerator(nn.Module, SavedModel, library_name="diffgap", license="apache-2.0"):
    """Draws log-mel spectrograms for embeddings.

    Args:
        config: See :class:`MelGeneratorConfig`.
    """

    mean: Tensor
    deviation: Tensor
    noise_table: Tensor
    times: Tensor
    loss_weight: Tensor

    def __init__(self, config: MelGeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.grid = config.bands // config.patch_bands
        patch = config.patch_frames * config.patch_bands
        self.tokens = Linear(patch, config.width)
        self.band_positions = nn.Parameter(torch.randn(self.grid, config.width) * 0.02)
        self.time = TimestepEmbedding(config.width)
        self.length = TimestepEmbedding(config.width)
        self.condition = Linear(config.condition_dim, config.width)
        self.no_condition = nn.Parameter(torch.zeros(config.width))
        self.rows = Linear(config.width, (ROWS_PER_BLOCK * config.depth + 2) * config.width)
        self.blocks = nn.ModuleList(DiTBlock(config, number) for number in range(config.depth))
        self.head = Linear(config.width, patch)
        self.register_buffer("mean", torch.zeros(config.bands))
        self.register_buffer("deviation", torch.ones(config.bands))
        schedule = config.noise_schedule()
        weight = (
            schedule.min_snr_weights(config.min_snr_gamma) if config.min_snr_gamma else torch.ones(len(schedule.times))
        )
        # Derived from the configuration, so not saved.
        self.register_buffer("noise_table", schedule.table.float(), persistent=False)
        self.register_buffer("times", schedule.times.float(), persistent=False)
        self.register_buffer("loss_weight", weight.float(), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """DiT's initialisation: Xavier for products, zero for modulation and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.rows, self.head):
            nn.init.zeros_(layer.weight)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameters for an optimizer: matrices with ``weight_decay``, vectors without."""
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        vectors = [p for p in self.parameters() if p.ndim < 2]
        return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]

    @torch.no_grad()
    def fit(self, mel: Tensor, lengths: Tensor | None = None) -> None:
        """Take the mean and standard deviation of each band from training spectrograms (N, F, M), as in forward."""
        frames = mel.flatten(0, 1) if lengths is None else mel[self._inside(mel, lengths)]
        if len(frames) < 2:
            raise ValueError(f"mel has {len(frames)} frames; fit needs 2 or more")
        self.mean.copy_(frames.double().mean(0))
        self.deviation.copy_(frames.double().std(0).clamp_min(1e-5))

    def forward(
        self, mel: Tensor, condition: Tensor, *, lengths: Tensor | None = None, seeds: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            mel: (B, F, M) log-mel spectrograms.
            condition: (B, D) embeddings.
            lengths: (B,) int64, frames of each that count; all F by default.
            seeds: (B,) int64, decide all that is random in a row; drawn from torch's generator by default.

        Returns:
            "loss", 0-d: the mean over the rows.

        Raises:
            ValueError: A shape that does not fit, or lengths outside 1..F.
        """
        self._check(mel, condition, lengths)
        seeds = draw_seeds(len(mel), mel.device) if seeds is None else seeds
        check_seed(seeds, len(mel), mel.device)
        frames = mel.new_full((len(mel),), mel.shape[1], dtype=torch.int64) if lengths is None else lengths
        inside = self._inside(mel, frames)
        clean = ((mel - self.mean) / self.deviation).masked_fill(~inside.unsqueeze(-1), 0.0)
        level, hidden = uniform(seeds, 2, STREAM_LEVEL).unbind(1)
        t = (level * self.config.num_train_timesteps).long()
        noisy, wanted = q_sample(clean, t, self.noise_table, seeds, self.config.prediction)
        drive = self._drive(condition, frames, hidden < self.config.condition_dropout)
        predicted = self.denoise(noisy, self.modulation(self.time(self.times[t]), drive), frames, seeds=seeds)
        error = (predicted.float() - wanted.float()).square().mean(-1)
        error = (error * inside).sum(1) / frames * self.loss_weight[t]
        return {"loss": error.mean()}

    def denoise(self, noisy: Tensor, rows: Tensor, lengths: Tensor, *, seeds: Tensor | None = None) -> Tensor:
        """The prediction (B, F, M) for noisy spectrograms, normalised, of which ``lengths`` (B,) frames count.

        ``rows`` (G, R, width) modulates G groups of consecutive samples.
        """
        config = self.config
        # Frames beyond a length share its last patch: they must not say how long the others of the batch are.
        patches = self._patches(noisy.masked_fill(~self._inside(noisy, lengths).unsqueeze(-1), 0.0))
        rows_of_patches = torch.arange(patches.shape[1], device=noisy.device)
        tokens = self.tokens(patches)
        places = sinusoidal_embedding(rows_of_patches, config.width).to(tokens.dtype).unsqueeze(1)
        stream = Residual((tokens + places + self.band_positions).flatten(1, 2))
        mask = (rows_of_patches * config.patch_frames < lengths.unsqueeze(1)).repeat_interleave(self.grid, 1)
        *block_rows, final = rows.split(ROWS_PER_BLOCK, 1)
        for block, own in zip(self.blocks, block_rows, strict=True):
            stream = block(stream, own, key_mask=mask, seeds=seeds)
        _, h = stream.normed(*final.unbind(1))
        return self._whole(self.head(h).unflatten(1, (-1, self.grid)))[:, : noisy.shape[1]]

    def _patches(self, mel: Tensor) -> Tensor:
        """(B, F, M) -> (B, F / pf, M / pb, pf pb), the last patches filled up with zeros."""
        config = self.config
        padded = F.pad(mel, (0, 0, 0, -mel.shape[1] % config.patch_frames))
        cut = padded.unflatten(1, (-1, config.patch_frames)).unflatten(3, (self.grid, config.patch_bands))
        return cut.transpose(2, 3).flatten(3)

    def _whole(self, patches: Tensor) -> Tensor:
        """(B, F / pf, M / pb, pf pb) -> (B, F, M), the inverse of :meth:`_patches`."""
        config = self.config
        cut = patches.unflatten(3, (config.patch_frames, config.patch_bands))
        return cut.transpose(2, 3).flatten(3).flatten(1, 2)

    def _drive(self, condition: Tensor, lengths: Tensor, hidden: Tensor) -> Tensor:
        """What modulates besides the time, (B, width); the condition is left out where ``hidden`` (B,)."""
        # Coordinates of a unit vector are of 1 / sqrt(D): beside the embedded time they would not be heard.
        seen = self.condition(condition * self.config.condition_dim**0.5)
        given = torch.where(hidden.unsqueeze(1), self.no_condition, seen)
        drive: Tensor = given + self.length(lengths)
        return drive

    def modulation(self, time: Tensor, drive: Tensor) -> Tensor:
        """(B, 6 depth + 2, width), what modulates the blocks and the final norm, from embedded times and ``drive``."""
        rows: Tensor = self.rows(F.silu(time + drive))
        return rows.unflatten(-1, (ROWS_PER_BLOCK * self.config.depth + 2, self.config.width))

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor | None,
        lengths: Tensor | Sequence[int],
        *,
        num_samples: int = 1,
        steps: int | None = None,
        solver: str | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        seeds: Tensor | None = None,
        callback: Callback | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Spectrograms (B, K, F, M) of embeddings, F the largest length; what is beyond a length is to be cut off.

        Args:
            condition: (B, D), or None to draw without a condition.
            lengths: (B,) frames wanted of each.
            num_samples: K.
            steps, solver, guidance_scale: The configuration's by default.
            seed: Of the noise; every sample has its own noise, whatever batch it is drawn in.
            seeds: (B, K) int64 instead of ``seed``.
            callback: See :func:`diffgap.diffusion.sample`.
            batch_size: Samples drawn at a time.

        Raises:
            ValueError: A shape that does not fit, or a length below 1.
        """
        config, device = self.config, self.mean.device
        lengths = torch.as_tensor(lengths, dtype=torch.int64, device=device)
        hidden = condition is None
        condition = self.mean.new_zeros(len(lengths), config.condition_dim) if condition is None else condition
        if condition.shape != (len(lengths), config.condition_dim):
            wanted = (len(lengths), config.condition_dim)
            raise ValueError(f"condition is {tuple(condition.shape)}; pass {wanted}: one row a length")
        if len(lengths) and int(lengths.min()) < 1:
            raise ValueError(f"lengths reach down to {int(lengths.min())}; use 1 frame or more")
        if num_samples < 1 or batch_size < 1:
            raise ValueError(f"num_samples is {num_samples} and batch_size {batch_size}; use 1 or more")
        if seeds is None:
            drawn_seeds = sample_seeds(len(lengths) * num_samples, torch.Generator().manual_seed(seed))
            seeds = drawn_seeds.view(-1, num_samples).to(device)
        table = build_solver(solver or config.solver, config.noise_schedule(), steps or config.sampling_steps)
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        guidance = None if scale == 1 or hidden else Guidance(scale)
        frames = int(lengths.max()) if len(lengths) else 0
        drawn = [self.mean.new_zeros(0, num_samples, frames, config.bands)]
        for part in torch.arange(len(lengths), device=device).split(max(1, batch_size // num_samples)):
            rows = part if guidance is None else part.repeat(2)
            hide = torch.arange(len(rows), device=device) >= (0 if hidden else len(part))
            model = _Prepared(
                self,
                self._drive(condition[rows], lengths[rows], hide),
                self.time(table.timesteps.to(self.mean)),
                lengths[rows].repeat_interleave(num_samples),
            )
            loop = SamplingLoop(
                model, table, seeds[part].numel(), (frames, config.bands),
                device=device, guidance=guidance, x0_clamp=config.x0_clamp,
            )  # fmt: skip
            result = loop(seeds[part].reshape(-1), callback=callback)
            drawn.append(result.reshape(len(part), num_samples, frames, config.bands) * self.deviation + self.mean)
        return torch.cat(drawn)

    def _inside(self, mel: Tensor, lengths: Tensor) -> Tensor:
        """(B, F) bool: the frames that count."""
        return torch.arange(mel.shape[1], device=mel.device) < lengths.unsqueeze(1)

    def _check(self, mel: Tensor, condition: Tensor, lengths: Tensor | None) -> None:
        config = self.config
        if mel.dim() != 3 or mel.shape[1] < 1 or mel.shape[2] != config.bands:
            raise ValueError(f"mel is {tuple(mel.shape)}; pass (B, frames, {config.bands})")
        if condition.shape != (len(mel), config.condition_dim):
            raise ValueError(f"condition is {tuple(condition.shape)}; pass {(len(mel), config.condition_dim)}")
        if lengths is not None:
            if lengths.shape != (len(mel),) or lengths.dtype != torch.int64:
                raise ValueError(f"lengths is {lengths.dtype} {tuple(lengths.shape)}; pass int64 ({len(mel)},)")
            if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= mel.shape[1]:
                raise ValueError(f"lengths lie outside 1..{mel.shape[1]}, the frames of mel")


@dataclass(frozen=True)
class _Prepared:
    """The generator with what no step changes made beforehand."""

    generator: MelGenerator
    drive: Tensor
    times: Tensor
    lengths: Tensor

    def __call__(self, sample: Tensor, step: int) -> Tensor:
        rows = self.generator.modulation(self.times[step], self.drive)
        return self.generator.denoise(sample, rows, self.lengths)
