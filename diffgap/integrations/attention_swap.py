"""Attention of a whole model by :func:`diffgap.attention`, in place and back.

A swapped module keeps its parameters, hooks and identity; only its class becomes a subclass of the one it had, which
is why ``state_dict``, ``isinstance`` and optimizers notice nothing.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffgap.integrations.attention_modules import (
    Adapted,
    DiffusersProcessor,
    MultiheadAttention,
    TimmAttention,
    redirected,
)

_ATTENTION_CALLS = {"scaled_dot_product_attention", "dispatch_attention_fn"}
_TIMM_CHILDREN = {"qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop"}


def swap_attention(module: nn.Module) -> int:
    """Let every attention module in the tree of ``module`` compute by :func:`diffgap.attention`, in place.

    Taken are :class:`torch.nn.MultiheadAttention`, diffusers' modules with a processor, timm's ``Attention`` (as in
    DiT), and any other module whose ``forward`` itself calls torch's ``scaled_dot_product_attention``. What
    :func:`diffgap.scaled_dot_product_attention` leaves to torch stays torch's, call by call: dropout in training,
    float biases, attention weights. RMS norms of queries and keys (eps 1e-6, one weight per head_dim) of timm's and of
    diffusers' plain modules become part of the operation.

    A float (n, n) mask is taken for the causal one if a module above holds the causal mask as its ``attn_mask``, as
    open_clip's text towers do: it is compared here, once, not at every call. Do not pass such modules another one.

    Swap after the weights are loaded and diffusers' projections are fused, and before ``torch.compile`` and FSDP.
    ``torch.jit.script`` refuses a swapped model.
    ``state_dict`` does not change; copies and pickles of a swapped module are swapped.
    :class:`torch.nn.TransformerEncoderLayer` does not call its attention at all in its own fast path for inference.

    Models of transformers call torch's function from a helper of theirs, and none of their modules is taken; they
    have :mod:`diffgap.integrations.transformers`.

    Returns:
        How many modules were swapped: 0 if all are already, and, with a warning, if there are none.
    """
    swapped = 0
    for submodule, causal_length in _with_causal_length(module):
        if _adapter(submodule) is not None:
            _swap(submodule)
            vars(submodule)["causal_length"] = causal_length
            swapped += 1
        processor = vars(submodule).get("processor")
        if processor is not None and _adapter(processor) is not None:
            # Its own copy, since a processor may serve several models.
            vars(submodule)["processor"] = _swap(copy.copy(processor))
            swapped += 1
    if not swapped and next(_parts(module), None) is None:
        warnings.warn(
            f"swap_attention: nothing is swapped in {type(module).__name__}, for no module of it calls torch's "
            "scaled_dot_product_attention in its own forward, or is a torch.nn.MultiheadAttention. For a model of "
            "transformers import diffgap.integrations.transformers and call model.set_attn_implementation('diffgap')",
            stacklevel=2,
        )
    return swapped


def restore_attention(module: nn.Module) -> int:
    """Undo :func:`swap_attention`, and return how many modules were restored."""
    restored = 0
    for adapted in _parts(module):
        # Not of a class that FSDP or a parametrization has derived from ours, and that is theirs to undo.
        if "_original" in vars(type(adapted)):
            adapted.__class__ = vars(type(adapted))["_original"]
            vars(adapted).pop("causal_length", None)
            restored += 1
    return restored


def _parts(module: nn.Module) -> Iterator[Any]:
    """The modules and processors of the tree that are swapped."""
    parts = (part for submodule in module.modules() for part in (submodule, vars(submodule).get("processor")))
    return (part for part in parts if isinstance(part, Adapted))


def _swap(module: Any) -> Any:
    original: Any = type(module)
    module.__class__ = _adapted(original, _adapter(module))
    return module


def _adapter(module: Any) -> type | None:
    """The class that takes the calls of ``module``; ``None`` if it has no attention we know, or is swapped."""
    cls = type(module)
    if issubclass(cls, Adapted):
        return None
    if issubclass(cls, nn.MultiheadAttention):
        return MultiheadAttention if cls.forward is nn.MultiheadAttention.forward else None
    method = getattr(cls, _method(cls), None)
    code = None if method is None else getattr(inspect.unwrap(method), "__code__", None)
    # The flag of timm's modules: false where its user wants the softmax spelt out.
    if code is None or not _ATTENTION_CALLS & set(code.co_names) or not getattr(module, "fused_attn", True):
        return None
    home = cls.__module__.partition(".")[0]
    if (home, cls.__name__) == ("diffusers", "AttnProcessor2_0"):
        return DiffusersProcessor
    if (home, cls.__name__) == ("timm", "Attention") and _is_plain_timm(module):
        return TimmAttention
    return Adapted


def _is_plain_timm(module: nn.Module) -> bool:
    """Whether timm's ``Attention`` has none of the parts it got over the years besides those of DiT's."""
    children = dict(module.named_children())
    norm = children.pop("norm", None)
    return children.keys() == _TIMM_CHILDREN and (norm is None or isinstance(norm, nn.Identity))


def _method(cls: type) -> str:
    """What runs when an instance is called: ``forward`` of a module, ``__call__`` of a processor."""
    return "forward" if getattr(cls, "__call__", None) is nn.Module.__call__ else "__call__"  # noqa: B004


@functools.cache
def _adapted(original: Any, adapter: Any) -> Any:
    """The subclass of ``original`` that ``adapter`` goes in front of, under the name of ``original``."""
    method = _method(original)
    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce,
        "_original": original,
        "_adapter": adapter,
    }
    if adapter is Adapted:
        namespace[method] = redirected(getattr(original, method))
    return type(original.__name__, (adapter, original), namespace)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Pickle by the original class, since this one can be found by no name."""
    reduced: Any = object.__reduce_ex__(self, max(protocol, 2))
    return (_new, (self._original, self._adapter), *reduced[2:])


def _new(original: type, adapter: type) -> Any:
    return object.__new__(_adapted(original, adapter))


def _with_causal_length(module: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """Every module of the tree once, with the length of the causal mask that it or the nearest module above holds."""
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, causal_length: int) -> Iterator[tuple[nn.Module, int]]:
        if module in seen:
            return
        seen.add(module)
        mask = getattr(module, "attn_mask", None)
        if isinstance(mask, Tensor):
            causal_length = len(mask) if _is_causal(mask) else 0
        yield module, causal_length
        for child in module.children():
            yield from visit(child, causal_length)

    return visit(module, 0)


def _is_causal(mask: Tensor) -> bool:
    if mask.is_meta or not mask.is_floating_point() or mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
        return False
    return torch.equal(mask, torch.full_like(mask, -math.inf).triu_(1))
