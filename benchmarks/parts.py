"""What a call consists of: the operations that torch's dispatcher was asked for, and the time of those of a kind.

One run is recorded, operation by operation. The calls of a kind are then made again as often, with the tensors they
had, and take part in a case like an implementation: ``gemm (0.70x)`` says that matrix products take 70% of the time.
The kinds but "calls" are disjoint and make up "calls"; what a run takes beyond them is Python. Alone, a kind finds its
tensors in the caches; all together, each call with its own, they fill them more than the run did. So Python's share
lies between what the kinds' sum leaves of the run and what "calls" leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from benchmarks.cases import Gate, Outputs, Peer, Run
from benchmarks.denoiser import _NO_KERNEL

_PRODUCTS = (
    "aten::addmm",
    "aten::mm",
    "aten::bmm",
    "aten::baddbmm",
    "mkldnn::_linear_pointwise",
    "diffgap::linear_gradients",
)
#: Kinds of operations: whether one belongs to it, by the name that the dispatcher knows it by.
Kinds = Mapping[str, Callable[[str], bool]]


def kinds_of(**prefixes: str | tuple[str, ...]) -> Kinds:
    """Kinds by what their operations' names begin with, then "other" for the rest, and "calls" for all."""
    own: dict[str, Callable[[str], bool]] = {
        kind: partial(_begins, beginnings) for kind, beginnings in prefixes.items()
    }
    return {
        **own,
        "other": lambda name: not any(belongs(name) for belongs in own.values()),
        "calls": lambda name: True,
    }


def _begins(beginnings: str | tuple[str, ...], name: str) -> bool:
    return name.startswith(beginnings)


#: Of the denoiser in a sampler.
PARTS = kinds_of(gemm=_PRODUCTS, attention="diffgap::attention", adaln="diffgap::adaln", step="diffgap::solver_step")
#: Of a training step, where every operation of an optimizer takes lists of tensors.
TRAINING_PARTS = kinds_of(
    gemm=_PRODUCTS,
    contrastive="diffgap::clip_loss",
    attention="diffgap::attention",
    adaln="diffgap::adaln",
    activation="diffgap::silu_mul",
    noise=("diffgap::normal", "diffgap::q_sample"),
    optimizer=("aten::_fused_", "aten::_foreach_"),
)


@dataclass
class Call:
    """An operation with its arguments, those that it overwrites, its results, and how often it was called so.

    ``exact``: called again it gives these results, because nothing in the run wrote over its tensors.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    overwritten: list[Tensor]
    outputs: list[Tensor]
    count: int = 1
    exact: bool = True

    @property
    def name(self) -> str:
        return str(self.function._schema.name)

    def again(self) -> Any:
        """Call it once more: what it returns."""
        return self.function(*self.args, **self.kwargs)


class Recorder(TorchDispatchMode):
    """Keeps the first of the calls that differ only in the values of the tensors made in the run, and of scalars.

    Those made before it, weights above all, are told apart, as each has to come into the caches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, Call] = {}
        self.overwritten: set[int] = set()
        self._made: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = written_by(func, args, kwargs)
        key = (func, *map(self._kind, args), *((name, self._kind(value)) for name, value in kwargs.items()))
        known = key in self.calls
        if known or func.is_view or func._schema.name in _NO_KERNEL:
            result = func(*args, **kwargs)
            if known:
                self.calls[key].count += 1
            self.overwritten |= _storages(written)
            return self._noted(result, args, kwargs)
        # What it overwrites is copied first, wherever among the arguments it stands.
        copies = {x.data_ptr(): x.clone() for x in written}
        own_args, own_kwargs = tree_map_only(Tensor, lambda x: copies.get(x.data_ptr(), x), (args, kwargs))
        result = func(*args, **kwargs)
        outputs = written or tensors_in(result)
        call = Call(func, own_args, own_kwargs, written_by(func, own_args, own_kwargs), outputs)
        self.calls[key] = call
        self.overwritten |= _storages(written)
        return self._noted(result, args, kwargs)

    def _noted(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._made |= _storages(tensors_in(result)) - _storages(tensors_in((args, kwargs)))
        return result

    def _kind(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            own = value.untyped_storage().data_ptr()
            return value.shape, value.stride(), value.dtype, None if own in self._made else value.data_ptr()
        if isinstance(value, tuple | list):
            return tuple(self._kind(x) if isinstance(x, Tensor) else repr(x) for x in value)
        return type(value) if isinstance(value, int | float) else repr(value)


def _storages(tensors: Sequence[Tensor]) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tensors}


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    return [x for x in tree_flatten(value)[0] if isinstance(x, Tensor)]


def arguments_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that were given, by the names of an operation's schema."""
    return dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs


def written_names(func: Any) -> set[str]:
    """The arguments that an operation writes into."""
    return {x.name for x in func._schema.arguments if x.alias_info is not None and x.alias_info.is_write}


def written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call writes into."""
    given = arguments_of(func, args, kwargs)
    return tensors_in([value for name, value in given.items() if name in written_names(func)])


class Recording:
    """The calls of one run, made when they are first asked for, and what kinds they are of."""

    def __init__(self, run: Run, kinds: Kinds = PARTS) -> None:
        self._run, self.kinds = run, kinds

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        with torch.no_grad(), Recorder() as recorder:
            self._run()
        calls = tuple(recorder.calls.values())
        for call in calls:
            touched = _storages([*tensors_in((call.args, call.kwargs)), *call.outputs])
            call.exact = not (call.overwritten or touched & recorder.overwritten)
        return calls

    def part(self, name: str) -> list[Call]:
        """The calls of one of the kinds."""
        return [call for call in self.calls if self.kinds[name](call.name)]


def part_peer(name: str) -> Peer:
    """One of the kinds of the ``recording`` that is among a case's inputs, beside the case."""
    return Peer(name, partial(_replay, name), "torch", module="torch", gate=partial(_replayed, name))


def _replay(name: str, *, recording: Recording, **_: Any) -> Run:
    calls = recording.part(name)

    @torch.no_grad()
    def run() -> Outputs:
        results: dict[int, Any] = {}
        # In turn, so that what was called in a loop finds the caches as the others leave them.
        for turn in range(max((call.count for call in calls), default=0)):
            for position, call in enumerate(calls):
                if turn < call.count:
                    results[position] = call.again()
        return tuple(x for i, call in enumerate(calls) for x in call.overwritten or tensors_in(results[i]))

    return run


def _replayed(name: str, *, recording: Recording, **_: Any) -> Gate:
    """Judges a part: it gives what it gave in the run, or at least what is finite where tensors were overwritten."""

    def gate(outputs: Outputs) -> str | None:
        expected = [(x, call.exact) for call in recording.part(name) for x in call.outputs]
        if not expected:
            return "was not called"
        if len(outputs) != len(expected):
            return f"gave {len(outputs)} results, not {len(expected)}"
        right = (
            torch.equal(x, recorded) if exact else bool(torch.isfinite(x).all())
            for x, (recorded, exact) in zip(outputs, expected, strict=True)
        )
        return None if all(right) else "gave other results than in the run"

    return gate
