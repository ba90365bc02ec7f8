"""The bridge's configuration: every choice the paper leaves open is a field, with the reason for its default."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from diffgap.diffusion.schedule import EmbeddingScaling, NoiseSchedule, Prediction, ScheduleKind
from diffgap.diffusion.solvers import SOLVERS

SplitMode = Literal["alternate", "half", "random", "joint"]
Contrastive = Literal["clip", "siglip", "none"]
Head = Literal["linear", "mlp", "identity"]
HeadInit = Literal["cca", "random"]
Precondition = Literal["gaussian", "none"]
Sources = Literal["single", "any"]

_MOST, _MOST_BLOCKS = 2**16, 2**8


@dataclass(frozen=True)
class BridgeSettings:
    """Settings of :class:`diffgap.DiffGAP`; ``paper`` and ``recommended`` are its presets.

    The defaults are the recommended preset: what measured best on the bundled data (docs/retrieval.md).
    """

    width: int = 256
    """Coordinates of the contrastive space that all modalities are projected into."""
    head: Head = "linear"
    """Projection into that space; "identity" uses the embeddings as they are (their widths must equal `width`)."""
    head_init: HeadInit = "cca"
    """How fitting starts the heads: regularised CCA of the training pairs, or at random. CCA measured better."""
    head_dropout: float = 0.5
    """Least dropout on the heads' inputs. Without it, a few thousand pairs are learnt by heart."""
    embeddings_per_input: float = 3.0
    """Dropout grows until a modality has this many distinct training embeddings for each input that is left; 0 for
    `head_dropout` alone. A few hundred pictures of 1,280 coordinates need .88, thousands of recordings .5."""
    heads_first: float = 0.17
    """Share of the training steps in which the heads are trained alone, 510 of 3,000; for the rest they are frozen and
    the diffusion is trained on what they give. 0 trains all together, as the paper does."""
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
    precondition: Precondition = "none"
    """What the network's output is added to: the best linear denoiser of the training pairs ("gaussian"), or nothing.
    The linear one gives a bridge before any training; but fused with the cosine, what a network learns alone tells
    more that the heads do not know (validation MRR on the stamps +0.9 against +0.6 after 800 steps)."""
    scaling: EmbeddingScaling = "sqrt_dim"
    """Unit vectors have coordinates of 1/sqrt(width), invisible beside unit noise: scaled or whitened first."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that its last step is pure noise."""
    min_snr_gamma: float = 0.0
    """Weight the loss by min-SNR with this gamma (5 is usual); 0 turns it off."""
    split: SplitMode = "random"
    """Bidirectional split training: one direction a step in turn (the paper's), a share of the batch for each
    direction, a random direction per sample, or every direction for every sample."""
    sources: Sources = "single"
    """Whether training shows one source modality at a time, or any set of those a row has. One by default: retrieval
    asks with one, and of two modalities there is no other set."""
    directions: str = "* -> *"
    """Directions that are trained, "source -> target", several separated by commas, * for any modality. All of them
    by default: both ways is what the paper argues for, and scoring uses both."""
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
    translate_steps: int = 1
    """Sampling steps of a translation. From pure noise, one step of a denoiser that predicts x0 gives the conditional
    mean, which the mean of many finished samples only estimates."""
    num_samples: int = 1
    """Samples averaged into a translation; more than one helps only where steps are not 1."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("head", Head),
            ("head_init", HeadInit),
            ("precondition", Precondition),
            ("contrastive", Contrastive),
            ("schedule", ScheduleKind),
            ("prediction", Prediction),
            ("scaling", EmbeddingScaling),
            ("split", SplitMode),
            ("sources", Sources),
        ):
            if getattr(self, name) not in get_args(allowed):
                options = ", ".join(get_args(allowed))
                raise ValueError(f"settings.{name} is {getattr(self, name)!r}; use one of {options}")
        if self.solver not in SOLVERS:
            raise ValueError(f"settings.solver is {self.solver!r}; use one of {', '.join(SOLVERS)}")
        counts = "width tokens denoiser_width depth heads sampling_steps translate_steps num_samples"
        for name in counts.split():
            # The bound is far beyond use: a damaged configuration must not take all memory.
            most = _MOST_BLOCKS if name == "depth" else _MOST
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"settings.{name} is {getattr(self, name)}; use 1 to {most}")
        if self.width % self.tokens:
            raise ValueError(f"settings.width {self.width} is not a multiple of settings.tokens {self.tokens}")
        if any(len(pair) != 2 or not all(pair) for pair in self._directions()):
            raise ValueError(f"settings.directions is {self.directions!r}; write e.g. 'audio -> text' or '* -> audio'")
        if not 0 <= self.heads_first < 1:
            raise ValueError(f"settings.heads_first is {self.heads_first}; use a share in [0, 1)")
        if not self.embeddings_per_input >= 0:
            raise ValueError(f"settings.embeddings_per_input is {self.embeddings_per_input}; use 0 or more")
        for name in ("contrastive_weight", "diffusion_weight", "min_snr_gamma", "guidance_scale", "head_learning_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"settings.{name} is {getattr(self, name)}; use a finite number, 0 or more")
        if not 0 < self.init_logit_scale < math.inf:
            raise ValueError(f"settings.init_logit_scale is {self.init_logit_scale}; use a positive number")
        if not math.isfinite(self.init_logit_bias):
            raise ValueError(f"settings.init_logit_bias is {self.init_logit_bias}; use a finite number")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"settings.condition_dropout is {self.condition_dropout}; use a value in [0, 1)")

    @classmethod
    def preset(cls, name: Literal["paper", "recommended"]) -> BridgeSettings:
        """``paper``: what arXiv 2503.12131 is known to do (epsilon, alternating directions, random heads), its
        silences filled by DDPM's own choices. ``recommended``: the defaults."""
        presets = {
            "paper": cls(
                head_init="random",
                embeddings_per_input=0.0,
                heads_first=0.0,
                schedule="linear",
                prediction="epsilon",
                split="alternate",
                solver="ddim",
                sampling_steps=50,
                translate_steps=8,
                num_samples=16,
            ),
            "recommended": cls(),
        }
        if name not in presets:
            raise ValueError(f"preset {name!r} does not exist; use one of {', '.join(presets)}")
        return presets[name]

    def _directions(self) -> list[tuple[str, ...]]:
        return [tuple(name.strip() for name in pair.split("->")) for pair in self.directions.split(",")]

    def trains(self, source: str, target: str) -> bool:
        """Whether the diffusion learns to give ``target`` from ``source`` (see ``directions``)."""
        allowed = any(s in ("*", source) and t in ("*", target) for s, t in self._directions())
        return bool(self.diffusion_weight) and source != target and allowed

    def head_steps(self, steps: int) -> int:
        """Of ``steps`` training steps, the first ones that train the heads alone (see ``heads_first``)."""
        apart = self.contrastive != "none" and self.head != "identity" and self.diffusion_weight
        return round(self.heads_first * steps) if apart and not self.diffusion_trains_heads else 0

    def noise_schedule(self) -> NoiseSchedule:
        """The noise schedule these settings describe."""
        return NoiseSchedule(
            kind=self.schedule,
            num_train_timesteps=self.num_train_timesteps,
            prediction_type=self.prediction,
            zero_terminal_snr=self.zero_terminal_snr,
            embedding_scaling=self.scaling,
        )
