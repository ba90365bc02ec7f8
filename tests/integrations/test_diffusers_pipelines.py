"""Drop-in schedulers in diffusers' own pipelines, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import FLOAT32_RTOL, relative_l2

diffusers = pytest.importorskip("diffusers", reason="diffusers is the peer: pip install diffusers")
from diffgap.integrations import diffusers as ours  # noqa: E402
from tests.integrations.scheduler_cases import DDIM, DDPM, Calls, case  # noqa: E402


@pytest.mark.parametrize("name", [DDPM, DDIM])
def test_image_pipeline(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    make = diffusers.DDPMPipeline if name == DDPM else diffusers.DDIMPipeline
    pipe = make(unet, getattr(diffusers, name)())
    pipe.set_progress_bar_config(disable=True)

    def images() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe(generator=generator, num_inference_steps=10, output_type="np").images)

    expected = images()
    pipe.scheduler = getattr(ours, name).from_config(pipe.scheduler.config)
    assert relative_l2(images(), expected) <= FLOAT32_RTOL
    pipe.save_pretrained(tmp_path)
    scheduler = diffusers.DDPMPipeline.from_pretrained(tmp_path).scheduler
    assert type(scheduler) is getattr(ours, name)


def assert_schedulers_agree(pipe: Any, names: Sequence[str], generate: Callable[[], Tensor]) -> None:
    pipe.set_progress_bar_config(disable=True)
    for name in names:
        scheduler, config, _ = case(name)
        pipe.scheduler = getattr(diffusers, scheduler)(**config)
        expected = generate()
        pipe.scheduler = getattr(ours, scheduler).from_config(pipe.scheduler.config)
        with Calls() as calls:
            actual = generate()
        assert calls.names.count("diffgap::solver_step") == 5
        assert relative_l2(actual, expected) <= FLOAT32_RTOL, name


def tiny_t5(transformers: Any) -> Any:
    config = transformers.T5Config(vocab_size=32, d_model=4, d_kv=2, d_ff=8, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config)


def words(width: int) -> Tensor:
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(3))


def test_stable_audio_pipeline() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    pipe = diffusers.StableAudioPipeline(
        vae=diffusers.AutoencoderOobleck(
            encoder_hidden_size=6,
            downsampling_ratios=[1, 2],
            decoder_channels=3,
            decoder_input_channels=3,
            audio_channels=2,
            channel_multiples=[2, 4],
            sampling_rate=4,
        ),
        text_encoder=tiny_t5(transformers),
        tokenizer=None,
        projection_model=diffusers.StableAudioProjectionModel(4, 4, 0, 32),
        transformer=diffusers.StableAudioDiTModel(
            sample_size=16,
            in_channels=3,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=4,
            num_key_value_attention_heads=2,
            out_channels=3,
            cross_attention_dim=4,
            time_proj_dim=8,
            global_states_input_dim=8,
            cross_attention_input_dim=4,
        ),
        scheduler=diffusers.DDIMScheduler(),
    )
    mask = torch.ones(2, 5, dtype=torch.long)

    def audio() -> Tensor:
        return pipe(
            prompt_embeds=words(4),
            negative_prompt_embeds=-words(4),
            attention_mask=mask,
            negative_attention_mask=mask,
            num_inference_steps=5,
            audio_end_in_s=8.0,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(7),
            output_type="pt",
        ).audios

    names = ("ddim", "ddim_eta", "ddpm", "dpm_2", "dpm_3", "sde_2", "unipc_2")
    assert_schedulers_agree(pipe, names, audio)


def test_audioldm2_pipeline() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    attended = (None, 8, 4)  # by each layer: itself, the language model's sequence, and T5's
    vae = diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **sizes,
    )
    unet = diffusers.AudioLDM2UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(attended, attended),
        attention_head_dim=4,
        **sizes,
    )
    vocoder = transformers.SpeechT5HifiGan(
        transformers.SpeechT5HifiGanConfig(
            model_in_dim=8,
            upsample_initial_channel=16,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3, 7],
            resblock_dilation_sizes=[[1, 3], [1, 3]],
            normalize_before=False,
            initializer_range=0.2,
        )
    )
    pipe = diffusers.AudioLDM2Pipeline(
        vae=vae.eval(),
        text_encoder=None,
        text_encoder_2=tiny_t5(transformers),
        projection_model=None,
        language_model=transformers.GPT2Model(
            transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        ),
        tokenizer=None,
        tokenizer_2=None,
        feature_extractor=None,
        unet=unet.eval(),
        scheduler=diffusers.DDIMScheduler(),
        vocoder=vocoder.eval(),
    )
    mask = torch.ones(2, 5, dtype=torch.long)

    def audio() -> Tensor:
        waves = pipe(
            prompt_embeds=words(4),
            negative_prompt_embeds=-words(4),
            attention_mask=mask,
            negative_attention_mask=mask,
            generated_prompt_embeds=words(8),
            negative_generated_prompt_embeds=-words(8),
            num_inference_steps=5,
            audio_length_in_s=0.004,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(7),
            output_type="pt",
        ).audios
        assert waves.shape == (2, 64) and waves.std() > 0.01
        return waves

    assert_schedulers_agree(pipe, ("ddim", "dpm_2", "unipc_2"), audio)
