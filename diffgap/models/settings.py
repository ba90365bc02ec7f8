"""The bridge's configuration: every choice the paper leaves open is a field, with the reason for its default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from diffgap.diffusion.schedule import EmbeddingScaling, NoiseSchedule, Prediction, ScheduleKind

SplitMode = Literal["alternate", "half", "random", "joint"]
Contrastive = Literal["clip", "siglip", "none"]
Head = Literal["linear", "mlp", "identity"]
HeadInit = Literal["cca", "random"]


@dataclass(frozen=True)
class BridgeSettings:
    """Settings of :class:`diffgap.DiffGAP`; ``paper`` and ``recommended`` are its presets.

    The defaults are the recommended preset: what measured best on the bundled data (README, "What it gives").
    """

    width: int = 256
    """Coordinates of the contrastive space that all modalities are projected into."""
    head: Head = "linear"
    """Projection into that space; "identity" uses the embeddings as they are (their widths must equal `width`)."""
    head_init: HeadInit = "cca"
    """How fitting starts the heads: regularised CCA of the training pairs, or at random. CCA measured better."""
    head_dropout: float = 0.5
    """Dropout on the heads' inputs. Without it, a few thousand pairs are learnt by heart."""
    head_learning_rate: float = 0.3
    """Learning rate of the heads, in units of the trainer's: from a CCA start they need to move only a little."""
    contrastive: Contrastive = "clip"
    """Contrastive loss over every pair of modalities."""
    contrastive_weight: float = 1.0
    """Weight of the contrastive loss."""
    init_logit_scale: float = 14.3
    """Starting logit scale, 1 / 0.07 as in CLIP; 10 with a bias of -10 is SigLIP's own start."""
    init_logit_bias: float = -10.0
    """Starting logit bias (siglip only)."""
    schedule: ScheduleKind = "squaredcos_cap_v2"
    """Noise schedule, by its diffusers name ("flow" is rectified flow)."""
    num_train_timesteps: int = 1000
    """Noise levels of the schedule."""
    prediction: Prediction = "sample"
    """What the denoiser predicts. The paper trains epsilon; sample (x0) measured better on embeddings."""
    scaling: EmbeddingScaling = "sqrt_dim"
    """Unit vectors have coordinates of 1/sqrt(width), invisible beside unit noise: scaled or whitened first."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that its last step is pure noise."""
    min_snr_gamma: float = 0.0
    """Weight the loss by min-SNR with this gamma (5 is usual); 0 turns it off."""
    split: SplitMode = "random"
    """Bidirectional split training: one direction a step in turn (the paper's), a share of the batch for each
    direction, a random direction per sample, or every direction for every sample."""
    diffusion_weight: float = 1.0
    """lambda in L = L_contrastive + lambda * mean over directions of L_diffusion."""
    diffusion_trains_heads: bool = False
    """Let the diffusion loss move the heads. Off: it would reward a space that is easy to denoise, a collapsed one."""
    condition_dropout: float = 0.1
    """Probability of hiding the condition in training, for classifier-free guidance."""
    tokens: int = 4
    """Tokens a pooled vector is split into; must divide `width`."""
    denoiser_width: int = 128
    """Features of a token inside the denoiser."""
    depth: int = 2
    """Transformer blocks of the denoiser."""
    heads: int = 4
    """Attention heads of the denoiser."""
    mlp_ratio: float = 2.0
    """Hidden width of its gated MLPs, in units of `denoiser_width`."""
    dropout: float = 0.1
    """Dropout on the output of every attention and MLP."""
    solver: str = "dpmpp"
    """Default solver for sampling. (DDIM's own spacing starts below pure noise, which tells at few steps.)"""
    sampling_steps: int = 8
    """Default number of sampling steps."""
    guidance_scale: float = 1.0
    """Default guidance; 1 is none."""
    num_samples: int = 16
    """Samples averaged into the conditional mean that retrieval uses."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("head", Head),
            ("head_init", HeadInit),
            ("contrastive", Contrastive),
            ("schedule", ScheduleKind),
            ("prediction", Prediction),
            ("scaling", EmbeddingScaling),
            ("split", SplitMode),
        ):
            if getattr(self, name) not in get_args(allowed):
                options = ", ".join(get_args(allowed))
                raise ValueError(f"settings.{name} is {getattr(self, name)!r}; use one of {options}")
        for name in ("width", "tokens", "denoiser_width", "depth", "heads", "sampling_steps", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"settings.{name} is {getattr(self, name)}; use 1 or more")
        if self.width % self.tokens:
            raise ValueError(f"settings.width {self.width} is not a multiple of settings.tokens {self.tokens}")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"settings.condition_dropout is {self.condition_dropout}; use a value in [0, 1)")

    @classmethod
    def preset(cls, name: Literal["paper", "recommended"]) -> BridgeSettings:
        """``paper``: what arXiv 2503.12131 is known to do (epsilon, alternating directions, random heads), its
        silences filled by DDPM's own choices. ``recommended``: the defaults."""
        presets = {
            "paper": cls(
                head_init="random",
                schedule="linear",
                prediction="epsilon",
                split="alternate",
                solver="ddim",
                sampling_steps=50,
            ),
            "recommended": cls(),
        }
        if name not in presets:
            raise ValueError(f"preset {name!r} does not exist; use one of {', '.join(presets)}")
        return presets[name]

    def noise_schedule(self) -> NoiseSchedule:
        """The noise schedule these settings describe."""
        return NoiseSchedule(
            kind=self.schedule,
            num_train_timesteps=self.num_train_timesteps,
            prediction_type=self.prediction,
            zero_terminal_snr=self.zero_terminal_snr,
            embedding_scaling=self.scaling,
        )
