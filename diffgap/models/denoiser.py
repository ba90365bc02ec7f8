"""One denoising network for every direction between modalities.

The embedding being denoised and its conditions are turned into tokens. Target tokens attend to one another
and to the condition tokens, and are modulated (adaLN-Zero) by the time and the direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffgap.diffusion.schedule import NoiseSchedule
from diffgap.models.blocks import ROWS_PER_BLOCK, DiTBlock, Residual, TimestepEmbedding
from diffgap.models.condition import Condition, ConditionEncoder, EncodedCondition
from diffgap.models.layers import Linear
from diffgap.models.linear_gaussian import posterior_coefficients
from diffgap.models.tokens import DenoiserConfig, Kind, TokenHead, Tokenizer, modality_index

__all__ = ["Condition", "Denoiser", "DenoiserConfig", "EncodedCondition", "StepRows"]


class Modulation(NamedTuple):
    """How a denoiser works at given times and in given directions.

    Attributes:
        rows: (G, R, width), what modulates the blocks and the final norm, for G groups of consecutive samples.
        terms: (G, 3), the factors of the noisy embedding, of its expected value and of the network's output in the
            prediction; ``None`` for a network that predicts alone.
    """

    rows: Tensor
    terms: Tensor | None


class StepRows(NamedTuple):
    """The modulation of all sampling steps, made beforehand.

    Attributes:
        rows: (S, P, R, width), for P distinct directions.
        terms: (S, P, 3), or ``None``.
        direction: (B,) int64, the direction of each sample; ``None`` if they are P equal groups, in order.
    """

    rows: Tensor
    terms: Tensor | None
    direction: Tensor | None

    def at(self, step: int) -> Modulation:
        """The modulation of one step, for B samples or P groups of them."""
        rows, terms = self.rows[step], None if self.terms is None else self.terms[step]
        if self.direction is None:
            return Modulation(rows, terms)
        own = None if terms is None else terms.index_select(0, self.direction)
        return Modulation(rows.index_select(0, self.direction), own)


class Denoiser(nn.Module):
    """What the schedule asks for (noise, x0, v), from a noisy embedding and embeddings of other modalities.

    :meth:`forward` encodes the condition, makes the modulation and denoises; a sampler calls
    :meth:`encode_condition` and :meth:`precompute` once, and :meth:`denoise` at every step. The network's output is
    zero at initialisation.

    Args:
        config: Shape.
        schedule: Noise levels and prediction type; the network then corrects the best linear denoiser
            (:mod:`~diffgap.models.linear_gaussian`). Without, it predicts alone.
    """

    levels: Tensor

    def __init__(self, config: DenoiserConfig, schedule: NoiseSchedule | None = None) -> None:
        super().__init__()
        self.config, self.prediction = config, None if schedule is None else schedule.prediction_type
        if schedule is not None:
            levels = torch.stack((schedule.times, schedule.alphas, schedule.sigmas))
            self.register_buffer("levels", levels.float(), persistent=False)
        self.tokens = Tokenizer(config)
        self.condition = ConditionEncoder(config, linear=schedule is not None)
        self.time = TimestepEmbedding(config.width)
        self.target = nn.Embedding(len(config.kinds), config.width)
        self.source = nn.Embedding(len(config.kinds), config.width)
        self.rows = Linear(config.width, (ROWS_PER_BLOCK * config.depth + 2) * config.width)
        self.blocks = nn.ModuleList(DiTBlock(config, config.condition_depth + number) for number in range(config.depth))
        self.head = TokenHead(config)
        self._initialise()

    def _initialise(self) -> None:
        """DiT's initialisation: Xavier for products, 0.02 for embeddings, zero for modulation and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for parameter in (self.rows.weight, *self.head.parameters()):
            nn.init.zeros_(parameter)

    def forward(
        self,
        noisy: Tensor,
        t: Tensor,
        target: int | Tensor,
        conditions: Sequence[Condition] = (),
        *,
        mask: Tensor | None = None,
        drop: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """The prediction for noisy embeddings.

        Args:
            noisy: (B, D), or (B, T, D) for a sequence modality.
            t: (B,) timesteps on the scale of 0 to 1000, integer or not.
            target: index of the modality being denoised, an int or int64 (B,).
            conditions: none (unconditional), or several, seen together.
            mask: (B, T) bool for sequences, True where there is a frame; the prediction is zero elsewhere.
            drop: (B,) bool, True hides all conditions of the sample (classifier-free guidance).
            seeds: (B,) int64, decide each sample's dropout in training; drawn if not given.

        Returns:
            The shape of ``noisy``.

        Raises:
            ValueError: an embedding, mask, ``t`` or ``drop`` of the wrong shape, or an unknown modality.
        """
        self._check("noisy", noisy, target, mask, len(noisy))
        encoded = self.encode_condition(conditions, len(noisy), drop=drop, seeds=seeds)
        modulation = self.modulation(t, target, encoded.sources)
        return self.denoise(noisy, target, modulation, encoded, mask=mask, seeds=seeds)

    def encode_condition(
        self,
        conditions: Sequence[Condition],
        batch_size: int,
        *,
        drop: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> EncodedCondition:
        """What :meth:`denoise` needs of the conditions, at any timestep; arguments as in :meth:`forward`.

        A sample with nothing present, or dropped, has one learned null token instead.
        """
        for i, (embedding, source, present) in enumerate(conditions):
            self._check(f"conditions[{i}]", embedding, source, present, batch_size)
        if drop is not None and (drop.shape != (batch_size,) or drop.dtype != torch.bool):
            raise ValueError(f"drop is {drop.dtype} {tuple(drop.shape)}; pass bool ({batch_size},), one a sample")
        encoded: EncodedCondition = self.condition(conditions, batch_size, drop, seeds)
        return encoded

    def modulation(self, t: Tensor, target: int | Tensor, sources: Tensor) -> Modulation:
        """Modulation of the B samples, with R = 6 * depth + 2 rows, from time and direction.

        Args:
            t: (B,) timesteps.
            target: index of the modality being denoised, an int or int64 (B,).
            sources: (B, modalities), see :class:`EncodedCondition`.
        """
        if t.shape != sources.shape[:1]:
            raise ValueError(f"t has shape {tuple(t.shape)}; pass ({len(sources)},), one timestep a sample")
        target = modality_index(target, len(sources), sources.device)
        drive = self.time(t) + self.target(target) + sources @ self.source.weight
        rows: Tensor = self.rows(F.silu(drive)).unflatten(
            -1, (ROWS_PER_BLOCK * self.config.depth + 2, self.config.width)
        )
        return Modulation(rows, self._terms(t, target, sources))

    def _terms(self, t: Tensor, target: Tensor, sources: Tensor) -> Tensor | None:
        """(B, 3), see :class:`Modulation`; between the schedule's times its levels are interpolated."""
        linear = self.condition.linear_gaussian
        if self.prediction is None or linear is None:
            return None
        times, alpha, sigma = self.levels
        upper = torch.searchsorted(times, t.to(times).contiguous()).clamp(1, len(times) - 1)
        share = ((t.to(times) - times[upper - 1]) / (times[upper] - times[upper - 1])).clamp(0, 1)
        alpha, sigma = (torch.lerp(level[upper - 1], level[upper], share) for level in (alpha, sigma))
        variance = linear.variance[target, sources.any(1).long()]
        return torch.stack(posterior_coefficients(alpha, sigma, variance, self.prediction), 1)

    def precompute(self, timesteps: Tensor, target: int | Tensor, sources: Tensor) -> StepRows:
        """:meth:`modulation` at each of ``timesteps`` (S,), computed once for each distinct direction."""
        target = modality_index(target, len(sources), sources.device)
        # A direction as one integer: a bit for each source, the target above them.
        bits = torch.arange(sources.shape[1], device=sources.device)
        codes = (target << len(bits)) + (sources.long() << bits).sum(1)
        directions, inverse = codes.unique(return_inverse=True)
        steps, count = len(timesteps), len(directions)
        every = directions.repeat(steps)
        given = (every.unsqueeze(1) >> bits & 1).to(sources.dtype)
        made = self.modulation(timesteps.repeat_interleave(count), every >> len(bits), given)
        rows, terms = (None if x is None else x.unflatten(0, (steps, count)) for x in made)
        assert rows is not None
        if len(inverse) and len(inverse) % count == 0:
            groups = inverse.view(count, -1)
            if bool((groups == groups[:, :1]).all()):
                first = groups[:, 0]
                return StepRows(rows[:, first], None if terms is None else terms[:, first], None)
        return StepRows(rows, terms, inverse)

    def denoise(
        self,
        noisy: Tensor,
        target: int | Tensor,
        modulation: Modulation,
        encoded: EncodedCondition,
        *,
        mask: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """The prediction from a modulation and an ``encoded`` condition; else as :meth:`forward`.

        The modulation is that of each sample, or of groups of equally many consecutive samples.
        """
        rows, terms = modulation
        self._check("noisy", noisy, target, mask, len(encoded.sources))
        if len(noisy) % max(len(rows), 1):
            raise ValueError(f"rows has {len(rows)} groups; pass a number that divides the {len(noisy)} samples")
        tokens = self.tokens(noisy, target, mask)
        stream = Residual(tokens)
        *block_rows, final = rows.split(ROWS_PER_BLOCK, 1)
        key_mask = _joint_mask(tokens, mask, encoded)
        for block, own_rows, context in zip(self.blocks, block_rows, encoded.contexts, strict=True):
            stream = block(stream, own_rows, context=context, key_mask=key_mask, seeds=seeds)
        _, h = stream.normed(*final.unbind(1))
        output: Tensor = self.head(h, pooled=noisy.ndim == 2)
        if terms is not None and encoded.means is not None:
            output = _corrected(output, noisy, encoded.means, target, terms)
        return output if mask is None else output.masked_fill(~mask.unsqueeze(-1), 0.0)

    def _check(
        self, name: str, embedding: Tensor, modality: int | Tensor, mask: Tensor | None, batch_size: int
    ) -> None:
        """Raise one clear error for an embedding the network cannot take."""
        kinds, width = self.config.kinds, self.config.embedding_dim
        shape = tuple(embedding.shape)
        if embedding.ndim not in (2, 3) or shape[-1] != width:
            raise ValueError(f"{name} has shape {shape}; pass (batch, {width}) or (batch, frames, {width})")
        if shape[0] != batch_size:
            raise ValueError(f"{name} has {shape[0]} samples, expected {batch_size}; make them equal")
        if isinstance(modality, int) and not 0 <= modality < len(kinds):
            raise ValueError(f"{name} has modality {modality}; use 0 to {len(kinds) - 1}")
        kind: Kind = "vector" if embedding.ndim == 2 else "sequence"
        if kind not in ((kinds[modality],) if isinstance(modality, int) else kinds):
            raise ValueError(f"{name} has shape {shape}, a {kind}; modality {modality} of {kinds} is not one")
        if mask is not None and (mask.shape != shape[:-1] or mask.dtype != torch.bool):
            raise ValueError(f"the mask of {name} is {mask.dtype} {tuple(mask.shape)}; pass bool {shape[:-1]}")


def _corrected(output: Tensor, noisy: Tensor, means: Tensor, target: int | Tensor, terms: Tensor) -> Tensor:
    """``a noisy + b mean + g output``, with (a, b, g) of groups of consecutive samples."""
    if isinstance(target, int):
        mean = means[:, target]
    else:
        mean = means.gather(1, target.view(-1, 1, 1).expand(-1, 1, means.shape[2])).squeeze(1)
    mean = mean if noisy.ndim == 2 else mean.unsqueeze(1)
    own = terms.repeat_interleave(len(noisy) // max(len(terms), 1), 0)
    a, b, g = own.view(-1, 3, *(1,) * (noisy.ndim - 1)).unbind(1)
    return (a * noisy + b * mean + g * output).to(output.dtype)


def _joint_mask(tokens: Tensor, mask: Tensor | None, encoded: EncodedCondition) -> Tensor | None:
    """The key mask over [target tokens | condition tokens], or ``None`` where nothing is hidden."""
    if mask is None and encoded.mask is None:
        return None
    context = encoded.contexts[0]
    own = tokens.new_ones(1, 1, dtype=torch.bool) if mask is None else mask
    own = own if own.ndim == 2 else own.unsqueeze(1)
    length = context.keys_values.shape[1] - context.room
    other = tokens.new_ones(len(tokens), length, dtype=torch.bool) if encoded.mask is None else encoded.mask
    return torch.cat([own.expand(tokens.shape[:2]), other], 1)
