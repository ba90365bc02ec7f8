"""``make release-check`` finds what it looks for; the builds themselves take it minutes."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"

pytestmark = pytest.mark.skipif(not SCRIPTS.is_dir(), reason="runs from the source folder alone")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import release_check

    yield release_check
    for name in ("release_check", "release_environments"):
        sys.modules.pop(name)


@pytest.fixture
def environments(script: Any) -> Any:
    return sys.modules["release_environments"]


def failing(script: Any, error: str, said: str) -> Any:
    def step() -> None:
        raise getattr(script, error)(said)

    return step


def test_a_step_becomes_a_row_whatever_happens(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1_250_000))
    rows = [
        script.attempt("good", lambda: (file, 2.6, "3 passed")),
        script.attempt("bad", failing(script, "Failed", "no kernels")),
        script.attempt("lacking", failing(script, "Unavailable", "no nvcc")),
    ]
    assert [row.state for row in rows] == ["ok", "failed", "not here"]
    assert script.table(rows).splitlines()[2:] == [
        "| good | ok | 3 | 1.2 MB | 3 passed |",
        "| bad | failed | 0 |  | no kernels |",
        "| lacking | not here | 0 |  | no nvcc |",
    ]
    assert "release-check: bad: failed: no kernels" in capsys.readouterr().err


def test_exit_status_tells_a_failure_from_a_lack(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    arguments = ["builds", "--only", "cuda", "--folder", str(tmp_path), "--json", str(report)]
    monkeypatch.setattr(script.Builds, "cuda", lambda self: failing(script, "Unavailable", "no nvcc")())
    script.main(arguments)
    assert '"state": "not here"' in report.read_text()
    monkeypatch.setattr(script.Builds, "cuda", lambda self: failing(script, "Failed", "does not compile")())
    with pytest.raises(SystemExit, match="1"):
        script.main(arguments)
    assert "| cuda | failed | 0 |  | does not compile |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--only nonsense chooses nothing"):
        script.main(["compat", "--only", "nonsense", "--folder", str(tmp_path)])


def test_a_wheel_without_a_file_that_git_tracks_is_refused(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("diffgap/py.typed", "diffgap/search/page.html", "kernels/_tiles.py", "csrc/cpu/a.cpp"):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).touch()
    packed = ["diffgap/py.typed", "diffgap/kernels/_tiles.py"]
    builds = script.Builds(tmp_path, "2.14", ("3.12", "2.10"), [])
    monkeypatch.setitem(vars(builds), "source", tmp_path / "source")
    monkeypatch.setitem(vars(builds), "environment", None)

    def write(*_: Any, **__: Any) -> tuple[Path, float]:
        with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
            for name in packed:
                archive.writestr(name, "")
        return tmp_path / "a.whl", 1.0

    monkeypatch.setattr(script, "timed_wheel", write)
    with pytest.raises(script.Failed, match=r"a\.whl lacks diffgap/search/page\.html$"):
        builds.wheel("cpu", env={})
    packed.append("diffgap/search/page.html")
    assert builds.wheel("cpu", env={}) == (tmp_path / "a.whl", 1.0)


def test_a_failed_command_is_said_in_its_own_words(environments: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "print('diffgap: the kernels need X'); print('ERROR: pip failed'); print('hint: none'); raise SystemExit(3)"
    with pytest.raises(environments.Failed, match=r"^diffgap: the kernels need X "):
        environments.run([sys.executable, "-c", code], cwd=tmp_path, log=log)
    assert "hint: none" in log.read_text()
    code = "import os; print(sorted(name for name in os.environ if name.startswith('PYTHON')))"
    assert environments.run([sys.executable, "-c", code], cwd=tmp_path, log=log, env={"A": "b"}) == "[]\n"


def test_a_python_that_is_not_here(environments: Any, tmp_path: Path) -> None:
    own = Path(sys.executable)
    minor = "{}.{}".format(*sys.version_info[:2])
    assert environments.find_python(minor, [own]) == own
    with pytest.raises(environments.Unavailable, match=r"no Python 2\.0 is here \(name one with --pythons\)"):
        environments.find_python("2.0", [own])


def test_the_copy_has_nothing_that_git_ignores(
    environments: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    (root / "csrc").mkdir(parents=True)
    for name in ("csrc/a.cpp", "new.py", "_C_cpu.abi3.so", "deleted.py"):
        (root / name).touch()
    (root / ".gitignore").write_text("*.so\n")
    for command in (["init", "-q"], ["add", "csrc", "deleted.py"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    (root / "deleted.py").unlink()
    monkeypatch.setattr(environments, "ROOT", root)
    copied = environments.copy_source(tmp_path / "copy")
    files = {file.relative_to(copied).as_posix() for file in copied.rglob("*") if file.is_file()}
    assert files == {".gitignore", "csrc/a.cpp", "new.py"}
