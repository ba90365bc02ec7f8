"""Pipelines of diffusers for sound, small and with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.encoders.checkpoints import write_roberta_tokenizer

WORDS = 300
RATE, HOP = 16_000, 4
SIZES: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
TEXT = {
    "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 40, "pad_token_id": 1, "projection_dim": 16,
}  # fmt: skip
AUDIO = {
    "hidden_size": 16, "num_mel_bins": 16, "spec_size": 64, "patch_size": 4, "patch_stride": [4, 4],
    "patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [1, 2], "window_size": 4,
    "projection_dim": 16, "enable_fusion": False,
}  # fmt: skip


def vae() -> Any:
    import diffusers

    return diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.9,
        **SIZES,
    )


def vocoder() -> Any:
    import transformers

    return transformers.SpeechT5HifiGan(
        transformers.SpeechT5HifiGanConfig(
            model_in_dim=16,
            sampling_rate=RATE,
            upsample_initial_channel=16,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3, 7],
            resblock_dilation_sizes=[[1, 3], [1, 3]],
            normalize_before=False,
            initializer_range=0.2,
        )
    )


def tokenizer(folder: Path) -> Any:
    import transformers

    write_roberta_tokenizer(folder, WORDS)
    found = transformers.RobertaTokenizer.from_pretrained(str(folder))
    found.model_max_length = 16  # the pipelines pad to it
    return found


def clap() -> Any:
    import transformers

    config = transformers.ClapConfig(text_config=dict(TEXT), audio_config=dict(AUDIO), projection_dim=16)
    return _telling_apart(transformers.ClapModel(config))


def _telling_apart(model: Any) -> Any:
    """Random weights as they come give all texts nearly the same vector."""
    with torch.no_grad():
        model.text_model.embeddings.word_embeddings.weight.mul_(50)
        for name, weight in model.text_model.named_parameters():
            if name.endswith("dense.weight"):
                weight.mul_(20)
    return model


def extractor() -> Any:
    import transformers

    return transformers.ClapFeatureExtractor(
        feature_size=16, sampling_rate=RATE, max_length_s=1, truncation="rand_trunc", padding="repeatpad"
    )


def conditioned_unet() -> Any:
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(8, 16),
        attention_head_dim=4,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=16,
        class_embeddings_concat=True,
        **SIZES,
    )


def audioldm(folder: Path) -> Any:
    import diffusers
    import transformers

    torch.manual_seed(0)
    return diffusers.AudioLDMPipeline(
        vae=vae().eval(),
        text_encoder=_telling_apart(
            transformers.ClapTextModelWithProjection(transformers.ClapTextConfig(**TEXT))
        ).eval(),
        tokenizer=tokenizer(folder),
        unet=conditioned_unet().eval(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        vocoder=vocoder().eval(),
    )


def musicldm(folder: Path) -> Any:
    import diffusers

    torch.manual_seed(0)
    return diffusers.MusicLDMPipeline(
        vae=vae().eval(),
        text_encoder=clap().eval(),
        tokenizer=tokenizer(folder),
        feature_extractor=extractor(),
        unet=conditioned_unet().eval(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        vocoder=vocoder().eval(),
    )


def audioldm2(folder: Path) -> Any:
    import diffusers
    import transformers

    torch.manual_seed(0)
    attended = (None, 8, 4)  # by each layer: itself, the language model's sequence, and T5's
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((chr(97 + i), -3.0) for i in range(26)), ("▁", -2.0)]
    return diffusers.AudioLDM2Pipeline(
        vae=vae().eval(),
        text_encoder=clap().eval(),
        text_encoder_2=transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=200, d_model=4, d_kv=2, d_ff=8, num_layers=1, num_heads=2)
        ).eval(),
        projection_model=diffusers.AudioLDM2ProjectionModel(16, 4, 8).eval(),
        language_model=transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=32, n_positions=64, n_embd=8, n_layer=1, n_head=2, max_new_tokens=3)
        ).eval(),
        tokenizer=tokenizer(folder),
        tokenizer_2=transformers.T5TokenizerFast(vocab=words, extra_ids=0, model_max_length=32),
        feature_extractor=extractor(),
        unet=diffusers.AudioLDM2UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=(attended, attended),
            attention_head_dim=4,
            **SIZES,
        ).eval(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        vocoder=vocoder().eval(),
    )


PIPELINES = {"audioldm": audioldm, "musicldm": musicldm, "audioldm2": audioldm2}
