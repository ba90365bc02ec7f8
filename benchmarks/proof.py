"""``python -m benchmarks proof``: what every kernel compiles to, on every chip, and what the chip could do with it.

Nothing is launched. Each kernel is compiled with each configuration that ships (:mod:`benchmarks.compiled`); registers,
spills, shared memory, instructions and occupancy are *compiled*, read from machine code. The time of a call of a
benchmark's size is *modelled* (:mod:`benchmarks.work`): the slowest pipe of one named GPU of the chip at its published
rates, a lower bound. The exit status is 1 if a kernel spills, takes more shared memory than the chip gives a block,
lost its tensor-core instructions, or loads a product's operands by less than 16 bytes; each is named with its
configuration.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton
from diffgap.kernels.configs import is_amd

from benchmarks.aot import TARGETS, TORCH
from benchmarks.compiled import FAMILIES, MULTIPROCESSORS, Case, Compiled, cases, compile_case
from benchmarks.cuda_kernels import found_in
from benchmarks.gpus import OF_CHIP
from benchmarks.nvcc import NothingCompiled, build
from benchmarks.report import seconds
from benchmarks.work import Work, kernel_of, work_of
from diffgap._files import atomic_file

#: The CUDA kernels; the others are Triton's.
SCHEDULE = "schedule"

#: The family that an op's kernels are compiled with.
OPS = {
    **dict.fromkeys(("clip_loss", "siglip_loss", "similarity_ranks", "similarity_topk"), "contrastive"),
    **{"attention": "attention", "adaln": "adaln"},
    **dict.fromkeys(("q_sample", "solver_step", "normal"), SCHEDULE),
}
#: The tensor core's instruction, by chip.
_TENSOR = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma", "gfx950": "v_mfma"}
#: Rows of a tile from which on a warp group's instruction can multiply it.
_WARP_GROUP_ROWS = 64
#: Beside this file's folder: the page that the results are summed up on.
PAGE = Path(__file__).resolve().parents[1] / "docs" / "proof.md"


@dataclass(frozen=True)
class Row:
    """One kernel with one configuration for one chip; the fields are the keys of a JSON row.

    Attributes:
        config: Compile-time sizes, warps and stages.
        spilled_bytes: Local memory of a thread.
        shared_bytes: Of a block; ``shared_limit`` is what the chip gives one.
        tensor: The tensor-core instruction, of which there are ``tensor_instructions`` in the code.
        load_bytes: Of a thread's widest load from global memory; ``store_bytes`` of its widest store.
        blocks: That a multiprocessor holds at a time, for lack of ``limit`` no more.
        occupancy: Warps of these, of those that it can hold.
        faults: What the kernel shall not do.
        shape: Of the call that is modelled on ``gpu``.
        modelled_s: Seconds of the slowest ``pipe``.
        kind: Of all but the three fields before it, which are *modelled*.
    """

    family: str
    chip: str
    dtype: str
    size: str
    kernel: str
    config: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    shared_limit: int
    tensor: str
    tensor_instructions: int
    load_bytes: int
    store_bytes: int
    warps: int
    blocks: int
    limit: str
    occupancy: float
    faults: tuple[str, ...]
    shape: str
    gpu: str
    modelled_s: float
    pipe: str
    kind: str = "compiled"


def multiplies(compiled: Compiled) -> bool:
    """Whether the kernel computes a product: all but adaln's, the merge of parts, and the gradient from logits that
    were kept."""
    _, *variant, kernel = compiled.kernel.split("/")
    from_logits = kernel == "gradient" and variant[0].endswith("_logits")
    return compiled.case.family != "adaln" and kernel != "merge" and not from_logits


def tensor_instructions(compiled: Compiled) -> frozenset[str]:
    """Those by which the kernel may multiply; none where it must not."""
    case = compiled.case
    if not multiplies(compiled) or (case.dtype == "fp32" and not is_amd(case.chip)):
        return frozenset()
    wanted = {_TENSOR.get(case.chip, "HMMA")}
    if case.family == "attention" and not is_amd(case.chip):
        sizes = dict(part.split("=") for part in compiled.config.split())
        if int(sizes["BLOCK_M"]) < _WARP_GROUP_ROWS:
            wanted.add("HMMA")
    return frozenset(wanted)


def faults(compiled: Compiled) -> tuple[str, ...]:
    """What the kernel shall not do, in words."""
    code, chip = compiled.code, compiled.case.chip
    found = []
    if code.spilled_bytes:
        found.append(f"spills {code.spilled_bytes} bytes a thread")
    limit = MULTIPROCESSORS[chip].block_bytes
    if code.shared_bytes > limit:
        found.append(f"takes {code.shared_bytes} bytes of shared memory, and the chip gives a block {limit}")
    elif not compiled.blocks:
        found.append(f"does not fit on a multiprocessor for lack of {compiled.limit}")
    wanted = tensor_instructions(compiled)
    if wanted and code.tensor not in wanted:
        found.append(
            f"multiplies by {code.tensor or 'no tensor-core instruction'} instead of {' or '.join(sorted(wanted))}"
        )
    if not wanted and code.tensor:
        found.append(f"multiplies by {code.tensor}, which rounds its operands")
    if multiplies(compiled) and code.load_bytes < (wanted_bytes := _operand_bytes(compiled)):
        found.append(f"loads {code.load_bytes} bytes a thread at most, instead of {wanted_bytes}")
    return tuple(found)


def _operand_bytes(compiled: Compiled) -> int:
    """What a thread can load at a time of a tile of operands, all of which have a share: 16 bytes, or its share."""
    sizes = {name: int(size) for name, size in (part.split("=") for part in compiled.config.split())}
    tile = min(sizes["BLOCK_M"], sizes["BLOCK_N"]) * sizes["BLOCK_D"] * TORCH[compiled.case.dtype].itemsize
    return min(16, tile // (compiled.warps * (64 if is_amd(compiled.case.chip) else 32)))


def row_of(compiled: Compiled) -> Row:
    """The facts, the faults and the modelled time of a Triton kernel."""
    return _row(compiled, work_of(compiled, OF_CHIP[compiled.case.chip]), faults(compiled))


def _row(compiled: Compiled, work: Work, wrong: tuple[str, ...]) -> Row:
    case, code, gpu = compiled.case, compiled.code, OF_CHIP[compiled.case.chip]
    pipes = kernel_of(compiled, work, gpu).pipes(gpu)
    pipe = max(pipes, key=lambda name: pipes[name])
    return Row(
        *(case.family, case.chip, case.dtype, case.label, compiled.kernel, compiled.config),
        *(code.registers, code.spilled_bytes, code.shared_bytes, MULTIPROCESSORS[case.chip].block_bytes),
        *(code.tensor, code.tensor_instructions, code.load_bytes, code.store_bytes),
        warps=compiled.warps,
        blocks=compiled.blocks,
        limit=compiled.limit,
        occupancy=round(compiled.occupancy, 4),
        faults=wrong,
        shape=work.shape,
        gpu=gpu.name,
        modelled_s=float(f"{pipes[pipe]:.4g}"),
        pipe=pipe,
    )


def rows_of(of: Sequence[Case], ops: Sequence[str] = (), jobs: int = 1) -> Iterator[Row]:
    """The rows of some cases, of all ops or those named, compiled in ``jobs`` processes, with a line of progress for
    each case on stderr."""
    for number, (case, found) in enumerate(zip(of, _compiled(of, jobs), strict=True), 1):
        print(f"[{number}/{len(of)}] {case.family} {case.chip} {case.dtype} {case.label}", file=sys.stderr)
        for compiled in found:
            if not ops or compiled.kernel.split("/")[0].removesuffix("_backward") in ops:
                yield row_of(compiled)


def _compiled(of: Sequence[Case], jobs: int) -> Iterator[list[Compiled]]:
    if jobs == 1:
        yield from map(compile_case, of)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_case, of)


def cuda_rows(chips: Sequence[str], ops: Sequence[str] = ()) -> list[Row]:
    """The rows of the CUDA kernels on NVIDIA's chips.

    Raises:
        benchmarks.nvcc.NothingCompiled: there is no nvcc.
        RuntimeError: nvcc failed.
    """

    with tempfile.TemporaryDirectory() as folder:
        found = list(found_in(build(Path(folder)), [chip for chip in chips if not is_amd(chip)]))
    rows = [_row(*entry) for entry in found]
    return [row for row in rows if not ops or row.kernel.split("/")[0].removesuffix("_backward") in ops]


def complaints(rows: Sequence[Row]) -> list[str]:
    """One line for each fault, with the kernel and its configuration."""
    return [
        f"{row.kernel} on {row.chip}, {row.dtype} {row.size} ({row.config}): {fault}"
        for row in rows
        for fault in row.faults
    ]


def table(rows: Sequence[Row]) -> list[str]:
    """One line per kernel of a family on one chip."""
    names = ("registers", "spilled", "shared", "warps", "tensor", "load", "store", "occupancy", "limit", "time", "pipe")
    sizes_are = FAMILIES[rows[0].family].sizes_are if rows[0].family in FAMILIES else "size"
    lines = [f"| dtype | {sizes_are} | kernel | " + " | ".join(names) + " |"]
    lines.append("|---|---|---|" + "---:|" * (len(names) - 3) + "---|---:|---|")
    for row in rows:
        tensor = f"{row.tensor_instructions} {row.tensor}" if row.tensor else ""
        cells = [
            *(row.dtype, row.size, row.kernel, str(row.registers), f"{row.spilled_bytes} B", kib(row.shared_bytes)),
            *(str(row.warps), tensor, f"{row.load_bytes} B", f"{row.store_bytes} B", f"{row.occupancy:.0%}", row.limit),
            *(seconds(row.modelled_s), row.pipe),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def summary(rows: Sequence[Row]) -> list[str]:
    """The extremes of every family on every chip."""
    names = (
        *("kernels", "faults", "registers", "spilled", "shared", "chip's limit"),
        *("tensor", "load, at least", "occupancy"),
    )
    lines = ["| family | chip | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(names)]
    for family, chip in dict.fromkeys((row.family, row.chip) for row in rows):
        of = [row for row in rows if (row.family, row.chip) == (family, chip)]
        occupancies = [row.occupancy for row in of]
        cells = [
            *(str(len(of)), str(sum(len(row.faults) for row in of)), str(max(row.registers for row in of))),
            *(f"{max(row.spilled_bytes for row in of)} B", kib(max(row.shared_bytes for row in of))),
            *(kib(of[0].shared_limit), ", ".join(sorted({row.tensor for row in of} - {""}))),
            *(f"{min(row.load_bytes for row in of)} B", f"{min(occupancies):.0%} to {max(occupancies):.0%}"),
        ]
        lines.append(f"| {family} | {chip} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def kernels_table(rows: Sequence[Row]) -> list[str]:
    """Every kernel on every chip: the most that a configuration takes, and the largest call's time and pipe."""
    lines = ["| kernel | chip | configurations | registers | shared | tensor | occupancy | call | time | pipe |"]
    lines.append("|---|---|---:|---:|---:|---|---:|---|---:|---|")
    for kernel, chip in dict.fromkeys((row.kernel, row.chip) for row in rows):
        of = [row for row in rows if (row.kernel, row.chip) == (kernel, chip)]
        # In bfloat16 where there is one.
        longest = max(of, key=lambda row: (row.dtype == "bf16", row.modelled_s))
        cells = [
            *(kernel, chip, str(len(of)), str(max(row.registers for row in of))),
            *(kib(max(row.shared_bytes for row in of)), longest.tensor, f"{min(row.occupancy for row in of):.0%}"),
            *(f"{longest.shape} {longest.dtype}", seconds(longest.modelled_s), longest.pipe),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def kib(size: int) -> str:
    """Bytes as KiB."""
    return f"{size / 1024:.3g} KiB"


_EXPLAINED = """\
No GPU has run any of this. Registers, spilled bytes, shared memory, instructions, accesses and occupancy are
*compiled*: they are read from the machine code of each kernel with each configuration that ships
(`kernels/configs.py`), or they follow from it and the chip's published limits. Triton {triton} compiles the kernels,
through ptxas or LLVM, except those of the family `schedule`, which are CUDA C++ and compiled by nvcc.

Times are *modelled*. A pipe is a part of the GPU with a rate of its own: the tensor cores (`tensor`), the special
functions, FP32, integer, `load/store`, L2, `hbm` and the `launch` of a kernel. The time is that of the slowest pipe of
one GPU of the chip at its published rates, with instructions counted in the machine code (`benchmarks/work.py` has the
rules), those of `schedule` in branches that the call does not take included. Times are meant as lower bounds, and a GPU
may take much longer. `make gpu` times whole calls and each of these
kernels, and lists the modelled times that were off by more than a quarter.

The GPUs are

{gpus}.

Their rates were checked against the documents that `benchmarks/gpus.py` names, some of them only as others quote them.
For MI300X and MI355X no document gives the rate of the special functions, so times that these limit are provisional.

Registers and spilled bytes are per thread, shared memory and warps per block. `tensor` names the instruction of the
tensor cores. Where it has a number, this counts it in the code, in which the body of a loop appears once. On NVIDIA's
chips float32 has none, unless torch is told to multiply in TF32 (`tf32`); CDNA 4 has no TF32. `load` and `store` are
the widest accesses of global memory by a thread. `occupancy` is the share of a multiprocessor's warps that can be
resident at a time, and `limit` is what prevents more.

Every variant of a contrastive kernel is compiled: positives by ids, on the diagonal or none (`none`, a tile of another
rank), losses of the rows alone (`one_sided`), and logits that `memory_budget` lets `clip_loss` keep (`logits`). The
kernels do not depend on the numbers of rows, but for the kept logits, which can be accessed by 16 bytes only where the
rows are aligned; so there are two sizes. Attention is compiled with all of its options. It does not depend on the
numbers of tokens within a row of the tables, and a d that 8 does not divide is filled up with zeros; of the multiples
of 8 these are compiled: 16, 32, 40, 64, 80 and 128. `adaln` is compiled for the widths of the tables; a width that 16
does not divide takes narrower accesses, and its gradient spills above 8,192 features (144 to 288 bytes a thread at
10,000 on sm_80 and sm_100, compiled by hand on 2026-11-27).

A fault is a spill, more shared memory than the chip gives a block, a product without the tensor-core instruction that
its dtype should have, or an access of less than 16 bytes where a kernel should make one of 16.
"""

_OF_FAMILIES = """\
For each family and chip the table has the most registers, spilled bytes and shared memory that a kernel takes, the
shared memory that the chip gives a block, the smallest of the kernels' widest loads, and the range of occupancies.
"""


def _head(header: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    gpus = ", ".join(f"{OF_CHIP[chip].name} ({chip})" for chip in dict.fromkeys(row.chip for row in rows))
    wrong = complaints(rows)
    without = f", without {header['without']}" if "without" in header else ""
    verdict = f"{len(rows)} kernels{without}, {len(wrong)} faults" + (":" if wrong else ".")
    lines = [f"`{header['command']}`, {header['date']}", ""]
    lines += [_EXPLAINED.format(triton=header["versions"]["triton"], gpus=gpus)]
    if header["size"] == "ci":
        lines += ["Of sizes that share a configuration one is compiled (`--size ci`); `--size full` compiles all.", ""]
    lines += [verdict, "", *(f"- {line}" for line in wrong), *([""] if wrong else []), _OF_FAMILIES]
    return [*lines, *summary(rows)]


def to_markdown(header: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The extremes, then everything."""
    lines = ["# Proof: every kernel on every chip (compiled and modelled)", "", *_head(header, rows)]
    for family, chip in dict.fromkeys((row.family, row.chip) for row in rows):
        of = [row for row in rows if (row.family, row.chip) == (family, chip)]
        lines += [f"## {family} on {chip} (compiled; times modelled on {of[0].gpu})", "", *table(of)]
    return "\n".join(lines)


def to_page(header: Mapping[str, Any], rows: Sequence[Row], results: str) -> str:
    """``docs/proof.md``: the extremes, and a line for each kernel and chip."""
    lines = [
        "# Every kernel on every chip",
        "",
        "This page sums up what each kernel compiles to on each chip, with a lower bound of its time.",
        f"The rows of all configurations are in `benchmarks/results/{results}`.",
        "",
        *_head(header, rows),
        "## By kernel (compiled; times modelled)",
        "",
        "Registers and shared memory are the most that any configuration takes, and occupancy is the lowest. A call",
        "is the one with the longest modelled time, in bfloat16 where the kernel has it.",
        "",
        *kernels_table(rows),
        _HOW_TO,
    ]
    return "\n".join(lines)


_HOW_TO = """\
## On a GPU of your own

<!-- not run: needs a GPU, or compiles for minutes; tests/kernels compiles one row of equal ones -->

    make gpu                                 # its tests, all benchmarks, and the modelled times beside its own
    python -m benchmarks proof --chip sm_90  # the rows of one chip, every configuration; no GPU needed
    python -m benchmarks tune                # times other configurations and prints the rows for kernels/configs.py

If a change makes a kernel spill, lose its tensor-core instructions or take more shared memory than there is,
`tests/kernels/test_proof.py` fails and names the kernel and its configuration.
"""


def to_json(header: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """One object of ``header`` and ``rows``, one row a line."""
    of_rows = ",\n    ".join(json.dumps(asdict(row)) for row in rows)
    return f'{{\n  "header": {json.dumps(header)},\n  "rows": [\n    {of_rows}\n  ]\n}}\n'


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks proof", description="Compile every kernel for every chip, and examine and model it."
    )
    add = result.add_argument
    add("--chip", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="chips; all by default")
    add("--kernel", nargs="+", choices=list(OPS), default=[], help="ops whose kernels to compile; all by default")
    add("--size", choices=("ci", "full"), default="full", help="ci: one row of equal ones; full: every one (default)")
    add("--jobs", type=int, default=1, metavar="N", help="processes that compile (default: 1)")
    add("--json", type=Path, metavar="FILE", help="write FILE, and .md beside it")
    add("--page", action="store_true", help=f"with --json: write {PAGE.parent.name}/{PAGE.name} too")
    return result


def _without_folder(word: str, path: Path | None) -> str:
    """Of the path only the file's name: folders are the machine's own affair."""
    return path.name if path is not None and word == str(path) else word


def main(argv: Sequence[str]) -> int:
    """Print the tables, and write them with ``--json``; 1 if a kernel has a fault."""
    options = parser()
    args = options.parse_args(argv)
    if args.json is not None and args.json.suffix != ".json":
        options.error(f"--json: expected a name that ends in .json, got {args.json.name}")
    if args.page and args.json is None:
        options.error("--page: names the results that it sums up; give --json FILE too")
    if args.jobs < 1:
        options.error(f"--jobs: expected 1 or more, got {args.jobs}")
    header: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": " ".join(["python -m benchmarks proof", *(_without_folder(word, args.json) for word in argv)]),
        "versions": {"triton": triton.__version__, "torch": torch.__version__},
        "kind": "compiled, times modelled",
        "size": args.size,
    }
    families = list(dict.fromkeys(OPS[op] for op in args.kernel or OPS))
    of_triton = [family for family in families if family != SCHEDULE]
    rows = list(rows_of(cases(args.size, of_triton, args.chip), args.kernel, args.jobs))
    if SCHEDULE in families:
        try:
            rows += cuda_rows(args.chip, args.kernel)
        except NothingCompiled as error:
            header["without"] = f"the CUDA kernels ({error})"
            print(f"proof: without {header['without']}", file=sys.stderr)
    document = to_markdown(header, rows)
    print(document)
    if args.json is not None:
        texts = {args.json: to_json(header, rows), args.json.with_suffix(".md"): document}
        texts |= {PAGE: to_page(header, rows, args.json.name)} if args.page else {}
        for path, text in texts.items():
            with atomic_file(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
            print(f"wrote {path}", file=sys.stderr)
    wrong = complaints(rows)
    for line in wrong:
        print(f"proof: {line}", file=sys.stderr)
    return 1 if wrong else 0
