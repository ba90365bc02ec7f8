"""Builds diffgap in every way users do, each in a clean environment, and runs it beside other versions of its needs.

    python scripts/release_check.py builds    isolated, CPU and CUDA kernels, sdist, audit of the stable ABI, elsewhere
    python scripts/release_check.py compat    one wheel under several versions of Python, torch and numpy

Environments are virtual environments, 7 GB each with a CUDA build of torch, of which two are there at a time: below
``--folder``, where the one that builds is kept and taken again, or below a temporary folder. Prints a Markdown table.
Exit status 1 if anything failed; what this machine lacks is said and is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property, partial
from pathlib import Path

from release_environments import (
    TEST_PACKAGES,
    TESTS,
    Environment,
    Failed,
    Unavailable,
    copy_source,
    find_python,
    make_environment,
    run,
    timed_wheel,
)

NO_ISOLATION = "--no-build-isolation"
CPU_ALONE = {"DIFFGAP_CPU": "1", "DIFFGAP_CUDA": "0"}
CUDA_ALONE = {"DIFFGAP_CPU": "0", "DIFFGAP_CUDA": "1"}
ABI3_TAG = "cp310-abi3-linux_"

#: Loads the CUDA library and lists the ops it has kernels for; needs no GPU.
LIST_CUDA_OPS = """
import pathlib, torch, diffgap.ops
(library,) = pathlib.Path(diffgap.__file__).parent.glob("_C_cuda*so")
torch.ops.load_library(str(library))
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("diffgap::")]
print(*(name[9:] for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")))
"""
CUDA_OPS = {"normal", "q_sample", "q_sample_backward", "solver_step", "solver_step_out"}


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    what: str
    state: str  # ok, not here, failed
    seconds: float
    size_bytes: int | None
    note: str


@dataclass(frozen=True)
class Combination:
    """Versions that are installed beside one wheel, as pip takes them."""

    python: str
    torch: str
    packages: tuple[str, ...]
    tests: tuple[str, ...] = ()  # beside those of every environment

    @property
    def title(self) -> str:
        return ", ".join((f"Python {self.python}", f"torch {self.torch}", *self.packages))


#: pyarrow 26 refuses numpy 1 when it is imported, and does not tell pip.
OLD_NUMPY = ("numpy==1.26.*", "pyarrow<26")

COMBINATIONS = (
    Combination("3.10", "2.10", OLD_NUMPY),
    Combination("3.10", "2.14", ("numpy==2.*",)),
    Combination("3.11", "2.12", ("numpy==2.*",)),
    Combination("3.11", "2.13", OLD_NUMPY),
    Combination("3.11", "2.14", (*OLD_NUMPY, "laion-clap", "torchvision"), ("tests/encoders/test_laionclap.py",)),
    Combination("3.12", "2.11", ("numpy==2.*",)),
    Combination("3.13", "2.15", ("numpy==2.*",)),
)


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def expect(fact: bool, otherwise: str) -> None:
    if not fact:
        raise Failed(otherwise)


class Builds:
    """The steps: each returns the file it made, if any, the seconds that took, and what was seen.

    ``torch`` is what the kernels are built against; ``other``, the Python and torch of the step ``elsewhere``.
    """

    def __init__(
        self,
        root: Path,
        torch: str,
        other: tuple[str, str],
        pythons: Sequence[Path],
        wheel: Path | None = None,
        tests: Sequence[str] = TESTS,
    ) -> None:
        self.root, self.torch, self.other, self.pythons, self.tests = root, torch, other, pythons, tests
        self.given_wheel = wheel

    @cached_property
    def environment(self) -> Environment:
        """Where everything is built."""
        try:
            return make_environment(Path(sys.executable), self.torch, self.root)
        except Unavailable as lack:
            raise Failed(f"nothing can be built: {lack}") from None

    @contextmanager
    def other_environment(self, python: str, torch: str) -> Iterator[Environment]:
        """One beside it, deleted after use: several would fill a disk."""
        environment = make_environment(find_python(python, self.pythons), torch, self.root)
        try:
            yield environment
        finally:
            if (python, torch) != ("{}.{}".format(*sys.version_info), self.torch):
                shutil.rmtree(environment.folder)

    @cached_property
    def source(self) -> Path:
        return copy_source(self.root / "source")

    def source_for(self, name: str) -> Path:
        """A copy of the source in which nothing has been built."""
        folder = self.root / f"source-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.source, folder)
        return folder

    def wheel(self, name: str, *options: str, source: Path | None = None, env: dict[str, str]) -> tuple[Path, float]:
        """A wheel from a fresh copy of the source, or of ``source``, with all modules and data that git tracks."""
        wheel, seconds = timed_wheel(
            self.environment, source or self.source_for(name), self.root / f"wheel-{name}", *options, env=env
        )
        packaged = [*self.source.glob("diffgap/**/*"), *self.source.glob("kernels/*.py")]
        names = {file.relative_to(self.source).as_posix() for file in packaged if file.is_file()}
        names = {name if name.startswith("diffgap/") else f"diffgap/{name}" for name in names}
        missing = sorted(names - contents(wheel))
        expect(not missing, f"{wheel.name} lacks {', '.join(missing[:5])}")
        return wheel, seconds

    def install(self, wheel: Path, environment: Environment | None = None) -> Environment:
        """Install a wheel, with what it requires, in place of the one before."""
        environment = environment or self.environment
        environment.pip("install", "--force-reinstall", "--no-deps", wheel)
        torch = environment.versions("torch").rpartition(" ")[2]  # whatever a package asks for, this one stays
        environment.pip("install", "--no-compile", wheel, *TEST_PACKAGES, f"torch=={torch}")
        return environment

    def doctor(self, environment: Environment, *expected: str) -> None:
        """``diffgap doctor`` says what is expected, whatever the table's lines break it into."""
        said = environment.run("-m", "diffgap", "doctor", env={"COLUMNS": "400"})
        for words in expected:
            expect(words in " ".join(said.replace("│", " ").split()), f"diffgap doctor does not say {words!r}")

    @cached_property
    def cpu_wheel(self) -> tuple[Path, float]:
        if self.given_wheel is not None:
            return self.given_wheel, 0.0
        wheel, seconds = self.wheel("cpu", NO_ISOLATION, env=CPU_ALONE)
        expect(ABI3_TAG in wheel.name, f"{wheel.name} is not tagged {ABI3_TAG}")
        expect("diffgap/_C_cpu.abi3.so" in contents(wheel), f"{wheel.name} has no C++ kernels")
        return wheel, seconds

    @cached_property
    def cuda_wheel(self) -> tuple[Path, float]:
        try:
            wheel, seconds = self.wheel("cuda", NO_ISOLATION, env=CUDA_ALONE)
        except Failed as failure:
            if "but the CUDA kernels need" in str(failure):
                raise Unavailable(str(failure)) from None
            raise
        expect(ABI3_TAG in wheel.name, f"{wheel.name} is not tagged {ABI3_TAG}")
        return wheel, seconds

    def isolated(self) -> tuple[Path, float, str]:
        """``pip install .`` where neither a compiler nor torch can be found at build time: pure Python, which works."""
        # pip's build environment has no torch, whatever is installed; this PATH has no compiler.
        wheel, seconds = self.wheel("isolated", env={"PATH": str(self.environment.python.parent)})
        expect(wheel.name.endswith("-py3-none-any.whl"), f"{wheel.name} is not tagged as pure Python")
        expect(not any(name.endswith(".so") for name in contents(wheel)), f"{wheel.name} has a library")
        environment = self.install(wheel)
        needs = "_C_cpu is not built: the C++ kernels need torch at build time (install torch, then pip install"
        self.doctor(environment, needs, "C++ CPU kernels missing, see above")
        return wheel, seconds, environment.test(self.source, self.tests)

    def cpu(self) -> tuple[Path, float, str]:
        """``pip install --no-build-isolation .``: C++ kernels, which load and pass their tests."""
        wheel, seconds = self.cpu_wheel
        environment = self.install(wheel)
        self.doctor(environment, "C++ CPU kernels loaded")
        return wheel, seconds, environment.test(self.source, self.tests)

    def cuda(self) -> tuple[Path, float, str]:
        """With nvcc: CUDA kernels, which load and are registered; running them takes a GPU."""
        wheel, seconds = self.cuda_wheel
        environment = self.install(wheel)
        found = set(environment.run("-c", LIST_CUDA_OPS).split())
        expect(found >= CUDA_OPS, f"the CUDA library has no kernel for {', '.join(sorted(CUDA_OPS - found))}")
        return wheel, seconds, f"compiled and loaded, not run; kernels for {', '.join(sorted(CUDA_OPS))}"

    def sdist(self) -> tuple[Path, float, str]:
        """A source distribution with all that git tracks, from which the kernels build."""
        source = self.source_for("sdist")
        began = time.monotonic()
        self.environment.run("-c", "from setuptools import build_meta; build_meta.build_sdist('dist')", cwd=source)
        seconds = time.monotonic() - began
        (archive,) = (source / "dist").glob("diffgap-*.tar.gz")
        with tarfile.open(archive) as tar:
            packed = {name.partition("/")[2] for name in tar.getnames()}
        # Hidden files are of git and CI, not of the package.
        tracked = {file.relative_to(self.source).as_posix() for file in self.source.rglob("*") if file.is_file()}
        missing = sorted(name for name in tracked - packed if not name.startswith("."))
        expect(not missing, f"the sdist lacks {len(missing)} files: {', '.join(missing[:5])}")
        wheel, build_seconds = self.wheel("sdist", NO_ISOLATION, source=archive, env=CPU_ALONE)
        expect("diffgap/_C_cpu.abi3.so" in contents(wheel), "what is built from the sdist has no C++ kernels")
        self.doctor(self.install(wheel), "C++ CPU kernels loaded")
        return archive, seconds, f"{len(packed)} files; its C++ kernels build in {build_seconds:.0f} s and load"

    def audit(self) -> tuple[None, float, str]:
        """The libraries use nothing but the stable ABIs of torch and Python, by the checkers of both."""
        wheels = [self.cpu_wheel[0]]
        if self.given_wheel is None:
            with suppress(Unavailable):
                wheels.append(self.cuda_wheel[0])
        began = time.monotonic()
        environment = Environment(self.root / "audit", self.root / "audit.log")
        run([sys.executable, "-m", "venv", environment.folder], cwd=self.root, log=environment.log)
        environment.pip("install", "torch-abi-audit>=0.3", "abi3audit>=0.0.26")
        oldest = []
        for wheel in wheels:
            environment.run("-m", "abi3audit", "--strict", "--summary", wheel)
            unpacked = self.root / f"unpacked-{wheel.parent.name}"
            with zipfile.ZipFile(wheel) as archive:
                libraries = [archive.extract(name, unpacked) for name in archive.namelist() if name.endswith(".so")]
            for library in libraries:
                audit = str(environment.folder / "bin" / "torch-abi-audit")
                command = [audit, "--json", "--check", "both", library]
                report = json.loads(run(command, cwd=self.root, log=environment.log))
                (torch,) = (found["torch"] for found in report["bundled_libs"] + report["extensions"])
                name = Path(library).name
                expect(torch["stable"] and not torch["unstable_symbols"], f"{name} uses torch's unstable ABI")
                expect(torch["min_torch_version"] == "2.10.0", f"{name} needs torch {torch['min_torch_version']}")
                oldest.append(f"{name} needs torch >= {torch['min_torch_version']}, Python >= 3.10")
        return None, time.monotonic() - began, "; ".join(oldest)

    def elsewhere(self) -> tuple[Path, float, str]:
        """The wheel that was built against one torch and Python, installed and tested under others."""
        wheel = self.cpu_wheel[0]
        began = time.monotonic()
        with self.other_environment(*self.other) as environment:
            self.doctor(self.install(wheel, environment), "C++ CPU kernels loaded")
            counts = environment.test(self.source, self.tests)
            return wheel, time.monotonic() - began, f"{environment.versions('torch', 'numpy')}: {counts}"

    def beside(self, combination: Combination) -> tuple[None, float, str]:
        """The wheel, or the one given, beside one combination of versions."""
        wheel = self.cpu_wheel[0]
        began = time.monotonic()
        with self.other_environment(combination.python, combination.torch) as environment:
            environment.pip("install", "--no-compile", *combination.packages, f"torch=={combination.torch}.*")
            self.doctor(self.install(wheel, environment), "C++ CPU kernels loaded")
            counts = environment.test(self.source, [*self.tests, *combination.tests])
            return None, time.monotonic() - began, f"{environment.versions('torch', 'numpy')}: {counts}"


STEPS = ("isolated", "cpu", "cuda", "sdist", "audit", "elsewhere")


def attempt(what: str, step: Callable[[], tuple[Path | None, float, str]]) -> Row:
    """A row of the table, whatever happens; a failure is also said at once."""
    began = time.monotonic()
    try:
        file, seconds, note = step()
        row = Row(what, "ok", seconds, file.stat().st_size if file else None, note)
    except Unavailable as lack:
        row = Row(what, "not here", time.monotonic() - began, None, str(lack))
    except Failed as failure:
        row = Row(what, "failed", time.monotonic() - began, None, str(failure))
    print(f"release-check: {row.what}: {row.state}: {row.note}", file=sys.stderr, flush=True)
    return row


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| what | result | seconds | size | seen |", "|---|---|---|---|---|"]
    for row in rows:
        size = "" if row.size_bytes is None else f"{row.size_bytes / 1e6:.1f} MB"
        lines.append(f"| {row.what} | {row.state} | {row.seconds:.0f} | {size} | {row.note} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Build diffgap in every way users do, in clean environments.")
    add = result.add_argument
    add("what", choices=("builds", "compat"), nargs="?", default="builds", help="what to check (default: %(default)s)")
    add("--only", nargs="+", metavar="WORD", help=f"steps of {', '.join(STEPS)}, or words of a combination's title")
    add("--torch", default="2.14", metavar="X.Y", help="torch to build the kernels against (default: %(default)s)")
    add("--elsewhere", nargs=2, default=("3.12", "2.10"), metavar=("PYTHON", "TORCH"), help="where they run as well")
    add("--pythons", nargs="+", type=Path, default=[], metavar="PATH", help="interpreters beside those on the PATH")
    add("--wheel", type=Path, help="the wheel with C++ kernels to install beside other versions (default: build one)")
    add("--tests", nargs="+", default=TESTS, metavar="FILE", help="tests to run (default: %(default)s)")
    add("--folder", type=Path, help="where environments are made and kept (default: a temporary folder)")
    add("--json", type=Path, help="also write the rows to this file")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    wheel = options.wheel and options.wheel.resolve()
    pythons = [python.absolute() for python in options.pythons]  # resolved, a link of an environment would leave it
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        folder: AbstractContextManager[str] = nullcontext(str(options.folder))
    else:
        folder = tempfile.TemporaryDirectory(prefix="diffgap-release-")
    with folder as path:
        builds = Builds(Path(path).resolve(), options.torch, options.elsewhere, pythons, wheel, options.tests)
        if options.what == "builds":
            steps = [step for step in STEPS if not options.only or step in options.only]
            rows = [attempt(step, getattr(builds, step)) for step in steps]
        else:
            chosen = [c for c in COMBINATIONS if not options.only or all(w in c.title for w in options.only)]
            rows = [attempt(c.title, partial(builds.beside, c)) for c in chosen]
        if not rows:
            sys.exit(f"release-check: --only {' '.join(options.only)} chooses nothing; see --help")
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "built against": f"torch {options.torch}",
        "rows": [asdict(row) for row in rows],
    }
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if any(row.state == "failed" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
