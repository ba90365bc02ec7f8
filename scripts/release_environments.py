"""Clean environments for ``release_check.py``: one virtual environment for each pair of Python and torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: What the tests chosen here import beside diffgap's own requirements.
TEST_PACKAGES = ("pytest>=8", "hypothesis>=6.100", "diffusers>=0.33", "expecttest>=0.2")

#: What shows that an installation works: imports, the kernels' loading, ops by all routes and compiled, model, store.
TESTS = (
    "tests/test_import.py",
    "tests/ops/test_random.py",
    "tests/ops/test_silu_mul.py",
    "tests/models/test_bridge.py",
    "tests/data/test_store.py",
)


class Failed(Exception):
    """What went wrong, in one line."""


class Unavailable(Exception):
    """What this machine lacks, in one line."""


def _reason(output: str) -> str:
    """The line of a failed command's output that says most: diffgap's own, pip's or an assertion's, or the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("diffgap: ")]
    others = [line for line in lines if line.startswith(("ERROR: ", "E  "))]
    return (own or others or lines or ["no output"])[-1]


def run(command: Sequence[str | Path], *, cwd: Path, log: Path, env: Mapping[str, str] | None = None) -> str:
    """Standard output and error of a command, which are also added to ``log``.

    Raises:
        Failed: It ended with another status than 0.
    """
    # Neither the caller's environment nor its checkout may lend what is missing here.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**own, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with log.open("a") as file:
        file.write(f"$ {' '.join(map(str, command))}\n{done.stdout}\n")
    if done.returncode != 0:
        raise Failed(f"{_reason(done.stdout)} ({log})")
    return done.stdout


@dataclass(frozen=True)
class Environment:
    """A virtual environment with a torch in it."""

    folder: Path
    log: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def run(self, *arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        return run([self.python, *arguments], cwd=cwd or self.folder, log=self.log, env=env)

    def pip(self, *arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        return self.run("-m", "pip", *arguments, "--disable-pip-version-check", cwd=cwd, env=env)

    def versions(self, *distributions: str) -> str:
        """``"Python 3.11.7, torch 2.14.1 ..."``, as installed."""
        code = "import platform, sys, importlib.metadata as m; print(platform.python_version()); "
        found = self.run("-c", code + "print(*map(m.version, sys.argv[1:]), sep='\\n')", *distributions).split()
        return ", ".join(" ".join(pair) for pair in zip(("Python", *distributions), found, strict=True))

    def test(self, source: Path, tests: Sequence[str] = TESTS) -> str:
        """Run tests of ``source`` on the diffgap that is installed; the counts, as pytest says them.

        Raises:
            Failed: A test failed, or none ran.
        """
        folder = self.folder / "tests-alone"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source / "tests", folder / "tests")
        shutil.copy(source / "pyproject.toml", folder)
        where = self.run("-c", "import diffgap; print(diffgap.__file__)", cwd=folder).strip()
        if not Path(where).is_relative_to(self.folder / "lib"):
            raise Failed(f"the tests would run on {where} instead of the installed package")
        options = ["-q", "-p", "no:cacheprovider", "--basetemp", str(folder / "tmp")]
        output = self.run("-m", "pytest", *options, *tests, cwd=folder)
        counts = re.search(r"^(\d+ passed.*?) in [\d.]+s", output, re.MULTILINE)
        if counts is None:
            raise Failed(f"no test ran ({self.log})")
        return counts[1]


def make_environment(python: Path, torch: str, root: Path) -> Environment:
    """The environment of a Python and a torch (``"2.14"``) below ``root``, as it is if an earlier call made it.

    Raises:
        Unavailable: pip finds no such torch.
    """
    version = run([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], cwd=root, log=root / "log.txt")
    name = f"python{version.strip()}-torch{torch}"
    environment = Environment(root / name, root / f"{name}.log")
    ready = environment.folder / "ready"
    if not ready.exists():
        shutil.rmtree(environment.folder, ignore_errors=True)
        run([python, "-m", "venv", environment.folder], cwd=root, log=environment.log)
        environment.pip("install", "pip<27", "setuptools>=77", "wheel", "ninja")
        # Byte code of all of torch takes a minute to compile; what is imported compiles itself.
        try:
            environment.pip("install", "--no-compile", f"torch=={torch}.*")
        except Failed as failure:
            shutil.rmtree(environment.folder)
            raise Unavailable(f"pip finds no torch {torch} for this Python: {failure}") from None
        ready.touch()
    return environment


def find_python(minor: str, extra: Sequence[Path]) -> Path:
    """The interpreter of a version (``"3.12"``) among ``extra``, those on the PATH and pyenv's.

    Raises:
        Unavailable: There is none.
    """
    on_path = shutil.which(f"python{minor}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for candidate in [*extra, *([Path(on_path)] if on_path else []), *sorted(pyenv.glob(f"{minor}.*/bin/python"))]:
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == minor:
            return candidate
    raise Unavailable(f"no Python {minor} is here (name one with --pythons)")


def copy_source(folder: Path) -> Path:
    """A copy of this checkout without anything that git ignores, so that no earlier build is taken for a new one."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    shutil.rmtree(folder, ignore_errors=True)
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def timed_wheel(
    environment: Environment, source: Path, folder: Path, *options: str, env: Mapping[str, str]
) -> tuple[Path, float]:
    """The one wheel that pip makes of ``source`` in ``folder``, and the seconds it took."""
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    environment.pip("wheel", "--no-deps", "--wheel-dir", folder, *options, source, cwd=folder.parent, env=env)
    (wheel,) = folder.glob("*.whl")
    return wheel, time.monotonic() - began
