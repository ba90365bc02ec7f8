"""Compiles the CUDA kernels for every chip and examines their machine code; needs nvcc, but no GPU.

    python scripts/cuda_check.py            the CUDA library, as setup.py builds it
    python scripts/cuda_check.py FILE ...   objects, libraries, fat binaries

Fails if a kernel keeps anything in local memory (a spill, or an array with a computed index), or if a vector kernel
(the first bool of its template arguments is true) has another store to global memory than one of 16 bytes, or loads
elements one by one. Prints the registers of every kernel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = "8.0;9.0;10.0;12.0"
CHIPS = ("sm_80", "sm_90", "sm_100", "sm_120")

_CHIP = re.compile(r"^arch = (sm_\w+)")
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_FUNCTION = re.compile(r"Function : (\S+)")
_ACCESS = re.compile(r"\b((?:LDG|STG)\.E[.\w]*)")
_FIRST_BOOL = re.compile(r"Lb([01])E")


@dataclass
class Kernel:
    """One kernel compiled for one chip."""

    registers: int
    shared_bytes: int
    local_bytes: int
    accesses: list[str] = field(default_factory=list)  # mnemonics of loads and stores of global memory


def _tool(name: str) -> str:
    """From the CUDA toolkit, or from inside the triton package."""
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("CUDA_HOME", "") + "/bin", os.environ["PATH"]]))
    if found is not None:
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _dump(file: Path, option: str) -> dict[str, str]:
    """cuobjdump's text by chip."""
    done = subprocess.run([_tool("cuobjdump"), option, str(file)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"cuda-check: cuobjdump {option} {file}: {done.stderr.strip()}")
    texts: dict[str, list[str]] = defaultdict(list)
    chip = ""
    for line in done.stdout.splitlines():
        if found := _CHIP.match(line):
            chip = found[1]
        texts[chip].append(line)
    return {chip: "\n".join(lines) for chip, lines in texts.items() if chip}


def read_kernels(file: Path) -> dict[tuple[str, str], Kernel]:
    """The kernels of a file by (mangled) name and chip."""
    kernels: dict[tuple[str, str], Kernel] = {}
    for chip, text in _dump(file, "--dump-resource-usage").items():
        for name, registers, stack, shared, local in _USAGE.findall(text):
            kernels[name, chip] = Kernel(int(registers), int(shared), int(stack) + int(local))
    for chip, text in _dump(file, "-sass").items():
        name = ""
        for line in text.splitlines():
            if function := _FUNCTION.search(line):
                name = function[1]
            elif (access := _ACCESS.search(line)) and (name, chip) in kernels:
                kernels[name, chip].accesses.append(access[1])
    return kernels


def is_vector(name: str) -> bool:
    found = _FIRST_BOOL.search(name)
    return found is not None and found[1] == "1"


def mistakes(name: str, kernel: Kernel) -> list[str]:
    """What the kernel shall not do, in words."""
    found = []
    if kernel.local_bytes:
        found.append(f"keeps {kernel.local_bytes} bytes a thread in local memory")
    if is_vector(name):
        stores = [access for access in kernel.accesses if access.startswith("STG")]
        narrow = sorted({access for access in stores if ".128" not in access})
        # Narrower loads are of coefficients, steps and seeds; elements of 16 bits are of tensors alone.
        narrow += sorted({a for a in kernel.accesses if a.startswith("LDG") and re.search(r"\.[US](8|16)\b", a)})
        if narrow or not stores:
            found.append(f"accesses global memory by {', '.join(narrow) or 'no store'} instead of 16 bytes")
    return found


def _readable(names: Sequence[str]) -> dict[str, str]:
    """``kernel<arguments>`` of mangled names, where there is a demangler."""
    if shutil.which("c++filt") is None:
        return {name: name for name in names}
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    plain = [line.removeprefix("void ").replace("diffgap::", "").partition("(")[0] for line in text.splitlines()]
    return dict(zip(names, plain, strict=True))


def _build(folder: Path) -> list[Path]:
    """The CUDA library by setup.py's own rules; ends the program where that fails or nothing can be compiled."""
    environment = {"DIFFGAP_CPU": "0", "DIFFGAP_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ARCHITECTURES}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if needs := re.search(r"but the CUDA kernels need (.*)", done.stderr):
        print(f"cuda-check: nothing is compiled here, which takes {needs[1]}")
        sys.exit(0)
    if done.returncode != 0:
        sys.exit(f"{done.stdout}{done.stderr}cuda-check: the CUDA kernels do not compile")
    return sorted((folder / "diffgap").glob("_C_cuda*.so"))


def check(files: Sequence[Path], chips: Sequence[str] = ()) -> int:
    """Print the registers of the files' kernels and all mistakes; the number of mistakes."""
    kernels = {key: kernel for file in files for key, kernel in read_kernels(file).items()}
    names = sorted({name for name, _ in kernels})
    chips = chips or sorted({chip for _, chip in kernels})
    plain = _readable(names)
    wrong = [] if names else ["no kernel is found"]
    wrong += [f"{plain[n]}: not compiled for {chip}" for n in names for chip in chips if (n, chip) not in kernels]
    wrong += [f"{plain[n]} on {chip}: {text}" for (n, chip), k in sorted(kernels.items()) for text in mistakes(n, k)]
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
        wrong = check(_build(Path(folder)), CHIPS)
    if wrong:
        sys.exit(1)
    print("cuda-check: no local memory, and 16-byte accesses in every vector kernel")


if __name__ == "__main__":
    main()
