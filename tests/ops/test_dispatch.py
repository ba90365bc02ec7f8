"""Choosing between backends, and the helpers that every op registers with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffgap.ops import _dispatch
from diffgap.ops._dispatch import Choice, Native, backend, choose, declare, distinct, explain, vjp


@pytest.fixture(autouse=True)
def known_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ops: with a C++ kernel, with one that cannot run, and with none; backend auto."""
    monkeypatch.setattr(_dispatch, "_ops", {})
    monkeypatch.setattr(_dispatch, "_mode", "auto")
    declare("fast", cpu=Native("C++", (torch.float32, torch.bfloat16)))
    declare("broken", cpu=Native("C++", (torch.float32,), missing="the C++ extension is not built; reinstall"))
    declare("plain")


X = torch.ones(2)


@pytest.mark.parametrize(
    ("op", "x", "route"),
    [("fast", X, "native"), ("fast", X.double(), "eager"), ("broken", X, "eager"), ("plain", X, "eager")],
)
def test_choose_auto(op: str, x: Tensor, route: str) -> None:
    assert choose(op, x) == route


def test_choose_follows_the_device() -> None:
    assert choose("fast", torch.empty(2, device="meta")) == "eager"


def test_backend_eager_overrides_and_is_restored() -> None:
    with backend("eager"):
        assert choose("fast", X) == "eager"
        with backend("native"):
            assert choose("fast", X) == "native"
        assert choose("fast", X) == "eager"
    assert choose("fast", X) == "native"


def test_backend_is_restored_after_an_error() -> None:
    with pytest.raises(KeyError), backend("eager"):
        raise KeyError
    assert choose("fast", X) == "native"


@pytest.mark.parametrize(
    ("op", "x", "reason"),
    [
        ("fast", X.double(), r"its C\+\+ kernel does not take torch.float64"),
        ("broken", X, "the C.. extension is not built; reinstall"),
        ("plain", X, "no native cpu kernel exists for it"),
    ],
)
def test_backend_native_never_falls_back(op: str, x: Tensor, reason: str) -> None:
    with (
        backend("native"),
        pytest.raises(RuntimeError, match=f"{op}: backend 'native' was asked for, but {reason}"),
    ):
        choose(op, x)


def test_backend_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="backend: unknown backend 'gpu'; use one of auto, eager, native"):
        backend("gpu").__enter__()
    assert choose("fast", X) == "native"


def test_backend_switches_a_compiled_function() -> None:
    compiled = torch.compile(
        lambda x: x + 1 if choose("fast", x) == "native" else x - 1, fullgraph=True, backend="eager"
    )
    assert compiled(X).tolist() == [2, 2]
    with backend("eager"):
        assert compiled(X).tolist() == [0, 0]
    assert compiled(X).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("value", "code", "text"),
    [
        ("eager", 0, "eager"),
        (None, 0, "auto"),
        ("fastest", 1, "DIFFGAP_BACKEND: unknown backend 'fastest'; use one of"),
    ],
)
def test_environment_variable(value: str | None, code: int, text: str) -> None:
    environment = {name: x for name, x in os.environ.items() if name != "DIFFGAP_BACKEND"}
    if value is not None:
        environment["DIFFGAP_BACKEND"] = value
    program = "from diffgap.ops import _dispatch; print(_dispatch._mode)"
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == code
    assert text in result.stdout + result.stderr


def test_explain_gives_the_reasons() -> None:
    rows = {row.op: row for row in explain() if row.device == "cpu"}
    assert list(rows) == ["broken", "fast", "plain"]
    assert rows["fast"] == Choice("fast", "cpu", "native", "C++ kernel")
    assert rows["broken"] == Choice("broken", "cpu", "eager", "the C++ extension is not built; reinstall")
    assert rows["plain"] == Choice("plain", "cpu", "eager", "no native cpu kernel exists for it")


def test_explain_under_backend_eager() -> None:
    with backend("eager"):
        assert {(row.backend, row.reason) for row in explain()} == {("eager", "backend 'eager' is set")}


def test_vjp_is_the_gradient_for_tensors_and_empty_for_the_rest() -> None:
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    index = torch.tensor([0, 2])
    grad = torch.randn(2, 4)
    dx, dy, *others = vjp(lambda x, y, index, factor, none: factor * (x * y)[index], [x, y, index, 2.0, None], [grad])
    expected = torch.zeros(3, 4).index_copy(0, index, grad) * 2
    torch.testing.assert_close(dx, expected * y)
    torch.testing.assert_close(dy, expected * x)
    assert [t.shape for t in others] == [(0,)] * 3


def test_vjp_gives_zeros_for_an_unused_input() -> None:
    _, unused = vjp(lambda x, y: x * 2, [torch.ones(3), torch.ones(2)], [torch.ones(3)])
    assert unused.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("function", "grad"),
    [
        (lambda x, y: x + y, torch.ones(2, 3)),
        (lambda x, y: (x + y).sum(), torch.ones(())),
        (lambda x, y: (x + y).T, torch.ones(3, 2)),
    ],
)
def test_vjp_results_are_contiguous_and_own_their_memory(function: Callable[..., Tensor], grad: Tensor) -> None:
    results = vjp(function, [torch.ones(2, 3), torch.ones(2, 3)], [grad])
    assert all(x.is_contiguous() for x in results)
    assert len({x.untyped_storage().data_ptr() for x in (grad, *results)}) == 3


def test_vjp_runs_where_gradients_are_off() -> None:
    with torch.no_grad():
        (dx,) = vjp(torch.square, [torch.full((2,), 3.0)], [torch.ones(2)])
    assert dx.tolist() == [6, 6]
    assert not dx.requires_grad


def test_distinct_replaces_repetitions_by_views() -> None:
    x, y = torch.ones(2), torch.ones(2)
    a, b, c, d, e = distinct(x, y, x, None, None)
    assert a is x
    assert b is y
    assert c is not x
    assert c.data_ptr() == x.data_ptr()
    assert d is e is None
