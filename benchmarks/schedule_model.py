"""A roofline model of noising and of solver steps on a named GPU: ours, diffusers' and the eager reference.

    time = sum over kernels of max over pipes (work / published rate)

with the pipes and rates of :mod:`benchmarks.model`, so every time is a lower bound, by the same rules for all. Launches
and bytes are counted, not estimated: each implementation runs once on the CPU, and torch's dispatcher tells what it is
asked for.

- An operation is one launch. It reads the tensors that it is given and writes those that it gives, whole; of an
  expanded tensor only what is there. One in place reads and writes its tensor.
- Views and allocations are no launches, nor is what gives less than a number for every sample: the schedulers keep
  their coefficients on the CPU, and if they did not, they would launch more.
- HBM is charged once for what a call is given or gives back, and for every touch of a tensor that L2 does not hold. The
  x0 that diffusers keeps for the next step is not charged, ours is.
- Our arithmetic is that of our CUDA kernels as compiled: an element's share of all instructions in their loops,
  branches that are not taken included, but for the sums over rows that ``x0_norm`` takes. Of the others' only normal
  numbers count, by their formula: in ten rounds of Philox4x32 two wide products, two exclusive ors and two additions to
  the key, for four numbers; a logarithm, a root, a sine and a cosine for two.

``python -m benchmarks.schedule_model [--chip CHIP ...] [--json FILE]`` prints the tables, all of kind ``modelled``.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from typing import Any

import torch
from diffgap.kernels.configs import is_amd
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import cases, floors, schedule
from benchmarks.attention_model import Launch, PerLogit, bound, kernels
from benchmarks.cases import Case, Outputs, Run
from benchmarks.denoiser import _NO_KERNEL
from benchmarks.gpus import OF_CHIP, Gpu
from benchmarks.model import LAUNCH_SECONDS, Implementation
from benchmarks.model_options import parse
from benchmarks.parts import arguments_of, tensors_in, written_by, written_names
from benchmarks.report import operation, operations, section, to_json, write
from benchmarks.runner import OURS, Result, Row
from diffgap.ops._dispatch import backend

#: With our CUDA kernels.
CHIPS = tuple(chip for chip in OF_CHIP if not is_amd(chip))
_CPU = torch.device("cpu")
#: What fills a tensor without reading it.
_FILLS = frozenset(f"aten::{name}_" for name in ("copy", "fill", "zero", "normal", "random", "uniform"))
_NORMAL = PerLogit(special=2, integer=15)
# Of csrc/cuda by nvcc 13.0 for sm_80 in float32 (sm_90 has up to 2% more, and the other chips are taken to have as
# many), counted like all SASS here: a number of normal_kernel, and what q_sample_kernel and step_kernel have besides.
_OUR_NORMAL = PerLogit(special=1, fp32=24, integer=35)
_OUR_ARITHMETIC = {
    "diffgap::q_sample": PerLogit(fp32=5, integer=17),
    "diffgap::solver_step": PerLogit(fp32=18, integer=31),
    "diffgap::solver_step_out": PerLogit(fp32=18, integer=31),
}


class Launches(TorchDispatchMode):
    """The launches of a call for some number of samples, with the tensors that each reads and writes.

    A tensor is named by where its elements lie and how often they were written, so that one overwritten is another.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self._samples = samples
        self._versions: Counter[tuple[int, ...]] = Counter()
        self._made: set[str] = set()
        self.sizes: dict[str, float] = {}
        self.launches: list[Launch] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        result = func(*args, **kwargs)
        written = written_by(func, args, kwargs) or tensors_in(result)
        if func.is_view or name in _NO_KERNEL or all(x.numel() < self._samples for x in written):
            return result
        reads = list(map(self.name_of, _read_by(func, args, kwargs)))
        self._versions.update({_place(x) for x in written})
        writes = list(map(self.name_of, written))
        self._made.update(writes)
        touches, arithmetic = " ".join(dict.fromkeys(reads + writes)), _arithmetic(func, args, kwargs)
        self.launches.append(Launch(name, touches, logits=written[0].numel(), per_logit=arithmetic))
        return result

    def name_of(self, x: Tensor) -> str:
        """Of the tensor as it is now; its bytes are noted."""
        place = _place(x)
        name = "-".join(map(str, (*place, self._versions[place])))
        self.sizes[name] = float(place[-1])
        return name

    def internal(self, kept: Sequence[Tensor]) -> str:
        """The names of what the call makes and does not give back."""
        return " ".join(self._made - set(map(self.name_of, kept)))


def _place(x: Tensor) -> tuple[int, int]:
    """Address, and bytes of the elements there are: of an expanded tensor fewer than it shows."""
    there = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride != 0]
    return x.data_ptr(), math.prod(there) * x.element_size()


def _read_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that a call reads: all but those that it only writes into."""
    name, values = func._schema.name, arguments_of(func, args, kwargs)
    written_only = () if name.endswith("_") and name not in _FILLS else written_names(func)
    return tensors_in([value for argument, value in values.items() if argument not in written_only])


def _arithmetic(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PerLogit:
    """Of an element that a launch gives."""
    name = func._schema.name
    if not name.startswith("diffgap::"):
        return _NORMAL if name == "aten::normal_" else PerLogit()
    own = _OUR_ARITHMETIC.get(name, PerLogit())
    if arguments_of(func, args, kwargs).get("seed") is None:
        return own
    return PerLogit(*(x + y for x, y in zip(own, _OUR_NORMAL, strict=True)))


@dataclass(frozen=True)
class Call:
    """What a call launches, the names of what it makes and does not give back, and its outputs."""

    launches: Launches
    internal: str
    outputs: Outputs

    def on(self, gpu: Gpu, name: str) -> Implementation:
        """Its kernels on a GPU."""
        return Implementation(name, kernels(gpu, self.launches.sizes, self.internal, *self.launches.launches), 0)


def recorded(run: Run, samples: int) -> Call:
    """A call, after one that sets up whatever is set up once."""
    run()
    with torch.no_grad(), Launches(samples) as launches:
        outputs = run()
    return Call(launches, launches.internal(outputs), outputs)


@dataclass(frozen=True)
class Counted:
    """A case: the bytes of our inputs and outputs, and each implementation's call."""

    name: str
    traffic: int
    calls: dict[str, Call]


def counted(case: Case) -> Counted:
    """Run every implementation once; compilers are left out, as what they would launch on a GPU is not known here."""
    inputs = case.inputs(_CPU)
    runs = cases.implementations(case, inputs, without=("compile", "torch_compile"))
    samples = len(next(cases.tensors(inputs)))
    with backend("native"):  # eager code and peers select for themselves, or have no use for it
        calls = {name: recorded(run, samples) for name, run in runs.items()}
    traffic = floors.traffic_bytes(cases.tensors(inputs), calls[OURS].outputs, case.dtype)
    return Counted(case.name, traffic, calls)


def modelled_cases() -> Iterator[Case]:
    """Noising with its noise, and guided steps, at the shapes of the measured tables."""
    for shape in schedule.NOISING_SHAPES["full"]:
        yield schedule.noising_case(*shape)
    for shape in schedule.STEP_SHAPES["full"]:
        for solver in schedule.SOLVERS:
            if solver.guided and solver.in_place:
                yield schedule.step_case(solver, *shape)


def model(gpu: Gpu, found: Iterable[Counted]) -> dict[Row, Implementation]:
    """Every case on one GPU, and what each time was computed from."""
    modelled = {}
    for case in found:
        for name, call in case.calls.items():
            entry, floor = call.on(gpu, name), case.traffic / gpu.hbm
            modelled[Row(case.name, name, entry.seconds(gpu), 0.0, None, floor, 0, gpu.name, "modelled")] = entry
    return modelled


def launches_table(gpu: Gpu, modelled: Mapping[Row, Implementation]) -> list[str]:
    """Launches, bytes beside the floor's, and the pipe that most of the time goes to."""
    lines = ["Launches, bytes through HBM (and over the floor's) and L2, and what bounds most:", ""]
    lines += ["| case | impl | launches | HBM, MB | L2, MB | bound |", "|---|---|---:|---:|---:|---|"]
    for row, entry in modelled.items():
        hbm, through_l2 = (sum(x) for x in zip(*((kernel.hbm, kernel.l2) for kernel in entry.kernels), strict=True))
        over = hbm / (row.floor_s * gpu.hbm)
        cells = [row.case.partition("/")[2], row.impl, str(len(entry.kernels)), f"{hbm / 1e6:,.2f} ({over:.2f}x)"]
        lines.append("| " + " | ".join([*cells, f"{through_l2 / 1e6:,.2f}", bound(gpu, entry)]) + " |")
    return [*lines, ""]


def to_markdown(header: Mapping[str, Any], modelled: Mapping[Gpu, Mapping[Row, Implementation]]) -> str:
    """Times beside one another, then what they were computed from."""
    lines = [
        f"# Modelled: noising and solver steps, {header['date']}",
        "",
        f"`{header['command']}`; diffusers {header['versions']['diffusers']}",
        "",
        "No GPU has run any of this. Each time is a lower bound, from published peak rates: the sum over kernels of "
        f"their slowest pipe, a launch of {LAUNCH_SECONDS * 1e6:.1f} µs among them. The floor moves inputs and outputs "
        "once. Launches and bytes are counted in a run on a CPU. Assumptions: `benchmarks/schedule_model.py`.",
        "",
    ]
    for gpu, of_gpu in modelled.items():
        for op in operations(list(of_gpu)):
            rows = {row: entry for row, entry in of_gpu.items() if operation(row) == op}
            lines += section(f"{op} on {gpu.name} (modelled)", list(rows), ())
            lines += launches_table(gpu, rows)
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Print the tables, and write them with ``--json``."""
    gpus, path, command = parse("benchmarks.schedule_model", argv, CHIPS)
    found = [counted(case) for case in modelled_cases()]
    modelled = {gpu: model(gpu, found) for gpu in gpus}
    header = {
        "date": date.today().isoformat(),
        "command": command,
        "versions": {"torch": torch.__version__, "diffusers": version("diffusers")},
        "kind": "modelled",
    }
    document = to_markdown(header, modelled)
    print(document)
    if path is not None:
        rows = Result([row for of_gpu in modelled.values() for row in of_gpu])
        for target in write(path, to_json(header, rows), document):
            print(f"wrote {target}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
