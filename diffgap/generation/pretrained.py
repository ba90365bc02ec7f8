"""AudioLDM, MusicLDM and AudioLDM2 of diffusers, driven by vectors of CLAP's space instead of by a text.

All three were trained on CLAP embeddings *of audio* (AudioLDM, MusicLDM: only of audio) and are prompted with those of
text: the gap that a bridge closes. Where the vector c, of norm 1, goes in:

    audioldm, musicldm    class_labels = c of the UNet
    audioldm2             the first of the two inputs of its projection model; the other is T5 of the caption, ""
                          where none is given. GPT-2 makes of both what the UNet attends to.

No condition is the vector of "", as their guidance has it.
"""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from diffgap.data.media import Source
from diffgap.data.media.text import TextReader
from diffgap.encoders import Encoder
from diffgap.encoders._packages import require
from diffgap.encoders._towers import TextTower
from diffgap.encoders._transformers import features
from diffgap.generation.mel import INSTALL
from diffgap.generation.space import AudioSpace
from diffgap.ops import normal, sample_seeds

__all__ = ["AudioLDM", "AudioLDM2", "ClapTower", "DiffusersGenerator", "MusicLDM", "load_pretrained"]

FloatArray = npt.NDArray[np.float32]

#: Sounds in one pass of the UNet, each twice for guidance.
BATCH = 8
_PROBES = ("a dog barks", "rain falls on a tin roof", "a violin and a piano play slowly", "an engine starts")
_PULSES = (1.0, 4.0, 16.0)
_AGREE = 0.999


class ClapTower(TextTower):
    """The text tower inside a pipeline, as an encoder: texts to unit vectors (n, D).

    Args:
        tower: ``ClapTextModelWithProjection`` or ``ClapModel``.
        tokenizer: Its tokenizer.
        device: Where the tower is.
    """

    def __init__(self, tower: Any, tokenizer: Any, device: str) -> None:
        self._tower, self._tokenizer = tower, tokenizer
        config = getattr(tower.config, "text_config", tower.config)
        self._limit = min(config.max_position_embeddings - config.pad_token_id - 1, tokenizer.model_max_length)
        super().__init__(
            modality="text",
            dim=tower.config.projection_dim,
            family="clap-generator",
            weights=_digest(tower),
            preparation=f"{self._limit} tokens",
            reader=TextReader(),
            device=device,
        )

    def _tokens(self, texts: list[str]) -> Sequence[Sequence[int]]:
        return self._tokenizer(texts, truncation=True, max_length=self._limit)["input_ids"]

    def _embed(self, rows: Sequence[Any]) -> Tensor:
        inputs = self._tokenizer.pad({"input_ids": list(rows)}, return_tensors="pt").to(self._device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if hasattr(self._tower, "get_text_features"):
            return features(self._tower.get_text_features(input_ids=ids, attention_mask=mask))
        return self._tower(ids, attention_mask=mask).text_embeds


class DiffusersGenerator(ABC):
    """What the three have in common; a :class:`~diffgap.generation.generator.Generator`.

    Args:
        pipeline: Of diffusers.
        device: Where it runs.
        scheduler: "ours" puts the class of the same name of :mod:`diffgap.integrations.diffusers` in, whose step is one
            fused kernel and gives the same numbers; "theirs" leaves the pipeline's own.
    """

    def __init__(self, pipeline: Any, device: str = "cpu", scheduler: Literal["ours", "theirs"] = "ours") -> None:
        self.pipeline = pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        if scheduler == "ours":
            self._swap_scheduler()
        self.encoder = ClapTower(pipeline.text_encoder, pipeline.tokenizer, device)
        self.dim = self.encoder.dim
        vocoder = pipeline.vocoder.config
        self.sample_rate = int(vocoder.sampling_rate)
        self._hop = math.prod(vocoder.upsample_rates)
        self.seconds = pipeline.unet.config.sample_size * pipeline.vae_scale_factor * self._hop / self.sample_rate

    def _swap_scheduler(self) -> None:
        from diffgap.integrations import diffusers as ours

        current = self.pipeline.scheduler
        name = type(current).__name__
        if name not in ours.__all__:
            warnings.warn(f"there is no fused {name}; the pipeline keeps its own", stacklevel=3)
            return
        self.pipeline.scheduler = getattr(ours, name).from_config(current.config)

    def check(self, space: AudioSpace) -> None:
        """Raises ValueError for conditions that are not vectors of CLAP's own space."""
        if space.bridge is None:
            return
        settings = space.bridge.settings
        if settings.head != "identity":
            raise ValueError(
                f"the bridge has {settings.head} heads and so a space of its own, while {type(self).__name__} takes "
                f"vectors of CLAP's; train one with --bridge.head identity --bridge.width {self.dim} on CLAP embeddings"
            )
        if settings.width != self.dim:
            raise ValueError(
                f"the bridge's width is {settings.width}, that of {type(self).__name__}'s CLAP {self.dim}: another CLAP"
            )

    def check_tower(self, encoder: Encoder) -> None:
        """Raises ValueError unless an encoder of the conditions' CLAP gives what the pipeline's own tower does.

        Args:
            encoder: Of texts or of audio. AudioLDM has no audio tower, so nothing is asked of one there.
        """
        if encoder.modality == "text":
            own = np.asarray(self.encoder.encode(list(_PROBES)), np.float64)
            sources = [Source(text=text) for text in _PROBES]
        elif hasattr(self.pipeline.text_encoder, "get_audio_features"):
            rate = self.pipeline.feature_extractor.sampling_rate
            waves = [_pulsing_noise(hertz, rate) for hertz in _PULSES]
            own = self._hear(waves)
            sources = [Source(data=_wav(wave, rate), suffix=".wav") for wave in waves]
        else:
            return
        other = np.asarray(encoder.encode([encoder.reader(source) for source in sources]), np.float64)
        least = float((own * other).sum(1).min()) if own.shape == other.shape else math.nan
        if not least > _AGREE:
            raise ValueError(
                f"the conditions' CLAP ({encoder.fingerprint}) is not the generator's ({self.encoder.fingerprint}): "
                f"their {encoder.modality} towers agree to a cosine of {least:.3f}, not {_AGREE}; embed and bridge "
                "with the generator's CLAP"
            )

    @torch.no_grad()
    def _hear(self, waves: Sequence[FloatArray]) -> npt.NDArray[np.float64]:
        """Unit vectors (n, D) of sounds at the extractor's rate, by the audio tower inside the pipeline."""
        pipe = self.pipeline
        inputs = pipe.feature_extractor(
            list(waves), sampling_rate=pipe.feature_extractor.sampling_rate, return_tensors="pt"
        )
        tower = pipe.text_encoder
        mel = inputs["input_features"].to(tower.device, tower.dtype)
        longer = torch.zeros(len(mel), 1, dtype=torch.bool, device=tower.device)
        vectors = features(tower.get_audio_features(input_features=mel, is_longer=longer))
        return F.normalize(vectors.double(), dim=-1).cpu().numpy()

    def generate(
        self,
        conditions: Tensor | None,
        seconds: Sequence[float],
        *,
        num_samples: int = 1,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        captions: Sequence[str] | None = None,
    ) -> list[list[FloatArray]]:
        """See :meth:`diffgap.generation.generator.Generator.generate`."""
        count = len(seconds)
        if conditions is not None and conditions.shape != (count, self.dim):
            raise ValueError(f"conditions are {tuple(conditions.shape)}; pass {(count, self.dim)}: one row a length")
        seeds = [seed] * count if isinstance(seed, int) else list(seed)
        if len(seeds) != count:
            raise ValueError(f"seed has {len(seeds)} numbers for {count} sounds; pass one, or one for each")
        least = self.pipeline.vae_scale_factor * self._hop / self.sample_rate
        for one in seconds:
            if not least <= one < math.inf:
                raise ValueError(f"seconds has {one}; this generator makes {least:g} s or more")
        for name, value in (("num_samples", num_samples), ("steps", 1 if steps is None else steps)):
            if value < 1:
                raise ValueError(f"{name} is {value}; use 1 or more")
        said = [""] * count if captions is None else list(captions)
        if len(said) != count:
            raise ValueError(f"captions has {len(said)} texts for {count} sounds; pass one for each")
        # Only what needs no padding beside the others shares a pass: the network has no mask for shorter sounds, and
        # the language model of AudioLDM2 counts padding as positions.
        places: dict[tuple[float, int], list[tuple[int, int]]] = {}
        for row, length in enumerate(seconds):
            alike = places.setdefault((length, self._caption_tokens(said[row])), [])
            alike.extend((row, number) for number in range(num_samples))
        found: list[list[FloatArray]] = [[np.empty(0, np.float32)] * num_samples for _ in seconds]
        for (length, _), wanted in places.items():
            for start in range(0, len(wanted), BATCH):
                part = wanted[start : start + BATCH]
                rows = [row for row, _ in part]
                noise = torch.cat([self._noise(seeds[row], number, length) for row, number in part])
                options: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
                if conditions is None:
                    options["guidance_scale"] = 1.0
                elif guidance_scale is not None:
                    options["guidance_scale"] = guidance_scale
                vectors = None if conditions is None else conditions[rows]
                options |= self._prompt(vectors, len(part), [said[row] for row in rows])
                waves = self.pipeline(audio_length_in_s=length, latents=noise, output_type="np", **options).audios
                for (row, number), wave in zip(part, waves, strict=True):
                    found[row][number] = np.asarray(wave, np.float32).clip(-1, 1)
        return found

    def _noise(self, seed: int, number: int, seconds: float) -> Tensor:
        """(1, C, H, W) standard normals of one sound."""
        pipe = self.pipeline
        factor = pipe.vae_scale_factor
        # The pipeline's own arithmetic: frames of the length, up to a multiple of the autoencoder's factor.
        frames = math.ceil(int(seconds / (self._hop / self.sample_rate)) / factor)
        shape = (pipe.unet.config.in_channels, frames, pipe.vocoder.config.model_in_dim // factor)
        own = sample_seeds(number + 1, torch.Generator().manual_seed(seed))[number:]
        return normal(own, shape).to(pipe.unet.device, pipe.unet.dtype)

    def _vectors(self, conditions: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        """(B, D) conditions, and what guidance leads away from: the vector of ""."""
        unet = self.pipeline.unet
        empty = torch.from_numpy(np.asarray(self.encoder.encode([""]))).to(unet.device, unet.dtype)
        empty = empty.expand(count, -1)
        return (empty if conditions is None else F.normalize(conditions, dim=-1).to(empty)), empty

    def _caption_tokens(self, caption: str) -> int:
        """Tokens that the generator reads of a caption beside the condition."""
        return 0

    @abstractmethod
    def _prompt(self, conditions: Tensor | None, count: int, captions: Sequence[str]) -> dict[str, Any]:
        """Arguments of the pipeline's call that stand for the prompt."""


class AudioLDM(DiffusersGenerator):
    """arXiv 2301.12503."""

    def _prompt(self, conditions: Tensor | None, count: int, captions: Sequence[str]) -> dict[str, Any]:
        vectors, empty = self._vectors(conditions, count)
        return {"prompt_embeds": vectors, "negative_prompt_embeds": empty}


class MusicLDM(AudioLDM):
    """arXiv 2308.01546: AudioLDM on music, with both towers of its CLAP."""


class AudioLDM2(DiffusersGenerator):
    """arXiv 2308.05734."""

    def _caption_tokens(self, caption: str) -> int:
        return len(self.pipeline.tokenizer_2(caption, truncation=True).input_ids)

    def _prompt(self, conditions: Tensor | None, count: int, captions: Sequence[str]) -> dict[str, Any]:
        vectors, empty = self._vectors(conditions, count)
        words, mask, generated = self._sequences(vectors, captions)
        no_words, no_mask, not_generated = self._sequences(empty, [""] * count, room=words.shape[1])
        return {
            "prompt_embeds": words, "attention_mask": mask, "generated_prompt_embeds": generated,
            "negative_prompt_embeds": no_words, "negative_attention_mask": no_mask,
            "negative_generated_prompt_embeds": not_generated,
        }  # fmt: skip

    @torch.no_grad()
    def _sequences(
        self, vectors: Tensor, captions: Sequence[str], room: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """T5 of the captions with its mask, and what the language model makes of both, as ``encode_prompt`` does."""
        pipe = self.pipeline
        padding: dict[str, Any] = {"padding": True} if room is None else {"padding": "max_length", "max_length": room}
        inputs = pipe.tokenizer_2(list(captions), truncation=True, return_tensors="pt", **padding).to(vectors.device)
        words = pipe.text_encoder_2(inputs.input_ids, attention_mask=inputs.attention_mask)[0]
        projected = pipe.projection_model(
            hidden_states=vectors[:, None],
            hidden_states_1=words,
            attention_mask=inputs.attention_mask.new_ones(len(vectors), 1),
            attention_mask_1=inputs.attention_mask,
        )
        generated = pipe.generate_language_model(projected.hidden_states, attention_mask=projected.attention_mask,
                                                 max_new_tokens=None)  # fmt: skip
        return words, inputs.attention_mask, generated


_KINDS: dict[str, tuple[str, type[DiffusersGenerator]]] = {
    "audioldm": ("AudioLDMPipeline", AudioLDM),
    "musicldm": ("MusicLDMPipeline", MusicLDM),
    "audioldm2": ("AudioLDM2Pipeline", AudioLDM2),
}


def load_pretrained(
    kind: str, path: str, *, device: str = "cpu", scheduler: Literal["ours", "theirs"] = "ours"
) -> DiffusersGenerator:
    """A generator of diffusers.

    Args:
        kind: "audioldm", "musicldm" or "audioldm2".
        path: A folder in diffusers' layout, or a name on the hub.
        device: Where it runs.
        scheduler: See :class:`DiffusersGenerator`.

    Raises:
        FileNotFoundError: A path that is no folder of a pipeline.
        ValueError: Another kind, a pipeline of another kind, or damaged weights.
        ModuleNotFoundError: diffusers or transformers is missing.
    """
    if kind not in _KINDS:
        raise ValueError(f"generator {kind!r} is unknown; use one of {', '.join(_KINDS)}")
    require("diffusers", "diffusers", INSTALL)
    require("transformers", "transformers", INSTALL)
    import diffusers

    name, adapter = _KINDS[kind]
    folder = Path(path)
    local = folder.exists() or path.startswith((".", "/", "~"))
    if local and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{path} holds no model_index.json; give a folder in diffusers' layout")
    try:
        found = diffusers.DiffusionPipeline.load_config(path).get("_class_name")
        if found != name:
            raise ValueError(f"{path} holds a {found}, not the {name} of {kind}; name its kind")
        pipeline = getattr(diffusers, name).from_pretrained(path)
    except OSError as error:
        raise FileNotFoundError(f"{path} cannot be loaded as {name} ({' '.join(str(error).split())[:200]})") from error
    except SafetensorError as error:
        raise ValueError(f"{path} has damaged weights ({error}); copy the folder again") from error
    if kind == "audioldm2" and type(pipeline.text_encoder_2).__name__ != "T5EncoderModel":
        raise ValueError(f"{path} speaks transcriptions (its second encoder is no T5); use an AudioLDM2 of sounds")
    return adapter(pipeline, device, scheduler)


def _digest(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if name.startswith("text_"):
            digest.update(name.encode() + value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _pulsing_noise(hertz: float, rate: int) -> FloatArray:
    """A second with something in every band: in empty ones, a sample's rounding shows in the logarithm."""
    noise = np.random.default_rng(0).standard_normal(rate)
    return (0.1 * noise * (1 + 0.8 * np.sin(np.arange(rate) * 2 * np.pi * hertz / rate))).astype(np.float32)


def _wav(wave: FloatArray, rate: int) -> bytes:
    """A sound file, as an encoder's reader takes it."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()
