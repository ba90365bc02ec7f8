"""``"diffgap"`` as an attention implementation of transformers' models.

Importing this module registers it; a model takes it by ``model.set_attn_implementation("diffgap")`` or at
``from_pretrained(..., attn_implementation="diffgap")``, and gives it back by ``set_attn_implementation("sdpa")``. It is
transformers' own ``"sdpa"``, masks included, with :func:`diffgap.scaled_dot_product_attention` in place of torch's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffgap.integrations.attention_modules import Redirect

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask
except ImportError as error:
    raise ImportError(
        f"diffgap.integrations.transformers does not fit this transformers ({error}); "
        "run: pip install --upgrade transformers"
    ) from error


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' ``sdpa_attention_forward``.

    Raises:
        ValueError: ``module`` does not say whether it is causal. transformers would take it to be, and refuses
            ``"sdpa"`` for models of such modules.
    """
    if attention_mask is None and options.get("is_causal") is None and not hasattr(module, "is_causal"):
        raise ValueError(
            f"attn_implementation 'diffgap': {type(module).__name__} has no is_causal, and its model no support for "
            "'sdpa'; use model.set_attn_implementation('eager')"
        )
    with Redirect():
        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return result


def attention_mask(*args: Any, **options: Any) -> Tensor | None:
    """transformers' ``sdpa_mask``, (B, 1, N_q, N_k) bool; one of padding alone is a row of keys, expanded."""
    mask: Tensor | None = sdpa_mask(*args, **options)
    if mask is not None and options.get("mask_function") is bidirectional_mask_function:
        return mask[..., :1, :].expand_as(mask)
    return mask


AttentionInterface.register("diffgap", attention_forward)
AttentionMaskInterface.register("diffgap", attention_mask)
