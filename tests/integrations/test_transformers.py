"""transformers' models with attention implementation "diffgap": what they compute, and by which attention."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffgap
from tests.helpers import assert_close_to_oracle
from tests.integrations.attention_calls import attention_calls

transformers = pytest.importorskip("transformers", reason="not installed: pip install 'diffgap[encoders]'")
pytest.importorskip("diffgap.integrations.transformers", reason="this transformers has no AttentionMaskInterface")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 64}
WORDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0))
PADDING = torch.arange(7) < torch.tensor([[7], [5], [3]])


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SIZES))


def llama(**options: Any) -> nn.Module:
    return transformers.LlamaModel(transformers.LlamaConfig(**SIZES, **options))


#: The model, what is passed to it, and how many of its two layers' attentions are ours.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], int]] = {
    "encoder": (bert, {}, 2),
    "encoder, padding": (bert, {"attention_mask": PADDING.long()}, 2),
    "decoder": (llama, {}, 2),
    "decoder, grouped queries": (functools.partial(llama, num_key_value_heads=1), {}, 2),
    "decoder, padding": (llama, {"attention_mask": PADDING.long()}, 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_computes_what_sdpa_does(name: str) -> None:
    make, options, ours = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()

    def call(m: nn.Module) -> Tensor:
        return m(WORDS, **options).last_hidden_state[PADDING]

    exact = call(copy.deepcopy(model).double())
    model.set_attn_implementation("diffgap")
    assert_close_to_oracle(call(model), exact)
    assert attention_calls(lambda: call(model)) == (ours, 2 - ours)
    model.set_attn_implementation("sdpa")
    assert attention_calls(lambda: call(model)) == (0, 2)


def test_a_module_that_may_be_causal_or_not_is_refused() -> None:
    """transformers takes it for causal; it is not, and eager is its model's own choice."""
    model = transformers.ClapTextModel(transformers.ClapTextConfig(**SIZES)).eval()
    expected = model(WORDS, attention_mask=PADDING.long()).last_hidden_state[PADDING]
    model.set_attn_implementation("diffgap")
    with pytest.raises(ValueError, match="ClapTextSelfAttention has no is_causal"):
        model(WORDS)
    found = model(WORDS, attention_mask=PADDING.long()).last_hidden_state[PADDING]
    assert_close_to_oracle(found, expected)


def test_swap_attention_names_the_way() -> None:
    model = bert()
    with pytest.warns(
        UserWarning, match=r"nothing is swapped in BertModel.*model.set_attn_implementation\('diffgap'\)"
    ):
        assert diffgap.swap_attention(model) == 0
