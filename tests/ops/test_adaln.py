"""adaln: the reference, the registered ops and the kernels against float64 and torch's own layer norm."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import diffgap
from diffgap.ops import _dispatch
from diffgap.ops._native import CPU_MISSING
from tests.helpers import assert_close_to_oracle, relative_l2
from tests.ops.routes import ROUTES, take

adaln_module = importlib.import_module("diffgap.ops.adaln")
adaln: Callable[..., tuple[Tensor, Tensor]] = adaln_module.adaln

NAMES = ("x", "branch", "gate", "shift", "scale")


needs_kernel = pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take(request.param, monkeypatch, adaln_module, _adaln="_forward", _adaln_backward="_backward")
    return str(request.param)


@pytest.fixture(params=["reference", "operators"])
def compiled_route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where compilers look: the reference, which they trace, and the operators, whatever implements these."""
    monkeypatch.setattr(_dispatch, "choose", lambda *_: "eager" if request.param == "reference" else "native")
    return str(request.param)


def inputs(
    b: int,
    n: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    *,
    per_token: bool = False,
    first: bool = False,
) -> list[Tensor | None]:
    """Random x, branch, gate, shift and scale; no branch and gate for the ``first`` norm of a network."""
    generator = torch.Generator().manual_seed(0)
    modulation = (b, n, d) if per_token else (b, d)
    shapes = [(b, n, d), (b, n, d), modulation, modulation, modulation]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return [None if first and name in ("branch", "gate") else x for name, x in zip(NAMES, tensors, strict=True)]


def explicit(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The formula, written out."""
    gate, shift, scale = (t.unsqueeze(1) if t is not None and t.ndim == 2 else t for t in (gate, shift, scale))
    y = x if branch is None else x + gate * branch
    centred = y - y.mean(-1, keepdim=True)
    return y, centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift


def with_layer_norm(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """As DiT writes it, every operation in the inputs' dtype."""
    gate, shift, scale = (t.unsqueeze(1) if t is not None and t.ndim == 2 else t for t in (gate, shift, scale))
    y = x if branch is None else x + gate * branch
    return y, F.layer_norm(y, y.shape[-1:], eps=1e-6) * (1 + scale) + shift


def outputs_and_gradients(
    function: Callable[..., tuple[Tensor, Tensor]], arguments: list[Tensor | None]
) -> list[Tensor]:
    """Both outputs and the gradient of each argument, for fixed incoming gradients."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in arguments]
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
    wanted = [x for x in leaves if x is not None]
    return [*outputs, *torch.autograd.grad(outputs, wanted, grads)]


SHAPES = [(2, 1, 24), (2, 3, 1), (1, 7, 100), (3, 17, 7), (1, 77, 24), (2, 33, 512), (1, 257, 1000)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("oracle", [explicit, with_layer_norm])
@pytest.mark.usefixtures("route")
def test_adaln_matches_torch(
    shape: tuple[int, ...], per_token: bool, first: bool, oracle: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    arguments = inputs(*shape, torch.float64, per_token=per_token, first=first)
    for ours, expected in zip(
        outputs_and_gradients(adaln, arguments), outputs_and_gradients(oracle, arguments), strict=True
    ):
        assert_close_to_oracle(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.usefixtures("route")
def test_adaln_accuracy(shape: tuple[int, ...], per_token: bool, first: bool, dtype: torch.dtype) -> None:
    arguments = inputs(*shape, dtype, per_token=per_token, first=first)
    exact = outputs_and_gradients(explicit, [None if x is None else x.double() for x in arguments])
    ours, torchs = (outputs_and_gradients(f, arguments) for f in (adaln, with_layer_norm))
    for actual, expected, eager in zip(ours, exact, torchs, strict=True):
        assert actual.dtype == dtype
        assert_close_to_oracle(actual, expected, eager)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.usefixtures("route")
def test_adaln_gradcheck(per_token: bool, first: bool) -> None:
    arguments = inputs(2, 3, 4, torch.float64, per_token=per_token, first=first)
    leaves = [None if x is None else x.requires_grad_() for x in arguments]
    assert torch.autograd.gradcheck(adaln, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("used", ["y", "h"])
@pytest.mark.usefixtures("route")
def test_adaln_gradient_through_one_output(used: str, dtype: torch.dtype) -> None:
    def gradients(function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        exact = torch.float64 if function is explicit else dtype
        leaves = [x.to(exact).requires_grad_() for x in inputs(2, 3, 8, dtype)]
        output = function(*leaves)[0 if used == "y" else 1]
        grads = torch.autograd.grad(output.square().sum(), leaves, allow_unused=True, materialize_grads=True)
        return list(grads)

    for actual, expected in zip(gradients(adaln), gradients(explicit), strict=True):
        assert_close_to_oracle(actual, expected)


def test_adaln_reference_is_twice_differentiable() -> None:
    leaves = [x.requires_grad_() for x in inputs(1, 2, 3, torch.float64)]
    assert torch.autograd.gradgradcheck(adaln, leaves)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_adaln_opcheck(per_token: bool, first: bool) -> None:
    x, branch, gate, _, scale = arguments = inputs(2, 3, 8, per_token=per_token, first=first)
    torch.library.opcheck(torch.ops.diffgap.adaln.default, arguments)
    grads = (None if first else torch.ones_like(x), torch.ones_like(x))
    torch.library.opcheck(torch.ops.diffgap.adaln_backward.default, (*grads, x, branch, gate, scale))


@pytest.mark.parametrize("used", ["y", "h"])
@pytest.mark.usefixtures("compiled_route")
def test_adaln_compiles_where_one_output_is_used(used: str) -> None:
    def function(*arguments: Tensor) -> Tensor:
        return adaln(*arguments)[0 if used == "y" else 1] * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    gradients = []
    for f in (compiled, function):
        leaves = [x.requires_grad_() for x in inputs(2, 3, 8)]
        gradients.append(torch.autograd.grad(f(*leaves).square().sum(), leaves, materialize_grads=True))
    for actual, expected in zip(*gradients, strict=True):
        assert_close_to_oracle(actual, expected)


@pytest.mark.parametrize(("compiler", "first"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
@pytest.mark.usefixtures("compiled_route")
def test_adaln_compiles(compiler: str, first: bool) -> None:
    def function(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        y, h = adaln(*arguments)
        return y * 2, h + 1

    arguments = inputs(2, 3, 8, first=first)
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for actual, expected in zip(
        outputs_and_gradients(compiled, arguments), outputs_and_gradients(function, arguments), strict=True
    ):
        assert_close_to_oracle(actual, expected)


@pytest.mark.usefixtures("route")
def test_adaln_autocast_keeps_the_stream_in_its_dtype() -> None:
    x, *others = inputs(2, 3, 8)
    low = [t.bfloat16() for t in others]
    with torch.autocast("cpu", torch.bfloat16):
        y, h = adaln(x, *low)
    expected = adaln(x, *(t.float() for t in low))
    assert y.dtype == h.dtype == torch.float32
    torch.testing.assert_close((y, h), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.usefixtures("route")
def test_adaln_empty(shape: tuple[int, ...], first: bool) -> None:
    y, h, *gradients = outputs_and_gradients(adaln, inputs(*shape, first=first))
    assert y.shape == h.shape == shape
    assert all((x == 0).all() for x in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.usefixtures("route")
def test_adaln_any_strides(dtype: torch.dtype) -> None:
    x, branch, *_ = inputs(2, 3, 8, dtype)
    rows = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)

    def outputs(function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (x, branch, rows)]
        transposed = leaves[0].transpose(1, 2).contiguous().transpose(1, 2)
        y, h = function(transposed, leaves[1][:, :1].expand(-1, 3, -1), *leaves[2].expand(2, -1, -1).unbind(1))
        grad = torch.arange(3.0, dtype=dtype)[:, None].expand(2, 3, 8)
        return [y, h, *torch.autograd.grad((y, h), leaves, (grad, -grad))]

    for actual, expected in zip(outputs(adaln, dtype), outputs(explicit, torch.float64), strict=True):
        assert_close_to_oracle(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("route")
def test_adaln_of_strided_rows_is_that_of_their_copies(dtype: torch.dtype) -> None:
    """Rows in place inside larger tensors, some of them shared by samples or tokens."""
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(4, 20, 6, 40, generator=generator, dtype=torch.float64).to(dtype)
    x, branch, grad_y, grad_h = (wide[:, :, i, 3:36] for i in range(4))
    gate, shift, scale = (wide[:, 0, i, :33] for i in range(3))
    per_token = wide[:1, :, 4, :33].expand(4, -1, -1), wide[:, :1, 5, :33].expand(-1, 20, -1), wide[:, :, 4, :33]
    for modulation in ((gate, shift, scale), (gate[:1].expand(4, -1),) * 3, per_token):
        arguments = [x, branch, *modulation]
        results = []
        for values in (arguments, [t.contiguous() for t in arguments]):
            leaves = [t.detach().requires_grad_() for t in values]
            outputs = adaln(*leaves)
            results.append([*outputs, *torch.autograd.grad(outputs, leaves, (grad_y, grad_h))])
        for strided, contiguous in zip(*results, strict=True):
            assert torch.equal(strided, contiguous)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [512, 1000])
def test_adaln_of_a_large_offset(width: int, dtype: torch.dtype) -> None:
    """Rows of 1e4 plus noise: E[y^2] - E[y]^2 would lose it, and a mean as float32 rounds it much of it. The kernel
    corrects the mean, which the reference does not."""
    x, _, _, shift, scale = inputs(2, 5, width)
    arguments = [(x + 1e4).to(dtype), None, None, shift.to(dtype), scale.to(dtype)]
    exact = outputs_and_gradients(explicit, [None if t is None else t.double() for t in arguments])
    with diffgap.backend("native"):
        for actual, expected in zip(outputs_and_gradients(adaln, arguments), exact, strict=True):
            assert_close_to_oracle(actual, expected)


@needs_kernel
@pytest.mark.parametrize("width", [500, 512])
@pytest.mark.parametrize("first", [False, True])
def test_adaln_of_more_than_the_caches_hold(width: int, first: bool) -> None:
    """Where the kernel writes its results past the caches (512), and where rows do not begin at lines."""
    arguments = inputs(12, 1500, width, first=first)
    exact = outputs_and_gradients(explicit, [None if x is None else x.double() for x in arguments])
    with diffgap.backend("native"):
        for actual, expected in zip(outputs_and_gradients(adaln, arguments), exact, strict=True):
            assert_close_to_oracle(actual, expected)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1100, 64), (70, 40, 100), (3, 5000, 512)])
@pytest.mark.parametrize("per_token", [False, True])
def test_adaln_does_not_depend_on_the_number_of_threads(
    shape: tuple[int, ...], per_token: bool, dtype: torch.dtype
) -> None:
    arguments, results, threads = inputs(*shape, dtype, per_token=per_token), [], torch.get_num_threads()
    with diffgap.backend("native"):
        for count in (1, 1, 2, 7):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(adaln, arguments))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


INSTRUCTION_SETS = """
import sys
import torch
from tests.ops.test_adaln import adaln, inputs, outputs_and_gradients

results = []
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for shape in ((2, 3, 1), (3, 17, 7), (2, 33, 100), (1, 40, 512), (3, 3000, 128)):
        for options in ({}, {"per_token": True}, {"first": True}):
            if shape[1] < 3000 or dtype == torch.float32:
                results += outputs_and_gradients(adaln, inputs(*shape, dtype, **options))
torch.save(results, sys.argv[1])
"""


@needs_kernel
def test_adaln_gives_the_same_numbers_with_every_instruction_set(tmp_path: Path) -> None:
    results = {}
    for isa in ("widest", "avx512", "avx2", "baseline"):
        environment = {**os.environ, "DIFFGAP_CPU_ISA": isa, "DIFFGAP_BACKEND": "native"}
        command = [sys.executable, "-c", INSTRUCTION_SETS, str(tmp_path / isa)]
        subprocess.run(command, cwd=Path(__file__).resolve().parents[2], env=environment, check=True)
        results[isa] = torch.load(tmp_path / isa)
    for isa, ours in results.items():
        for actual, widest in zip(ours, results["widest"], strict=True):
            tolerance = 2e-6 if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps
            assert relative_l2(actual, widest) <= tolerance, isa


@pytest.mark.usefixtures("route")
def test_adaln_of_equal_features_is_the_shift() -> None:
    x, _, _, shift, scale = inputs(2, 3, 8)
    _, h = adaln(torch.full_like(x, 1e4), None, None, shift, scale)
    assert torch.isfinite(h).all()
    torch.testing.assert_close(h, shift.unsqueeze(1).expand_as(h), rtol=0, atol=1e-5)


def test_adaln_on_meta_tensors() -> None:
    x, row = torch.empty(2, 3, 8, device="meta"), torch.empty(2, 8, device="meta")
    y, h = adaln(x, x, row, row, row)
    assert y.shape == h.shape == x.shape


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 8)}, ValueError, r"adaln: x has shape \(2, 8\)"),
        ({"x": torch.ones(2, 3, 8, dtype=torch.int64)}, TypeError, "adaln: x has dtype torch.int64"),
        ({"branch": None}, ValueError, "adaln: branch is None"),
        ({"gate": None}, ValueError, "adaln: gate is None"),
        (
            {"branch": torch.ones(2, 4, 8)},
            ValueError,
            r"adaln: branch has shape \(2, 4, 8\) but x \(2, 3, 8\)",
        ),
        ({"gate": torch.ones(2, 3, 8)}, ValueError, r"adaln: gate has shape \(2, 3, 8\) but shift \(2, 8\)"),
        ({"shift": torch.ones(8)}, ValueError, r"adaln: shift has shape \(8,\); pass \(2, 8\)"),
        ({"scale": torch.ones(2, 7)}, ValueError, r"adaln: scale has shape \(2, 7\) but shift \(2, 8\)"),
        (
            {"scale": torch.ones(2, 8).double()},
            TypeError,
            "adaln: scale has dtype torch.float64 but x torch.float32",
        ),
        ({"shift": torch.ones(2, 8, device="meta")}, ValueError, "adaln: shift is on meta but x on cpu"),
    ],
)
def test_adaln_bad_input(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    arguments = dict(zip(NAMES, inputs(2, 3, 8), strict=True))
    with pytest.raises(error, match=message):
        adaln(**{**arguments, **change})
