"""Tensors of any size, dtype and layout, and the comparison of an op's routes with the oracle in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from diffgap.ops import backend
from tests.helpers import assert_close_to_oracle

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


def softmax_terms(
    logit_scale: float, rows: int, columns: int, ids: tuple[Tensor, Tensor] | None, features: Sequence[str]
) -> dict[str, float]:
    """Norms of what the gradients of softmax losses sum, if they are means over rows: see :func:`compare`.

    Row i of n that have a positive has the gradient ``logit_scale / n * sum_j (softmax_ij - target_ij) b_j``, and the
    scale that of ``1 / n * sum_j (softmax_ij - target_ij) <a_i, b_j>``. Both factors are probabilities, and all rows of
    norm 1, so that the terms of a row have a sum of at most ``2 logit_scale / n``.
    """
    valid = min(rows, columns)
    if ids is not None:
        valid = min(int(torch.isin(x, y).sum()) for x, y in (ids, ids[::-1]))
    return dict.fromkeys(features, 2 * logit_scale / max(valid, 1) ** 0.5) | {"logit_scale": 2.0, "output": 2.0}


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, tuple) else (outputs,)


def upstream(*shapes: Sequence[int]) -> list[Tensor]:
    """The gradients of outputs of these shapes: the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(-128, 129, tuple(shape), generator=generator) / 64 for shape in shapes]


def _results(op: Op, tensors: Mapping[str, Any], options: Mapping[str, Any], learned: Sequence[str]) -> list[Tensor]:
    """Outputs, and the gradients of the ``learned`` inputs for fixed random gradients of the outputs."""
    leaves = {name: x.detach().requires_grad_() if name in learned else x for name, x in tensors.items()}
    outputs = _tuple(op(**leaves, **options))
    if not learned:
        return list(outputs)
    cotangents = [grad.to(y.dtype) for y, grad in zip(outputs, upstream(*(y.shape for y in outputs)), strict=True)]
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
    terms: Mapping[str, float] | None = None,
    reference: Op | None = None,
    same_kind: bool = True,
) -> None:
    """Assert the accuracy contract of outputs and gradients, and that the inputs are left as they were.

    The oracle is the eager reference in float64; ``reference`` is another way to it, by default ``op`` itself.
    ``terms`` has those of :func:`assert_equal_enough` for the gradient of an input by its name, and for outputs by
    ``"output"``; ``same_kind`` is passed on to it.
    """
    options, terms = options or {}, terms or {}
    learned = [name for name, x in tensors.items() if backward and isinstance(x, Tensor) and x.is_floating_point()]
    before = {name: x.clone() for name, x in tensors.items() if isinstance(x, Tensor)}
    actual = _results(op, tensors, options, learned)
    reference = reference or op
    with backend("eager"):
        eager = _results(reference, tensors, options, learned)
        oracle, *others = (
            _results(reference, {name: change(x) for name, x in tensors.items()}, options, learned)
            for change in (widened, *FLOAT32_CHANGES)
        )
    for name, x in before.items():
        assert torch.equal(x.nan_to_num(), tensors[name].nan_to_num()), f"{name} was changed"
    names = ["output"] * (len(actual) - len(learned)) + learned
    for name, mine, plain, exact, *float32 in zip(names, actual, eager, oracle, *others, strict=True):
        assert_equal_enough(mine, plain, exact, float32, terms.get(name, 0.0), same_kind=same_kind)


def widened(x: Any, dtype: torch.dtype = torch.float64) -> Any:
    """The numbers of a tensor in ``dtype``; anything else as it is."""
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def rounded_once(x: Any, *, by_row: bool, seed: int) -> Any:
    """Each number, or each row of them, times 1 + eps or 1 - eps of float32, in float64; anything else as it is.

    What a row is multiplied by reaches all its inner products, as the rounding of a product does.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    shape = (*x.shape[:-1], 1) if by_row and x.ndim else x.shape
    signs = torch.randint(2, shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return x.double() * (1 + torch.finfo(torch.float32).eps * signs)


#: How inputs are changed to see what float32 can do at best: computed in, or moved by one of its roundings, four ways.
FLOAT32_CHANGES: tuple[Callable[[Any], Any], ...] = (
    partial(widened, dtype=torch.float32),
    *(partial(rounded_once, by_row=by_row, seed=seed) for seed in range(2) for by_row in (False, True)),
)


#: What may be taken for 0. In float32, exponentials below the smallest normal number, times scales and gradients; in
#: float16, half of the smallest number.
NOTHING = {torch.float32: 1e-30, torch.bfloat16: 1e-30, torch.float16: 2.0**-25}


def assert_equal_enough(
    mine: Tensor, plain: Tensor, exact: Tensor, float32: Sequence[Tensor], terms: float = 0.0, *, same_kind: bool = True
) -> None:
    """Assert the accuracy contract of a random case.

    What is not finite must be the same in ``plain``, the reference in the inputs' own dtype, which overflows where
    float64 (``exact``) does not; without ``same_kind``, not finite either: whether a sum with infinite terms is NaN
    depends on their order. Random cases may be so ill-conditioned that float32 cannot keep the contract. Then the
    result may be four times as far from ``exact`` as the farthest of ``float32``, the references of
    :data:`FLOAT32_CHANGES`, in half precision after one rounding of its own. Of a sum whose terms, of a norm up to
    ``terms``, cancel, those say little, because what they change need not reach it: the gradient of rows that are
    compared with equal ones is 0 for any inputs. It may have four roundings of its terms, which is more than the
    contract allows where they cancel to a twentieth or less.
    """
    assert mine.dtype == plain.dtype and mine.shape == plain.shape
    if not mine.is_floating_point():
        assert torch.equal(mine, plain)
        return
    finite = plain.isfinite() & exact.isfinite()
    if same_kind:
        torch.testing.assert_close(mine[~finite], plain[~finite], equal_nan=True)
    assert not mine[~finite].isfinite().any()
    mine, plain, exact = mine[finite], plain[finite], exact[finite]
    allowed = 4 * max(distance(x[finite], exact) for x in float32) + NOTHING[mine.dtype] * mine.numel()
    if mine.dtype != torch.float32:
        allowed += torch.finfo(mine.dtype).eps / 2 * exact.norm().item()
    allowed = max(allowed, 4 * torch.finfo(torch.float32).eps * terms)
    if not distance(mine, exact) <= allowed:
        assert_close_to_oracle(mine, exact, plain)


def distance(x: Tensor, y: Tensor) -> float:
    """``|x - y|`` in float64."""
    return (x.double() - y.double()).norm().item()
