"""Drop-in schedulers in diffusers' own pipelines, with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers import relative_l2

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
    assert relative_l2(images(), expected) <= 1e-4
    pipe.save_pretrained(tmp_path)
    scheduler = diffusers.DDPMPipeline.from_pretrained(tmp_path).scheduler
    assert type(scheduler) is getattr(ours, name)


def test_text_to_audio_pipeline() -> None:
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
        text_encoder=transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=32, d_model=4, d_kv=2, d_ff=8, num_layers=1, num_heads=2)
        ),
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
    pipe.set_progress_bar_config(disable=True)
    words = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 5, dtype=torch.long)

    def audio() -> Tensor:
        return pipe(
            prompt_embeds=words,
            negative_prompt_embeds=-words,
            attention_mask=mask,
            negative_attention_mask=mask,
            num_inference_steps=5,
            audio_end_in_s=8.0,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(7),
            output_type="pt",
        ).audios

    for name in ("ddim", "ddpm", "dpm_2", "dpm_3", "sde_2", "unipc_2"):
        scheduler, config, _ = case(name)
        pipe.scheduler = getattr(diffusers, scheduler)(**config)
        expected = audio()
        pipe.scheduler = getattr(ours, scheduler).from_config(pipe.scheduler.config)
        with Calls() as calls:
            actual = audio()
        assert calls.names.count("diffgap::solver_step") == 5
        assert relative_l2(actual, expected) <= 1e-4, name
