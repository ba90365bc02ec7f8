"""The families attention, adaln and denoiser, and the modelled attention of GPUs; never a duration."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import adaln, attention, cases, denoiser, floors, runner
from benchmarks.cases import DIRECTIONS, DTYPES, Case, Direction
from benchmarks.denoiser import count_calls
from benchmarks.gpus import A100, GPUS, H100, OF_CHIP, Gpu
from diffgap.models.settings import BridgeSettings
from diffgap.ops._dispatch import explain
from tests.benchmarks.toys import CLOCK, QUICK
from tests.helpers import relative_l2

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
pytestmark = pytest.mark.usefixtures("uncompiled")
SMALL = BridgeSettings(width=24, tokens=3, denoiser_width=16, depth=2, heads=2)
NATIVE = {choice.op for choice in explain() if choice.device == "cpu" and choice.backend == "native"}


def small_case(direction: Direction, dtype: str = "fp32", option: str | None = None) -> Case:
    return attention.attention_case(direction, 2, 7, 19, dtype, option, heads=2, head_dim=24)


SMALL_CASES = (
    *(
        small_case(direction, dtype, option)
        for direction in DIRECTIONS
        for dtype in DTYPES
        for option in (None, "norm", "mask")
    ),
    *(adaln.adaln_case(direction, (3, 5, 24), dtype) for direction in DIRECTIONS for dtype in DTYPES),
    *(
        denoiser.denoiser_case(subject(SMALL), direction, 3)
        for subject in (denoiser.block, denoiser.network)
        for direction in DIRECTIONS
    ),
)


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_case_passes_the_gate(case: Case) -> None:
    """Every peer that is installed computes what we do, and only then is timed."""
    result = runner.run_case(case, CPU, CLOCK, QUICK)
    assert not result.failures
    present = {peer.name for peer in case.on(CPU).peers if not peer.missing}
    assert {row.impl for row in result.rows} == {"diffgap", "eager", "compile", *present} - set(case.infeasible(CPU))


@pytest.mark.parametrize("option", ["norm", "mask"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_oracle_by_slices_of_the_batch_is_that_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, direction: Direction, option: str
) -> None:
    case = attention.attention_case(direction, 5, 6, 19, "fp32", option, heads=2, head_dim=24)
    whole = cases.oracle(replace(case, expected=None), case.inputs(CPU))
    taken: list[int] = []
    reference = attention.attention

    def call(**inputs: Tensor) -> Tensor:
        taken.append(len(inputs["q"]))
        return reference(**inputs)

    monkeypatch.setattr(attention, "attention", call)
    monkeypatch.setattr(attention, "_ORACLE_LOGITS", 2 * (2 * 6 * 19) + 1)
    slices = cases.oracle(case, case.inputs(CPU))
    assert taken == [2, 2, 1]
    for ours, expected in zip(slices, whole, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", [attention, adaln, denoiser])
@pytest.mark.parametrize("size", ["ci", "full"])
def test_names_differ(family: ModuleType, size: str) -> None:
    names = [case.name for case in family.cases(size)]
    assert len(set(names)) == len(names) > 0


def test_full_size_has_the_cases_of_the_tables() -> None:
    names = {case.name for family in (attention, adaln, denoiser) for case in family.cases("full")}
    lengths = ("4x4", "8x8", "16x16", "16x77", "64x64", "256x256")
    for direction in ("fwd", "fwd+bwd"):
        assert {f"attention/{direction}/64x{n}x8x64/{dtype}" for n in lengths for dtype in ("fp32", "bf16")} < names
        assert {f"attention/{direction}+{option}/64x16x16x8x64/fp32" for option in ("norm", "mask")} < names
        shapes = ("64x16x512", "64x77x512", "16x256x1024")
        assert {f"adaln/{direction}/{shape}/{dtype}" for shape in shapes for dtype in ("fp32", "bf16")} < names
        assert {f"denoiser/{direction}/{batch}x256/fp32" for batch in (64, 512)} < names
        assert {f"denoiser_block/{direction}/{batch}x4x128/fp32" for batch in (64, 512)} < names


# attention


def test_attention_products_are_counted() -> None:
    flops = {case.name: case.flops for case in attention.cases("full")}
    assert flops["attention/fwd/64x16x77x8x64/bf16"] == 4 * 64 * 8 * 16 * 77 * 64
    assert flops["attention/fwd+bwd/64x16x16x8x64/fp32"] == 7 * 2 * 64 * 8 * 16 * 16 * 64


def test_attention_differentiates_only_where_there_is_a_backward_pass() -> None:
    assert not any(x.requires_grad for x in cases.tensors(small_case("fwd", option="norm").inputs(CPU)))
    inputs = small_case("fwd+bwd", option="norm").inputs(CPU)
    assert [name for name, x in inputs.items() if x.requires_grad] == ["q", "k", "v", "q_weight", "k_weight"]


def test_attention_masks_some_keys_and_never_all() -> None:
    mask = small_case("fwd", option="mask").inputs(CPU)["key_mask"]
    assert mask.any(1).all() and not mask.all()


def test_attention_copies_the_bytes_of_a_forward_pass() -> None:
    case = small_case("fwd", "bf16")
    inputs = case.inputs(CPU)
    (target,) = attention.COPY.prepare(**inputs)()
    moved = 2 * target.numel() * target.element_size()
    output = case.call(**inputs)
    assert moved == floors.traffic_bytes(cases.tensors(inputs), output, torch.bfloat16)
    gate = attention.COPY.gate(**inputs)
    assert gate((target,)) is None and gate((2 * target,)) == "is no copy"
    assert attention.COPY in case.peers and attention.COPY not in small_case("fwd+bwd").peers


def test_attention_peers_of_each_device() -> None:
    case = small_case("fwd+bwd")
    assert [peer.name for peer in case.on(CPU).peers] == ["sdpa", "flex"]
    backends = {"sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "sdpa_math"}
    assert {peer.name for peer in case.on(CUDA).peers} == {
        *("sdpa", "flex", "xformers", "xformers_cutlass", "flash_attn"),
        *backends,
    }


@pytest.mark.parametrize("option", [None, "norm", "mask"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_attention_says_who_cannot_take_a_case(device: torch.device, dtype: str, option: str | None) -> None:
    case = small_case("fwd", dtype, option)
    skipped = set(case.infeasible(device))
    if device == CPU:
        assert not skipped
        assert set(small_case("fwd+bwd", dtype, option).infeasible(device)) == {"flex"}
    else:
        half_only = {"sdpa_flash", "sdpa_cudnn", "flash_attn"} if dtype == "fp32" else set()
        assert skipped == half_only | ({"sdpa_flash", "flash_attn"} if option == "mask" else set())
    assert skipped <= {peer.name for peer in case.on(device).peers}


CUTLASS = object()


def by_formula(
    q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None = None, op: object = None, *, expected: object = None
) -> Tensor:
    assert op is expected
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", (logits if attn_bias is None else logits + attn_bias).softmax(-1), v)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name in ("sdpa_math", "xformers", "xformers_cutlass", "flash_attn")
        for option in (None, "norm", "mask")
        if (name, option) != ("flash_attn", "mask")
    ],
)
def test_attention_peers_of_a_gpu_are_called_as_they_define(
    name: str, option: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the formula in place of the packages that run on a GPU only."""
    attention = partial(by_formula, expected=CUTLASS if name == "xformers_cutlass" else None)
    ops = SimpleNamespace(memory_efficient_attention=attention, MemoryEfficientAttentionCutlassOp=CUTLASS)
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=by_formula))
    case = small_case("fwd", option=option)
    inputs = case.inputs(CPU)
    (peer,) = (peer for peer in case.peers if peer.name == name)
    (output,), (expected,) = peer.prepare(**inputs)(), cases.oracle(case, inputs)
    assert relative_l2(output, expected) < 1e-5


# denoiser


def test_denoiser_products_are_those_of_its_layers() -> None:
    block = denoiser.denoiser_case(denoiser.block(SMALL), "fwd", 5)
    # qkv, out, gate and up, down of three tokens; logits and output of three queries, six keys, all heads.
    products = 3 * (16 * 48 + 16 * 16 + 16 * 64 + 32 * 16) + 2 * 3 * 6 * 16
    assert block.flops == 5 * 2 * products
    assert denoiser.denoiser_case(denoiser.block(SMALL), "fwd+bwd", 5).flops == 3 * block.flops


def test_denoiser_differentiates_every_parameter() -> None:
    case = denoiser.denoiser_case(denoiser.network(SMALL), "fwd+bwd", 3)
    inputs = case.inputs(CPU)
    output, *gradients = cases.implementations(case, inputs)["eager"]()
    assert output.shape == (3, 24)
    leaves = [x for x in cases.tensors(inputs) if x.requires_grad]
    assert [x.shape for x in gradients] == [x.shape for x in leaves]
    assert len(leaves) == 2 + len(list(inputs["module"].parameters()))


def test_count_calls_leaves_out_views_and_allocations() -> None:
    x = torch.randn(4, 6, requires_grad=True)

    def function() -> Tensor:
        first, second = (x.T.reshape(4, 6) @ torch.empty(6, 4).zero_()).unsqueeze(0).detach().chunk(2, 1)
        return first.expand(2, 2, 4) + second

    assert count_calls(function) == {"aten::clone": 1, "aten::zero_": 1, "aten::mm": 1, "aten::add": 1}
    assert count_calls(lambda: x.view(24)[3:]) == {}


def test_count_calls_sees_our_ops_and_not_what_they_consist_of() -> None:
    q, weight = torch.randn(1, 3, 2, 8), torch.ones(8)
    op = torch.ops.diffgap.attention.default
    assert count_calls(lambda: op(q, q, q, weight, weight, None, 1.0, False)) == {"diffgap::attention": 1}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_count_calls_sees_the_backward_pass(direction: str) -> None:
    calls = denoiser.calls_of(denoiser.block(SMALL), direction, "eager", batch=2)
    backward = {"aten::_softmax_backward_data", "aten::native_layer_norm_backward"}
    assert calls["aten::_softmax"] == 1 and calls["aten::native_layer_norm"] == 2
    assert (backward <= set(calls)) == (direction == "fwd+bwd")
    assert not backward & set(calls) or direction == "fwd+bwd"


@pytest.mark.skipif(not {"attention", "adaln"} <= NATIVE, reason="attention or adaln has no native kernel here")
def test_calls_table_compares_eager_with_native(capsys: pytest.CaptureFixture[str]) -> None:
    assert denoiser.main(["--calls"]) == 0
    totals, operations = (
        [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
        for table in capsys.readouterr().out.split("\n\n")
    )
    names = [f"{name} {direction}" for name in ("denoiser_block", "denoiser") for direction in DIRECTIONS]
    assert [row[0] for row in totals] == names
    assert all(0 < int(ours) < int(native) < int(eager) for _, eager, native, ours in totals)
    # A block normalises twice and attends once; where its linear layers are not ours, silu_mul is a call of its own.
    assert totals[0][3] == ("3" if "linear" in NATIVE else "4")
    assert [str(sum(int(row[column]) for row in operations)) for column in (1, 2)] == totals[2][1:3]


# the model


@pytest.fixture
def model() -> ModuleType:
    pytest.importorskip("triton")
    return importlib.import_module("benchmarks.attention_model")


def moved(kernels: tuple) -> float:
    return sum(kernel.hbm for kernel in kernels)


def config_of(model: ModuleType, gpu: Gpu, n: int, which: str) -> Any:
    return model.attention_config(gpu.chip, "half", n, n, 64, which)


def test_model_bytes_and_operations_by_hand(model: ModuleType) -> None:
    """Batch 256 and 16 tokens: q, k, v, o and their gradients have 256 * 8 * 16 * 64 elements of two bytes each."""
    tensor, lse = 4194304, 256 * 8 * 16 * 4
    shape = model.Shape(256, 16, 16)
    passes = [build(A100, shape) for build in model.IMPLEMENTATIONS]
    assert [entry.name for entry in passes] == ["diffgap", "sdpa_flash", "xformers_cutlass", "eager"]
    ours, flash, xformers, eager = passes
    assert (moved(ours.forward), moved(ours.backward)) == (4 * tensor, 7 * tensor)
    assert sum(kernel.flops for kernel in ours.forward) == 2 * 2 * 256 * 8 * 16 * 16 * 64
    assert sum(kernel.flops for kernel in ours.backward) == 5 * 2 * 256 * 8 * 16 * 16 * 64
    assert moved(xformers.forward) == 4 * tensor
    # 32 log-sum-exps are written where there are 16 queries.
    assert moved(xformers.training) == 4 * tensor + 2 * lse
    assert moved(xformers.backward) == 8 * tensor + 2 * lse
    assert moved(flash.forward) == 4 * tensor + lse
    # 128 rows of the float32 sum of dq, larger than L2: cleared, added to (read and written), and read.
    total = 256 * 8 * 128 * 64 * 4
    assert total > A100.l2_bytes
    assert moved(flash.backward) == 8 * tensor + lse + 4 * total
    assert sum(kernel.flops for kernel in flash.forward) == 2 * 2 * 256 * 8 * 128 * 128 * 64
    # What does not outlive a pass fits in L2: six touches of q's size, six of k's, four of the logits.
    assert moved(eager.forward) == 4 * tensor
    assert sum(kernel.l2 for kernel in eager.forward) == 12 * tensor + 4 * (256 * 8 * 16 * 16 * 2)


def test_model_of_the_long_path(model: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 queries and 200 keys, on a GPU of whose size all is read from L2 the second time."""
    configs = {"forward": SimpleNamespace(block_m=64, block_n=128, pairs=1)}
    configs["backward"] = SimpleNamespace(block_m=64, block_n=32, pairs=1)
    asked = []
    monkeypatch.setattr(model, "attention_config", lambda *sizes: asked.append(sizes) or configs[sizes[-1]])
    q, k, lse = 8 * 8 * 100 * 64 * 2, 8 * 8 * 200 * 64 * 2, 8 * 8 * 100 * 4
    ours = model.ours(H100, model.Shape(8, 100, 200))
    assert asked == [("sm_90", "half", 100, 200, 64, which) for which in ("forward", "backward")]
    # Two blocks of queries read all keys.
    (forward,) = ours.forward
    assert forward.flops == 2 * 2 * 64 * (128 * 256) * 64
    assert (forward.hbm, forward.l2) == (2 * q + 2 * k + lse, 2 * q + 2 * k + lse + 2 * k)
    # dq of 64 queries a program, in steps of 32 keys; dk and dv of 64 keys a program, in steps of 32 queries.
    dq, dk = ours.backward
    assert dq.flops == 3 * 2 * 64 * (128 * 224) * 64
    assert dk.flops == 4 * 2 * 64 * (128 * 256) * 64
    assert (dq.hbm, dk.hbm) == (4 * q + 2 * k + lse, 2 * k)
    # Two blocks of queries, and dO for delta; four blocks of keys, which read q and dO.
    assert dq.l2 == 4 * q + 2 * k + 2 * lse + 2 * k + q
    assert dk.l2 == 2 * q + 4 * k + 2 * lse + 3 * 2 * q
    assert ours.of("fwd+bwd").peak_bytes == 2 * q + 2 * k + 2 * lse


def test_model_takes_the_tiles_of_the_kernels(model: ModuleType) -> None:
    for gpu in GPUS:
        for n in (65, 256):
            config = config_of(model, gpu, n, "backward")
            _, dk = model.ours(gpu, model.Shape(2, n, n)).backward
            rows = [-(-n // size) * size for size in (config.block_m, config.block_n)]
            assert dk.flops == 4 * 2 * 64 * 2 * 8 * rows[0] * rows[1]
        config = config_of(model, gpu, 4, "forward")
        (forward,) = model.ours(gpu, model.Shape(2, 4, 4)).forward
        assert forward.flops == 2 * 2 * 64 * 16 / config.pairs * config.block_m * config.block_n


def test_model_charges_memory_for_every_touch_of_what_does_not_fit_in_l2(model: ModuleType) -> None:
    sizes = {"small": 10.0, "large": 1e9, "kept": 7.0}
    first, second = model.kernels(
        A100, sizes, "small large", model.Launch("a", "kept small large"), model.Launch("b", "kept small large large")
    )
    assert (first.hbm, second.hbm) == (7.0 + 1e9, 2e9)
    assert (first.l2, second.l2) == (1e9 + 17.0, 2e9 + 17.0)


@pytest.mark.parametrize(
    ("n_q", "n_k", "logits"),
    [
        # 16 pairs of batch and head: four to a tile, two, or one.
        (4, 4, 4 * 16 * 16),
        (1, 3, 4 * 16 * 16),
        (5, 3, 8 * 16 * 16),
        (16, 16, 16 * 16 * 16),
        (4, 33, 16 * 16 * 64),
        (64, 64, 16 * 64 * 64),
    ],
)
def test_model_packs_short_sequences(model: ModuleType, n_q: int, n_k: int, logits: int) -> None:
    for gpu in GPUS:
        ours = model.ours(gpu, model.Shape(2, n_q, n_k))
        assert [kernel.flops for kernel in ours.forward] == [2 * 2 * 64 * logits]
        assert [kernel.flops for kernel in ours.backward] == [5 * 2 * 64 * logits]


def test_model_reads_packed_inputs_twice(model: ModuleType) -> None:
    """From L2: all inputs where pairs share a tile, and q and k once more in a backward pass."""
    for n, packed in ((4, True), (16, False)):
        tensor = 2 * 8 * n * 64 * 2
        ours = model.ours(A100, model.Shape(2, n, n))
        assert (moved(ours.forward), moved(ours.backward)) == (4 * tensor, 7 * tensor)
        assert sum(kernel.l2 for kernel in ours.forward) == (4 + 3 * packed) * tensor
        assert sum(kernel.l2 for kernel in ours.backward) == (7 + 2 + 4 * packed) * tensor


def test_model_of_eager_launches_what_torch_launches(model: ModuleType) -> None:
    q, k, v = (torch.randn(3, n, 2, 8, dtype=torch.bfloat16, requires_grad=True) for n in (5, 7, 7))
    outputs: list[Tensor] = []

    def forward() -> None:
        logits = (q * 0.3).transpose(1, 2) @ k.transpose(1, 2).transpose(-1, -2)
        outputs.append((logits.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2))

    eager = model.eager(A100, model.Shape(3, 5, 7))
    assert len(eager.forward) == count_calls(forward).total()
    gradient = torch.randn(q.shape, dtype=q.dtype)
    backward = count_calls(lambda: torch.autograd.grad(outputs, (q, k, v), [gradient]))
    assert len(eager.backward) == backward.total()


def test_model_floor_by_hand(model: ModuleType) -> None:
    shape = model.Shape(256, 16, 16)
    assert model.floor_seconds(A100, shape, "fwd") == pytest.approx(4 * 4194304 / 2.039e12)
    assert model.floor_seconds(A100, shape, "fwd+bwd") == pytest.approx(11 * 4194304 / 2.039e12)
    long = model.Shape(1, 4096, 4096)
    assert model.floor_seconds(H100, long, "fwd") == pytest.approx(2 * 2 * 8 * 4096**2 * 64 / 989.4e12)


def test_model_rows_are_modelled_and_above_the_floor(model: ModuleType) -> None:
    for gpu in OF_CHIP.values():
        rows = list(model.model(gpu))
        # The peers' kernels that are modelled are not those of AMD's chips.
        assert len(rows) == (2 if gpu.chip.startswith("gfx") else 4) * 2 * 3 * 7
        assert all(row.kind == "modelled" and row.device == gpu.name for row in rows)
        assert all(row.median_s >= row.floor_s for row in rows)
        # A kernel never takes less than its launch.
        assert min(row.median_s for row in rows if row.case.startswith("attention/fwd+bwd")) >= 2 * 2.5e-6


def test_model_prints_and_writes_modelled_rows_only(
    model: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "attention.json"
    assert model.main(["--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert path.with_suffix(".md").read_text(encoding="utf-8").strip() == printed.strip()
    assert "No GPU has run any of this" in printed and "(measured)" not in printed and "±" not in printed
    assert {row["kind"] for row in json.loads(path.read_text())["rows"]} == {"modelled"}
    assert path.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(SystemExit):
        model.main(["--json", "attention.txt"])
