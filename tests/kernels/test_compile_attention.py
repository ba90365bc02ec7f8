"""Every kernel of attention compiles for every chip without a GPU, and its machine code is as intended."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton", reason="the kernels need triton: pip install triton")

from diffgap.kernels._attention_configs import config_for
from diffgap.kernels._tiles import Product

from benchmarks.aot import TARGETS, attention_kernels
from benchmarks.sass import resources, sass
from tests.kernels.chips import NVIDIA, SHARED_BYTES, TENSOR, WIDE_LOAD, WIDE_LOAD_NVIDIA


class Case(NamedTuple):
    chip: str
    product: Product
    n: int
    d: int
    plain: bool = False


@dataclass(frozen=True)
class Facts:
    """What the machine code of one kernel uses and holds."""

    spilled_bytes: int
    shared_bytes: int
    multiplies_in_tensor_cores: bool
    has_wide_loads: bool
    #: Mnemonics of NVIDIA's loads and stores of global memory.
    accesses: frozenset[str]


# Every bucket of the short path, the long path, and both ends of d; of float32 where a row of the table is fullest.
_SIZES: dict[Product, list[tuple[int, int]]] = {
    "half": [
        *((n, 64) for n in (4, 8, 16, 32, 64, 256)),
        (16, 16),
        (16, 128),
        (32, 80),
        (32, 128),
        (64, 80),
        (64, 128),
        (256, 128),
    ],
    "ieee": [(4, 64), (16, 64), (32, 64), (64, 128), (256, 64), (256, 128)],
    "tf32": [(16, 64), (32, 64), (64, 128), (256, 128)],
}
CASES = [Case(chip, product, n, d) for chip in TARGETS for product, sizes in _SIZES.items() for n, d in sizes]
PLAIN_CASES = [Case(chip, "half", n, 64, True) for chip in TARGETS for n in (4, 16, 256)]


def examine(case: Case) -> dict[str, Facts]:
    """Compile a case's kernels and read their machine code."""
    kernels = attention_kernels(case.chip, case.product, case.n, case.n, case.d, case.plain)
    return {
        name: (_nvidia_facts if case.chip in NVIDIA else _amd_facts)(kernel, case) for name, kernel in kernels.items()
    }


def _nvidia_facts(kernel: Any, case: Case) -> Facts:
    usage, code = resources(kernel), sass(kernel)
    config = config_for(case.chip, case.product, case.n, case.n, case.d, "forward")
    # A tile of fewer rows than a warp group's instruction takes is multiplied by those of a warp.
    tensor = TENSOR[case.chip] if config.block_m >= 64 else rf"{TENSOR[case.chip]}|\bHMMA\."
    return Facts(
        usage.local_bytes,
        usage.shared_bytes,
        bool(re.search(tensor, code)),
        bool(re.search(WIDE_LOAD_NVIDIA, code)),
        frozenset(re.findall(r"\b(?:LDG|LDGSTS|STG)\.\S+", code)),
    )


def _amd_facts(kernel: Any, case: Case) -> Facts:
    code = kernel.asm["amdgcn"]
    spilled = [re.search(rf"\.{name}: +(\d+)\b", code) for name in ("vgpr_spill_count", "private_segment_fixed_size")]
    return Facts(
        sum(int(found[1]) for found in spilled if found is not None) if all(spilled) else -1,
        kernel.metadata.shared,
        bool(re.search(TENSOR[case.chip], code)),
        bool(re.search(WIDE_LOAD[case.chip], code)),
        frozenset(),
    )


@pytest.fixture(scope="module")
def examined() -> Iterator[Mapping[Case, Future[dict[str, Facts]]]]:
    """All cases, compiled in as many processes as there are processors."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "what is interpreted cannot be compiled"
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        yield {case: pool.submit(examine, case) for case in (*CASES, *PLAIN_CASES)}
        pool.shutdown(cancel_futures=True)


def kernels_of(case: Case) -> set[str]:
    """The kernels that a forward and a backward pass launch."""
    length = {"short_forward", "short_backward"}
    if case.n > 64:
        length = {"long_forward", "long_backward_queries", "long_backward_keys"}
    return length


@pytest.mark.parametrize("case", [*CASES, *PLAIN_CASES], ids=lambda case: "-".join(map(str, case)))
def test_kernels_compile(case: Case, examined: Mapping[Case, Future[dict[str, Facts]]]) -> None:
    found = examined[case].result()
    assert {name.split("/")[-1] for name in found} == kernels_of(case)
    for name, facts in found.items():
        assert facts.spilled_bytes == 0, f"{name} spills: {facts}"
        assert facts.shared_bytes <= SHARED_BYTES[case.chip], f"{name}: {facts}"
        assert facts.has_wide_loads, f"{name}: no 16-byte loads"
        # IEEE float32 has no tensor core but CDNA 3's.
        wanted = case.product != "ieee" or case.chip == "gfx942"
        assert facts.multiplies_in_tensor_cores == wanted, f"{name}: tensor-core instructions"


@pytest.mark.parametrize("case", [c for c in PLAIN_CASES if c.chip in NVIDIA and c.n <= 64], ids=str)
def test_every_access_of_the_short_path_is_of_16_bytes(
    case: Case, examined: Mapping[Case, Future[dict[str, Facts]]]
) -> None:
    for name, facts in examined[case].result().items():
        assert facts.accesses == {"LDG.E.128", "STG.E.128"}, f"{name}: {facts}"
