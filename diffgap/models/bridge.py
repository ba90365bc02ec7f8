"""DiffGAP: a contrastive space for several modalities and one small diffusion model that crosses its gaps.

arXiv 2503.12131. With z_m the projected unit embedding of modality m, and s the scaling of the schedule:

    L_contrastive  = mean over pairs {m, n} of clip_loss(z_m, z_n)                (or the sigmoid loss)
    L_diff[m | n]  = E_{t, eps} || target - f(alpha_t s(z_m) + sigma_t eps, t, m, z_n) ||^2
    L              = L_contrastive + lambda * mean over directions of L_diff[m | n]

"Bidirectional split training" decides which directions a step trains (:data:`diffgap.models.settings.SplitMode`).
"""

import contextlib
import inspect
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any, TypeAlias, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from diffgap._files import atomic_folder
from diffgap.diffusion.sampler import Callback
from diffgap.losses import gather_rows
from diffgap.models.contrastive_diffusion import ContrastiveDiffusion
from diffgap.models.heads import IdentityHead, ProjectionHead, shared_space
from diffgap.models.objective import frames_present
from diffgap.models.scoring import Encoded, Scoring, score_features
from diffgap.models.settings import BridgeSettings
from diffgap.ops import clip_loss, sample_seeds, siglip_loss

Head: TypeAlias = ProjectionHead | IdentityHead

# Annotations here are real types, not strings: the hub mixin rebuilds `settings` from config.json by its annotation.


class DiffGAP(nn.Module, PyTorchModelHubMixin, library_name="diffgap", license="apache-2.0"):
    """Bridges between modalities: projects, samples, translates and scores.

    Args:
        modalities: Width of each modality's embedding, e.g. ``{"audio": 512, "text": 512, "video": 512}``.
        settings: Everything else; :meth:`BridgeSettings.preset` has the paper's and the recommended ones.
        sequences: Modalities whose embeddings are sequences (B, T, D) rather than vectors (B, D).

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
        self._dims = dict(modalities)
        _check_modalities(modalities, settings, self.sequences)
        hidden = 2 * settings.width if settings.head == "mlp" else 0
        self.heads = nn.ModuleDict(
            {
                name: IdentityHead()
                if settings.head == "identity"
                else ProjectionHead(dim, settings.width, hidden=hidden, dropout=settings.head_dropout)
                for name, dim in modalities.items()
            }
        )
        self.logit_scale = nn.Parameter(torch.tensor(float(settings.init_logit_scale)).log())
        self.logit_bias = nn.Parameter(torch.tensor(float(settings.init_logit_bias)))
        self.logit_bias.requires_grad_(settings.contrastive == "siglip")
        self.diffusion = ContrastiveDiffusion(self.modalities, self.sequences, settings)

    def _head(self, modality: str) -> Head:
        return cast(Head, self.heads[modality])

    @torch.no_grad()
    def fit(self, embeddings: Mapping[str, Tensor]) -> None:
        """Take statistics, and the heads' start under ``head_init="cca"``, from training data.

        Args:
            embeddings: Every modality, (N, D) or (N, T, D); row i of all belongs together.

        Raises:
            ValueError: A modality is missing, of another width, or of another number of rows; or there are no rows.
        """
        rows = {len(x) for x in embeddings.values()}
        if set(embeddings) != set(self.modalities) or len(rows) != 1 or 0 in rows:
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in embeddings.items())
            raise ValueError(f"fit needs paired rows of {', '.join(self.modalities)}; got {shapes or 'nothing'}")
        flat = {}
        for name in self.modalities:
            self._check(name, embeddings[name])
            flat[name] = embeddings[name].flatten(0, -2)
            self._head(name).fit(flat[name])
        if self.settings.head == "linear" and self.settings.head_init == "cca" and not self.sequences:
            heads = [cast(ProjectionHead, self.heads[name]) for name in self.modalities]
            views = [head.standardise(flat[name]) for head, name in zip(heads, self.modalities, strict=True)]
            for head, weight in zip(heads, shared_space(views, self.settings.width), strict=True):
                head.start_from(weight)
        for name, x in flat.items():
            self.diffusion.scaler(name).fit(self._head(name)(x, corrupt=False))

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
        self._check(modality, x)
        projected: Tensor = self._head(modality)(x)
        return projected

    def forward(
        self,
        embeddings: Mapping[str, Tensor],
        *,
        ids: Tensor | None = None,
        present: Mapping[str, Tensor] | None = None,
        lengths: Mapping[str, Tensor] | None = None,
        step: int = 0,
    ) -> dict[str, Tensor]:
        """The losses of a batch of rows that belong together.

        Args:
            embeddings: By modality, (B, D) or (B, T, D).
            ids: (B,) int64; rows of equal id are mutual positives. All different by default.
            present: By modality, (B,) bool; all present by default.
            lengths: By sequence modality, (B,) int64 frames; all T by default.
            step: Training step; picks the direction of ``split="alternate"``.

        Returns:
            0-d tensors: "loss", what to minimise; "contrastive" and "diffusion", its parts (absent if not trained).
        """
        masks = {name: self._mask(name, x, present, lengths) for name, x in embeddings.items()}
        z = {name: self.project(name, x) for name, x in embeddings.items()}
        losses: dict[str, Tensor] = {}
        total = self.logit_scale.new_zeros(())
        if self.settings.contrastive != "none":
            losses["contrastive"] = self._contrastive(z, masks, ids)
            total = total + self.settings.contrastive_weight * losses["contrastive"]
        if self.settings.diffusion_weight:
            conditions, targets = self._diffusion_sides(z, embeddings)
            losses["diffusion"] = self.diffusion(targets, conditions, masks, step)
            total = total + self.settings.diffusion_weight * losses["diffusion"]
        return {"loss": total, **losses}

    def _contrastive(self, z: Mapping[str, Tensor], masks: Mapping[str, Tensor], ids: Tensor | None) -> Tensor:
        """Mean contrastive loss over the pairs of modalities, each over the rows of all processes that have both."""
        pooled = {name: gather_rows(_pool(x, masks[name])) for name, x in z.items()}
        present = {name: gather_rows(frames_present(mask)) for name, mask in masks.items()}
        ids = None if ids is None else gather_rows(ids)
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()  # CLIP's own limit
        losses = []
        for first, second in combinations(z, 2):
            rows = present[first] & present[second]
            a, b = pooled[first][rows], pooled[second][rows]
            pair_ids = None if ids is None else ids[rows]
            if self.settings.contrastive == "clip":
                losses.append(clip_loss(a, b, scale, ids_a=pair_ids, ids_b=pair_ids))
            else:
                losses.append(siglip_loss(a, b, scale, self.logit_bias, ids_a=pair_ids, ids_b=pair_ids))
        return torch.stack(losses).mean()

    def _diffusion_sides(
        self, z: Mapping[str, Tensor], embeddings: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Conditions and targets of the diffusion.

        Dropout in the heads corrupts conditions, which keeps the bridge from learning pairs by heart; targets are what
        the heads give in use.
        """
        targets = z
        if self.training and self.settings.head_dropout:
            targets = {name: self._head(name)(x, corrupt=False) for name, x in embeddings.items()}
        if self.settings.diffusion_trains_heads:
            return z, targets
        return {name: x.detach() for name, x in z.items()}, {name: x.detach() for name, x in targets.items()}

    @torch.no_grad()
    def sample(
        self,
        target: str,
        *,
        num_samples: int = 1,
        seed: int = 0,
        frames: int | None = None,
        lengths: Tensor | None = None,
        steps: int | None = None,
        solver: str | None = None,
        guidance_scale: float | None = None,
        callback: Callback | None = None,
        batch_size: int = 4096,
        cuda_graph: bool = False,
        **sources: Tensor,
    ) -> Tensor:
        """Samples of ``target`` embeddings given those of another modality: ``bridge.sample("audio", text=x)``.

        A sample depends on its embedding, ``seed`` and its number only, not on the batch.

        Args:
            target: Modality to sample.
            num_samples: K samples for each embedding.
            seed: Seed of the noise.
            steps, solver, guidance_scale: The settings' own if not given.
            frames: Frames to sample of a sequence modality; the source's number by default.
            lengths: (B,) frames of a source sequence; all by default.
            callback: See :func:`diffgap.diffusion.sample`; called for every batch.
            batch_size: Samples drawn at a time.
            cuda_graph: On a GPU, record the loop as a CUDA graph for the first of several batches, and replay it for
                the others; not with a callback.
            sources: One modality and its embeddings (B, D) or (B, T, D), as its encoder gives them.

        Returns:
            (B, K, width), or (B, K, frames, width): unit vectors of the contrastive space.

        Raises:
            ValueError: An unknown modality, not exactly one source, or an option out of range.
        """
        source, x = self._only(target, sources)
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; use 1 or more")
        shape: tuple[int, ...] = (self.settings.width,)
        if target in self.sequences:
            frames = frames or (x.shape[1] if x.dim() == 3 else 0)
            if frames < 1:
                raise ValueError(f"frames is not given; {target!r} is a sequence and {source!r} has no frames to copy")
            shape = (frames, self.settings.width)
        generator = torch.Generator().manual_seed(seed)
        seeds = sample_seeds(len(x) * num_samples, generator).view(len(x), num_samples).to(x.device)
        with _evaluating(self):
            z = self.project(source, x)
            mask = _frame_mask(z, lengths) if z.dim() == 3 else None
            return self.diffusion.sample(
                source, z, mask, target, shape, seeds,
                solver=solver, steps=steps, guidance_scale=guidance_scale,
                callback=callback, batch_size=batch_size, cuda_graph=cuda_graph,
            )  # fmt: skip

    def translate(self, target: str, *, num_samples: int | None = None, **options: Any) -> Tensor:
        """Mean direction of ``num_samples`` samples, (B, width) or (B, frames, width); options as in :meth:`sample`.

        A sample is one plausible embedding; their mean has the highest expected cosine with the true one.
        """
        samples = self.sample(target, num_samples=num_samples or self.settings.num_samples, **options)
        return F.normalize(samples.mean(1), dim=-1)

    @torch.no_grad()
    def encode(self, modality: str, x: Tensor, to: str, **options: Any) -> Encoded:
        """What scoring needs of embeddings of one modality: themselves, and bridged ``to`` another.

        Sequences are pooled over their frames. Options as in :meth:`translate`.
        """
        with _evaluating(self):
            own = self.project(modality, x)
        lengths = options.get("lengths")
        own = _pool(own, _frame_mask(own, lengths)) if own.dim() == 3 else own
        options[modality] = x
        bridged = self.translate(to, **options)
        return Encoded(own, F.normalize(bridged.mean(1), dim=-1) if bridged.dim() == 3 else bridged)

    def score(self, *, scoring: Scoring = "fusion", alpha: float = 1.0, **pair: Tensor) -> Tensor:
        """Scores (N, M) of N queries against M gallery items: ``bridge.score(text=queries, audio=gallery)``.

        See :func:`score_features` for the formula; it also gives the features of a streaming search.
        """
        if len(pair) != 2:
            raise ValueError(f"score takes two modalities, the queries' first; got {', '.join(pair) or 'none'}")
        (source, query), (target, gallery) = pair.items()
        q, g = score_features(self.encode(source, query, target), self.encode(target, gallery, source), scoring, alpha)
        return q @ g.T

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> str | None:
        """Write weights (safetensors) and configuration (JSON) to a folder, whole or not at all."""
        with atomic_folder(save_directory, overwrite=True) as folder:
            result: str | None = super().save_pretrained(folder, **options)
        return result

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path: str | os.PathLike[str], **options: Any
    ) -> Self:
        """Load what :meth:`save_pretrained` wrote, from a folder or by hub name.

        Raises:
            ValueError: The weights or the configuration are damaged, missing, or do not belong together.
        """
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the hub prints where it loads from
                model: Self = super().from_pretrained(str(path), **options)
        except (SafetensorError, RuntimeError, TypeError, json.JSONDecodeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{path} does not hold a whole DiffGAP model ({reason}); save or fetch it again"
            ) from error
        return model.eval()

    def _only(self, target: str, sources: Mapping[str, Tensor]) -> tuple[str, Tensor]:
        self._known(target)
        example = next(name for name in self.modalities if name != target)
        if len(sources) != 1:
            raise ValueError(
                f"give exactly one source modality beside target {target!r}, e.g. {example}=...; "
                f"got {', '.join(sources) or 'none'}"
            )
        ((source, x),) = sources.items()
        self._check(source, x)
        if source == target:
            raise ValueError(f"source and target are both {target!r}; use another source, e.g. {example}")
        return source, x

    def _known(self, modality: str) -> None:
        if modality not in self.modalities:
            raise ValueError(f"modality {modality!r} is unknown to this bridge; it has {', '.join(self.modalities)}")

    def _check(self, modality: str, x: Tensor) -> None:
        self._known(modality)
        dim = self._dims[modality]
        expected = "(B, T, D)" if modality in self.sequences else "(B, D)"
        if x.dim() != len(expected.split(",")) or x.shape[-1] != dim:
            raise ValueError(f"{modality} has shape {tuple(x.shape)}; this bridge takes {expected} with D = {dim}")

    def _mask(
        self,
        name: str,
        x: Tensor,
        present: Mapping[str, Tensor] | None,
        lengths: Mapping[str, Tensor] | None,
    ) -> Tensor:
        """(B,) or (B, T) bool: the vectors or frames that are there."""
        here = (present or {}).get(name)
        here = torch.ones(len(x), dtype=torch.bool, device=x.device) if here is None else here
        if name not in self.sequences:
            return here
        return _frame_mask(x, (lengths or {}).get(name)) & here[:, None]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


#: Modalities are passed to these methods by name, beside their options.
_RESERVED = {*inspect.signature(DiffGAP.sample).parameters, *inspect.signature(DiffGAP.score).parameters} - {"sources"}


def _check_modalities(modalities: Mapping[str, int], settings: BridgeSettings, sequences: Sequence[str]) -> None:
    if len(modalities) < 2:
        raise ValueError(f"modalities has {len(modalities)} entries; a bridge needs two or more, e.g. audio and text")
    for name, dim in modalities.items():
        if not name.isidentifier() or name in _RESERVED:
            raise ValueError(
                f"modality name {name!r} is no identifier or an option of sample(); use letters and digits"
            )
        if dim < 1:
            raise ValueError(f"modality {name!r} has width {dim}; use 1 or more")
        if settings.head == "identity" and dim != settings.width:
            raise ValueError(
                f"head 'identity' needs width {settings.width} of every modality, but {name!r} has {dim}; "
                "use head='linear' or change settings.width"
            )
    for name in sequences:
        if name not in modalities:
            raise ValueError(f"sequences names {name!r}, which is not among the modalities {', '.join(modalities)}")


def _frame_mask(x: Tensor, lengths: Tensor | None) -> Tensor:
    frames = torch.arange(x.shape[1], device=x.device)
    return (frames < lengths.to(x.device)[:, None]) if lengths is not None else frames.expand(len(x), -1) >= 0


def _pool(z: Tensor, mask: Tensor) -> Tensor:
    """Unit mean over the frames that are there; a vector as it is."""
    return z if z.dim() == 2 else F.normalize((z * mask[..., None]).sum(1), dim=-1)
