"""Drop-ins for what other libraries call by other names."""

from diffgap.integrations.attention import scaled_dot_product_attention
from diffgap.integrations.attention_swap import restore_attention, swap_attention
from diffgap.integrations.xformers import memory_efficient_attention

__all__ = ["memory_efficient_attention", "restore_attention", "scaled_dot_product_attention", "swap_attention"]
