"""swap_attention in models of diffusers, open_clip, timm and torch: outputs, gradients, and what they call."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffgap
from diffgap import restore_attention, swap_attention
from tests.helpers import FLOAT32_RTOL, assert_close_to_oracle, relative_l2
from tests.integrations.attention_calls import attention_calls

Call = Callable[[nn.Module], Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def of(module: str, name: str) -> Any:
    """A name of a package that may be absent."""
    package = module.partition(".")[0]
    pytest.importorskip(package, reason=f"{package} is not installed")
    return getattr(importlib.import_module(module), name)


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def transformer_2d() -> tuple[nn.Module, Call]:
    """Self- and cross-attention alternating, of GLIGEN's and Stable Diffusion's kind."""
    model = of("diffusers", "Transformer2DModel")(
        num_attention_heads=2, attention_head_dim=24, in_channels=8, num_layers=2, cross_attention_dim=12,
        norm_num_groups=4, sample_size=4,
    )  # fmt: skip

    def call(m: nn.Module) -> Tensor:
        image, text = tokens(2, 8, 4, 4).to(dtype_of(m)), tokens(2, 7, 12).to(dtype_of(m))
        return m(image, encoder_hidden_states=text, return_dict=False)[0]

    return model, call


def dit() -> tuple[nn.Module, Call]:
    model = of("diffusers", "DiTTransformer2DModel")(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip

    def call(m: nn.Module) -> Tensor:
        image = tokens(2, 4, 8, 8).to(dtype_of(m))
        return m(image, torch.tensor([3, 5]), class_labels=torch.tensor([1, 2]), return_dict=False)[0]

    return model, call


def unet() -> tuple[nn.Module, Call]:
    model = of("diffusers", "UNet2DConditionModel")(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=12, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip

    def call(m: nn.Module) -> Tensor:
        image, text = tokens(2, 4, 8, 8).to(dtype_of(m)), tokens(2, 7, 12).to(dtype_of(m))
        return m(image, torch.tensor([3, 5]), text, return_dict=False)[0]

    return model, call


def flux() -> tuple[nn.Module, Call]:
    """The newer kind of diffusers' modules: one class and one processor for each model."""
    model = of("diffusers", "FluxTransformer2DModel")(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip

    def call(m: nn.Module) -> Tensor:
        dtype = dtype_of(m)
        return m(
            tokens(2, 16, 8).to(dtype), tokens(2, 5, 12).to(dtype), tokens(2, 10).to(dtype),
            torch.tensor([0.3, 0.6], dtype=dtype), torch.zeros(16, 3), torch.zeros(5, 3), return_dict=False,
        )[0]  # fmt: skip

    return model, call


def fused_diffusers() -> tuple[nn.Module, Call]:
    """One product for queries, keys and values, which is a processor of its own."""
    model, call = transformer_2d()
    attention_processor = importlib.import_module("diffusers.models.attention_processor")
    for module in model.modules():
        if isinstance(module, attention_processor.Attention):
            module.fuse_projections()
            module.set_processor(attention_processor.FusedAttnProcessor2_0())
    return model, call


def clip() -> tuple[nn.Module, Call]:
    model = of("open_clip", "CLIP")(
        embed_dim=32,
        vision_cfg={"image_size": 32, "patch_size": 16, "layers": 2, "width": 48, "head_width": 24},
        text_cfg={"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2},
    )

    def call(m: nn.Module) -> Tensor:
        words = torch.randint(1, 63, (3, 12), generator=torch.Generator().manual_seed(0))
        return torch.cat(m(tokens(3, 3, 32, 32).to(dtype_of(m)), words)[:2])

    return model, call


def clip_custom_blocks() -> tuple[nn.Module, Call]:
    """A text tower of open_clip's own attention, whose queries and keys have a layer norm."""
    model = of("open_clip.transformer", "TextTransformer")(
        context_length=12, vocab_size=64, width=32, heads=2, layers=2, output_dim=32,
        block_type="custom", qk_norm=True,
    )  # fmt: skip
    words = torch.randint(1, 63, (3, 12), generator=torch.Generator().manual_seed(0))
    return model, lambda m: m(words)


def timm_vit() -> tuple[nn.Module, Call]:
    model = of("timm", "create_model")("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=2, embed_dim=48)
    return model, lambda m: m(tokens(2, 3, 32, 32).to(dtype_of(m)))


def timm_rope() -> tuple[nn.Module, Call]:
    """One of timm's other attention modules, which is not known here by name."""
    model = of("timm.layers.attention", "AttentionRope")(48, 3, num_prefix_tokens=0)
    return model, lambda m: m(tokens(2, 5, 48).to(dtype_of(m)))


class Gpt(nn.Module):
    """A module that is not known at all, but calls torch's function."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.out(
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )


def gpt() -> tuple[nn.Module, Call]:
    return Gpt(), lambda m: m(tokens(2, 6, 16).to(dtype_of(m)))


#: Each model, and the number of its attention modules; every module is called once.
MODELS: dict[Callable[[], tuple[nn.Module, Call]], int] = {
    transformer_2d: 4, dit: 2, unet: 8, flux: 2, fused_diffusers: 4, clip: 4, clip_custom_blocks: 2, timm_vit: 2,
    timm_rope: 1, gpt: 1,
}  # fmt: skip


def made(make: Callable[[], tuple[nn.Module, Call]]) -> tuple[nn.Module, Call]:
    """A model with the random weights of one seed. Many start at zero, which would compare nothing."""
    torch.manual_seed(0)
    model, call = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval(), call


def output_and_gradients(model: nn.Module, call: Call) -> list[Tensor]:
    """The output and the gradients of all parameters in one vector, for a fixed incoming gradient."""
    model.zero_grad()
    output = call(model)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output.backward(grad.to(output.dtype))
    gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    return [output.detach(), torch.cat(gradients)]


@pytest.mark.parametrize("make", MODELS)
def test_swapped_models_compute_the_same(make: Callable[[], tuple[nn.Module, Call]]) -> None:
    model, call = made(make)
    double = copy.deepcopy(model).double()
    exact = output_and_gradients(double, call)
    expected = output_and_gradients(model, call)
    assert swap_attention(model) == swap_attention(double) == MODELS[make]
    with diffgap.backend("native"):
        actual = output_and_gradients(model, call)
    for ours, oracle, torchs in zip(actual, exact, expected, strict=True):
        assert_close_to_oracle(ours, oracle)
        assert relative_l2(ours, torchs) <= FLOAT32_RTOL
    with diffgap.backend("eager"):
        for ours, oracle in zip(output_and_gradients(double, call), exact, strict=True):
            assert_close_to_oracle(ours, oracle)


@pytest.mark.parametrize("make", MODELS)
def test_every_attention_is_ours_and_can_be_given_back(make: Callable[[], tuple[nn.Module, Call]]) -> None:
    model, call = made(make)
    expected, count = call(model), MODELS[make]
    state, classes = model.state_dict(), [type(m) for m in model.modules()]
    assert attention_calls(lambda: call(model)) == (0, count)
    assert swap_attention(model) == count
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert swap_attention(model) == 0
    assert all(isinstance(m, cls) for m, cls in zip(model.modules(), classes, strict=True))
    assert attention_calls(lambda: call(model)) == (count, 0)
    with torch.no_grad():
        assert attention_calls(lambda: call(model)) == (count, 0)
    assert model.state_dict().keys() == state.keys()
    assert all(model.state_dict()[name].data_ptr() == x.data_ptr() for name, x in state.items())
    assert restore_attention(model) == count
    assert restore_attention(model) == 0
    assert [type(m) for m in model.modules()] == classes
    assert attention_calls(lambda: call(model)) == (0, count)
    torch.testing.assert_close(call(model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("make", [transformer_2d, flux, clip, timm_vit, gpt])
@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_swapped(make: Callable[[], tuple[nn.Module, Call]], duplicate: str) -> None:
    model, call = made(make)
    classes = [type(m) for m in model.modules()]
    swap_attention(model)
    if duplicate == "deepcopy":
        other = copy.deepcopy(model)
    elif duplicate == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    torch.testing.assert_close(call(other), call(model), rtol=0, atol=0)
    assert attention_calls(lambda: call(other)) == (MODELS[make], 0)
    assert restore_attention(other) == MODELS[make]
    assert [type(m) for m in other.modules()] == classes
    assert attention_calls(lambda: call(model)) == (MODELS[make], 0), "the original shares nothing with its copy"


@pytest.mark.parametrize("make", [transformer_2d, dit, flux, clip, clip_custom_blocks, timm_vit, gpt])
def test_swapped_models_compile(make: Callable[[], tuple[nn.Module, Call]]) -> None:
    torch._dynamo.reset()
    model, call = made(make)
    expected = output_and_gradients(model, call)
    swap_attention(model)
    model.compile(fullgraph=True, backend="aot_eager")
    for actual, torchs in zip(output_and_gradients(model, call), expected, strict=True):
        assert relative_l2(actual, torchs) <= FLOAT32_RTOL


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_torch_jit_script_says_what_to_do() -> None:
    model, _ = made(gpt)
    swap_attention(model)
    with pytest.raises(
        TypeError, match=r"torch.jit.script cannot compile the swapped .* call diffgap.restore_attention"
    ):
        torch.jit.script(model)


def test_swapped_models_compile_with_inductor() -> None:
    torch._dynamo.reset()
    model, call = made(gpt)
    expected = output_and_gradients(model, call)
    swap_attention(model)
    model.compile(fullgraph=True)
    for actual, torchs in zip(output_and_gradients(model, call), expected, strict=True):
        assert relative_l2(actual, torchs) <= FLOAT32_RTOL


def test_a_published_text_tower_computes_the_same() -> None:
    """ViT-B-32's at full width and depth, with a small vocabulary and a single layer for images."""
    config = of("open_clip", "get_model_config")("ViT-B-32")
    config["vision_cfg"]["layers"] = 1
    config["text_cfg"]["vocab_size"] = 1000
    torch.manual_seed(0)
    model = of("open_clip", "CLIP")(**config)
    words = torch.randint(1, 999, (1, 77), generator=torch.Generator().manual_seed(0))

    def call(m: nn.Module) -> Tensor:
        return m.encode_text(words)

    torch.set_num_threads(2)
    expected = output_and_gradients(model, call)
    assert swap_attention(model) == 13
    assert attention_calls(lambda: call(model)) == (12, 0)
    for actual, torchs in zip(output_and_gradients(model, call), expected, strict=True):
        assert relative_l2(actual, torchs) <= FLOAT32_RTOL
