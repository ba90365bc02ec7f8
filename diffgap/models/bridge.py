"""DiffGAP: a contrastive space for several modalities and one small diffusion model that crosses its gaps.

arXiv 2503.12131. With z_m the projected unit embedding of modality m, and s the scaling of the schedule:

    L_contrastive  = mean over pairs {m, n} of clip_loss(z_m, z_n)                (or the sigmoid loss)
    L_diff[m | n]  = E_{t, eps} || target - f(alpha_t s(z_m) + sigma_t eps, t, m, z_n) ||^2
    L              = L_contrastive + lambda * mean over directions of L_diff[m | n]

"Bidirectional split training" decides which directions a step trains (:data:`diffgap.models.settings.SplitMode`).
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffgap.diffusion.sampler import Callback
from diffgap.losses import mean_over_ranks
from diffgap.models.contrastive import contrastive_loss
from diffgap.models.contrastive_diffusion import ContrastiveDiffusion
from diffgap.models.heads import IdentityHead, ProjectionHead, shared_space
from diffgap.models.inputs import Inputs, everything, hidden, integers, pool
from diffgap.models.likelihood import information
from diffgap.models.objective import frames_present
from diffgap.models.randomness import draw_seeds
from diffgap.models.saving import SavedModel
from diffgap.models.scoring import (
    CANDIDATES,
    Encoded,
    Scoring,
    dense_scores,
    find_candidates,
    rerank,
    score_features,
)
from diffgap.models.settings import BridgeSettings
from diffgap.ops import sample_seeds
from diffgap.ops.random import check_seed

Head: TypeAlias = ProjectionHead | IdentityHead
Stage: TypeAlias = Literal["joint", "heads", "diffusion"]

# Annotations here are real types, not strings: the hub mixin rebuilds `settings` from config.json by its annotation.


class DiffGAP(nn.Module, SavedModel, library_name="diffgap", license="apache-2.0"):
    """Bridges between modalities: projects, samples, translates and scores.

    Args:
        modalities: Width of each modality's embedding, e.g. ``{"audio": 512, "text": 512, "video": 512}``.
        settings: Everything else; :meth:`BridgeSettings.preset` has the paper's and the recommended ones.
        sequences: Modalities whose embeddings are sequences (B, T, D) rather than vectors (B, D).

    ``stage`` says which losses :meth:`forward` makes: those of the heads, of the diffusion, or both (see
    ``BridgeSettings.heads_first``).

    Embeddings are passed by modality name. A row that lacks a modality is marked in ``present`` and its values are
    ignored; frames beyond ``lengths`` likewise.

    Raises:
        ValueError: Fewer than two modalities, an identity head of another width, or an unknown sequence modality.
    """

    def __init__(
        self,
        modalities: dict[str, int],
        settings: BridgeSettings | None = None,
        sequences: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.settings = settings = settings or BridgeSettings()
        self.modalities = tuple(sorted(modalities))  # the order of the denoiser's indices, whatever that of the dict
        self.sequences = tuple(sequences)
        self.inputs = Inputs(dict(modalities), self.sequences)
        self.inputs.check_names(_RESERVED, settings.width if settings.head == "identity" else None)
        inner = 2 * settings.width if settings.head == "mlp" else 0
        self.heads = nn.ModuleDict(
            {
                name: IdentityHead()
                if settings.head == "identity"
                else ProjectionHead(
                    dim,
                    settings.width,
                    hidden=inner,
                    dropout=settings.head_dropout,
                    embeddings_per_input=settings.embeddings_per_input,
                    number=self.modalities.index(name),
                )
                for name, dim in modalities.items()
            }
        )
        # Vectors of one element: FSDP shards no scalars.
        self.logit_scale = nn.Parameter(torch.tensor([float(settings.init_logit_scale)]).log())
        self.logit_bias = nn.Parameter(torch.tensor([float(settings.init_logit_bias)]))
        self.logit_bias.requires_grad_(settings.contrastive == "siglip")
        self.diffusion = ContrastiveDiffusion(self.modalities, self.sequences, settings)
        self.stage: Stage = "joint"

    @property
    def _dtype(self) -> torch.dtype:
        return self.logit_scale.dtype

    def _head(self, modality: str) -> Head:
        return cast(Head, self.heads[modality])

    @torch.no_grad()
    def fit(
        self,
        embeddings: Mapping[str, Tensor],
        *,
        present: Mapping[str, Tensor] | None = None,
        lengths: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take statistics, and the heads' start under ``head_init="cca"``, from training data.

        A modality's statistics are those of the rows, and frames, that it has. A sequence takes part in the CCA by the
        mean of its frames; a modality that a row lacks, by its mean (see :func:`shared_space`).

        Args:
            embeddings: Every modality, (N, D) or (N, T, D); row i of all belongs together.
            present: By modality, (N,) bool; all present by default.
            lengths: By sequence modality, (N,) int64 frames; all T by default.

        Raises:
            ValueError: A modality is missing, of another width, of another number of rows or in no row; or no row has
                two modalities.
        """
        if set(embeddings) != set(self.modalities):
            raise ValueError(f"fit needs {', '.join(self.modalities)}; got {', '.join(embeddings) or 'nothing'}")
        embeddings = self.inputs.checked(embeddings, self._dtype)
        masks = self._masks(embeddings, self.inputs.masks(embeddings, present, lengths))
        here = {name: frames_present(mask) for name, mask in masks.items()}
        for name, rows in here.items():
            if not rows.any():
                raise ValueError(f"fit needs rows of every modality; none has {name}")
        if torch.stack(list(here.values())).sum(0).max() < 2:
            raise ValueError("fit needs rows that have two modalities; none has")
        flat = {name: embeddings[name][masks[name]] for name in self.modalities}
        for name, x in flat.items():
            self._head(name).fit(x)
        if self.settings.head == "linear" and self.settings.head_init == "cca":
            heads = [cast(ProjectionHead, self.heads[name]) for name in self.modalities]
            views = []
            for head, name in zip(heads, self.modalities, strict=True):
                view = hidden(head.standardise(embeddings[name]), masks[name])
                if name in self.sequences:
                    view = view.sum(1) / masks[name].sum(1, keepdim=True).clamp_min(1)
                views.append(hidden(view - view[here[name]].mean(0), here[name]))
            starts = shared_space(views, self.settings.width, [head.ridge for head in heads])
            for head, weight in zip(heads, starts, strict=True):
                head.start_from(weight)
        self._fit_diffusion(embeddings, masks)

    @torch.no_grad()
    def fit_diffusion(
        self,
        embeddings: Mapping[str, Tensor],
        *,
        present: Mapping[str, Tensor] | None = None,
        lengths: Mapping[str, Tensor] | None = None,
    ) -> None:
        """What :meth:`fit` takes for the diffusion, anew: once the heads have been trained. Arguments as there."""
        embeddings = self.inputs.checked(embeddings, self._dtype)
        self._fit_diffusion(embeddings, self._masks(embeddings, self.inputs.masks(embeddings, present, lengths)))

    def _fit_diffusion(self, embeddings: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        z = {name: self._head(name)(hidden(x, masks[name]), corrupt=False) for name, x in embeddings.items()}
        self.diffusion.fit(z, masks)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameters for an optimizer: matrices with ``weight_decay``, vectors and scalars without.

        "lr_scale" of a group is the factor its learning rate takes: ``head_learning_rate`` for the heads.
        """
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                scale = self.settings.head_learning_rate if name.startswith("heads.") else 1.0
                key = (scale, weight_decay if parameter.ndim >= 2 else 0.0)
                groups.setdefault(key, []).append(parameter)
        return [
            {"params": parameters, "weight_decay": decay, "lr_scale": scale}
            for (scale, decay), parameters in groups.items()
        ]

    def project(self, modality: str, x: Tensor) -> Tensor:
        """(B, D) or (B, T, D) embeddings of a modality as unit vectors (B, width) or (B, T, width)."""
        projected: Tensor = self._head(modality)(self.inputs.checked({modality: x}, self._dtype)[modality])
        return projected

    def forward(
        self,
        embeddings: Mapping[str, Tensor],
        *,
        ids: Tensor | Sequence[int] | None = None,
        present: Mapping[str, Tensor] | None = None,
        lengths: Mapping[str, Tensor] | None = None,
        step: int = 0,
        seeds: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a batch of rows that belong together.

        In training mode, where torch.distributed is initialised, over the rows of all processes, however many each has:
        a process gets its share, and the mean of the shares (of their gradients, in ``DistributedDataParallel``) is the
        loss of one process that holds all rows. All processes call it, with the same modalities. In evaluation mode the
        losses are of this process's own rows.

        Args:
            embeddings: By modality, two or more, (B, D) or (B, T, D) floating point.
            ids: (B,) integers; rows of equal id are mutual positives. All different by default.
            present: By modality, (B,) bool; all present by default.
            lengths: By sequence modality, (B,) int64 frames; all T by default.
            step: Training step; picks the direction of ``split="alternate"``.
            seeds: (B,) int64, one a row. All that is random for a row follows from its seed alone. Drawn from torch's
                generator by default.

        Returns:
            0-d tensors: "loss", what to minimise; "contrastive" and "diffusion", its parts (absent if not trained).

        Raises:
            ValueError: Fewer than two modalities, or an argument of another shape than above.
            TypeError: An argument is no tensor or of another dtype.
        """
        embeddings = self.inputs.checked(embeddings, self._dtype)
        some = next(iter(embeddings.values()))
        if len(embeddings) < 2:
            raise ValueError(f"the losses need two modalities or more; got {', '.join(embeddings)} alone")
        ids = None if ids is None else integers("ids", ids, some)
        if seeds is None:
            seeds = draw_seeds(len(some), some.device)
        check_seed(seeds, len(some), some.device)
        known = self.inputs.masks(embeddings, present, lengths)
        embeddings = {name: hidden(x, known.get(name)) for name, x in embeddings.items()}
        masks = self._masks(embeddings, known)
        losses: dict[str, Tensor] = {}
        total = self.logit_scale.new_zeros(())
        if self.settings.contrastive != "none" and self.stage != "diffusion":
            z = {name: self._head(name)(x, seeds=seeds) for name, x in embeddings.items()}
            scale = self.logit_scale.clamp(max=math.log(100.0)).exp()  # CLIP's own limit
            losses["contrastive"] = contrastive_loss(
                self.settings.contrastive, z, known, scale, self.logit_bias, ids, across_ranks=self.training
            )
            total = total + self.settings.contrastive_weight * losses["contrastive"]
        if self.settings.diffusion_weight and self.stage != "heads":
            # Without the dropout that the contrastive loss needs: the diffusion learns what the heads give in use.
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.settings.diffusion_trains_heads):
                z = {name: self._head(name)(x, corrupt=False) for name, x in embeddings.items()}
            complete = not known and len(z) == len(self.modalities)
            errors = self.diffusion(z, masks, seeds, step=step, complete=complete)
            losses["diffusion"] = mean_over_ranks(errors) if self.training else errors.sum() / max(len(errors), 1)
            total = total + self.settings.diffusion_weight * losses["diffusion"]
        return {"loss": total, **losses}

    @staticmethod
    def _masks(embeddings: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masks of all embeddings, of which ``known`` has those that are not all True."""
        return {name: known[name] if name in known else everything(x) for name, x in embeddings.items()}

    @torch.no_grad()
    def sample(
        self,
        target: str,
        *,
        num_samples: int = 1,
        seed: int = 0,
        frames: int | Tensor | None = None,
        lengths: Tensor | Mapping[str, Tensor] | None = None,
        present: Mapping[str, Tensor] | None = None,
        steps: int | None = None,
        solver: str | None = None,
        guidance_scale: float | None = None,
        callback: Callback | None = None,
        batch_size: int = 4096,
        cuda_graph: bool = False,
        **sources: Tensor,
    ) -> Tensor:
        """Samples of ``target`` embeddings given those of others: ``bridge.sample("audio", text=x, image=y)``.

        A sample depends on its row's embeddings, ``seed`` and its number only, not on the batch.

        Args:
            target: Modality to sample.
            num_samples: K samples for each embedding.
            seed: Seed of the noise.
            steps, solver, guidance_scale: The settings' own if not given.
            frames: Frames to sample of a sequence modality, one number or (B,) int64; those of the source by default.
            lengths: (B,) int64 frames of the source sequence, or of several by modality; all by default.
            present: By source modality, (B,) bool; all present by default. A row with none is sampled unconditionally.
            callback: See :func:`diffgap.diffusion.sample`; called for every batch.
            batch_size: Samples drawn at a time.
            cuda_graph: On a GPU, record the loop as a CUDA graph for the first of several batches, and replay it for
                the others; not with a callback.
            sources: Modalities and their embeddings (B, D) or (B, T, D), as their encoders give them. Several ask for
                ``settings.sources = "any"`` in training.

        Returns:
            (B, K, width), or (B, K, frames, width): unit vectors of the contrastive space; zeros beyond a row's frames.

        Raises:
            ValueError: An unknown modality, no source, an option out of range, or a bridge that is not float32.
            TypeError: A source is no floating-point tensor.
        """
        self.inputs.check_sources(target, sources)
        if self._dtype != torch.float32:
            raise ValueError(
                f"the bridge is {self._dtype}, and sampling computes in float32; call bridge.float(), "
                "and torch.autocast around sample() for lower precision"
            )
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; use 1 or more")
        some = next(iter(sources.values()))
        by_name = self.inputs.lengths_by_name(lengths, sources)
        masks = self.inputs.masks(sources, present, by_name)
        count, target_mask = self.inputs.target_frames(target, frames, sources, by_name)
        shape = (self.settings.width,) if count is None else (count, self.settings.width)
        generator = torch.Generator().manual_seed(seed)
        seeds = sample_seeds(len(some) * num_samples, generator).view(len(some), num_samples).to(some.device)
        with evaluating(self):
            z = {name: self.project(name, hidden(x, masks.get(name))) for name, x in sources.items()}
            return self.diffusion.sample(
                z, masks, target, shape, seeds,
                frames=target_mask, solver=solver, steps=steps, guidance_scale=guidance_scale,
                callback=callback, batch_size=batch_size, cuda_graph=cuda_graph,
            )  # fmt: skip

    def translate(
        self, target: str, *, num_samples: int | None = None, steps: int | None = None, **options: Any
    ) -> Tensor:
        """Mean direction of samples, (B, width) or (B, frames, width); options as in :meth:`sample`.

        A sample is one plausible embedding; their mean has the highest expected cosine with the true one. The
        settings' ``translate_steps`` and ``num_samples`` hold where none are given: one step of one sample under the
        recommended preset, whose denoiser predicts that mean outright from pure noise.
        """
        steps = steps or self.settings.translate_steps
        samples = self.sample(target, num_samples=num_samples or self.settings.num_samples, steps=steps, **options)
        return F.normalize(samples.mean(1), dim=-1)

    @torch.no_grad()
    def encode(self, modality: str, x: Tensor, to: str, **options: Any) -> Encoded:
        """What scoring needs of embeddings of one modality: themselves, and bridged ``to`` another.

        Sequences are pooled over their frames. Options as in :meth:`translate`.
        """
        with evaluating(self):
            z = self.project(modality, x)
        lengths = self.inputs.lengths_by_name(options.get("lengths"), {modality: x})
        mask = self.inputs.masks({modality: x}, None, lengths).get(modality)
        options[modality] = x
        bridged = self.translate(to, **options)
        bridged = F.normalize(bridged.mean(1), dim=-1) if bridged.dim() == 3 else bridged
        return Encoded(pool(z, mask), bridged, *((hidden(z, mask), mask) if z.dim() == 3 else ()))

    def score(
        self,
        *,
        scoring: Scoring = "fusion",
        alpha: float = 1.0,
        beta: float = 0.5,
        candidates: int = CANDIDATES,
        **pair: Tensor,
    ) -> Tensor:
        """Scores (N, M) of N queries against M gallery items: ``bridge.score(text=queries, audio=gallery)``.

        Args:
            scoring: See :func:`score_features` for the formulas; it also gives the features of a streaming search.
            alpha: Weight of the bridged cosines in "fusion" and "rerank".
            beta: Weight of :func:`information` in "rerank", which reorders the best ``candidates`` of every query.
            pair: The queries' modality first.
        """
        if len(pair) != 2:
            raise ValueError(f"score takes two modalities, the queries' first; got {', '.join(pair) or 'none'}")
        (source, query), (target, gallery) = pair.items()
        encoded = self.encode(source, query, target), self.encode(target, gallery, source)
        q, g = score_features(*encoded, scoring, alpha)
        if scoring != "rerank":
            return q @ g.T
        found = find_candidates(q, g, candidates)
        with evaluating(self):
            shared = information(self.diffusion, encoded[0].side(source), encoded[1].side(target), found.indices)
        return dense_scores(q, g, rerank(found, shared, beta))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


#: Modalities are passed to these methods by name, beside their options.
_RESERVED = {*inspect.signature(DiffGAP.sample).parameters, *inspect.signature(DiffGAP.score).parameters} - {"sources"}
