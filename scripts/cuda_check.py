"""Compiles the CUDA kernels for every chip and examines their machine code; needs nvcc, but no GPU.

    python scripts/cuda_check.py            the CUDA library, as setup.py builds it
    python scripts/cuda_check.py FILE ...   objects, libraries, fat binaries

Fails if a kernel keeps anything in local memory (a spill, or an array with a computed index), takes more shared memory
than its chip gives a block, or if a vector kernel (the first bool of its template arguments is true) has another store
to global memory than one of 16 bytes, or loads elements one by one. Prints the registers of every kernel.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.nvcc import CHIPS, NothingCompiled, build, mistakes, read_kernels, readable


def check(files: Sequence[Path], chips: Sequence[str] = ()) -> int:
    """Print the registers of the files' kernels and all mistakes; the number of mistakes."""
    kernels = {key: kernel for file in files for key, kernel in read_kernels(file).items()}
    names = sorted({name for name, _ in kernels})
    chips = chips or sorted({chip for _, chip in kernels})
    plain = readable(names)
    wrong = [] if names else ["no kernel is found"]
    wrong += [f"{plain[n]}: not compiled for {chip}" for n in names for chip in chips if (n, chip) not in kernels]
    wrong += [f"{plain[n]} on {c}: {text}" for (n, c), k in sorted(kernels.items()) for text in mistakes(n, k)]
    width = max(map(len, plain.values()), default=0)
    print(f"{'registers':{width}}", *(f"{chip:>7}" for chip in chips))
    for name in names:
        values = [str(kernels[name, chip].registers) if (name, chip) in kernels else "-" for chip in chips]
        print(f"{plain[name]:{width}}", *(f"{value:>7}" for value in values))
    for text in wrong:
        print(f"cuda-check: {text}", file=sys.stderr)
    return len(wrong)


def main() -> None:
    if files := [Path(name) for name in sys.argv[1:]]:
        sys.exit(1 if check(files) else 0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = build(Path(folder))
        except NothingCompiled as error:
            print(f"cuda-check: {error}")
            return
        except RuntimeError as error:
            sys.exit(f"cuda-check: {error}")
        wrong = check(files, CHIPS)
    if wrong:
        sys.exit(1)
    print("cuda-check: no local memory, shared memory that a block gets, and 16-byte accesses in every vector kernel")


if __name__ == "__main__":
    main()
