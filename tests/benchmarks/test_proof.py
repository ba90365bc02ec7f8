"""The proof: what is a fault, what a kernel's time is modelled from, and what is printed, written and returned."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks import __main__ as command
from benchmarks import cuda_kernels, nvcc, proof
from benchmarks.compiled import Case, Code, Compiled
from benchmarks.gpus import A100, B200, H100, L40S, MI300X, MI355X, OF_CHIP
from benchmarks.sass import LoopCounts
from benchmarks.work import Work, kernel_of, work_of

NONE = LoopCounts(0, 0, 0, 0, 0)
Build = Callable[..., Compiled]


def on(chip: str, dtype: Any = "bf16", family: str = "contrastive", size: tuple[int, ...] = (1024, 512)) -> Case:
    return Case(family, chip, dtype, size)


@pytest.fixture
def build() -> Build:
    def kernel(
        name: str = "clip_loss/diagonal/forward",
        case: Case | None = None,
        counts: tuple[LoopCounts, ...] = (NONE,),
        blocks: int = 1,
        **code: Any,
    ) -> Compiled:
        fields = {"registers": 200, "spilled_bytes": 0, "shared_bytes": 4096, "tensor": "HMMA"}
        fields |= {"tensor_instructions": 8, "load_bytes": 16, "narrowest_load_bytes": 4, "store_bytes": 16}
        config = "BLOCK_M=128 BLOCK_N=128 BLOCK_D=32 warps=8 stages=4"
        return Compiled(case or on("sm_80"), name, config, Code(**fields | code), 8, counts, blocks, "registers")

    return kernel


def test_a_kernel_without_faults(build: Build) -> None:
    assert proof.faults(build()) == ()
    assert proof.faults(build(case=on("sm_90"), tensor="HGMMA")) == ()
    assert proof.faults(build(case=on("gfx950"), tensor="v_mfma")) == ()
    for merge in ("clip_loss/ids/merge", "clip_loss_backward/diagonal_logits/gradient"):
        assert proof.faults(build(merge, tensor="", tensor_instructions=0, load_bytes=4)) == ()
    assert proof.faults(build(case=on("sm_80", "fp32"), tensor="", tensor_instructions=0)) == ()


@pytest.mark.parametrize(
    ("case", "changes", "fault"),
    [
        (on("sm_80"), {"spilled_bytes": 8}, "spills 8 bytes a thread"),
        (
            on("sm_86"),
            {"shared_bytes": 101377},
            "takes 101377 bytes .*, and the chip gives a block 101376",
        ),
        (on("gfx942"), {"shared_bytes": 65537, "tensor": "v_mfma"}, "takes 65537 bytes of shared memory, .* 65536"),
        (on("sm_80"), {"blocks": 0}, "does not fit on a multiprocessor for lack of registers"),
        (on("sm_80"), {"tensor": ""}, "multiplies by no tensor-core instruction instead of HMMA"),
        # A warp's instruction has half of the rate of a warp group's.
        (on("sm_90"), {"tensor": "HMMA"}, "multiplies by HMMA instead of HGMMA"),
        (on("sm_100"), {"tensor": "HMMA"}, "multiplies by HMMA instead of UTCHMMA"),
        (on("gfx950"), {"tensor": ""}, "multiplies by no tensor-core instruction instead of v_mfma"),
        (on("sm_80", "fp32"), {"tensor": "HMMA"}, "multiplies by HMMA, which rounds its operands"),
        (on("sm_80"), {"load_bytes": 8}, "loads 8 bytes a thread at most, instead of 16"),
    ],
)
def test_faults(build: Build, case: Case, changes: dict[str, Any], fault: str) -> None:
    (line,) = proof.complaints([proof.row_of(build(case=case, **changes))])
    head, _, said = line.partition("): ")
    assert head == f"clip_loss/diagonal/forward on {case.chip}, {case.dtype} 1024x512 ({build().config}"
    assert re.fullmatch(fault, said), said


@pytest.mark.parametrize(("rows", "wanted"), [(16, {"HGMMA", "HMMA"}), (64, {"HGMMA"})])
def test_small_tiles_of_attention_are_multiplied_by_warps(build: Build, rows: int, wanted: set[str]) -> None:
    case = on("sm_90", family="attention", size=(16, 16, 64))
    kernel = replace(build("attention/all/short_forward", case), config=f"BLOCK_M={rows} BLOCK_N=16 warps=2 stages=1")
    assert proof.tensor_instructions(kernel) == wanted
    assert proof.tensor_instructions(replace(kernel, case=case._replace(chip="gfx942"))) == {"v_mfma"}
    # CDNA multiplies float32 in its matrix cores.
    assert proof.tensor_instructions(replace(kernel, case=case._replace(chip="gfx942", dtype="fp32"))) == {"v_mfma"}
    assert proof.tensor_instructions(replace(kernel, case=case._replace(dtype="fp32"))) == set()


def test_a_tile_without_16_bytes_for_each_thread_is_loaded_by_its_shares(build: Build) -> None:
    """256 threads have 8 of the 2,048 bytes of 32 rows of 16 numbers."""
    case = on("sm_80", "fp32", "attention", (256, 256, 16))
    for loaded, said in ((8, ()), (4, ("loads 4 bytes a thread at most, instead of 8",))):
        kernel = build("attention/all/long_forward", case, tensor="", tensor_instructions=0, load_bytes=loaded)
        assert proof.faults(replace(kernel, config="BLOCK_M=32 BLOCK_N=32 BLOCK_D=16 CHUNK=16 warps=8")) == said


def test_pipes_of_a_kernel_by_hand(build: Build) -> None:
    """1,080 programs of 8 warps: 3 turns of the outer loop, 5 of the inner one in each."""
    counts = (replace(NONE, mufu=7), replace(NONE, fp32=2, integer=1), LoopCounts(8, 1, 0, 0, 4))
    warps, clocks = 1080 * 8, A100.multiprocessors * A100.clock
    kernel = kernel_of(build(counts=counts), Work("", 1080, (3, 5), 312e9, 2.039e9, 5120.0, 2), A100)
    pipes = kernel.pipes(A100)
    assert pipes["tensor"] == pytest.approx(1e-3) and pipes["hbm"] == pytest.approx(1e-3)
    assert pipes["special"] == pytest.approx(warps * 32 * (7 + 15) / (16 * clocks))
    assert pipes["fp32"] == pytest.approx(warps * 32 * (3 * 2) / (64 * clocks))
    assert pipes["integer"] == pytest.approx(warps * 32 * 3 / (64 * clocks))
    # 16 bytes a lane in the product's loop, four clocks of 128 bytes a warp.
    assert pipes["load/store"] == pytest.approx(warps * 15 * 4 * 4 / clocks)
    assert pipes["l2"] == pytest.approx(1 / A100.clock) and pipes["launch"] == 2 * 2.5e-6
    # Loops without products may stand within others, or beside the products' own.
    beside = kernel_of(build(counts=(*counts, replace(NONE, load_store=2))), Work("", 1080, (3, 5), 1.0), A100)
    assert beside.load_store_clocks == warps * (15 * 4 * 4 + 15 * 2)
    # Without a tensor core the products are among the instructions; elsewhere a load has 4 bytes a lane.
    plain = kernel_of(build(counts=counts, tensor="", tensor_instructions=0), Work("", 1080, (3, 5)), A100)
    assert plain.flops == 0.0 and plain.pipes(A100)["load/store"] == pytest.approx(warps * 15 * 4 / clocks)
    # A warp of 64 lanes.
    wide = kernel_of(build(case=on("gfx950"), counts=counts), Work("", 1080, (3, 5)), MI355X)
    assert wide.special == 2 * kernel.special


def test_work_of_the_losses_by_hand(build: Build) -> None:
    """8192 x 512 in bfloat16 is 8 MiB a side; 10 x 10 programs have 64 x 64 tiles of 128 x 128 on an A100."""
    work = work_of(build(), A100)
    side, pairs = 8192 * 512 * 2, 8192**2
    assert (work.shape, work.programs, work.trips) == ("8192x512", 100, (6.4, 6.4, 16.0))
    assert (work.flops, work.hbm, work.l2) == (2 * pairs * 512, 2 * side, 64 * 64 * 256 * 512 * 2)
    # A10's 6 MiB of L2 do not hold them: one side is read for each column of tiles.
    small = work_of(build(case=on("sm_86")), OF_CHIP["sm_86"])
    assert small.hbm == side * (1 + small.trips[0])
    gradient = work_of(build("clip_loss_backward/diagonal/gradient"), A100)
    # Macro tiles of 64 MiB have 5760 columns, and as many rows as fit.
    assert gradient.trips == (16.0,) and gradient.programs == 64 * 128 and gradient.flops == work.flops
    assert gradient.launches == 4 and gradient.hbm == 2 * pairs + side * 3
    kept = work_of(build("clip_loss_backward/diagonal_logits/gradient"), A100)
    assert (kept.flops, kept.trips, kept.hbm) == (0.0, (), (4 + 2) * pairs)
    assert work_of(build("siglip_loss/diagonal/pairs"), A100).hbm == side * 3
    # With logits to keep a tile has 64 columns, of which there are twice as many; they are written once.
    keeps = work_of(build("clip_loss/diagonal_logits/forward"), A100)
    assert (keeps.programs, keeps.trips, keeps.flops) == (100, (12.8, 6.4, 16.0), work.flops)
    assert keeps.hbm == 2 * side + 4 * pairs
    # As many tiles for a row less.
    odd = work_of(build(case=on("sm_80", size=(1001, 512))), A100)
    assert (odd.shape, odd.trips, odd.flops) == ("8191x512", work.trips, work.flops)
    assert odd.hbm == 2 * 8191 * 512 * 2


def test_work_of_retrieval_by_hand(build: Build) -> None:
    compare = work_of(build("similarity_ranks/ids/compare"), A100)
    # 32 blocks of queries and 391 of the gallery; 4 x 108 programs make 14 groups.
    assert (compare.programs, compare.trips) == (32 * 14, (391 / 14, 16.0))
    assert compare.flops == 2 * (32 * 128) * (391 * 128) * 512
    best = work_of(build("similarity_topk/k=10/best_of_group"), A100)
    assert best.hbm == 2 * 512 * 54096 + 8 * 391 * 4096 and best.programs == 32 * 391
    assert work_of(build("similarity_ranks/ids/best_positive"), A100).flops == 2 * 32 * 128 * 128 * 512


def test_work_of_attention_by_hand(build: Build) -> None:
    q = 1024 * 8 * 16 * 64 * 2
    case = on("sm_90", family="attention", size=(16, 16, 64))
    forward = work_of(build("attention/all/short_forward", case), H100)
    assert (forward.programs, forward.hbm, forward.flops) == (8192, 4 * q, 2 * 2 * 8192 * 16 * 16 * 64)
    backward = work_of(build("attention_backward/all/short_backward", case), H100)
    assert (backward.hbm, backward.flops) == (7 * q, 5 * 2 * 8192 * 16 * 16 * 64)
    # Four samples of four tokens share a tile.
    packed = work_of(build("attention/all/short_forward", case._replace(size=(4, 4, 64))), H100)
    assert (packed.programs, packed.shape) == (2048, "1024x4x4x8x64")
    case, q, lse = case._replace(size=(256, 128, 64)), 1024 * 8 * 256 * 64 * 2, 1024 * 8 * 256 * 4
    long = work_of(build("attention/all/long_forward", case), H100)
    assert (long.programs, long.trips, long.hbm) == (8192 * 4, (2, 1.0), 2 * q + q + lse)
    keys = work_of(build("attention_backward/all/long_backward_keys", case), H100)
    assert (keys.programs, keys.trips, keys.flops) == (8192 * 2, (8, 1.0), 4 * 2 * 8192 * 256 * 128 * 64)


def test_work_of_adaln_by_hand(build: Build) -> None:
    case, tensor, row = on("sm_80", family="adaln", size=(1024,)), 16 * 256 * 1024 * 2, 16 * 1024 * 2
    forward = work_of(build("adaln/gated/forward", case), A100)
    assert (forward.programs, forward.hbm) == (4096, 4 * tensor + 3 * row)
    assert work_of(build("adaln/first/forward", case), A100).hbm == 2 * tensor + 2 * row
    # Four tokens a program, 64 parts of three sums.
    backward = work_of(build("adaln_backward/gated/backward", case), A100)
    assert (backward.programs, backward.trips) == (16 * 64, (4.0,))
    assert backward.hbm == 6 * tensor + 3 * 4 * 16 * 64 * 1024
    assert work_of(build("adaln_backward/per_token/backward", case), A100).hbm == 11 * tensor
    merge = work_of(build("adaln_backward/gated/merge", case), A100)
    assert (merge.programs, merge.trips, merge.hbm) == (16 * 2, (64,), 4 * 16 * 64 * 1024 + row)


def test_the_time_is_that_of_the_slowest_pipe(build: Build) -> None:
    case = on("sm_80", family="adaln", size=(1024,))
    row = proof.row_of(build("adaln/gated/forward", case, tensor="", tensor_instructions=0))
    assert (row.gpu, row.shape, row.pipe) == ("A100-SXM4-80GB", "16x256x1024", "hbm")
    assert row.modelled_s == pytest.approx((4 * 16 * 256 * 1024 * 2 + 3 * 16 * 1024 * 2) / 2.039e12, rel=1e-3)
    assert row.kind == "compiled" and row.occupancy == 8 / 64 and row.faults == ()


def cuda_kernel(*instructions: str, local_bytes: int = 0) -> nvcc.Kernel:
    return nvcc.Kernel(40, 0, local_bytes, [*instructions])


#: Of one multiprocessor and clock: dense operations in bfloat16 with float32 accumulation.
OPERATIONS = {"sm_80": 2048, "sm_86": 1024, "sm_89": 1024, "sm_90": 4096, "sm_100": 8192, "sm_120": 512}
OPERATIONS |= {"gfx942": 2048, "gfx950": 4096}
#: Published, in float32 without tensor cores; H100's is at another clock than its products'.
FP32 = {"sm_80": 19.5e12, "sm_86": 31.2e12, "sm_89": 91.6e12, "sm_90": 67e12 * 1.83 / 1.98, "sm_100": 75e12}
FP32 |= {"sm_120": 104.8e12, "gfx942": 163.4e12, "gfx950": 157.3e12}


@pytest.mark.parametrize("chip", OF_CHIP)
def test_published_rates_fit_units_and_clock(chip: str) -> None:
    gpu = OF_CHIP[chip]
    made = gpu.multiprocessors * gpu.clock * OPERATIONS[chip]
    # B200's products have a lower clock, which is not published.
    assert gpu.bf16 == pytest.approx(made, rel=0.06 if gpu is B200 else 2e-3)
    assert gpu.tf32 == pytest.approx(gpu.bf16 / 2 if gpu is not MI355X else 0.0, rel=2e-3)
    assert gpu.matrix_fp32 == pytest.approx(FP32[chip], rel=1e-2)


def test_rates_that_differ_from_those_of_like_gpus() -> None:
    assert L40S.bf16 == 733e12 / 2
    assert (B200.hbm, B200.l2_bytes) == (7.7e12, 132_644_864)
    assert MI355X.special == 2 * MI300X.special


def test_cuda_kernels_are_read_and_modelled(monkeypatch: pytest.MonkeyPatch) -> None:
    vector = ["LDG.E.128", "LDG.E", "LDG.E.128", "FFMA", "FFMA", "MUFU.RSQ", "STG.E.128", "STG.E.128"]
    kernels = {
        ("_Z15q_sample_kernelIfLb1EEvT_", "sm_80"): cuda_kernel(*vector),
        ("_Z15q_sample_kernelIfLb1EEvT_", "sm_90"): cuda_kernel(*vector),
        ("_Z11step_kernelI4HalfLb1EEvT_", "sm_80"): cuda_kernel("STG.E.U16", local_bytes=8),
    }
    names = {"_Z15q_sample_kernelIfLb1EEvT_": "q_sample_kernel<float, true>"}
    names |= {"_Z11step_kernelI4HalfLb1EEvT_": "step_kernel<Half, true>"}
    monkeypatch.setattr(cuda_kernels, "read_kernels", lambda file: kernels)
    monkeypatch.setattr(cuda_kernels, "readable", lambda mangled: {name: names[name] for name in mangled})
    found = [proof._row(*entry) for entry in cuda_kernels.found_in([Path("_C.so")], ["sm_80", "sm_89", "sm_90"])]
    # sm_89 runs the code of sm_80.
    assert [(row.chip, row.kernel, row.dtype) for row in found] == [
        ("sm_80", "solver_step/step_kernel<Half,true>", "fp16"),
        ("sm_80", "q_sample/q_sample_kernel<float,true>", "fp32"),
        ("sm_89", "solver_step/step_kernel<Half,true>", "fp16"),
        ("sm_89", "q_sample/q_sample_kernel<float,true>", "fp32"),
        ("sm_90", "q_sample/q_sample_kernel<float,true>", "fp32"),
    ]
    wrong, right = found[:2]
    assert [fault.partition(" by ")[0] for fault in wrong.faults] == [
        "keeps 8 bytes a thread in local memory",
        "accesses global memory",
    ]
    assert (right.load_bytes, right.store_bytes, right.faults, right.warps) == (16, 16, (), 4)
    # x0 is read, x_t and the target are written; 12 blocks of four warps fit by their registers.
    assert (right.shape, right.pipe, right.occupancy) == ("q_sample/4096x1024", "hbm", 0.75)
    assert right.modelled_s == pytest.approx(3 * 4096 * 1024 * 4 / 2.039e12, rel=1e-3)


def test_the_proof_without_nvcc_says_so(
    build: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(folder: Path) -> list[Path]:
        raise nvcc.NothingCompiled("nothing is compiled here, which takes nvcc")

    monkeypatch.setattr(proof, "build", no_compiler)
    code, asked = run(build, monkeypatch, "--chip", "sm_90", "--kernel", "q_sample", "clip_loss", "--size", "ci")
    assert code == 0 and {case.family for case in asked} == {"contrastive"}
    printed = capsys.readouterr()
    assert "12 kernels, without the CUDA kernels (nothing is compiled here, which takes nvcc), 0 faults" in printed.out
    assert "proof: without the CUDA kernels" in printed.err


def run(build: Build, monkeypatch: pytest.MonkeyPatch, *argv: str, **changes: Any) -> tuple[int, list[Case]]:
    asked: list[Case] = []
    names = ("clip_loss/diagonal/forward", "clip_loss_backward/diagonal/gradient", "similarity_ranks/ids/compare")

    def compile_case(case: Case) -> list[Compiled]:
        asked.append(case)
        tensor = {"sm_90": "HGMMA"}.get(case.chip, "HMMA") if case.dtype != "fp32" else ""
        return [build(name, case, tensor=tensor, **changes) for name in names]

    monkeypatch.setattr(proof, "compile_case", compile_case)
    return command.main(["proof", *argv]), asked


def test_main_prints_and_writes(
    build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(proof, "PAGE", tmp_path / "docs.md")
    path = tmp_path / "proof.json"
    argv = ("--chip", "sm_90", "sm_80", "--kernel", "clip_loss", "--json", str(path), "--page")
    code, asked = run(build, monkeypatch, *argv)
    assert code == 0
    assert [(case.chip, case.dtype, case.size[0]) for case in asked] == [
        (chip, dtype, rows)
        for chip in ("sm_90", "sm_80")
        for dtype in ("bf16", "fp16", "fp32", "tf32")
        for rows in (1024, 1001)
    ]
    printed = capsys.readouterr().out
    assert path.with_suffix(".md").read_text(encoding="utf-8").strip() == printed.strip()
    assert "32 kernels, 0 faults." in printed and "No GPU has run any of this" in printed and "measured" not in printed
    assert "## contrastive on sm_90 (compiled; times modelled on H100-SXM5-80GB)" in printed
    assert "--json proof.json --page`" in printed and str(tmp_path) not in printed
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert {row["kernel"].split("/")[0] for row in rows} == {"clip_loss", "clip_loss_backward"}
    assert all(row["kind"] == "compiled" and row["modelled_s"] > 0 for row in rows)
    page = (tmp_path / "docs.md").read_text(encoding="utf-8")
    assert "`benchmarks/results/proof.json`" in page
    assert page.count("| clip_loss/diagonal/forward | sm_80 | 8 |") == 1 and "similarity" not in page
    assert len(list(tmp_path.iterdir())) == 3


def test_the_page_is_made_from_the_newest_results() -> None:
    path = max((proof.PAGE.parents[1] / "benchmarks" / "results").glob("proof-*.json"))
    results = json.loads(path.read_text(encoding="utf-8"))
    rows = [proof.Row(**{**row, "faults": tuple(row["faults"])}) for row in results["rows"]]
    assert proof.PAGE.read_text(encoding="utf-8") == proof.to_page(results["header"], rows, path.name)


def test_main_fails_by_name(build: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--chip", "sm_80", "--kernel", "similarity_ranks", "--size", "ci")
    code, _ = run(build, monkeypatch, *argv, spilled_bytes=12)
    assert code == 1
    printed = capsys.readouterr()
    assert "Of sizes that share a configuration one is compiled" in printed.out
    line = f"similarity_ranks/ids/compare on sm_80, bf16 1024x512 ({build().config}): spills 12 bytes a thread"
    assert f"proof: {line}" in printed.err and f"- {line}" in printed.out and "6 kernels, 6 faults:" in printed.out


@pytest.mark.parametrize(
    "argv",
    [
        ["--chip", "sm_70"],
        ["--kernel", "flash"],
        ["--json", "proof.txt"],
        ["--page"],
        ["--size", "tiny"],
        ["--jobs", "0"],
    ],
)
def test_main_rejects_what_it_does_not_know(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["proof", *argv])
    assert stopped.value.code == 2
