"""The bridge's denoiser as its default settings make it, and the calls of operations that it consists of.

``python -m benchmarks denoiser`` times one block and the whole network with eager and with native operations;
``python -m benchmarks.denoiser --calls`` counts the calls. A vector is four tokens, and its condition four more. The
network is in evaluation mode, where dropout draws nothing, and off its initial values, where its output is zero.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import DIRECTIONS, Case, Direction, Inputs, Outputs, Peer, Run, differentiated
from diffgap.models.blocks import ROWS_PER_BLOCK, Context, DiTBlock, Residual
from diffgap.models.contrastive_diffusion import ContrastiveDiffusion
from diffgap.models.denoiser import Condition, Denoiser
from diffgap.models.settings import BridgeSettings
from diffgap.ops._dispatch import Backend, backend

SETTINGS = BridgeSettings()
BATCHES = {"ci": (16,), "full": (64, 512)}
_CALLS_BATCH = 64
_CPU = torch.device("cpu")
#: Operations of aten that launch nothing, beside the views.
_NO_KERNEL = frozenset(
    f"aten::{name}"
    for name in (
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "_unsafe_view",
        "promote_types",
    )
)


@dataclass(frozen=True)
class Subject:
    """Something to time.

    Attributes:
        name: The operation, in the names of cases.
        shape: Of one sample, there too.
        module: On the CPU, in float32.
        tensors: Its arguments for a batch size and a direction, on the CPU.
        call: Its outputs, given the module and the arguments.
    """

    name: str
    shape: str
    module: nn.Module
    tensors: Callable[[int, Direction], dict[str, Tensor]]
    call: Callable[..., Outputs]


def block(settings: BridgeSettings = SETTINGS) -> Subject:
    """One block, with a residual stream, modulation and the condition's keys and values."""
    width, heads, count = settings.denoiser_width, settings.heads, settings.tokens
    module = _moved(DiTBlock(_denoiser(settings).config))

    def tensors(batch: int, direction: Direction) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        context = (batch, count, 2, heads, width // heads)
        sizes = {"x": (batch, count, width), "branch": (batch, count, width), "gate": (batch, width)}
        sizes |= {"rows": (batch, ROWS_PER_BLOCK, width), "keys_values": context}
        return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}

    def call(module: nn.Module, x: Tensor, branch: Tensor, gate: Tensor, rows: Tensor, keys_values: Tensor) -> Outputs:
        stream = module(Residual(x, branch, gate), rows, context=Context(keys_values))
        return stream.x, stream.branch

    return Subject("denoiser_block", f"{count}x{width}", module, tensors, call)


def network(settings: BridgeSettings = SETTINGS) -> Subject:
    """The whole denoiser, one vector given another; in training a tenth of the conditions are dropped."""

    def tensors(batch: int, direction: Direction) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        noisy, condition = torch.randn(2, batch, settings.width, generator=generator)
        t = torch.randint(settings.num_train_timesteps, (batch,), generator=generator)
        dropped = {"drop": torch.arange(batch) % 10 == 0} if direction == "fwd+bwd" else {}
        return {"noisy": noisy, "t": t, "condition": condition, **dropped}

    def call(module: nn.Module, noisy: Tensor, t: Tensor, condition: Tensor, drop: Tensor | None = None) -> Outputs:
        return (module(noisy, t, 0, [Condition(condition, 1)], drop=drop),)

    return Subject("denoiser", str(settings.width), _moved(_denoiser(settings)), tensors, call)


def cases(size: str) -> Iterator[Case]:
    """The cases of ``--size ci`` or ``full``."""
    for subject in (block(), network()):
        for batch in BATCHES[size]:
            for direction in DIRECTIONS:
                yield denoiser_case(subject, direction, batch)


def denoiser_case(subject: Subject, direction: Direction, batch: int) -> Case:
    """A forward pass, or one and a backward pass into parameters and arguments."""

    def expected(device: torch.device) -> Outputs:
        exact = inputs_of(subject, direction, batch, device, torch.float64)
        with backend("eager"):
            return differentiated(lambda: _call(subject, **exact), exact)()

    return Case(
        f"{subject.name}/{direction}/{batch}x{subject.shape}/fp32",
        torch.float32,
        partial(inputs_of, subject, direction, batch),
        partial(_call, subject),
        (Peer("cuda_graph", partial(_graphed, subject), "torch", module="torch", devices=("cuda",)),)
        if direction == "fwd"
        else (),
        flops=batch * _flops(subject, direction),
        expected=expected,
    )


def inputs_of(
    subject: Subject, direction: Direction, batch: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Inputs:
    """The arguments of a call: a copy of the module, its parameters to differentiate, and the tensors."""
    learn = direction == "fwd+bwd"
    module = copy.deepcopy(subject.module).to(device, dtype).requires_grad_(learn)
    tensors = {
        name: x.to(device, dtype).requires_grad_(learn) if x.is_floating_point() else x.to(device)
        for name, x in subject.tensors(batch, direction).items()
    }
    return {"module": module, "parameters": tuple(module.parameters()), **tensors}


def _call(subject: Subject, module: nn.Module, parameters: tuple[Tensor, ...], **tensors: Tensor) -> Outputs:
    return subject.call(module, **tensors)


def _graphed(subject: Subject, **inputs: Any) -> Run:
    """Our own forward pass, captured once and replayed: what is left of it without launches from Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capture needs everything compiled and loaded
        _call(subject, **inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = _call(subject, **inputs)

    def run() -> Outputs:
        graph.replay()
        return outputs

    return run


def _denoiser(settings: BridgeSettings) -> Denoiser:
    return ContrastiveDiffusion(("a", "b"), (), settings).denoiser


def _moved(module: nn.Module) -> nn.Module:
    """The module in evaluation mode, every parameter off its initial value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def _flops(subject: Subject, direction: Direction) -> int:
    """Operations of the matrix products of one sample."""
    inputs = inputs_of(subject, direction, 1, _CPU)
    with backend("eager"), FlopCounterMode(display=False) as counter:
        outputs = _call(subject, **inputs)
        if direction == "fwd+bwd":
            torch.autograd.backward(outputs, [x.detach() for x in outputs])
    return counter.get_total_flops()


class _CallCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view and func._schema.name not in _NO_KERNEL:
            self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def count_calls(function: Callable[[], object]) -> Counter[str]:
    """How often ``function`` calls each operation that launches a kernel, as ``aten::addmm`` or ``diffgap::adaln``.

    What the dispatcher sees counts, composite operations taken apart; views and allocations do not. On a GPU each of
    aten's is one launch or more, and each of ours what its kernels are.
    """
    with _CallCounter() as counter:
        function()
    return counter.calls


def calls_of(subject: Subject, direction: Direction, name: Backend, batch: int = _CALLS_BATCH) -> Counter[str]:
    """The calls of one pass with a backend."""
    inputs = inputs_of(subject, direction, batch, _CPU)
    run = differentiated(lambda: _call(subject, **inputs), inputs)
    with backend(name):
        run()  # makes the gradients of the outputs, which are no part of a pass
        return count_calls(run)


def calls_table() -> str:
    """Calls per pass, and for the network's forward pass of which operations."""
    lines = ["| | eager | native | of these diffgap's |", "|---|---:|---:|---:|"]
    for subject in (block(), network()):
        for direction in DIRECTIONS:
            eager, native = calls_of(subject, direction, "eager"), calls_of(subject, direction, "native")
            ours = sum(count for name, count in native.items() if name.startswith("diffgap::"))
            lines.append(f"| {subject.name} {direction} | {eager.total()} | {native.total()} | {ours} |")
    eager, native = calls_of(network(), "fwd", "eager"), calls_of(network(), "fwd", "native")
    lines += ["", "| in denoiser fwd | eager | native |", "|---|---:|---:|"]
    lines += [f"| {name} | {eager[name]} | {native[name]} |" for name in sorted({*eager, *native})]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Print the table of calls."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.denoiser", description="What the denoiser consists of.")
    parser.add_argument("--calls", action="store_true", required=True, help="operations called in each pass")
    parser.parse_args(argv)
    print(calls_table())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
