"""Every kernel compiles for every chip without a GPU, with every configuration that ships, and none has a fault: no
spills, tensor-core instructions, 16-byte loads, no more shared memory than there is."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor

import pytest

pytest.importorskip("triton", reason="the kernels need triton: pip install triton")

from diffgap.kernels.configs import is_amd

from benchmarks.aot import TARGETS, adaln_kernels, attention_kernels, contrastive_kernels
from benchmarks.compiled import Case, Compiled, cases, compile_case
from benchmarks.proof import complaints, row_of
from benchmarks.sass import sass

Examined = Mapping[Case, Future[list[Compiled]]]
CASES = cases("ci")
NVIDIA = [chip for chip in TARGETS if not is_amd(chip)]


@pytest.fixture(scope="module")
def examined(request: pytest.FixtureRequest) -> Iterator[Examined]:
    """The cases of the tests that were selected, compiled in as many processes as there are processors."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "what is interpreted cannot be compiled"
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    wanted = {found["case"] for found in parameters if isinstance(found.get("case"), Case)}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        yield {case: pool.submit(compile_case, case) for case in CASES if case in wanted}
        pool.shutdown(cancel_futures=True)


def name_of(case: Case) -> str:
    return "-".join([*case[:3], case.label])


def kernels_of(case: Case) -> set[str]:
    """The kernels that a case has at least, by the ends of their names."""
    if case.family == "attention":
        if max(case.size[:2]) <= 64:
            return {"short_forward", "short_backward"}
        return {"long_forward", "long_backward_queries", "long_backward_keys"}
    if case.family == "adaln":
        return {"forward", "backward", "merge"}
    if case.launches and all(name.endswith("_logits") for name in case.launches):
        return {"forward", "merge", "gradient"}
    return {"forward", "merge", "gradient", "pairs", "best_positive", "compare", "best_of_group", "keys_of_groups"}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_no_kernel_has_a_fault(case: Case, examined: Examined) -> None:
    found = examined[case].result()
    assert {kernel.kernel.split("/")[-1] for kernel in found} == kernels_of(case)
    assert complaints([row_of(kernel) for kernel in found]) == []


@pytest.mark.parametrize("case", [case for case in CASES if case.family == "adaln"], ids=name_of)
def test_adaln_moves_16_bytes_a_thread(case: Case, examined: Examined) -> None:
    for found in examined[case].result():
        # AMD's merge has 8 elements a thread, in float32 of two threads' columns.
        if not found.kernel.endswith("/merge"):
            assert found.code.narrowest_load_bytes == found.code.store_bytes == 16, found.kernel
        elif not is_amd(case.chip):
            assert found.code.narrowest_load_bytes == 16, found.kernel


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.dtype == "bf16" and case.size == (1024, 512) and case.chip in NVIDIA],
    ids=name_of,
)
def test_the_product_is_the_hottest_loop(case: Case, examined: Examined) -> None:
    """The loop over the width has the products and 16-byte loads, and no exponential."""
    (forward,) = [x for x in examined[case].result() if x.kernel == "clip_loss/diagonal/forward"]
    loop = forward.counts[-1]
    outside = [level for level in forward.counts if level is not loop]
    assert loop.tensor > 0 and loop.load_store > 0 and loop.mufu == loop.fp32 == 0
    # Two exponentials a pair in each of the 32 lanes of all warps.
    sizes = dict(part.split("=") for part in forward.config.split())
    pairs = int(sizes["BLOCK_M"]) * int(sizes["BLOCK_N"])
    assert sum(level.mufu for level in outside) >= 2 * pairs // (32 * forward.warps)


@pytest.mark.parametrize("n", [4, 16])
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_every_access_of_the_short_path_is_of_16_bytes(chip: str, n: int) -> None:
    """Without options, which are read number by number."""
    for name, kernel in attention_kernels(chip, "bf16", n, n, 64, plain=True).items():
        accesses = set(re.findall(r"\b(?:LDG|LDGSTS|STG)\.\S+", sass(kernel)))
        assert accesses == {"LDG.E.128", "STG.E.128"}, f"{name}: {accesses}"


@pytest.mark.parametrize("chip", NVIDIA)
def test_float32_logits_are_rounded_before_the_largest_is_subtracted(chip: str) -> None:
    """As many subtractions as of logits that are loaded: none is fused with the product of the scale."""
    names = [f"clip_loss_backward/{variant}" for variant in ("diagonal", "diagonal_logits")]
    kernels = contrastive_kernels(chip, "fp32", launches=names)
    computed, loaded = (len(re.findall(r"\bsub\S*\.f32", kernels[f"{name}/gradient"].asm["ptx"])) for name in names)
    assert computed == loaded > 0


@pytest.mark.parametrize("chip", ["sm_80", "gfx942"])
@pytest.mark.parametrize("width", [1, 7, 100, 1000])
def test_adaln_compiles_for_widths_that_are_no_power_of_two(chip: str, width: int) -> None:
    assert len(adaln_kernels(chip, "fp16", width)) == 7
