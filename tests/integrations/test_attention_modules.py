"""The options of the modules that swap_attention knows by name, one by one, and the calls that stay torch's."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffgap
from diffgap import swap_attention
from diffgap.integrations.attention_modules import rms_weight
from tests.helpers import assert_close_to_oracle
from tests.integrations.attention_calls import attention_calls

Call = Callable[[nn.Module], Tensor]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def causal_mask(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((n, n), -torch.inf, dtype=dtype).triu(1)


def output_and_gradients(module: nn.Module, call: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of the inputs and of all parameters in one vector."""
    dtype = next(module.parameters()).dtype
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    output = call(module, *leaves)
    grad = tokens(*output.shape, seed=1).to(dtype)
    gradients = torch.autograd.grad(output, [*leaves, *module.parameters()], grad)
    return [output, torch.cat([x.flatten() for x in gradients])]


def in_float64(module: nn.Module) -> nn.Module:
    """A copy to compute the oracle by: diffusers' RMS norm takes its variance in float32 whatever its input."""
    double = copy.deepcopy(module)
    for name, child in double.named_children():
        if type(child).__module__.startswith("diffusers.") and type(child).__name__ == "RMSNorm":
            norm = nn.RMSNorm(child.dim, eps=child.eps, elementwise_affine=child.elementwise_affine)
            norm.load_state_dict(child.state_dict())
            setattr(double, name, norm)
    return double.double()


def assert_swapped_is_the_same(module: nn.Module, call: Callable[..., Tensor], *inputs: Tensor) -> None:
    """In float32 by the registered op, in float64 by the reference, both against the original in float64."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    double = in_float64(module)
    exact = output_and_gradients(double, call, list(inputs))
    assert swap_attention(module) == swap_attention(double) == 1
    for model, backend in ((module, "native"), (double, "eager")):
        with diffgap.backend(backend):
            for actual, oracle in zip(output_and_gradients(model, call, list(inputs)), exact, strict=True):
                assert_close_to_oracle(actual, oracle)
    leaves = [x.float() for x in inputs]
    assert attention_calls(lambda: call(module, *leaves)) == (1, 0)


def assert_stays_torchs(module: nn.Module, call: Call, message: str) -> None:
    """The swapped ``module`` gives the original's own output, and refuses to under backend native."""
    torch.manual_seed(0)
    expected = call(module)
    swap_attention(module)
    torch.manual_seed(0)
    actual = call(module)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    with diffgap.backend("native"), pytest.raises(RuntimeError, match=message):
        call(module)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("module", "call"),
    [
        ({}, {}),
        ({"bias": False}, {}),
        ({}, {"key_padding_mask": torch.arange(5) > torch.tensor([[2], [4], [3]])}),
        ({}, {"attn_mask": causal_mask(5), "is_causal": True}),
        ({}, {"attn_mask": causal_mask(5).isinf(), "is_causal": True}),
        (
            {},
            {
                "attn_mask": causal_mask(5).isinf(),
                "is_causal": True,
                "key_padding_mask": torch.arange(5) > torch.tensor([[2], [4], [3]]),
            },
        ),
    ],
    ids=["plain", "no bias", "padding", "causal", "causal bool", "causal padding"],
)
def test_multihead_self_attention(batch_first: bool, module: dict[str, Any], call: dict[str, Any]) -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        mask = call.get("attn_mask")
        mask = mask.to(x.dtype) if mask is not None and mask.is_floating_point() else mask
        return m(x, x, x, need_weights=False, **({**call, "attn_mask": mask} if call else {}))[0]

    x = tokens(3, 5, 24) if batch_first else tokens(5, 3, 24)
    assert_swapped_is_the_same(nn.MultiheadAttention(24, 2, batch_first=batch_first, **module), run, x)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 10, "vdim": 7}, {"kdim": 10, "vdim": 7, "bias": False}])
def test_multihead_cross_attention(batch_first: bool, sizes: dict[str, Any]) -> None:
    lengths = [(3, n, d) for n, d in ((5, 24), (7, sizes.get("kdim", 24)), (7, sizes.get("vdim", 24)))]
    qkv = [
        tokens(*(shape if batch_first else (shape[1], shape[0], shape[2])), seed=i) for i, shape in enumerate(lengths)
    ]
    module = nn.MultiheadAttention(24, 2, batch_first=batch_first, **sizes)
    assert_swapped_is_the_same(module, lambda m, *x: m(*x, need_weights=False)[0], *qkv)


def test_multihead_cross_attention_to_one_tensor() -> None:
    module = nn.MultiheadAttention(24, 2, batch_first=True)
    x, y = tokens(3, 5, 24), tokens(3, 7, 24, seed=1)
    assert_swapped_is_the_same(module, lambda m, x, y: m(x, y, y, need_weights=False)[0], x, y)


@pytest.mark.parametrize(
    ("module", "call", "message"),
    [
        ({}, {"need_weights": True}, "need_weights=False"),
        ({}, {"attn_mask": torch.zeros(5, 5)}, "not known to be the causal mask"),
        ({}, {"attn_mask": torch.zeros(5, 5).bool()}, "not known to be the causal mask"),
        ({}, {"key_padding_mask": torch.full((3, 5), 0.5)}, "key_padding_mask is neither bool nor"),
        ({"dropout": 0.5}, {}, "no dropout"),
        ({"add_bias_kv": True}, {}, "keys cannot be added"),
        ({"add_zero_attn": True}, {}, "keys cannot be added"),
    ],
)
def test_multihead_attention_that_stays_torchs(module: dict[str, Any], call: dict[str, Any], message: str) -> None:
    x = tokens(3, 5, 24).float()
    options = {"need_weights": False, **call}
    made = nn.MultiheadAttention(24, 2, batch_first=True, **module)
    assert_stays_torchs(made, lambda m: m(x, x, x, **options)[0], message)


def test_multihead_attention_has_dropout_in_training_only() -> None:
    x = tokens(3, 5, 24).float()
    module = nn.MultiheadAttention(24, 2, dropout=0.5, batch_first=True)
    swap_attention(module)
    assert attention_calls(lambda: module(x, x, x, need_weights=False))[0] == 0
    module.eval()
    assert attention_calls(lambda: module(x, x, x, need_weights=False)) == (1, 0)


def test_multihead_attention_in_torchs_encoder_layer() -> None:
    layer = nn.TransformerEncoderLayer(24, 2, 32, dropout=0.0, batch_first=True)
    mask = causal_mask(5)

    def call(m: nn.Module, x: Tensor) -> Tensor:
        return m(x, src_mask=mask.to(x.dtype), is_causal=True)

    assert_swapped_is_the_same(layer, call, tokens(3, 5, 24))
    x = tokens(3, 5, 24).float()
    expected = call(layer, x)
    with torch.no_grad():
        torch.testing.assert_close(call(layer.eval(), x), expected)


def test_multihead_attention_in_torchs_encoder_with_padding() -> None:
    """The encoder gives its layers the mask as 0 and -inf."""
    layer = nn.TransformerEncoderLayer(24, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    padding = torch.arange(5) > torch.tensor([[2], [4], [3]])
    x = tokens(3, 5, 24)
    exact = copy.deepcopy(encoder).double()(x, src_key_padding_mask=padding)
    assert swap_attention(encoder) == 2
    assert_close_to_oracle(encoder(x.float(), src_key_padding_mask=padding), exact)
    assert attention_calls(lambda: encoder(x.float(), src_key_padding_mask=padding)) == (2, 0)


def test_multihead_attention_gives_weights_as_before() -> None:
    x = tokens(3, 5, 24).float()
    module = nn.MultiheadAttention(24, 2, batch_first=True)
    expected = module(x, x, x)
    swap_attention(module)
    for actual, wanted in zip(module(x, x, x), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_multihead_attention_under_autocast(dtype: torch.dtype) -> None:
    x = tokens(3, 5, 24)
    module = nn.MultiheadAttention(24, 2, batch_first=True).eval()
    exact = copy.deepcopy(module).double()(x, x, x)[0]
    with torch.autocast("cpu", dtype):
        expected = module(x.float(), x.float(), x.float(), need_weights=False)[0]
        swap_attention(module)
        actual = module(x.float(), x.float(), x.float(), need_weights=False)[0]
    assert actual.dtype == expected.dtype == dtype
    assert_close_to_oracle(actual, exact, expected)


class Tower(nn.Module):
    def __init__(self, mask: Tensor, *, buffer: bool = True) -> None:
        super().__init__()
        if buffer:
            self.register_buffer("attn_mask", mask, persistent=False)
        else:
            self.attn_mask = mask
        self.layers = nn.ModuleList(nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        mask = self.attn_mask[: x.shape[1], : x.shape[1]].to(x.dtype)
        for layer in self.layers:
            x = layer(x, x, x, attn_mask=mask, need_weights=False)[0]
        return x


@pytest.mark.parametrize("buffer", [True, False])
@pytest.mark.parametrize("n", [9, 5, 1])
def test_held_causal_mask_is_recognised(buffer: bool, n: int) -> None:
    tower = Tower(causal_mask(9), buffer=buffer)
    x = tokens(2, n, 16)
    exact = copy.deepcopy(tower).double()(x)
    assert swap_attention(tower) == 2
    with diffgap.backend("native"):
        assert_close_to_oracle(tower(x.float()), exact)
    assert attention_calls(lambda: tower(x.float())) == (2, 0)
    with diffgap.backend("native"):
        half = tower.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16, "a cast of the mask is the mask still"


@pytest.mark.parametrize(
    "mask", [torch.zeros(9, 9), causal_mask(9).T.contiguous(), causal_mask(9).triu(2), causal_mask(9).clamp(min=-1e4)]
)
def test_another_mask_is_not_taken_for_causal(mask: Tensor) -> None:
    tower, x = Tower(mask), tokens(2, 9, 16).float()
    expected = tower(x)
    assert swap_attention(tower) == 2
    torch.testing.assert_close(tower(x), expected, rtol=0, atol=0)
    assert attention_calls(lambda: tower(x))[0] == 0


def test_the_nearest_mask_above_decides() -> None:
    outer = Tower(causal_mask(9))
    outer.inner = Tower(torch.zeros(9, 9))
    swap_attention(outer)
    x = tokens(2, 9, 16).float()
    assert attention_calls(lambda: outer.inner(x))[0] == 0
    assert attention_calls(lambda: outer(x)) == (2, 0)


def diffusers_attention(**options: Any) -> Any:
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")
    module = importlib.import_module("diffusers.models.attention_processor")
    return module.Attention(**{"query_dim": 32, "heads": 2, "dim_head": 16, **options})


@pytest.mark.parametrize(
    ("options", "is_fused"),
    [
        ({"qk_norm": "rms_norm", "eps": 1e-6}, True),
        ({"qk_norm": "rms_norm", "eps": 1e-5}, False),
        ({"qk_norm": "rms_norm", "eps": 1e-6, "elementwise_affine": False}, False),
        ({"qk_norm": "layer_norm", "eps": 1e-6}, False),
        ({"qk_norm": "l2", "eps": 1e-6}, False),
        ({"bias": True, "out_bias": False}, None),
        ({"residual_connection": True, "rescale_output_factor": 2.0}, None),
        ({"dropout": 0.5}, None),
    ],
)
def test_diffusers_self_attention(options: dict[str, Any], is_fused: bool | None) -> None:
    module = diffusers_attention(**options).eval()
    if is_fused is not None:
        assert [rms_weight(norm, 16) is not None for norm in (module.norm_q, module.norm_k)] == [is_fused] * 2
    assert_swapped_is_the_same(module, lambda m, x: m(x), tokens(3, 5, 32))


@pytest.mark.parametrize("cross_attention_norm", [None, "layer_norm", "group_norm"])
def test_diffusers_cross_attention(cross_attention_norm: str | None) -> None:
    module = diffusers_attention(
        cross_attention_dim=12, cross_attention_norm=cross_attention_norm, cross_attention_norm_num_groups=3
    )
    assert_swapped_is_the_same(module, lambda m, x, y: m(x, y), tokens(3, 5, 32), tokens(3, 7, 12))


def test_diffusers_attention_of_an_image() -> None:
    """As in the autoencoder: a group norm, a residual, and the layout of images."""
    module = diffusers_attention(norm_num_groups=8, residual_connection=True, bias=True)
    assert_swapped_is_the_same(module, lambda m, x: m(x), tokens(2, 32, 3, 4))


def test_diffusers_attention_with_spatial_norm() -> None:
    module = diffusers_attention(spatial_norm_dim=4, residual_connection=True)
    assert_swapped_is_the_same(module, lambda m, x, z: m(x, temb=z), tokens(2, 32, 3, 4), tokens(2, 4, 3, 4))


@pytest.mark.parametrize("ndim", [2, 3])
def test_diffusers_attention_with_a_mask_of_keys(ndim: int) -> None:
    mask = torch.arange(7) <= torch.tensor([[2], [6], [4]])
    mask = mask if ndim == 2 else mask[:, None]
    module = diffusers_attention(cross_attention_dim=12)
    assert_swapped_is_the_same(module, lambda m, x, y: m(x, y, attention_mask=mask), tokens(3, 5, 32), tokens(3, 7, 12))


def test_diffusers_attention_with_a_bias_stays_torchs() -> None:
    bias, x = tokens(3, 1, 5, seed=2).float(), tokens(3, 5, 32).float()
    assert_stays_torchs(diffusers_attention(), lambda m: m(x, attention_mask=bias), "boolean masks only")


def test_a_processor_of_two_models_is_swapped_in_one() -> None:
    first, second = diffusers_attention(), diffusers_attention()
    second.set_processor(first.processor)
    swap_attention(first)
    x = tokens(3, 5, 32).float()
    assert attention_calls(lambda: first(x)) == (1, 0)
    assert attention_calls(lambda: second(x)) == (0, 1)


class ScaledProcessor(nn.Module):
    """A processor with a parameter, as IP-adapters have, that diffusers calls by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        q, k, v = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        output = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2)
        return attn.to_out[0](output) * self.scale + shift


def test_a_processor_that_is_a_module() -> None:
    module = diffusers_attention(processor=ScaledProcessor())
    assert_swapped_is_the_same(module, lambda m, x, y: m(x, shift=y), tokens(3, 5, 32), tokens(3, 5, 32, seed=3))


def test_a_processor_without_torchs_attention_is_left_alone() -> None:
    module = diffusers_attention()
    processors = importlib.import_module("diffusers.models.attention_processor")
    module.set_processor(processors.AttnProcessor())
    with pytest.warns(UserWarning, match="nothing is swapped"):
        assert swap_attention(module) == 0


def timm_attention(**options: Any) -> Any:
    pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    return importlib.import_module("timm.layers.attention").Attention(32, 2, **options)


@pytest.mark.parametrize(
    ("options", "is_fused"),
    [
        ({"qkv_bias": True}, False),
        ({"proj_drop": 0.5}, False),
        ({"qk_norm": True, "norm_layer": nn.LayerNorm}, False),
        ({"qk_norm": True, "norm_layer": lambda d, **kw: nn.RMSNorm(d, eps=1e-6, **kw)}, True),
        ({"scale_norm": True, "norm_layer": nn.LayerNorm}, False),
        ({"gated": True}, False),
        ({"attn_head_dim": 24}, False),
    ],
)
def test_timm_attention(options: dict[str, Any], is_fused: bool) -> None:
    module = timm_attention(**options).eval()
    assert (rms_weight(module.q_norm, 16) is not None) == is_fused
    assert_swapped_is_the_same(module, lambda m, x: m(x), tokens(3, 5, 32))


def test_timm_attention_of_timms_own_rms_norm() -> None:
    timm_norm = pytest.importorskip("timm.layers", reason="timm is not installed: pip install timm").RmsNorm
    module = timm_attention(qk_norm=True, norm_layer=timm_norm)
    assert rms_weight(module.q_norm, 16) is not None
    assert_swapped_is_the_same(module, lambda m, x: m(x), tokens(3, 5, 32))


def test_timm_attention_with_a_mask_of_keys() -> None:
    mask = torch.arange(5) <= torch.tensor([2, 4, 3])[:, None, None, None]
    assert_swapped_is_the_same(timm_attention(), lambda m, x: m(x, attn_mask=mask), tokens(3, 5, 32))


def test_timm_attention_causal() -> None:
    assert_swapped_is_the_same(timm_attention(), lambda m, x: m(x, is_causal=True), tokens(3, 5, 32))


@pytest.mark.parametrize(("options", "bias", "message"), [({"attn_drop": 0.5}, None, "dropout"), ({}, 1.0, "boolean")])
def test_timm_attention_that_stays_torchs(options: dict[str, Any], bias: float | None, message: str) -> None:
    x = tokens(3, 5, 32).float()
    mask = None if bias is None else torch.full((5, 5), bias).tril()
    assert_stays_torchs(timm_attention(**options), lambda m: m(x, attn_mask=mask), message)


def test_timm_attention_without_torchs_function_is_left_alone() -> None:
    module = timm_attention(gated=True)
    module.fused_attn = False
    with pytest.warns(UserWarning, match="nothing is swapped"):
        assert swap_attention(module) == 0


def test_a_module_without_attention_is_left_alone() -> None:
    with pytest.warns(UserWarning, match="swap_attention: nothing is swapped in Sequential, for no module of it calls"):
        assert swap_attention(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == 0
