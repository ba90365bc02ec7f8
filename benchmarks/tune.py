"""``python -m benchmarks tune``: find the rows of ``kernels/configs.py`` on the GPU that is here, and print them.

For each row of the chip's table: other rows are proposed, those that cannot fit are dropped by arithmetic, those that
spill, lose their tensor-core instructions or take too much shared memory by compiling them (:mod:`benchmarks.proof`),
those with other results by running them. What is left is timed, interleaved with the row that ships; every round halves
them and doubles the time (successive halving, Jamieson and Talwalkar, 2016). A row that is not faster than the one that
ships by :data:`GAIN` is no better: it is within the noise.

The output is Python to paste; run ``python -m benchmarks proof --chip CHIP`` and ``tests/gpu`` afterwards.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from itertools import product
from typing import Any, Generic, TypeVar

import torch
import triton
from diffgap.kernels.configs import (
    CONFIGS,
    Attention,
    Pass,
    Product,
    Rows,
    Short,
    Tile,
    attention_config,
    chip_of,
    is_amd,
)
from torch import Tensor

from benchmarks.aot import (
    TORCH,
    Dtype,
    Launches,
    Make,
    adaln_kernels,
    adaln_launches,
    attention_kernels,
    attention_launches,
    contrastive_kernels,
    contrastive_launches,
    multiplied_as,
)
from benchmarks.cases import Outputs
from benchmarks.check import mismatch
from benchmarks.compiled import FAMILIES, MULTIPROCESSORS, Case, Compiled, examined
from benchmarks.proof import faults
from benchmarks.timing import Budget, CudaClock, time_interleaved

Config = TypeVar("Config", bound=Hashable)

#: A row must be faster than the one that ships by this factor.
GAIN = 1.03
#: Seconds of timing in the first round of a row, of all configurations together.
SECONDS = 2.0
#: Configurations that are compiled at most, those that read the least first.
MOST = 48
FIELDS = ("contrastive", "short", "long", "adaln")
_ROWS, _WIDTH, _BATCH = 8192, 512, 1024
_DTYPES: dict[Product, Dtype] = {"half": "bf16", "tf32": "tf32", "ieee": "fp32"}
_WARPS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Row(Generic[Config]):
    """A row of the table to find.

    Attributes:
        field: Of :class:`diffgap.kernels.configs.Table`.
        key: In that field.
        shipped: What stands there.
        proposals: What could, the most promising ones first.
        product: How its kernels multiply.
        compile: The kernels with a configuration, with none launched.
        launches: What to run with a configuration on the GPU.
    """

    field: str
    key: Any
    shipped: Config
    proposals: Sequence[Config]
    product: Product
    compile: Callable[[Config], list[Compiled]]
    launches: Callable[[Config], Launches]

    def paste(self, config: Config) -> str:
        """The line of the table."""
        return f"{self.key!r}: {config!r},"


def tiles(chip: str, product_: Product) -> list[Tile]:
    """Tiles of similarities that fit, those that read the least first."""
    size, maxnreg = 2 if product_ == "half" else 4, CONFIGS[chip].contrastive[product_].maxnreg
    found = [
        Tile(m, n, d, warps, stages, maxnreg=maxnreg)
        for m, n, d, warps, stages in product(
            (64, 128, 256), (64, 128, 256), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4, 5)
        )
        # One stage less is buffered than counted; a thread holds 16 to 128 sums of a tile.
        if max(stages - 1, 1) * (m + n) * d * size <= MULTIPROCESSORS[chip].block_bytes
        and 16 <= m * n // (32 * warps) <= 128
    ]
    return sorted(found, key=lambda tile: (1 / tile.block_m + 1 / tile.block_n, -tile.block_d, -tile.num_stages))


def shorts() -> list[Short]:
    """Columns at a time and warps of attention's short path, the most columns first."""
    return [Short(chunk, warps) for chunk in (128, 64, 32, 16) for warps in (1, 2, 4, 8)]


def longs(wide: bool, amd: bool) -> list[Attention]:
    """Tiles of attention's long path, those that read the least first."""
    d = 128 if wide else 64
    found = [
        Attention(m, n, chunk, warps, stages, amd=amd)
        for m, n, chunk, warps, stages in product((32, 64, 128), (16, 32, 64, 128), (16, d), (4, 8), (1, 2, 3))
        # Sums of the held rows, and the logits.
        if m * (d + n) // (32 * warps) <= 160
    ]
    return sorted(found, key=lambda tile: (-tile.block_m, -tile.block_n, -tile.chunk, -tile.num_stages))


def holdings(width: int, warp: int) -> list[Rows]:
    """How a program of adaln can hold rows of ``width`` features, with 4 to 32 elements a thread: 8 first, 16 bytes."""
    found = []
    for rows, warps in product((1, 2, 4, 8, 16, 32, 64), _WARPS):
        elements = rows * width / (warps * warp)
        if 4 <= elements <= 32 and warps * warp <= 1024:
            found.append(Rows(rows, width, warps, keeps_sums=elements <= 8))
    return sorted(found, key=lambda row: abs(row.rows * row.block_d / (row.num_warps * warp) - 8))


def rows_of(chip: str, fields: Sequence[str], make: Make) -> Iterator[Row[Any]]:
    """Every row of some fields of a chip's table; ``make`` makes tensors on the GPU."""
    table = CONFIGS[chip]
    if "contrastive" in fields:
        for kind in table.contrastive:
            yield _contrastive_row(chip, kind, make)
    if "short" in fields:
        for kind, n, wide in table.short:
            yield _short_row(chip, kind, n, wide, make)
    if "long" in fields:
        for kind, which, wide in table.long:
            yield _long_row(chip, kind, which, wide, make)
    if "adaln" in fields:
        for width in table.adaln:
            yield _adaln_row(chip, width, make)


def _contrastive_row(chip: str, kind: Product, make: Make) -> Row[Tile]:
    case = Case(
        "contrastive", chip, _DTYPES[kind], (1024, _WIDTH), FAMILIES["contrastive"].launches["ci", (1024, _WIDTH)]
    )
    # One variant of every op: the others have the same loops.
    timed = (
        *("clip_loss/diagonal", "clip_loss_backward/diagonal", "siglip_loss_backward/diagonal"),
        *("similarity_ranks/ids", "similarity_topk/k=10"),
    )

    def launches(tile: Tile) -> Launches:
        of_all = contrastive_launches(tile, TORCH[_DTYPES[kind]], _WIDTH, _ROWS, make)
        return {name: of_all[name] for name in timed}

    return Row(
        *("contrastive", kind, CONFIGS[chip].contrastive[kind], tiles(chip, kind), kind),
        lambda tile: examined(case, _compile_contrastive(case, tile)),
        launches,
    )


def _short_row(chip: str, kind: Product, n: int, wide: bool, make: Make) -> Row[Short]:
    size, dtype = (n, n, 128 if wide else 64), TORCH[_DTYPES[kind]]

    def tile(row: Short) -> Attention:
        of_tokens = attention_config(chip, kind, *size, "forward")
        return replace(of_tokens, chunk=min(row.chunk, size[2]), num_warps=row.num_warps)

    return Row(
        *("short", (kind, n, wide), CONFIGS[chip].short[kind, n, wide], shorts(), kind),
        lambda row: _compile_attention(chip, kind, size, tile(row)),
        lambda row: attention_launches(tile(row), tile(row), dtype, size, _BATCH, make, plain=True),
    )


def _long_row(chip: str, kind: Product, which: Pass, wide: bool, make: Make) -> Row[Attention]:
    size, amd, dtype = (256, 256, 128 if wide else 64), is_amd(chip), TORCH[_DTYPES[kind]]
    op = "attention" if which == "forward" else "attention_backward"

    def launches(row: Attention) -> Launches:
        return {op: attention_launches(row, row, dtype, size, _BATCH // 16, make, plain=True)[op]}

    def compiled(row: Attention) -> list[Compiled]:
        return [x for x in _compile_attention(chip, kind, size, row) if x.kernel.split("/")[0] == op]

    shipped = attention_config(chip, kind, *size, which)
    return Row("long", (kind, which, wide), shipped, longs(wide, amd), kind, compiled, launches)


def _adaln_row(chip: str, width: int, make: Make) -> Row[Rows]:
    case = Case("adaln", chip, "bf16", (width,))
    return Row(
        *("adaln", width, CONFIGS[chip].adaln[width], holdings(width, 64 if is_amd(chip) else 32), "half"),
        lambda row: examined(case, adaln_kernels(chip, "bf16", width, row)),
        lambda row: adaln_launches(row, torch.bfloat16, width, make),
    )


def _compile_contrastive(case: Case, tile: Tile) -> dict[str, Any]:
    return contrastive_kernels(case.chip, case.dtype, *case.size, launches=case.launches, tile=tile)


def _compile_attention(chip: str, kind: Product, size: tuple[int, int, int], config: Attention) -> list[Compiled]:
    kernels = attention_kernels(chip, _DTYPES[kind], *size, config=config)
    return examined(Case("attention", chip, _DTYPES[kind], size), kernels)


def screened(row: Row[Config], most: int = MOST) -> list[Config]:
    """The row that ships, and the first ``most`` proposals that compile without a fault."""
    found: list[Config] = []
    for config in row.proposals:
        if len(found) == most:
            break
        try:
            good = not any(faults(kernel) for kernel in row.compile(config))
        except Exception as error:  # whatever the compiler says of one configuration, the others are left
            print(f"  {config}: {type(error).__name__}", file=sys.stderr)
            continue
        if good and config != row.shipped:
            found.append(config)
    return [row.shipped, *found]


def halving(
    configs: Sequence[Config], time: Callable[[Sequence[Config], float], Mapping[Config, float]], seconds: float
) -> dict[Config, float]:
    """Time all, keep the faster half, double the time, until two are left; the first is always kept.

    Args:
        configs: The one that ships, then the others.
        time: Seconds a call, for configurations and seconds to spend on each round.
        seconds: Of the first round.

    Returns:
        Seconds a call of those that came to the last round.
    """
    first, alive = configs[0], list(configs)
    while True:
        times = dict(time(alive, seconds))
        if len(alive) <= 2:
            return times
        others = sorted((config for config in alive if config != first), key=lambda config: times[config])
        alive, seconds = [first, *others[: max(1, len(others) // 2)]], 2 * seconds


def best(times: Mapping[Config, float], shipped: Config) -> Config:
    """The fastest, or the one that ships where that gains less than :data:`GAIN`."""
    fastest = min(times, key=lambda config: times[config])
    return fastest if times[shipped] > GAIN * times[fastest] else shipped


def disagreement(row: Row[Config], config: Config, expected: Mapping[str, Outputs]) -> str | None:
    """Why the results with a configuration are not the ``expected`` ones, by op; integers may differ by ties."""
    dtype = TORCH[_DTYPES[row.product]]
    for name, run in row.launches(config).items():
        if expected[name] and (reason := mismatch(_floats(run()), expected[name], None, dtype)):
            return f"{name}: {reason}"
    return None


def _floats(outputs: Sequence[Tensor] | Tensor) -> Outputs:
    found = (outputs,) if isinstance(outputs, Tensor) else outputs
    return tuple(x for x in found if x.is_floating_point() and x.numel() > 0)


def agreeing(row: Row[Config], configs: Sequence[Config]) -> list[Config]:
    """The configurations whose results are those of the first, which the tests hold against the reference."""
    runs = row.launches(configs[0])
    expected = {name: tuple(x.double() for x in _floats(run())) for name, run in runs.items()}
    found = [configs[0]]
    for config in configs[1:]:
        try:
            wrong = disagreement(row, config, expected)
        except Exception as error:  # a launch that fails leaves the others to be timed
            wrong = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if wrong is None:
            found.append(config)
        else:
            print(f"  {config}: {wrong}", file=sys.stderr)
    return found


def tune(
    row: Row[Config], time: Callable[[Row[Config], Sequence[Config], float], Mapping[Config, float]], seconds: float
) -> tuple[Config, dict[Config, float]]:
    """The row to paste, and the times of the last round."""
    with multiplied_as(row.product):
        configs = agreeing(row, screened(row))
        times = halving(configs, lambda of, budget: time(row, of, budget), seconds)
    return best(times, row.shipped), times


def on_gpu(row: Row[Config], configs: Sequence[Config], seconds: float) -> dict[Config, float]:
    """Median seconds of all launches of a row, the configurations interleaved."""

    def call(launches: Launches) -> Callable[[], object]:
        return lambda: [run() for run in launches.values()]

    calls = {config: call(row.launches(config)) for config in configs}
    timings = time_interleaved(calls, CudaClock(), Budget(seconds, limit_seconds=10 * seconds))
    return {config: timing.median_s for config, timing in timings.items()}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks tune", description="Find the launch configurations of the GPU that is here."
    )
    add = result.add_argument
    add(
        "--kernel", nargs="+", choices=FIELDS, default=list(FIELDS), help="tables of kernels/configs.py; all by default"
    )
    add("--seconds", type=float, default=SECONDS, help="of the first round of a row (default: %(default)s)")
    return result


def main(argv: Sequence[str]) -> int:
    """Print the rows to paste."""
    options = parser()
    args = options.parse_args(argv)
    if not args.seconds > 0:
        options.error(f"--seconds: must be positive, got {args.seconds}")
    if not torch.cuda.is_available():
        options.error("configurations are timed on a GPU, and no CUDA device is visible; run it on a machine with one")
    here = torch.empty(1, device="cuda")
    chip, fields = chip_of(here), [field for field in FIELDS if field in args.kernel]
    print(f"# {chip}: {torch.cuda.get_device_name()}, triton {triton.__version__}, {date.today().isoformat()}")
    print_rows(rows_of(chip, fields, partial(torch.randn, device="cuda")), on_gpu, args.seconds)
    return 0


def print_rows(rows: Iterable[Row[Any]], time: Callable[..., Mapping[Any, float]], seconds: float) -> None:
    """One line of the table for every row, under the name of its field, with what it gains."""
    field = ""
    for row in rows:
        if row.field != field:
            field = row.field
            print(f"# {field}")
        config, times = tune(row, time, seconds)
        gain = times[row.shipped] / times[config]
        print(row.paste(config), f"# {gain:.2f}x" if config != row.shipped else "# as it ships", flush=True)
