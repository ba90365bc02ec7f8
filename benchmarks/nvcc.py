"""The CUDA kernels' machine code: the library built by nvcc for every chip, and what it uses and executes.

Needs nvcc, but no GPU; ``cuobjdump`` is that of the toolkit, or the one inside the triton package.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
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
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*[.\w]*)")
_ACCESS = re.compile(r"(?:LDG|STG)\.E")
_FIRST_BOOL = re.compile(r"Lb([01])E")


#: Bytes of shared memory that a block gets whose launch asks for no more; none here does.
SHARED_LIMIT = 48 << 10


@dataclass
class Kernel:
    """One kernel compiled for one chip."""

    registers: int
    shared_bytes: int
    local_bytes: int
    instructions: list[str] = field(default_factory=list)  # mnemonics

    @property
    def accesses(self) -> list[str]:
        """Mnemonics of loads and stores of global memory."""
        return [name for name in self.instructions if _ACCESS.match(name)]


class NothingCompiled(RuntimeError):
    """There is no compiler here; the message says in a line what it takes."""


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
        sys.exit(f"cuobjdump {option} {file}: {done.stderr.strip()}")
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
            kernels[name, chip] = Kernel(int(registers), int(shared) - _system_bytes(chip), int(stack) + int(local))
    for chip, text in _dump(file, "-sass").items():
        name = ""
        for line in text.splitlines():
            if function := _FUNCTION.search(line):
                name = function[1]
            elif (instruction := _INSTRUCTION.match(line)) and (name, chip) in kernels:
                kernels[name, chip].instructions.append(instruction[1])
    return kernels


def is_vector(name: str) -> bool:
    found = _FIRST_BOOL.search(name)
    return found is not None and found[1] == "1"


def _system_bytes(chip: str) -> int:
    """Of the shared memory that the machine code counts, what is the system's."""
    return 1 << 10 if int(chip.removeprefix("sm_").rstrip("af")) >= 90 else 0


def mistakes(name: str, kernel: Kernel) -> list[str]:
    """What the kernel shall not do, in words."""
    found = []
    if kernel.shared_bytes > SHARED_LIMIT:
        found.append(f"takes {kernel.shared_bytes} bytes of shared memory, and a block gets {SHARED_LIMIT}")
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


def readable(names: Sequence[str]) -> dict[str, str]:
    """``kernel<arguments>`` of mangled names, where there is a demangler."""
    if shutil.which("c++filt") is None:
        return {name: name for name in names}
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, map(plain_name, text.splitlines()), strict=True))


def plain_name(demangled: str) -> str:
    """``kernel<arguments>`` of ``void diffgap::kernel<arguments>(parameters)``."""
    return demangled.removeprefix("void ").replace("diffgap::", "").partition("(")[0]


def build(folder: Path) -> list[Path]:
    """The CUDA library by setup.py's own rules.

    Raises:
        NothingCompiled: there is no compiler.
        RuntimeError: it failed.
    """
    environment = {"DIFFGAP_CPU": "0", "DIFFGAP_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ARCHITECTURES}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if needs := re.search(r"but the CUDA kernels need (.*)", done.stderr):
        raise NothingCompiled(f"nothing is compiled here, which takes {needs[1]}")
    if done.returncode != 0:
        raise RuntimeError(f"{done.stdout}{done.stderr}the CUDA kernels do not compile")
    return sorted((folder / "diffgap").glob("_C_cuda*.so"))
