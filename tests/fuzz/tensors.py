"""Tensors of any size, dtype and layout, and the comparison of an op's routes with the oracle in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from diffgap.ops import backend
from tests.helpers import assert_close_to_oracle, relative_l2

Op = Callable[..., Any]

DTYPES = st.sampled_from((torch.float32, torch.float16, torch.bfloat16))
#: Small ones, and those beside the widths of vectors, tiles and blocks.
SIZES = st.one_of(st.integers(0, 9), st.sampled_from((15, 16, 17, 31, 32, 33, 63, 64, 65, 130)))
WIDTHS = SIZES.filter(lambda size: size > 0)
MAGNITUDES = st.sampled_from((0.0, 1e-3, 1.0, 1.0, 1.0, 30.0))
LAYOUTS = ("dense", "reversed", "every second", "offset", "repeated")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` elsewhere in memory, between NaN that are not its own; ``repeated`` copies its first row.

    Between whole numbers lie the largest there are.
    """
    others = torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    if layout == "reversed":
        order = tuple(reversed(range(x.dim())))
        return x.permute(order).contiguous().permute(order)
    if layout == "every second" and x.dim():
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), others)[..., ::2]
        return wide.copy_(x)
    if layout == "offset":
        return x.new_full((x.numel() + 3,), others)[3:].view(x.shape).copy_(x)
    if layout == "repeated" and x.dim() and x.shape[0]:
        return x[:1].expand(x.shape)
    return x


@st.composite
def tensors(draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype, magnitude: float | None = None) -> Tensor:
    """Normal numbers times a magnitude, in any layout."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = draw(MAGNITUDES) if magnitude is None else magnitude
    x = torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * scale
    return laid_out(x.to(dtype), draw(st.sampled_from(LAYOUTS)))


@st.composite
def id_tensors(draw: st.DrawFn, rows: int) -> Tensor:
    """Ids of ``rows`` rows out of few, the most extreme among them."""
    few = draw(st.lists(st.sampled_from((0, 1, -1, 7, 2**63 - 1, -(2**63))), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    ids = torch.tensor(few)[torch.randint(len(few), (rows,), generator=generator)]
    return laid_out(ids, draw(st.sampled_from(LAYOUTS)))


@st.composite
def contrastive(
    draw: st.DrawFn, dtype: torch.dtype, rows: int, columns: int, width: int, with_ids: bool | None = None
) -> dict[str, Tensor]:
    """Unit rows, as losses get them, and ids, or maybe none."""
    a, b = (draw(tensors((count, width), torch.float64, 1.0)) for count in (rows, columns))
    shared = min(rows, columns)
    b = torch.cat([b[:shared] + a[:shared] / 8, b[shared:]])
    given = {
        name: laid_out(F.normalize(x, dim=1).to(dtype), draw(st.sampled_from(LAYOUTS)))
        for name, x in (("a", a), ("b", b))
    }
    if draw(st.booleans()) if with_ids is None else with_ids:
        given |= {"ids_a": draw(id_tensors(rows)), "ids_b": draw(id_tensors(columns))}
    return given


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, tuple) else (outputs,)


def _results(op: Op, tensors: Mapping[str, Any], options: Mapping[str, Any], learned: Sequence[str]) -> list[Tensor]:
    """Outputs, and the gradients of the ``learned`` inputs for fixed random gradients of the outputs."""
    leaves = {name: x.detach().requires_grad_() if name in learned else x for name, x in tensors.items()}
    outputs = _tuple(op(**leaves, **options))
    if not learned:
        return list(outputs)
    generator = torch.Generator().manual_seed(0)
    # The same numbers in every dtype.
    cotangents = [(torch.randint(-128, 129, y.shape, generator=generator) / 64).to(y.dtype) for y in outputs]
    differentiable = [(y, g) for y, g in zip(outputs, cotangents, strict=True) if y.requires_grad]
    wanted = [leaves[name] for name in learned]
    ys, gs = zip(*differentiable, strict=True)
    grads = torch.autograd.grad(ys, wanted, gs, allow_unused=True, materialize_grads=True)
    return [y.detach() for y in outputs] + list(grads)


def compare(
    op: Op,
    tensors: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    *,
    backward: bool = True,
    terms: float = 0.0,
    logit: float = 1.0,
) -> None:
    """Assert the accuracy contract of outputs and gradients, and that the inputs are left as they were.

    The oracle is the eager reference in float64. ``terms`` and ``logit`` are as in :func:`assert_equal_enough`.
    """
    options = options or {}
    learned = [name for name, x in tensors.items() if backward and isinstance(x, Tensor) and x.is_floating_point()]
    before = {name: x.clone() for name, x in tensors.items() if isinstance(x, Tensor)}
    actual = _results(op, tensors, options, learned)
    with backend("eager"):
        eager = _results(op, tensors, options, learned)
        wide = {
            name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in tensors.items()
        }
        oracle = _results(op, wide, options, learned)
    for name, x in before.items():
        assert torch.equal(x.nan_to_num(), tensors[name].nan_to_num()), f"{name} was changed"
    for mine, plain, exact in zip(actual, eager, oracle, strict=True):
        assert_equal_enough(mine, plain, exact, terms, logit)


def assert_equal_enough(mine: Tensor, plain: Tensor, exact: Tensor, terms: float = 0.0, logit: float = 1.0) -> None:
    """Assert the accuracy contract of a random case.

    What is not finite must be the same in ``plain``, the reference in the inputs' own dtype, which overflows where
    float64 (``exact``) does not. Random cases may be so ill-conditioned that float32 cannot keep the contract. Then at
    most four times the error of the reference in float32 is allowed; and, as that may cancel to nothing by chance, one
    rounding of a logit, which is a relative error of its exponential, and where the terms of a sum cancel to a
    hundredth or less, four roundings of a term. ``terms`` is the size of the largest terms, and ``logit`` that of the
    exponents in them, by which their errors grow.
    """
    assert mine.dtype == plain.dtype and mine.shape == plain.shape
    if not mine.is_floating_point():
        assert torch.equal(mine, plain)
        return
    finite = plain.isfinite() & exact.isfinite()
    torch.testing.assert_close(mine[~finite], plain[~finite], equal_nan=True)
    mine, plain, exact = mine[finite], plain[finite], exact[finite]
    eps = torch.finfo(torch.float32).eps
    allowed = max(4 * relative_l2(plain, exact), eps * logit)
    if mine.dtype == torch.float32 and relative_l2(mine, exact) <= allowed:
        return
    rounding = 4 * eps * terms * max(logit, 1.0)
    cancelled = bool(exact.abs().le(terms / 100).all())
    if cancelled and (mine.double() - exact).abs().le(rounding).all():
        return
    assert_close_to_oracle(mine, exact, plain)
