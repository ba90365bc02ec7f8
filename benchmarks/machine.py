"""The header of a results file: what was measured on what hardware, and nothing that names the machine."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import diffgap
from benchmarks.timing import Clock
from diffgap.ops._dispatch import explain


def header(device: torch.device, clock: Clock, argv: Sequence[str], packages: Iterable[str]) -> dict[str, Any]:
    """Machine, versions, date and command.

    Args:
        device: Where the cases run.
        clock: What times them.
        argv: The command line after ``python -m benchmarks``; of a path only the file name is kept.
        packages: Peers whose versions to name where they are installed.
    """
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["python -m benchmarks", *map(_without_folder, argv)]),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "clock": clock.name,
        "machine": _machine(device),
        "versions": _versions(packages),
        "backends": {c.op: f"{c.backend}: {c.reason}" for c in explain() if c.device == device.type},
    }


def _without_folder(word: str) -> str:
    option, equals, value = word.rpartition("=")
    return option + equals + (Path(value).name if os.sep in value else value)


def _machine(device: torch.device) -> dict[str, Any]:
    machine: dict[str, Any] = {
        **_cpu(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if hasattr(os, "getloadavg"):
        machine["load_before"] = round(os.getloadavg()[0], 2)
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def _cpu() -> dict[str, Any]:
    """The processor's name and, on x86, its family and model: of "AMD EPYC" there are several generations."""
    first: dict[str, str] = {}
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            first.setdefault(name.strip(), value.strip())
    numbers = {"cpu_family": first.get("cpu family"), "cpu_model": first.get("model")}
    return {
        "cpu": first.get("model name") or platform.processor() or platform.machine(),
        **{name: int(value) for name, value in numbers.items() if value is not None and value.isdecimal()},
    }


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "diffgap": diffgap.__version__}
    for package in sorted(set(packages) - set(found)):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
