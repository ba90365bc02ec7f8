"""Runs the ops' tests on C++ CPU kernels that are compiled with the compiler's sanitizers; needs g++ and its libraries.

    python scripts/sanitize.py address                        reads and writes out of bounds; undefined behaviour
    python scripts/sanitize.py thread                         data races
    python scripts/sanitize.py address --isa avx2 baseline    with other instruction sets than the widest
    python scripts/sanitize.py thread --kernels random --tests tests/ops/test_random.py
    python scripts/sanitize.py thread --turn --kernels ...    or, on every other day of the year, one kernel of TURNS

The sources are copied to a temporary folder, compiled there by their own setup.py and tested there, so that no
instrumented library is ever where users' code would load it. Exit status 1, and the reports, if a sanitizer reports
anything or a test fails. Memory that is not freed is not looked for: Python and torch leave too much of it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("csrc", "diffgap", "kernels", "tests")
FILES = ("setup.py", "pyproject.toml")

#: After setup.py's own flags, so these win. Box-Muller is exact only where products and sums are fused, which g++ does
#: at -O1 if told so; setup.py may get -fwrapv from Python, with which no overflow is undefined.
COMMON_FLAGS = "-O1 -fexpensive-optimizations -fno-wrapv -g1 -fno-omit-frame-pointer"
FLAGS = {"address": "-fsanitize=address,undefined,float-cast-overflow", "thread": "-fsanitize=thread"}
LIBRARIES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
ISAS = ("widest", "avx512", "avx2", "baseline")

_REPORT = re.compile(r"runtime error:|(ERROR|WARNING): \w+Sanitizer")

#: What compiles runs g++ or triton under the sanitizer, and none of the kernels in another way.
TESTS = ("tests/ops", "-k", "native and not compile")

#: Kernels whose tests take longer, and these tests: ``--turn`` takes one of them, under one of the sanitizers, in the
#: place of what is given, so that no day takes much longer than another.
TURNS = (
    (("adaln",), "test_adaln.py"),
    (("attention", "attention_backward"), "test_attention.py"),
    (("clip_loss",), "test_clip_loss.py"),
    (("q_sample", "random"), "test_q_sample.py"),  # of the same noise
    (("siglip_loss",), "test_siglip_loss.py"),
    (("similarity_ranks",), "test_similarity.py"),
    (("solver_step",), "test_solver_step.py"),
)


def in_turn(sanitizer: str, turn: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Kernels and their tests whose turn it is, which after 14 have been under either sanitizer; maybe none."""
    number, chosen = divmod(turn % (2 * len(TURNS)), 2)
    if sorted(FLAGS)[chosen] != sanitizer:
        return (), ()
    kernels, tests = TURNS[number]
    print(f"sanitize: {sanitizer}: it is the turn of {' and '.join(kernels)}, again with --turn {turn}", flush=True)
    return kernels, (f"tests/ops/{tests}", *TESTS[1:])


def library(name: str) -> Path:
    """A runtime library of g++'s."""
    command = ["g++", f"-print-file-name={name}"]
    found = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    if not found.is_absolute():
        sys.exit(f"sanitize: g++ has no {name}; install the package libgcc-<version>-dev of its version")
    return found


def copy_sources(source: Path, tree: Path, kernels: Sequence[str]) -> None:
    """What is compiled and tested, of the C++ kernels those named (all if none is)."""
    for part in PARTS:
        shutil.copytree(source / part, tree / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in FILES:
        shutil.copy(source / file, tree)
    for kernel in (tree / "csrc" / "cpu").glob("*.cpp"):
        if kernels and kernel.stem not in kernels:
            kernel.unlink()
    unknown = [name for name in kernels if not (tree / "csrc" / "cpu" / f"{name}.cpp").exists()]
    if unknown:
        sys.exit(f"sanitize: --kernels {unknown[0]}: there is no csrc/cpu/{unknown[0]}.cpp")


def build(tree: Path, sanitizer: str) -> None:
    """Compile ``diffgap/_C_cpu.abi3.so`` in the copy."""
    compiler = tree / "c++"
    compiler.write_text(f'#!/bin/sh\nexec g++ "$@" {COMMON_FLAGS} {FLAGS[sanitizer]}\n')
    compiler.chmod(0o755)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    chosen = {"CXX": str(compiler), "DIFFGAP_CPU": "1", "DIFFGAP_CUDA": "0"}
    done = subprocess.run(command, cwd=tree, env={**os.environ, **chosen}, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"sanitize: the kernels do not compile\n{done.stdout}{done.stderr}")
    if sanitizer == "thread":
        source, result = tree / "csrc" / "sanitize" / "parallel.cpp", tree / "parallel.so"
        command = [str(compiler), "-shared", "-fPIC", str(source), "-o", str(result), "-ldl"]
        subprocess.run(command, check=True)


def variables(tree: Path, sanitizer: str, isa: str) -> dict[str, str]:
    """The environment in which Python runs with the sanitizer."""
    preloaded = [library(name) for name in LIBRARIES[sanitizer]]
    chosen = {
        "PYTHONPATH": str(tree),
        # Python's own allocator hands out parts of large blocks, in which no overflow would be seen.
        "PYTHONMALLOC": "malloc",
        "DIFFGAP_CPU_ISA": isa,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    if sanitizer == "thread":
        # torch's own libgomp, which parallel.so calls; more threads than cores, so that they interleave.
        runtimes = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
        preloaded += [tree / "parallel.so", *runtimes[:1]]
        chosen |= {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4", "MKL_DYNAMIC": "FALSE"}
        # Python and torch are not compiled with the sanitizer: what they lock and copy it cannot judge.
        chosen["TSAN_OPTIONS"] = "ignore_noninstrumented_modules=1:report_signal_unsafe=0"
    return {**os.environ, **chosen, "LD_PRELOAD": " ".join(map(str, preloaded))}


def fixed_addresses() -> list[str]:
    """The command before a program that keeps its memory where ThreadSanitizer expects it, where that is allowed."""
    command = ["setarch", "-R"]
    allowed = shutil.which("setarch") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if allowed else []


def run_tests(tree: Path, sanitizer: str, isa: str, tests: Sequence[str]) -> bool:
    """Run pytest in the copy; whether all was well."""
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tree / 'pytest'}"]
    # Sanitizers write to the process's own stderr, which pytest would keep, and lose if they end the process.
    command = [*fixed_addresses(), *command, "--capture=sys", *(tests or TESTS)]
    environment = variables(tree, sanitizer, isa)
    tested = subprocess.run(command, cwd=tree, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")
    sys.stderr.write(tested.stderr)
    well = tested.returncode == 0 and not _REPORT.search(tested.stderr)
    took = time.monotonic() - start
    print(
        f"sanitize: {sanitizer}, {isa} instruction set: {'clean' if well else 'NOT clean'} after {took:.0f} s of tests"
    )
    return well


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizer", choices=sorted(FLAGS))
    parser.add_argument(
        "--isa", nargs="+", choices=ISAS, default=["widest"], help="instruction sets, one after another"
    )
    parser.add_argument("--kernels", nargs="+", default=[], metavar="NAME", help="csrc/cpu/NAME.cpp alone")
    parser.add_argument(
        "--turn", type=int, nargs="?", const=datetime.now(tz=timezone.utc).timetuple().tm_yday, metavar="N",
        help="a kernel of TURNS in the place of --kernels and --tests if it has its turn, by the day of the year",
    )  # fmt: skip
    parser.add_argument("--source", type=Path, default=ROOT, help="another source folder than this one")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, help="pytest's arguments, all that follow")
    given: Any = parser.parse_args(arguments)
    if shutil.which("g++") is None:
        sys.exit("sanitize: g++ is not installed (apt install g++)")
    kernels, tests = in_turn(given.sanitizer, given.turn) if given.turn is not None else ((), ())
    with tempfile.TemporaryDirectory(prefix="diffgap-sanitize-") as folder:
        tree, start = Path(folder), time.monotonic()
        copy_sources(given.source, tree, kernels or given.kernels)
        build(tree, given.sanitizer)
        print(f"sanitize: {given.sanitizer}: compiled in {time.monotonic() - start:.0f} s", flush=True)
        well = [run_tests(tree, given.sanitizer, isa, tests or given.tests) for isa in given.isa]
    sys.exit(0 if all(well) else 1)


if __name__ == "__main__":
    main()
